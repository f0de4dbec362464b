"""The schedules that a structure may run under, from the freshest on, and the first of them within given limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from natgrad.errors import ArgumentError
from natgrad.metric import Kronecker
from natgrad.planning.choice import CLIP, FIT, RADIUS, SPREAD, TOGETHER, Choice
from natgrad.planning.limits import Limits, value
from natgrad.planning.methods import Method
from natgrad.planning.shapes import block_shapes, state_bytes
from natgrad.planning.timing import Timing

_INTERVALS = (1, 2, 5, 10, 20, 50, 100)
_FRACTIONS = (1.0, 1 / 4, 1 / 16)


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
    try:
        shapes = block_shapes(meta, method.structure, uncovered)
    except ArgumentError as error:
        return Found(Choice(method.name, method.preset, problem=str(error).partition(". ")[0] + "."), {})
    every: list[Choice] = []
    for search in searches(method):
        base = Choice(method.name, method.preset, search, state=state_bytes(meta, method, search, shapes))
        rates = {f: timing.rates(method, shapes, search, f) for f in _fractions(method)}
        every += [
            rates[f].at(replace(base, fraction=f), statistics, inverse, refresh)
            for statistics, inverse, f, refresh in _grid(method)
        ]
    choice = min(every, key=limits.excess)  # of equals the first, which is the freshest
    least = {name: min(value(c, name) for c in every) for name in limits.names}
    return Found(replace(choice, problem=limits.problem(choice)), least)


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
