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
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from natgrad.errors import ShapeError
from natgrad.network.layers import Layout, rule_for, why_without_rule

BlockVector = dict[str, Tensor]
"""A vector in parameter space: one flat tensor ``[*batch, n_block]`` per block."""


@dataclass(frozen=True)
class Site:
    """A layer that uses parameters: its qualified name, and its own names of them."""

    module: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """Parameters that share one vector.

    Args:
        name: qualified name of the layer, or of the parameter where no rule covers it.
        parameters: qualified names, weight before bias.
        shapes: their shapes.
        sites: the layers whose rules give the rows, which add up; empty for an uncovered parameter.
        layout: how the parameters make the vector.
        reason: why no layer rule covers the parameter (empty where one does).
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sites: tuple[Site, ...] = ()
    layout: Layout = Layout()
    reason: str = ""

    @property
    def module(self) -> str | None:
        """Qualified name of the (first) layer whose rule gives the rows; None for an uncovered parameter."""
        return self.sites[0].module if self.sites else None

    @property
    def groups(self) -> int:
        """Number of independent weight matrices; 0 for cells that are plain concatenations."""
        return self.layout.groups

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    @property
    def outputs(self) -> int:
        """Rows of the matrix ``[outputs, size / outputs]`` that a cell with ``groups`` is, over all groups."""
        weight = self.shapes[0]
        if self.layout.table:
            return weight[:-1].numel()
        return weight[1] * self.groups if self.layout.transposed and len(weight) > 1 else weight[0]

    def single(self) -> tuple[Cell, ...]:
        """One cell per parameter, served as this one is."""
        return tuple(
            replace(
                self,
                name=name,
                parameters=(name,),
                shapes=(shape,),
                sites=tuple(Site(site.module, (site.names[i],)) for site in self.sites),
            )
            for i, (name, shape) in enumerate(zip(self.parameters, self.shapes, strict=True))
        )

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector ``[*batch, size]`` from tensors ``[*batch, *shape]``."""
        first = tensors[self.parameters[0]]
        batch = first.shape[: first.dim() - len(self.shapes[0])]
        parts = [self._canonical(tensors[n], s, batch) for n, s in zip(self.parameters, self.shapes, strict=True)]
        if self.groups and len(parts) == 2:
            return torch.cat([t.reshape(*batch, self.outputs, -1) for t in parts], -1).flatten(len(batch))
        if len(parts) == 1:
            return parts[0].reshape(*batch, -1)
        return torch.cat([t.reshape(*batch, -1) for t in parts], -1)

    def pack_into(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the vector that :meth:`pack` gives of tensors without batch axes to ``out`` ``[size]``, contiguous."""
        parts = [
            self._canonical(tensors[n], s, torch.Size()) for n, s in zip(self.parameters, self.shapes, strict=True)
        ]
        side_by_side = bool(self.groups) and len(parts) == 2
        rows = self.outputs if side_by_side else 1
        matrix, start = out.view(rows, -1), 0
        for part in parts:
            columns = part.reshape(rows, -1)
            matrix[:, start : start + columns.shape[1]].copy_(columns)
            start += columns.shape[1]

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`pack`."""
        batch = vector.shape[:-1]
        if self.groups and len(self.parameters) == 2:
            matrix = vector.reshape(*batch, self.outputs, -1)
            parts = [matrix[..., :-1], matrix[..., -1:]]
        else:
            parts = list(vector.split([shape.numel() for shape in self.shapes], -1))
        return {
            name: self._stored(part, shape, batch)
            for name, part, shape in zip(self.parameters, parts, self.shapes, strict=True)
        }

    def _canonical(self, t: Tensor, shape: torch.Size, batch: torch.Size) -> Tensor:
        """A weight stored as ``[in, out / groups, *kernel]`` as ``[groups, out / groups, in / groups, kernel]``."""
        if not self.layout.transposed or len(shape) < 2:
            return t
        return t.reshape(*batch, self.groups, shape[0] // self.groups, shape[1], shape[2:].numel()).transpose(-3, -2)

    def _stored(self, t: Tensor, shape: torch.Size, batch: torch.Size) -> Tensor:
        if self.layout.transposed and len(shape) > 1:
            t = t.reshape(*batch, self.groups, shape[1], shape[0] // self.groups, shape[2:].numel()).transpose(-3, -2)
        return t.reshape((*batch, *shape))


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
        if len(self.cells) > 1 and self._plain(tensors):
            first = tensors[self.parameters[0]]
            out = torch.empty(self.size, dtype=first.dtype, device=first.device)
            for cell, part in zip(self.cells, out.split([cell.size for cell in self.cells]), strict=True):
                cell.pack_into(tensors, part)
            return out
        parts = [cell.pack(tensors) for cell in self.cells]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _plain(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the tensors can be written side by side at once: alike, without batch axes, derivatives or
        transforms."""
        if torch.is_grad_enabled() or _functorch.peek_interpreter_stack() is not None:
            return False
        first = tensors[self.parameters[0]]
        return all(
            type(t) in (Tensor, nn.Parameter) and (t.shape, t.dtype, t.device) == (shape, first.dtype, first.device)
            for cell in self.cells
            for t, shape in ((tensors[n], s) for n, s in zip(cell.parameters, cell.shapes, strict=True))
        )

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
    trainable = trainable_parameters(model)
    canonical = {id(p): n for n, p in trainable.items() if names is None or n in names}
    parts = _parts(model, canonical)
    uncovered = _spread(parts, dict(uncovered or {}), _clashes(model, parts))
    uses: dict[str, list[Site]] = {}
    for part in parts:
        for own, name in zip(part.names, part.parameters, strict=True):
            uses.setdefault(name, []).append(Site(part.module, (own,)))
    found: list[Cell] = []
    taken: set[str] = set()
    for part in parts:
        module = model.get_submodule(part.module)
        left = [n for n in part.parameters if n not in uncovered and n not in taken]
        whole = len(left) == sum(any(p is q for q in trainable.values()) for p in module._parameters.values())
        for together in _by_users(left, uses):
            sites = tuple(
                Site(site.module, tuple(uses[n][i].names[0] for n in together))
                for i, site in enumerate(uses[together[0]])
            )
            # A layer of which only a part belongs here shares its name with the other part.
            name = (part.module or "model") if whole and len(together) == len(left) else together[0]
            shapes = tuple(trainable[n].shape for n in together)
            found.append(Cell(name, together, shapes, sites, _layout(model, sites)))
        taken.update(left)
    positions = {name: i for i, name in enumerate(canonical.values())}
    for name in positions:
        if name not in taken:
            owner, _, own = name.rpartition(".")
            reason = uncovered.get(name) or why_without_rule(model.get_submodule(owner), own)
            found.append(Cell(name, (name,), (trainable[name].shape,), reason=reason))
    return tuple(sorted(found, key=lambda cell: positions[cell.parameters[0]]))


@dataclass(frozen=True)
class _Part:
    """Parameters of one layer that its rule puts into one matrix: own and qualified names."""

    module: str
    names: tuple[str, ...]
    parameters: tuple[str, ...]


def _parts(model: nn.Module, canonical: Mapping[int, str]) -> list[_Part]:
    found: list[_Part] = []
    for module_name, module in model.named_modules():
        rule = rule_for(module)
        if rule is None:
            continue
        own = {n: canonical[id(p)] for n, p in module._parameters.items() if p is not None and id(p) in canonical}
        for part in rule.parts(module):
            local = tuple(n for n in part if n in own)
            if local:
                found.append(_Part(module_name, local, tuple(own[n] for n in local)))
    return found


def _clashes(model: nn.Module, parts: list[_Part]) -> dict[str, str]:
    """Parameters that layers of different layouts share, with the reason why no rule serves them."""
    users: dict[str, list[str]] = {}
    for part in parts:
        for name in part.parameters:
            users.setdefault(name, []).append(part.module)
    found: dict[str, str] = {}
    for name, modules in users.items():
        layouts = {replace(_own_layout(model, m), table=False) for m in modules}
        if len(layouts) > 1 or len(set(modules)) < len(modules):
            found[name] = "shared by " + " and ".join(sorted(n or "the root" for n in modules))
    return found


def _spread(parts: list[_Part], uncovered: dict[str, str], clashes: Mapping[str, str]) -> dict[str, str]:
    """What is not covered takes the other parameters of its layer's matrix with it."""
    uncovered = {**clashes, **uncovered}
    before = -1
    while len(uncovered) != before:
        before = len(uncovered)
        for part in parts:
            if any(n in uncovered for n in part.parameters):
                for n in part.parameters:
                    uncovered.setdefault(n, f"another parameter of {part.module} is not covered")
    return uncovered


def _by_users(names: list[str], uses: Mapping[str, list[Site]]) -> list[tuple[str, ...]]:
    """The names, those together that the same layers use."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        grouped.setdefault(tuple(site.module for site in uses[name]), []).append(name)
    return [tuple(group) for group in grouped.values()]


def _own_layout(model: nn.Module, module: str) -> Layout:
    layer = model.get_submodule(module)
    rule = rule_for(layer)
    return Layout() if rule is None else rule.layout(layer)


def _layout(model: nn.Module, sites: tuple[Site, ...]) -> Layout:
    layouts = [_own_layout(model, site.module) for site in sites]
    tables = [layout.table for layout in layouts]
    return replace(layouts[0], table=any(tables), mixed=any(tables) and not all(tables))
