"""Exact comparison of running times: everything interleaved in one process, medians over blocks, ratios with intervals.

An *action* is what is timed (one optimizer step of one kind, one gradient, one matrix product). Every block runs the
actions in a new random order, so that drift of the machine (other processes, clock, temperature) meets all alike. A
*row* of the table is a weighted sum of actions: an optimizer that renews its inverse every tenth step is nine parts of
the plain step and one part of the renewing step. Ratios are taken within a block before anything is averaged.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Clock = Literal["wall", "cpu"]
_RESAMPLES = 2000
_MAX_REPEATS = 500
_SLOW = 3.0
_LEAST_FOR_INTERVAL = 3


@dataclass(frozen=True)
class Action:
    """Something that is timed.

    Args:
        name: unique within a workload.
        run: does it once.
        flops: floating point operations that the method needs at the least, where they are known.
    """

    name: str
    run: Callable[[], object]
    flops: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table: a weighted sum of actions.

    Args:
        label: what it is.
        shares: how often each action happens per step.
        note: anything the reader must know.
    """

    label: str
    shares: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Args:
        blocks: how often every action is run at most.
        least: how often at the least, however slow it is.
        seconds: time for all blocks together; slow actions sit out some blocks to keep within it, and past twice this
            time (the machine has become slower) only what has not been timed at all still is.
        turn: a fast action is repeated until its turn lasts this long.
        clock: ``"wall"``, or ``"cpu"`` for processor time, which on one thread hardly suffers from other processes.
    """

    blocks: int = 15
    least: int = 3
    seconds: float = 60.0
    turn: float = 0.03
    clock: Clock = "wall"


@dataclass
class Samples:
    """Seconds per run of every action, by block (only blocks in which it ran).

    Args:
        wall, cpu: the two clocks.
        clock: the one that medians and ratios are taken of.
    """

    wall: dict[str, dict[int, float]] = field(default_factory=dict)
    cpu: dict[str, dict[int, float]] = field(default_factory=dict)
    clock: Clock = "wall"

    @property
    def seconds(self) -> dict[str, dict[int, float]]:
        return self.wall if self.clock == "wall" else self.cpu

    def add(self, action: str, block: int, wall: float, cpu: float) -> None:
        self.wall.setdefault(action, {})[block] = wall
        self.cpu.setdefault(action, {})[block] = cpu

    def median(self, action: str) -> float:
        return statistics.median(self.seconds[action].values())

    def processors(self) -> float:
        """How many processors were at work on average: fewer than threads where others wanted them too."""
        wall, cpu = (sum(t for found in clock.values() for t in found.values()) for clock in (self.wall, self.cpu))
        return cpu / wall

    def ratios(self, action: str, base: str) -> list[float]:
        """Seconds of ``action`` over those of ``base``, for each block in which both ran."""
        mine, other = self.seconds[action], self.seconds[base]
        shared = [mine[block] / other[block] for block in mine if block in other]
        return shared or [self.median(action) / self.median(base)]


@dataclass(frozen=True)
class Interval:
    """A median and the bootstrap interval that holds 95 % of its resampled values.

    ``low`` and ``high`` are None where fewer than three timings are behind any part of it: too few to show a spread.
    """

    value: float
    low: float | None
    high: float | None


def measure(
    actions: Sequence[Action],
    plan: Plan,
    bases: Sequence[str] = (),
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Samples:
    """Time all actions, interleaved in random order; what warms up is not counted.

    The actions named in ``bases`` run in every block, so that every other action has something to be compared with.
    """
    shuffle = random.Random(seed)
    repeats: dict[str, int] = {}
    turns: dict[str, float] = {}
    for action in actions:
        tell(f"warming up {action.name}")
        once = _timed(action.run, 1)[0]
        # The first run allocates and fills caches; only the slowest actions cannot afford a second.
        if once < _SLOW:
            once = _timed(action.run, 1)[0]
        repeats[action.name] = max(1, min(_MAX_REPEATS, math.ceil(plan.turn / max(once, 1e-9))))
        turns[action.name] = once * repeats[action.name]
    counts = _counts(turns, plan, bases)
    samples = Samples(clock=plan.clock)
    deadline = time.perf_counter() + 2 * plan.seconds
    for block in range(plan.blocks):
        tell(f"block {block + 1} of {plan.blocks}")
        due = [a for i, a in enumerate(actions) if _due(block + 7 * i, counts[a.name], plan.blocks)]
        shuffle.shuffle(due)
        gc.collect()
        for action in due:
            if action.name in bases or time.perf_counter() < deadline or action.name not in samples.wall:
                samples.add(action.name, block, *_timed(action.run, repeats[action.name]))
    return samples


def _timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Wall and processor seconds per run."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / repeats, cpu / repeats


def _counts(turns: Mapping[str, float], plan: Plan, bases: Sequence[str]) -> dict[str, int]:
    """In how many blocks each action runs: all, unless it would take more than its share of the time left."""
    counts = dict.fromkeys(bases, plan.blocks)
    left = plan.seconds - plan.blocks * sum(turns[name] for name in bases)
    others = sorted((n for n in turns if n not in counts), key=lambda n: turns[n])
    # From the fastest on: what a fast action leaves of its share goes to the slower ones.
    for position, name in enumerate(others):
        share = left / (len(others) - position)
        affordable = int(share / max(turns[name], 1e-9))
        counts[name] = min(plan.blocks, max(plan.least, affordable))
        left = max(0.0, left - counts[name] * turns[name])
    return counts


def _due(block: int, count: int, blocks: int) -> bool:
    """Whether an action that runs in ``count`` of ``blocks`` blocks runs in this one: evenly spread, and cyclic."""
    block %= blocks
    return (block + 1) * count // blocks > block * count // blocks


def row_ratio(samples: Samples, row: Row, base: str, seed: int = 0) -> Interval:
    """Time of ``row`` over that of the action ``base``: median of within-block ratios, with its bootstrap interval.

    Blocks are resampled for each action of the row by itself, because slow actions do not run in every block.
    """
    parts = [(share, samples.ratios(name, base)) for name, share in row.shares.items()]
    value = sum(share * statistics.median(ratios) for share, ratios in parts)
    if min(len(ratios) for _, ratios in parts) < _LEAST_FOR_INTERVAL:
        return Interval(value, None, None)
    draw = random.Random(seed)
    resampled = sorted(
        sum(share * statistics.median(draw.choices(ratios, k=len(ratios))) for share, ratios in parts)
        for _ in range(_RESAMPLES)
    )
    return Interval(value, resampled[int(0.025 * _RESAMPLES)], resampled[int(0.975 * _RESAMPLES) - 1])


def row_seconds(samples: Samples, row: Row) -> float:
    """Median seconds of a row."""
    return sum(share * samples.median(name) for name, share in row.shares.items())


def row_flops(actions: Sequence[Action], row: Row) -> float | None:
    """Operations that a row needs at the least; None where they are not known for all its parts."""
    known = {a.name: a.flops for a in actions}
    total = 0.0
    for name, share in row.shares.items():
        flops = known[name]
        if flops is None:
            return None
        total += share * flops
    return total


def fewest(samples: Samples, row: Row) -> int:
    """The smallest number of timings behind any part of a row."""
    return min(len(samples.seconds[name]) for name in row.shares)
