"""What an optimizer would do with every layer of a model, why, and at what cost; from types, or from a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from natgrad.errors import ArgumentError
from natgrad.likelihood import Categorical
from natgrad.metric import Fisher, MonteCarlo, Structure
from natgrad.metric.widths import Side
from natgrad.network import Cell, as_arguments, output_tensor, recording
from natgrad.network.layers import rule_for
from natgrad.planning.costs import block_application, block_refresh, layer_statistics
from natgrad.planning.layers import Layer, Passes, assumed, seen
from natgrad.planning.methods import Method, method_of
from natgrad.planning.shapes import BlockShapes, Geometry, block_shapes, geometries, on_meta
from natgrad.planning.work import flops_of


@dataclass(frozen=True)
class LayerRow:
    """One layer, or one parameter that no layer's rule serves.

    Attributes:
        name: qualified name.
        type: class of the module that owns the parameters.
        parameters: how many numbers.
        treatment: the structure it gets.
        reason: why, where that is not what was asked for.
        covered: whether a layer rule serves it, or it is a vector of no layer, for which there is none but a diagonal.
        factors: sizes of what is kept: Kronecker factors, or the length of a diagonal.
        rows: examples times positions that the layer sees.
        state: bytes of averages, bases and inverses; those of a block of several layers stand with its first.
        statistics, refresh, application: operations of one update of statistics, one renewal of the inverse and one
            application to a gradient.
    """

    name: str
    type: str
    parameters: int
    treatment: str
    reason: str
    covered: bool
    factors: str
    rows: int
    state: int
    statistics: float
    refresh: float
    application: float


@dataclass(frozen=True)
class Inspection:
    """All layers under one structure.

    Attributes:
        model: class of the model.
        structure: the structure.
        batch, tokens: examples and positions that rows and operations are counted for.
        layers: one row per layer.
        state: bytes of curvature, of all layers together.
        frozen: parameters that are not trained, and are left alone.
        seen: whether rows were found by running the model; otherwise every layer counts batch times tokens.
    """

    model: str
    structure: str
    batch: int
    tokens: int
    layers: tuple[LayerRow, ...]
    state: int
    frozen: int
    seen: bool

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(row.parameters for row in self.layers)

    @property
    def uncovered(self) -> tuple[LayerRow, ...]:
        """What is not covered."""
        return tuple(row for row in self.layers if not row.covered)

    def as_json(self) -> dict[str, Any]:
        """Plain values, with totals."""
        return {**asdict(self), "parameters": self.parameters, "uncovered": [row.name for row in self.uncovered]}


def inspect(
    model: nn.Module,
    structure: Structure | str = "kfac",
    *,
    batch: int | None = None,
    tokens: int | None = None,
    inputs: Any = None,
) -> Inspection:
    """What an optimizer with ``structure`` would do with every layer of ``model``, and what that costs.

    Without ``inputs`` the table is what types tell, and works on a model under ``torch.device("meta")``. With them, a
    model that has memory is run once, and its layers are compared with autograd, as at the first step of an optimizer:
    that finds weights that are used past their module. Its buffers and the random streams stay as they are.

    Args:
        model: the network.
        structure: a structure, or its short name: kfac, ekfac, diagonal, block, gram, dense, matrix-free.
        batch, tokens: examples, and positions of each that share weights; 1 by default. Not with ``inputs``.
        inputs: a batch, as the model takes it (a tensor, a tuple, or a mapping of keyword arguments).

    Raises:
        ArgumentError: an argument that cannot be meant, or a block too large for a dense structure.
    """
    method = method_of(structure)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={type(model).__name__} was given; it must be a torch.nn.Module.")
    meta, passes = passes_of(model, batch, tokens, inputs)
    uncovered = examined(model, method.structure, inputs)
    rows, state = _rows(meta, method, passes, uncovered)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    examples = passes.layers[0].examples
    most = max(layer.positions for layer in passes.layers)
    return Inspection(type(model).__name__, method.name, examples, most, rows, state, frozen, passes.seen)


def passes_of(model: nn.Module, batch: int | None, tokens: int | None, inputs: Any = None) -> tuple[nn.Module, Passes]:
    """The model without memory, and its passes on ``inputs``, or on ``batch`` times ``tokens`` rows."""
    meta = on_meta(model)
    found = geometries(meta)
    if inputs is not None:
        if batch is not None or tokens is not None:
            raise ArgumentError("Give either inputs=, or batch= and tokens=, not both.")
        return meta, _seen(model, meta, found, inputs)
    for name, value in (("batch", batch), ("tokens", tokens)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ArgumentError(f"{name}={value!r} was given; it must be a whole number of at least 1.")
    return meta, assumed(found, batch or 1, tokens or 1)


def _seen(model: nn.Module, meta: nn.Module, found: tuple[Geometry, ...], inputs: Any) -> Passes:
    try:
        return seen(meta, found, inputs)
    except ArgumentError as error:
        if not _in_memory(model, inputs):
            raise
        # What a model does may depend on values: masks, tokens that are routed to experts. Then it runs as it is.
        try:
            with _undisturbed(model):
                return seen(model, found, inputs)
        except ArgumentError:
            raise error from error.__cause__


def _in_memory(model: nn.Module, inputs: Any) -> bool:
    leaves = [t for t in pytree.tree_leaves(as_arguments(inputs)) if isinstance(t, torch.Tensor)]
    return not any(t.is_meta for t in (*leaves, *model.parameters()))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leaves the model's buffers and the global random streams as they are, whatever it does inside."""
    device = next(model.parameters()).device
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])


def examined(model: nn.Module, structure: Structure, inputs: Any) -> dict[str, str]:
    """Parameters that a pass shows no layer rule may serve, with the reason; none where model or inputs have no memory.

    The model's buffers, its gradients and the global random streams are left as they are.
    """
    if inputs is None or not _in_memory(model, inputs):
        return {}
    device = next(model.parameters()).device
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), as_arguments(inputs))
    with _undisturbed(model):
        with recording(model) as tape:
            tape.output = output_tensor(model(*args, **kwargs))
        if tape.output is None:
            raise ArgumentError("The model's output is no tensor, and has no logits, so its layers cannot be checked.")
        generator = torch.Generator(device=device).manual_seed(0)
        return Fisher(MonteCarlo(), structure).examine(tape, Categorical(), generator)


def _rows(
    meta: nn.Module, method: Method, passes: Passes, uncovered: Mapping[str, str]
) -> tuple[tuple[LayerRow, ...], int]:
    structure = method.structure
    shapes = block_shapes(meta, structure, uncovered)
    of = {name: kept for kept in shapes for name in kept.block.parameters}
    layers = {name: layer for layer in passes.layers for name in layer.geometry.cell.parameters}
    rows = []
    for geometry in geometries(meta, uncovered):
        cell = geometry.cell
        layer = layers[cell.parameters[0]]
        layer = Layer(geometry, layer.rows, layer.examples, layer.first)
        treatment, reason = structure.reason(cell)
        parts = [of[name] for name in cell.parameters if name in of and of[name].block.parameters[0] == name]
        owner = cell.module if cell.module is not None else cell.parameters[0].rpartition(".")[0]
        rows.append(
            LayerRow(
                cell.name,
                type(meta.get_submodule(owner)).__name__,
                cell.size,
                treatment,
                reason,
                cell.module is not None or (not set(cell.parameters) & uncovered.keys() and _vector(meta, cell)),
                _factors(parts, [of[n] for n in cell.parameters if n in of]),
                layer.rows,
                sum(p.bytes for p in parts),
                flops_of(layer_statistics(layer, structure)),
                sum(flops_of(block_refresh(p, structure)) for p in parts),
                sum(flops_of(block_application(p)) for p in parts),
            )
        )
    return tuple(rows), sum(kept.bytes for kept in shapes)


def _vector(model: nn.Module, cell: Cell) -> bool:
    """Whether a parameter without a rule is a vector among vectors: there is no more for it than a diagonal."""
    owner = model.get_submodule(cell.parameters[0].rpartition(".")[0])
    if hasattr(owner, "parametrizations"):
        return False
    rule = rule_for(owner)
    known = () if rule is None else rule.parameters(owner)
    left = [p for n, p in owner.named_parameters(recurse=False) if n not in known]
    return all(sum(size > 1 for size in p.shape) <= 1 for p in left)


def _factors(parts: list[BlockShapes], blocks: list[BlockShapes]) -> str:
    """``257² × 10²``, with the number of matrices in front where there are several; ``diagonal 64``."""
    if not parts:
        return f"in {blocks[0].block.name}" if blocks else ""
    texts = []
    for kept in parts:
        averages = kept.averages
        if "matrix" in averages:
            texts.append(f"{averages['matrix'][-1]}²")
        elif "diagonal" in averages:
            texts.append(f"diagonal {averages['diagonal'].numel()}")
        else:
            groups = f"{kept.groups} of " if kept.groups > 1 else ""
            texts.append(f"{groups}{_side(kept, 'input')} × {_side(kept, 'output')}")
    return ", ".join(texts)


def _side(kept: BlockShapes, side: Side) -> str:
    """``257²``; ``diagonal 50257``; ``12·1024²``; ``(31·1008² + 752²)``."""
    if kept.diagonal(side):
        return f"diagonal {kept.width(side)}"
    if kept.squares(side) == ((kept.groups, kept.width(side)),):
        return f"{kept.width(side)}²"
    parts = [f"{count}·{n}²" if count > 1 else f"{n}²" for count, n in kept.squares(side)]
    return parts[0] if len(parts) == 1 else f"({' + '.join(parts)})"
