"""The shapes of what a structure keeps of each block, and of each layer's factors, found without any data.

A structure is asked for its statistics of a batch without examples on a copy of the model whose tensors have shapes and
no memory (the ``meta`` device). Layers that are taught to natgrad later are thereby measured as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from natgrad.errors import ArgumentError, UnsupportedError
from natgrad.metric import Dense, EigenKronecker, Factor, Kronecker, Moments, Structure, Unpacked, WidthLimits
from natgrad.metric.widths import REST, SIDES, Side
from natgrad.network import Block, Cell, EmptyTape, Partition, cells, trainable_parameters
from natgrad.planning.choice import FIT
from natgrad.planning.methods import Method

Shapes = Mapping[str, torch.Size]
Uncovered = Mapping[str, str] | None

_UNLIMITED = WidthLimits(full=2**40)


@dataclass(frozen=True)
class BlockShapes:
    """What is kept of one block between steps.

    Args:
        block: the block.
        averages: shape of each running average, by kind (``"input"``, ``"output"``, ``"eigenvalues"``, ``"diagonal"``,
            ``"matrix"``; blocks of wide sides have what is left over as ``"input_rest"`` and ``"output_rest"``).
        bases: shapes of the eigenbases.
        inverse: shapes of the tensors of the inverse that are not bases.
        dtype: of all of them as they are computed.
        storage: how factors and inverses are kept.
    """

    block: Block
    averages: Shapes
    bases: tuple[torch.Size, ...]
    inverse: tuple[torch.Size, ...]
    dtype: torch.dtype
    storage: Unpacked = Unpacked()

    @property
    def table(self) -> bool:
        """Whether it is a table of embeddings, whose input factor is diagonal."""
        return "input" in self.averages and len(self.averages["input"]) == 1

    def diagonal(self, side: Side) -> bool:
        """Whether one Kronecker factor is diagonal."""
        return len(self.averages[side]) == (1 if self.table else 2)

    def squares(self, side: Side) -> tuple[tuple[int, int], ...]:
        """The square matrices of one Kronecker factor as numbers and widths, over all groups; none of a diagonal."""
        shapes = [self.averages[kind] for kind in (side, side + REST) if kind in self.averages]
        return () if self.diagonal(side) else tuple((shape[:-2].numel(), shape[-1]) for shape in shapes)

    def width(self, side: Side) -> int:
        """Width of one Kronecker factor, of one group."""
        shape, groups = self.averages[side], self.groups
        return sum(k * b for k, b in self.squares(side)) // groups if self.squares(side) else shape[-1]

    @property
    def groups(self) -> int:
        """Matrices that have factors of their own; 1 where factors are no stacks."""
        shape = self.averages["output"]
        return shape[0] if len(shape) == 3 and not self.table else 1

    @property
    def entries(self) -> int:
        """Numbers in the averages."""
        return sum(shape.numel() for shape in self.averages.values())

    @property
    def bytes(self) -> int:
        """Bytes of averages, of their weights (one number each), of bases and of the inverse."""
        kept = (*map(self.storage.shape, self.averages.values()), *self.bases)
        numbers = sum(shape.numel() for shape in kept) + len(self.averages)
        return numbers * self.dtype.itemsize + self.inverse_bytes

    @property
    def inverse_bytes(self) -> int:
        """Bytes of the inverse without its bases."""
        dtypes = (self.storage.inverse_dtype(shape, self.dtype) for shape in self.inverse)
        return sum(self.storage.shape(s).numel() * d.itemsize for s, d in zip(self.inverse, dtypes, strict=True))


@dataclass(frozen=True)
class Geometry:
    """A cell as matrices: ``groups`` of them, ``[outputs, inputs]`` each, homogeneous coordinate included.

    Args:
        cell: whose parameters it is about.
        inputs, outputs: sizes of the Kronecker factors; for a cell that is no matrix its size, and 1.
        groups: number of matrices; 0 for a cell that is none.
        embedding: whether the input factor is diagonal, as one-hot inputs have it.
    """

    cell: Cell
    inputs: int
    outputs: int
    groups: int
    embedding: bool = False


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers take no memory; the model itself where it has none either.

    Raises:
        ArgumentError: a parameter has no shape yet, there is none to train, or the model cannot be copied.
    """
    tensors = list(chain(model.parameters(), model.buffers()))
    if any(is_lazy(t) for t in tensors):
        raise ArgumentError("The model has lazy layers, whose shapes are not known yet. Run it once on a batch first.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError("The model has no trainable parameters, so there is nothing to optimize.")
    if all(t.is_meta for t in tensors):
        return model
    try:
        memo = {id(t): _shape_of(t) for t in tensors}
        return copy.deepcopy(model, memo)
    except Exception as error:  # a model may hold anything
        raise ArgumentError(
            f"The model {type(model).__name__} cannot be copied to look at its shapes ({type(error).__name__}: "
            f"{error}). Build it under torch.device('meta') and give that."
        ) from error


def _shape_of(t: Tensor) -> Tensor:
    empty = torch.empty_like(t, device="meta")
    return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty


def partition_of(model: nn.Module, structure: Structure, uncovered: Uncovered = None) -> Partition:
    """The structure's blocks, as far as types tell, and with ``uncovered`` parameters left to no rule.

    Raises:
        ArgumentError: a block is too large for the structure.
    """
    return Partition(structure.blocks(cells(model, uncovered)), tuple(trainable_parameters(model)))


def block_shapes(model: nn.Module, structure: Structure, uncovered: Uncovered = None) -> tuple[BlockShapes, ...]:
    """What ``structure`` keeps of each block of ``model``, which is on the meta device; empty where it keeps nothing.

    Raises:
        ArgumentError: a block is too large for the structure.
        UnsupportedError: the structure's state is not known here.
    """
    partition = partition_of(model, structure, uncovered)
    if not structure.averaged:
        return ()
    values = _moments(model, structure, partition)
    return tuple(_kept(block, values[block.name], structure) for block in partition.blocks)


def state_bytes(meta: nn.Module, method: Method, search: str, shapes: Sequence[BlockShapes]) -> int:
    """Bytes of the optimizer's state after a step: curvature, the step before or the momentum, and counters."""
    parameters = [p for p in meta.parameters() if p.requires_grad]
    kept = method.momentum or search == FIT or (method.fitted and method.scheduled)
    vectors = sum(p.numel() * p.element_size() for p in parameters) if kept else 0
    return sum(s.bytes for s in shapes) + vectors + 4 * len(parameters)


def geometries(model: nn.Module, uncovered: Uncovered = None) -> tuple[Geometry, ...]:
    """Every cell of ``model``, which is on the meta device, as matrices."""
    structure = Kronecker(widths=_UNLIMITED)
    partition = partition_of(model, structure, uncovered)
    values = _moments(model, structure, partition)
    found = []
    for block in partition.blocks:
        (cell,), kinds = block.cells, values[block.name]
        if "input" not in kinds:
            found.append(Geometry(cell, cell.size, 1, 0))
            continue
        inputs, outputs = kinds["input"].shape, kinds["output"].shape
        groups = outputs[0] if len(outputs) == 3 else 1
        found.append(Geometry(cell, inputs[-1], outputs[-1], groups, embedding=len(inputs) == 1))
    return tuple(found)


def _moments(model: nn.Module, structure: Structure, partition: Partition) -> dict[str, dict[str, Tensor]]:
    """The moments of a batch, by block and kind: shapes and dtypes without memory."""
    # The eigenvalues of EKFAC wait for a basis, which no tensor without memory has; its factors are K-FAC's.
    eigen = isinstance(structure, EigenKronecker)
    plain = Kronecker(structure.sharing, widths=structure.widths) if eigen else structure
    like = next(model.parameters())
    like = like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
    found = plain.statistics(EmptyTape(model), Factor(like.expand(1, 0, 1), False, like, None), partition)
    assert isinstance(found, Moments)
    values = {name: {kind: m.sum for kind, m in kinds.items()} for name, kinds in found.values.items()}
    # A batch without examples has no rows of what no layer serves; its rows are vectors of the block's length.
    kind, square = ("matrix", 2) if isinstance(structure, Dense) else ("diagonal", 1)
    return {b.name: values.get(b.name) or {kind: like.new_zeros((b.size,) * square)} for b in partition.blocks}


def _kept(block: Block, moments: dict[str, Tensor], structure: Structure) -> BlockShapes:
    averages, dtype = {kind: t.shape for kind, t in moments.items()}, next(iter(moments.values())).dtype
    if set(averages) in ({"diagonal"}, {"matrix"}):
        return BlockShapes(block, averages, (), tuple(averages.values()), dtype)
    if not set(SIDES) <= set(averages) <= {side + rest for side in SIDES for rest in ("", REST)}:
        raise UnsupportedError(
            f"{structure.name} keeps {sorted(averages)} of block {block.name!r}, which cannot be predicted."
        )
    assert isinstance(structure, Kronecker)
    kept = BlockShapes(block, averages, (), tuple(averages.values()), dtype, structure.storage)
    if not isinstance(structure, EigenKronecker):
        return kept
    values = torch.Size((block.size,))  # as many as there are parameters
    # A diagonal factor's basis is the identity.
    diagonal = [side for side in SIDES if kept.diagonal(side)]
    bases = tuple(shape for kind, shape in averages.items() if kind not in diagonal)
    # The inverse has the bases of the averages, and eigenvalues of its own.
    return replace(kept, averages={**averages, "eigenvalues": values}, bases=bases, inverse=(values,))
