"""Statistics from the loss's own backward pass: it brings the empirical estimate's columns to every layer, times c.

With ``s`` the columns and ``∂loss/∂f = c s``, one c for the whole batch, a layer's output gets the gradient ``c Jᵀ s``.
Whether it is so is seen from the gradient at the model's output, the first that arrives, and from the graph: nothing
else of the loss may reach a layer. Otherwise the statistics get a backward pass of their own, there and then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from natgrad.metric import Factor, Moments
from natgrad.network import (
    Cell,
    LayerUse,
    Partition,
    Rows,
    Tape,
    accumulation,
    differentiated,
    full_precision,
    only_through,
    reachable,
)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 2e-2  # of half precision

Reader = Callable[[str, Rows], Moments]


@dataclass(eq=False)
class Capture:
    """Waits for the gradients of one pass.

    Args:
        tape: the pass.
        cells: the partition's cells.
        source: node and output of the graph that the model's output is.
        factor: makes the columns of the estimate.
        reader: makes what reads the rows of a cell, from the factor without its columns.
        done: called with the statistics, as soon as all layers have their gradients.
        own: called where the backward pass does not bring them.
    """

    tape: Tape
    cells: tuple[Cell, ...]
    source: tuple[Any, int]
    factor: Callable[[], Factor]
    reader: Callable[[Factor], Reader | None]
    done: Callable[[Moments], None]
    own: Callable[[], None]
    _inside: frozenset[Any] = frozenset()
    _waiting: dict[str, set[int]] = field(default_factory=dict)
    _found: dict[str, list[Tensor | None]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _open: bool = False

    def __post_init__(self) -> None:
        self._inside = reachable([self.source[0]])
        me: weakref.ref[Capture] = weakref.ref(self)
        for layer in dict.fromkeys(site.module for cell in self.cells for site in cell.sites):
            uses = self.tape.uses.get(layer, [])
            self._found[layer] = [None] * len(uses)
            self._waiting[layer] = {i for i, use in enumerate(uses) if use.edge.node in self._inside}
            for i in self._waiting[layer]:
                hook = partial(_arrived, me, layer, i, uses[i].edge.output_nr)
                self._handles.append(uses[i].edge.node.register_prehook(hook))

    @staticmethod
    def possible(tape: Tape | None, partition: Partition) -> bool:
        """Whether every cell's rows come from layers that this pass called, and nothing but autograd's own is held."""
        return (
            tape is not None
            and not tape.packed
            and not tape.hidden
            and all(cell.sites and any(tape.uses.get(site.module) for site in cell.sites) for cell in partition.cells)
        )

    def begin(self, gradient: Tensor) -> None:
        """The gradient at the model's output is there, and those of the layers follow."""
        if self._open or not self._handles:
            return
        with torch.no_grad(), full_precision(gradient.device):
            factor = self.factor()
            scale = _scale(gradient, factor.columns[0]) if self._alone() else None
        if scale is None:
            self.close()
            self.own()
            return
        self._open, self._scale, self._count = True, scale, factor.columns.shape[1]
        self._total = Moments({}, factor.normaliser)
        read = self.reader(replace(factor, columns=factor.columns[:0]))
        assert read is not None
        self._read = read
        self._left = list(self.cells)
        self._take(None)

    def close(self) -> None:
        """Stop waiting."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], False

    def _alone(self) -> bool:
        """Whether the backward pass goes through all layers, and reaches them through the output alone."""
        nodes = {use.edge.node for layer, at in self._waiting.items() for i, use in self._uses(layer) if i in at}
        if not all(torch._C._will_engine_execute_node(node) for node in nodes):
            return False
        roots = differentiated()
        return roots is not None and only_through(self.source, self._inside, roots)

    def _uses(self, layer: str) -> list[tuple[int, LayerUse]]:
        return list(enumerate(self.tape.uses.get(layer, [])))

    def arrived(self, layer: str, i: int, gradient: Tensor | None) -> None:
        """Take the gradient of one use of a layer."""
        if self._open and i in self._waiting[layer]:
            self._waiting[layer].discard(i)
            if gradient is not None:
                with torch.no_grad(), full_precision(gradient.device):
                    self._found[layer][i] = (accumulation(gradient.detach()) / self._scale)[None]
            self._take(layer)

    def _take(self, layer: str | None) -> None:
        """Read the cells whose layers have all their gradients, those of ``layer`` if given, and let go of both."""
        ready = [
            cell
            for cell in self._left
            if (layer is None or any(site.module == layer for site in cell.sites))
            and not any(self._waiting[site.module] for site in cell.sites)
        ]
        for cell in ready:
            self._left.remove(cell)
            with torch.no_grad(), full_precision(self._scale.device):
                rows = self.tape.cell_rows(cell, self._found, self._count)
                if rows is not None:
                    self._total = self._total + self._read(cell.name, rows)
        if ready:
            needed = {site.module for cell in self._left for site in cell.sites}
            for name in {site.module for cell in ready for site in cell.sites} - needed:
                self._found[name], self.tape.uses[name] = [], []
        if not self._left:
            self.close()
            self.done(self._total)


def _arrived(me: weakref.ref[Capture], layer: str, i: int, output: int, gradients: tuple[Tensor | None, ...]) -> None:
    capture = me()
    if capture is not None:
        capture.arrived(layer, i, gradients[output])


def _scale(gradient: Tensor, columns: Tensor) -> Tensor | None:
    """c with ``gradient = c · columns``; None where there is none. Waits for the device."""
    if gradient.shape != columns.shape:
        return None
    tolerance = _TOLERANCE.get(gradient.dtype, _COARSE)
    gradient, columns = accumulation(gradient.detach()).to(columns.dtype), columns.detach()
    c = (gradient * columns).sum() / columns.square().sum()
    error = torch.linalg.vector_norm(gradient - c * columns)
    fits = (error <= tolerance * torch.linalg.vector_norm(gradient)) & torch.isfinite(c) & (c != 0)
    return c if bool(fits) else None
