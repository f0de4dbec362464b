"""The schedules that a structure may run under, from the freshest on, and the first of them within given limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from natgrad.errors import ArgumentError
from natgrad.metric import Kronecker, Packed, WidthLimits
from natgrad.planning.choice import CLIP, FIT, RADIUS, SPREAD, TOGETHER, Choice
from natgrad.planning.limits import Limits, value
from natgrad.planning.methods import Method
from natgrad.planning.shapes import block_shapes, state_bytes
from natgrad.planning.timing import Timing

_INTERVALS = (1, 2, 5, 10, 20, 50, 100)
_FRACTIONS = (1.0, 1 / 4, 1 / 16)
_BLOCKS = (4096, 1024, 256)


@dataclass(frozen=True)
class Found:
    """What was found of one structure.

    Args:
        choice: the freshest schedule within the limits; where there is none, the one that comes nearest.
        least: the least that any schedule takes of what each limit is about.
    """

    choice: Choice
    least: Mapping[str, float]


def freshest(meta: nn.Module, method: Method, timing: Timing, limits: Limits, uncovered: Mapping[str, str]) -> Found:
    """The schedule of one structure on ``meta``."""
    every: list[Choice] = []
    for block, packed in _kept(method, timing, limits):
        varied = _varied(method, block, packed)
        try:
            shapes = block_shapes(meta, varied.structure, uncovered)
        except ArgumentError as error:
            return Found(Choice(method.name, method.preset, problem=str(error).partition(". ")[0] + "."), {})
        for search in searches(method):
            state = state_bytes(meta, method, search, shapes)
            base = Choice(method.name, method.preset, search, block=block, packed=packed, state=state)
            rates = {f: timing.rates(varied, shapes, search, f) for f in _fractions(method)}
            every += [
                rates[f].at(replace(base, fraction=f), statistics, inverse, refresh)
                for statistics, inverse, f, refresh in _grid(method)
            ]
        if limits.excess(min(every, key=limits.excess)) <= 1:
            break
    choice = min(every, key=limits.excess)  # of equals the first, which is the freshest
    least = {name: min(value(c, name) for c in every) for name in limits.names}
    return Found(replace(choice, problem=limits.problem(choice)), least)


def _kept(method: Method, timing: Timing, limits: Limits) -> Iterator[tuple[int, bool]]:
    """Width of blocks and whether matrices are packed, in the order of what it costs: triangles lose nothing."""
    packed = limits.memory is not None
    yield 0, False
    if isinstance(method.structure, Kronecker) and limits.names:
        yield from ((0, True),) if packed else ()
        yield from ((block, packed) for block in _blocks(timing))


def _blocks(timing: Timing) -> list[int]:
    """Widths of blocks that some square factor would be divided into, the widest first."""
    usual = WidthLimits()
    sides = {n for layer in timing.passes.layers for n in (layer.geometry.inputs, layer.geometry.outputs)}
    square = [min(n, usual.full) if usual.treatment(n) == "full" else usual.block for n in sides]
    return [b for b in _BLOCKS if any(n > b for n in square)]


def _varied(method: Method, block: int, packed: bool) -> Method:
    """The method with factors of at most this width (0: of any), of each of which one triangle is kept."""
    structure = method.structure
    if isinstance(structure, Kronecker):
        structure = replace(structure, storage=Packed()) if packed else structure
        structure = replace(structure, widths=WidthLimits(full=block, block=block)) if block else structure
    return replace(method, structure=structure)


def searches(method: Method) -> tuple[str, ...]:
    """The searches that a preset is planned with, its own first."""
    if method.name == "matrix-free":
        return (RADIUS,)
    return (FIT, CLIP) if method.fitted else (CLIP,)


def _fractions(method: Method) -> tuple[float, ...]:
    return _FRACTIONS if isinstance(method.structure, Kronecker) else (1.0,)


def _grid(method: Method) -> Iterator[tuple[int, int, float, str]]:
    """Intervals, fractions and kinds of schedule, from the freshest on: each doubling of an interval counts as much,
    and inverses from the preset's own interval on."""
    if not method.scheduled:
        yield 1, 1, 1.0, TOGETHER
        return
    least = method.intervals[1]
    grid = [
        (s, i, f)
        for s in _INTERVALS
        for i in _INTERVALS
        for f in _fractions(method)
        if i >= least and (i == s or (i % s == 0 and least > 1))
    ]
    grid.sort(key=lambda g: (math.log2(g[0]) + math.log2(g[1] / least) - 0.5 * math.log2(g[2]), g[0]))
    for s, i, f in grid:
        yield s, i, f, TOGETHER
        if i > 1 and least > 1:
            yield s, i, f, SPREAD
