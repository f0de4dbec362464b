"""From runs to the target loss and the table: pure functions of what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from natgrad.tasks.results import Evaluation, Run, SummaryRow, Target

_REFERENCES = ("adamw", "sgd", "muon", "lbfgs")


def choose_target(task_target: float | None, runs: Sequence[Run]) -> Target | None:
    """The task's own target, else the final training loss of the reference optimizer, AdamW where it took part.

    The upper median over its seeds is taken, so that at least half of its own runs arrive.
    """
    if task_target is not None:
        return Target(task_target, "the task's own target")
    names = list(dict.fromkeys(run.optimizer for run in runs))
    for name in [*(n for n in _REFERENCES if n in names), *(n for n in names if n not in _REFERENCES)]:
        finals = [run.final.train_loss for run in runs if run.optimizer == name and _good(run) and run.final]
        if finals:
            return Target(statistics.median_high(finals), f"median final training loss of {name}")
    return None


def summarise(runs: Sequence[Run], names: Iterable[str], target: Target | None) -> tuple[SummaryRow, ...]:
    """One row per optimizer that has a run, in the order of ``names``."""
    groups = {name: [run for run in runs if run.optimizer == name] for name in names}
    groups = {name: group for name, group in groups.items() if group}
    step_times = {name: _median(_step_time(run) for run in group if _good(run)) for name, group in groups.items()}
    known = [value for value in step_times.values() if value is not None]
    cheapest = min(known) if known else None
    return tuple(_row(name, group, step_times[name], cheapest, target) for name, group in groups.items())


def _row(
    name: str, runs: Sequence[Run], step_time: float | None, cheapest: float | None, target: Target | None
) -> SummaryRow:
    good = [run for run in runs if _good(run)]
    finals = [run.final for run in good if run.final is not None]
    arrivals = [arrival(run, target.train_loss) for run in runs] if target else []
    memory = [run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None]
    state = [run.state_bytes for run in runs if run.state_bytes is not None]
    return SummaryRow(
        optimizer=name,
        lr=runs[0].lr,
        tuned=runs[0].tuned,
        runs=len(runs),
        failed=len(runs) - len(good),
        steps=int(statistics.median(run.steps for run in runs)),
        seconds_per_step=step_time,
        cost_ratio=step_time / cheapest if step_time is not None and cheapest else None,
        train_loss=_median(point.train_loss for point in finals),
        test_loss=_median(point.test_loss for point in finals),
        test_metric=_median(point.test_metric for point in finals),
        reached=sum(point is not None for point in arrivals),
        steps_to_target=_median_or_never([None if p is None else float(p.step) for p in arrivals]),
        seconds_to_target=_median_or_never([None if p is None else p.seconds for p in arrivals]),
        kl_per_update=_median(kl for run in good for kl in run.kl_measured),
        peak_memory_bytes=max(memory) if memory else None,
        state_bytes=max(state) if state else None,
        failure=next((run.failure for run in runs if run.failure), None),
    )


def arrival(run: Run, train_loss: float) -> Evaluation | None:
    """The first evaluation at or below a training loss."""
    return next((point for point in run.evaluations if point.train_loss <= train_loss), None)


def _good(run: Run) -> bool:
    return run.failure is None


def _step_time(run: Run) -> float:
    # The first step pays for allocations and, in natgrad, for the first decomposition; the median leaves it out.
    return statistics.median(run.seconds_per_step) if run.seconds_per_step else math.nan


def _median(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None


def _median_or_never(values: Sequence[float | None]) -> float | None:
    """Median with None as infinity; None when that is infinite."""
    if not values:
        return None
    middle = statistics.median(math.inf if value is None else value for value in values)
    return middle if math.isfinite(middle) else None
