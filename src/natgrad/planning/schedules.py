"""The schedules that a structure may run under, from the freshest on, and the first of them within given limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from natgrad.errors import ArgumentError
from natgrad.metric import Kronecker, Packed, Sampling, Structure, SubBatch, Unpacked, WidthLimits
from natgrad.planning.choice import CLIP, FIT, RADIUS, SPREAD, TOGETHER, Choice
from natgrad.planning.limits import Limits, value
from natgrad.planning.methods import Method
from natgrad.planning.shapes import BlockShapes, block_shapes, state_bytes
from natgrad.planning.timing import Timing

_INTERVALS = (1, 2, 5, 10, 20, 50, 100)
_FRACTIONS = (1.0, 1 / 4, 1 / 16)
_FEWEST = 16  # examples of a part that is run by itself
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
    for kept in _kept(method, timing, limits):
        try:
            shapes = block_shapes(meta, kept.structure, uncovered)
        except ArgumentError as error:
            return Found(Choice(method.name, method.preset, problem=str(error).partition(". ")[0] + "."), {})
        for search in searches(method):
            base = Choice(method.name, method.preset, search, state=state_bytes(meta, method, search, shapes))
            every += _scheduled(base, kept, timing, shapes)
        if limits.excess(min(every, key=limits.excess)) <= 1:
            break
    choice = min(every, key=limits.excess)  # of equals the first, which is the freshest
    least = {name: min(value(c, name) for c in every) for name in limits.names}
    return Found(replace(choice, problem=limits.problem(choice)), least)


def _kept(method: Method, timing: Timing, limits: Limits) -> Iterator[Method]:
    """The method as it is; under limits, too, with factors and inverses packed, and with ever smaller blocks."""
    yield method
    if isinstance(method.structure, Kronecker) and limits.names:
        packed = [Packed()] if limits.memory is not None else []
        for block in (0, *_blocks(timing)):
            widths = WidthLimits(full=block, block=block) if block else method.structure.widths
            for storage in [*([Unpacked()] if block else []), *packed]:
                yield replace(method, structure=replace(method.structure, widths=widths, storage=storage))


def _blocks(timing: Timing) -> list[int]:
    """Widths of blocks that some square factor would be divided into, the widest first."""
    usual = WidthLimits()
    sides = {n for layer in timing.passes.layers for n in (layer.geometry.inputs, layer.geometry.outputs)}
    square = [min(n, usual.full) if usual.treatment(n) == "full" else usual.block for n in sides]
    return [b for b in _BLOCKS if any(n > b for n in square)]


def _scheduled(base: Choice, method: Method, timing: Timing, shapes: Sequence[BlockShapes]) -> Iterator[Choice]:
    """``base`` with every schedule, from the freshest on: each doubling of an interval counts as much, half as much
    that of a fraction, and a quarter of it whole examples instead of positions."""
    least = method.intervals[1]

    def staleness(part: Sampling, s: int, i: int) -> float:
        return math.log2(s) + math.log2(i / least) - 0.5 * math.log2(part.fraction) + 0.25 * isinstance(part, SubBatch)

    rates = {}
    for part in _parts(method, timing):
        structure = method.structure
        used = (
            replace(method, structure=replace(structure, sampling=part)) if isinstance(structure, Kronecker) else method
        )
        rates[part] = timing.rates(used, shapes, base.search), replace(base, **described(used.structure))
    grid = sorted(((staleness(part, s, i), s, i, part) for part in rates for s, i in _intervals(method)),
                  key=lambda g: g[:2])  # fmt: skip
    for _, s, i, part in grid:
        found, like = rates[part]
        yield found.at(like, s, i, TOGETHER)
        if i > 1 and least > 1:
            yield found.at(like, s, i, SPREAD)


def _parts(method: Method, timing: Timing) -> list[Sampling]:
    if not isinstance(method.structure, Kronecker):
        return [Sampling()]
    examples = timing.passes.layers[0].examples
    # Whole examples: of few there would be too few, and some models cannot run them by themselves.
    whole = [f for f in _FRACTIONS if f < 1 and f * examples >= _FEWEST and not timing.coupled]
    return [*map(Sampling, _FRACTIONS), *map(SubBatch, whole)]


def described(structure: Structure) -> dict[str, Any]:
    """The fields of a :class:`Choice` that tell of a structure."""
    if not isinstance(structure, Kronecker):
        return {}
    widths, sampling, storage = structure.widths, structure.sampling, structure.storage
    block = 0 if widths == WidthLimits() else widths.block
    return {"fraction": sampling.fraction, "sampling": type(sampling).__name__,
            "packed": isinstance(storage, Packed), "block": block}  # fmt: skip


def searches(method: Method) -> tuple[str, ...]:
    """The searches that a preset is planned with, its own first."""
    if method.name == "matrix-free":
        return (RADIUS,)
    return (FIT, CLIP) if method.fitted else (CLIP,)


def _intervals(method: Method) -> Iterator[tuple[int, int]]:
    """Intervals of statistics and inverses: the latter from the preset's own on."""
    if not method.scheduled:
        yield 1, 1
        return
    least = method.intervals[1]
    for s in _INTERVALS:
        for i in _INTERVALS:
            if i >= least and (i == s or (i % s == 0 and least > 1)):
                yield s, i
