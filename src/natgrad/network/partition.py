"""The only place that turns parameters into vectors.

A *cell* is the smallest unit: the trainable parameters of one layer (weight and bias as one matrix with a
homogeneous coordinate), or one parameter that no layer rule covers. A *block* is an ordered set of cells whose
curvature is treated jointly: one cell for K-FAC, all cells for the dense Fisher. Vectors are flat per block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from natgrad.errors import ShapeError
from natgrad.network.layers import ConvRule, EmbeddingRule, LayerRule, LinearRule, rule_for

BlockVector = dict[str, Tensor]
"""A vector in parameter space: one flat tensor ``[*batch, n_block]`` per block."""


@dataclass(frozen=True)
class Cell:
    """Parameters that share one vector.

    Args:
        name: qualified name of the layer, or of the parameter where no rule covers it.
        parameters: qualified names, weight before bias.
        shapes: their shapes.
        module: qualified name of the layer whose rule gives the rows; None for an uncovered parameter.
        trainable: the layer's own names of ``parameters``.
        groups: with a weight matrix, the number of independent matrices (grouped convolution); 0 for cells that
            are plain concatenations.
        reason: why no layer rule covers the parameter (empty where one does).
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    module: str | None = None
    trainable: tuple[str, ...] = ()
    groups: int = 0
    reason: str = ""

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def single(self) -> tuple[Cell, ...]:
        """One cell per parameter, served as this one is."""
        own = self.trainable or (None,) * len(self.parameters)
        return tuple(
            replace(self, name=name, parameters=(name,), shapes=(shape,), trainable=() if t is None else (t,))
            for name, shape, t in zip(self.parameters, self.shapes, own, strict=True)
        )

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector ``[*batch, size]`` from tensors ``[*batch, *shape]``."""
        parts = [tensors[name] for name in self.parameters]
        batch = parts[0].shape[: parts[0].dim() - len(self.shapes[0])]
        if self.groups and len(parts) == 2:
            weight, bias = (t.reshape(*batch, self.shapes[1].numel(), -1) for t in parts)
            return torch.cat([weight, bias], -1).flatten(len(batch))
        if len(parts) == 1:
            return parts[0].reshape(*batch, -1)
        return torch.cat([t.reshape(*batch, -1) for t in parts], -1)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`pack`."""
        batch = vector.shape[:-1]
        if self.groups and len(self.parameters) == 2:
            matrix = vector.reshape(*batch, self.shapes[1].numel(), -1)
            parts = [matrix[..., :-1], matrix[..., -1:]]
        else:
            parts = list(vector.split([shape.numel() for shape in self.shapes], -1))
        return {
            name: part.reshape((*batch, *shape))
            for name, part, shape in zip(self.parameters, parts, self.shapes, strict=True)
        }


@dataclass(frozen=True)
class Block:
    """Cells whose curvature is one matrix; its vector is the concatenation of the cells' vectors."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def size(self) -> int:
        return sum(cell.size for cell in self.cells)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for cell in self.cells for name in cell.parameters)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [cell.pack(tensors) for cell in self.cells]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for cell, part in zip(self.cells, vector.split([cell.size for cell in self.cells], -1), strict=True):
            out.update(cell.unpack(part))
        return out


@dataclass(frozen=True)
class Partition:
    """Blocks that together hold every trainable parameter exactly once.

    Args:
        blocks: the blocks, in order.
        order: qualified parameter names in ``model.parameters()`` order; flat vectors follow it.
    """

    blocks: tuple[Block, ...]
    order: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for block in self.blocks for cell in block.cells)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {n: s for cell in self.cells for n, s in zip(cell.parameters, cell.shapes, strict=True)}

    def pack(self, tensors: Mapping[str, Tensor]) -> BlockVector:
        """Block vectors from named tensors ``[*batch, *shape]``."""
        return {block.name: block.pack(tensors) for block in self.blocks}

    def pack_present(self, tensors: Mapping[str, Tensor]) -> BlockVector:
        """Vectors of the blocks that have any of ``tensors``; a missing one inside such a block counts as zero."""
        shapes = self.shapes
        out: BlockVector = {}
        for block in self.blocks:
            present = [n for n in block.parameters if n in tensors]
            if present:
                like = tensors[present[0]]
                whole = {n: tensors[n] if n in tensors else like.new_zeros(shapes[n]) for n in block.parameters}
                out[block.name] = block.pack(whole)
        return out

    def unpack(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors from block vectors."""
        out: dict[str, Tensor] = {}
        for block in self.blocks:
            if block.name in vectors:
                out.update(block.unpack(vectors[block.name]))
        return out

    def split(self, flat: Tensor) -> BlockVector:
        """Block vectors from a flat vector ``[*batch, P]`` in ``model.parameters()`` order."""
        if flat.shape[-1] != self.size:
            raise ShapeError(
                f"A vector of length {flat.shape[-1]} was given where the model has {self.size} trainable parameters. "
                "Flatten them in model.parameters() order, frozen ones left out."
            )
        shapes, batch = self.shapes, flat.shape[:-1]
        parts = flat.split([prod(shapes[name]) for name in self.order], -1)
        return self.pack({n: t.reshape((*batch, *shapes[n])) for n, t in zip(self.order, parts, strict=True)})

    def join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Flat vector ``[*batch, P]`` in ``model.parameters()`` order."""
        tensors = self.unpack(vectors)
        batch = next(iter(vectors.values())).shape[:-1]
        return torch.cat([tensors[name].reshape(*batch, -1) for name in self.order], -1)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by qualified name, each shared parameter once, in ``model.parameters()`` order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def cells(
    model: nn.Module, uncovered: Mapping[str, str] | None = None, names: Collection[str] | None = None
) -> tuple[Cell, ...]:
    """Divide the trainable parameters of ``model`` into cells.

    Args:
        model: the network.
        uncovered: parameters that must not be given to a layer rule, with the reason (what a check of a real forward
            pass found, see :func:`natgrad.network.coverage.uncovered_parameters`).
        names: the parameters to divide; None for all.

    Returns:
        One cell per supported layer with trainable parameters, then one per remaining parameter, in model order.
    """
    uncovered = dict(uncovered or {})
    trainable = trainable_parameters(model)
    canonical = {id(p): n for n, p in trainable.items() if names is None or n in names}
    owners: dict[str, set[str]] = {name: set() for name in canonical.values()}
    for module_name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None and id(p) in canonical:
                owners[canonical[id(p)]].add(module_name)
    found: list[Cell] = []
    taken: set[str] = set()
    for module_name, module in model.named_modules():
        rule = rule_for(module)
        if rule is None:
            continue
        own = {n: canonical[id(p)] for n, p in module._parameters.items() if p is not None and id(p) in canonical}
        local = tuple(n for n in rule.parameters(module) if n in own)
        qualified = tuple(own[n] for n in local)
        shared = [q for q in qualified if len(owners[q]) > 1]
        for q in shared:
            uncovered.setdefault(q, "shared by " + " and ".join(sorted(n or "the root" for n in owners[q])))
        if not local or any(q in uncovered for q in qualified):
            for q in qualified:
                uncovered.setdefault(q, f"another parameter of {module_name} is not covered")
            continue
        shapes = tuple(module._parameters[n].shape for n in local)  # type: ignore[union-attr]
        whole = sum(any(p is q for q in trainable.values()) for p in module._parameters.values()) == len(local)
        # A layer of which only a part belongs here shares its name with the other part.
        name = (module_name or "model") if whole else qualified[0]
        found.append(Cell(name, qualified, shapes, module_name, local, _groups(rule, module)))
        taken.update(qualified)
    positions = {name: i for i, name in enumerate(canonical.values())}
    parameters = dict(model.named_parameters())
    for name in positions:
        if name not in taken:
            reason = uncovered.get(name) or _why_uncovered(model, name)
            found.append(Cell(name, (name,), (parameters[name].shape,), reason=reason))
    return tuple(sorted(found, key=lambda cell: positions[cell.parameters[0]]))


def _groups(rule: LayerRule, module: nn.Module) -> int:
    if isinstance(rule, ConvRule):
        return module.groups  # type: ignore[return-value]
    return 1 if isinstance(rule, LinearRule | EmbeddingRule) else 0


def _why_uncovered(model: nn.Module, parameter: str) -> str:
    owner = parameter.rpartition(".")[0]
    kind = type(model.get_submodule(owner)).__name__
    return f"no layer rule for {kind}"
