"""Numbers for the pictures: seeds put on one axis, medians and ranges, windows, arrivals at the target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from natgrad.tasks.results import Comparison, Run

MAX_POINTS = 160


@dataclass(frozen=True)
class Band:
    """Median, minimum and maximum over seeds at each x; empty where no seed has finite values."""

    x: tuple[float, ...] = ()
    middle: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def at(self, x: float) -> float:
        """The median at ``x``, linear between points, NaN outside the data."""
        if not self.x or not self.x[0] <= x <= self.x[-1]:
            return math.nan
        return float(np.interp(x, self.x, self.middle))


def band(seeds: Sequence[tuple[Sequence[float], Sequence[float]]], *, log_x: bool = False, offset: float = 0.0) -> Band:
    """Seeds as (x, y), x ascending, brought to common x values by linear interpolation where all of them have data."""
    cleaned = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in seeds]
    kept = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in cleaned]
    kept = [(x, y) for x, y in kept if len(x)]
    if not kept:
        return Band()
    start, end = max(x[0] for x, _ in kept), min(x[-1] for x, _ in kept)
    if end < start:
        return Band()
    grid = np.unique(np.concatenate([x for x, _ in kept]))
    grid = np.unique(np.concatenate([[start], grid[(grid >= start) & (grid <= end)], [end]]))
    if log_x:
        grid = grid[grid + offset > 0]
    grid = _thinned(grid, log_x, offset)
    if not len(grid):
        return Band()
    values = np.stack([np.interp(grid, x, y) for x, y in kept])
    return Band(
        tuple(grid.tolist()),
        tuple(np.median(values, axis=0).tolist()),
        tuple(values.min(axis=0).tolist()),
        tuple(values.max(axis=0).tolist()),
    )


def _thinned(grid: np.ndarray, log: bool, offset: float) -> np.ndarray:
    """At most MAX_POINTS of the values, evenly spread along the axis, the first and last among them."""
    if len(grid) <= MAX_POINTS:
        return grid
    axis = np.log(grid + offset) if log else grid
    wanted = np.linspace(axis[0], axis[-1], MAX_POINTS)
    return grid[np.unique(np.clip(np.searchsorted(axis, wanted), 0, len(grid) - 1))]


def windows(values: Sequence[float], *, count: int = 90, log_x: bool = False) -> tuple[list[float], list[float]]:
    """Per-step values as medians over at most ``count`` windows of steps: (step at the window's middle, median).

    Steps count from 1. Windows grow geometrically when ``log_x``. Windows without a finite value are left out.
    """
    size = len(values)
    if not size:
        return [], []
    spaced = np.geomspace(1, size + 1, count + 1) if log_x else np.linspace(1, size + 1, count + 1)
    edges = np.unique(np.round(spaced).astype(int))
    data = np.asarray(values, dtype=float)
    steps, medians = [], []
    for first, end in itertools.pairwise(edges):
        part = data[first - 1 : end - 1]
        part = part[np.isfinite(part)]
        if len(part):
            steps.append((first + end - 1) / 2)
            medians.append(float(np.median(part)))
    return steps, medians


def finite(values: Sequence[float], *, positive: bool = False) -> np.ndarray:
    """The finite (and positive) values as an array."""
    data = np.asarray(values, dtype=float)
    return data[np.isfinite(data) & ((data > 0) | (not positive))]


def arrival(run: Run, target: float) -> tuple[float, float]:
    """(steps, seconds) at the first evaluation whose training loss is at most ``target``; infinite without one."""
    for evaluation in run.evaluations:
        if evaluation.train_loss <= target:
            return float(evaluation.step), evaluation.seconds
    return math.inf, math.inf


def cheapest(comparison: Comparison) -> tuple[str, float] | None:
    """(name, median seconds of one step) of the optimizer with the cheapest step, the reference of all cost ratios."""
    known = [(row.optimizer, row.seconds_per_step) for row in comparison.summary if row.seconds_per_step]
    return min(known, key=lambda pair: pair[1]) if known else None


def early(seeds: Sequence[tuple[Sequence[float], Sequence[float]]], part: float = 0.05) -> bool:
    """Whether some seed does most (80 %) of its change in the first ``part`` of the longest axis: then a linear axis
    squeezes what matters into its edge.
    """
    longest = max((x[-1] for x, _ in seeds if len(x)), default=0.0)
    for x, y in seeds:
        values = np.asarray(y, dtype=float)
        if len(values) < 4 or not np.isfinite(values).all():
            continue
        change = np.abs(values - values[0])
        done = int(np.argmax(change >= 0.8 * change.max()))
        if change.max() > 0 and x[done] < part * longest:
            return True
    return False


def spans(values: Sequence[float], factor: float) -> bool:
    """Whether the positive finite values cover more than ``factor``, so that a logarithmic axis serves better."""
    kept = finite(values, positive=True)
    return bool(len(kept)) and float(kept.max() / kept.min()) > factor
