"""What `natgrad compare` shows: live progress on a terminal, one line per finished run, the final table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from natgrad.tasks.compare import Plan
    from natgrad.tasks.results import Comparison, Run, SummaryRow
    from natgrad.tasks.train import Progress as Report

_REFRESH = 0.1  # seconds between updates of the display: drawing must not slow the training it shows
# Columns left out: the first that lets the table fit, else the last.
_LEAST = ("KL/update", "memory", "cost")
_DROPPED = ((), _LEAST, (*_LEAST, "test loss"), (*_LEAST, "test loss", "setting"))
_PHASES = {"tune": "tuning", "measure": "memory of", "train": "training"}


class Display:
    """A context manager whose methods are the engine's listeners."""

    def __init__(self, console: Console, plan: Plan) -> None:
        from natgrad.tasks.optimizers import find_optimizers

        self.console, self.plan = console, plan
        self.knobs = {spec.name: spec.knob for spec in find_optimizers(plan.optimizers)}
        self.total = len(plan.optimizers) * len(plan.seeds)
        self.done = 0
        self.last = 0.0
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            refresh_per_second=8,
        )

    def __enter__(self) -> Display:
        self.bars.start()
        self.overall = self.bars.add_task("all runs", total=self.total, detail="")
        self.current = self.bars.add_task("starting", total=1.0, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def progress(self, report: Report) -> None:
        """Shows where the current run is."""
        now = time.monotonic()
        if now - self.last < _REFRESH and report.phase != "measure":
            return
        self.last = now
        detail = f"step {report.step}"
        if math.isfinite(report.train_loss):
            detail += f"  loss {report.train_loss:.4g}"
        rate = f" {self.knobs[report.optimizer]} {report.lr:.3g}" if report.phase == "tune" else ""
        self.bars.update(
            self.current,
            description=f"{_PHASES[report.phase]} {report.optimizer}{rate} seed {report.seed}",
            completed=report.fraction,
            detail=detail,
        )
        if report.phase == "train":
            self.bars.update(self.overall, completed=self.done + report.fraction)

    def run_done(self, run: Run) -> None:
        """One line that stays."""
        self.done += 1
        self.bars.update(self.overall, completed=self.done)
        head = f"[dim]{self.done:3d}/{self.total}[/]  {run.optimizer:<13} seed {run.seed}  "
        if run.failure is not None:
            self.console.print(head + f"[red]{escape(run.failure)}[/]", soft_wrap=True)
            return
        final = run.final
        loss = "" if final is None else f"  train loss {final.train_loss:.5g}  test loss {final.test_loss:.5g}"
        self.console.print(head + f"{run.steps:5d} steps in {run.seconds[-1]:.1f} s{loss}")


def table(comparison: Comparison, width: int) -> Table:
    """The summary, best final training loss first; on a narrow terminal without the columns that matter least."""
    tables = [_table(comparison, dropped) for dropped in _DROPPED]
    console = Console(width=1000)
    fitting = (each for each in tables if Measurement.get(console, console.options, each).minimum <= width)
    return next(fitting, tables[-1])


def _table(comparison: Comparison, dropped: tuple[str, ...]) -> Table:
    result = Table(title=f"{comparison.task.name}: medians over the seeds", title_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("optimizer", no_wrap=True)
    rows = sorted(comparison.summary, key=lambda row: math.inf if row.train_loss is None else row.train_loss)
    cells = [_cells(row, comparison.knob_of(row.optimizer), comparison.task.metric) for row in rows]
    for name in cells[0]:
        if name not in dropped:
            # A fixed width, because rich shrinks the widest columns below their longest word before it wraps others.
            lines = name.split("\n") if "\n" in name and dropped != _DROPPED[-1] else name.split()
            texts = [*lines, *(row[name] for row in cells)]
            result.add_column(name, justify="right", width=max(len(text) for text in texts))
    for row, values in zip(rows, cells, strict=True):
        result.add_row(row.optimizer, *(value for name, value in values.items() if name not in dropped))
    return result


def failures(comparison: Comparison) -> Iterator[str]:
    """One line per optimizer with failed runs."""
    for row in comparison.summary:
        if row.failed:
            reason = escape(row.failure or "")
            yield f"[red]{row.optimizer}[/]: {row.failed} of {row.runs} runs did not finish: {reason}"


def _cells(row: SummaryRow, knob: str, metric: str) -> dict[str, str]:
    """Column name -> text."""

    def share_arrived(median: float | None) -> str:
        partly = median is not None and math.isfinite(median) and row.reached < row.runs
        return f" ({row.reached} of {row.runs})" if partly else ""

    share = row.test_metric
    memory = row.peak_memory_bytes
    return {
        "setting": f"{knob} {_number(row.lr, 3)}" + ("†" if row.tuned else ""),
        "train loss": _number(row.train_loss),
        "test loss": _number(row.test_loss),
        metric: f"{100 * share:.1f}%" if share is not None and metric == "accuracy" else _number(share),
        "steps": str(row.steps),
        "ms/step": _number(None if row.seconds_per_step is None else 1e3 * row.seconds_per_step, 3),
        "cost": "–" if row.cost_ratio is None else f"{row.cost_ratio:.1f}x",
        "KL/update": _number(row.kl_per_update, 2),
        "memory": "–" if memory is None else f"{memory / 1e6:.1f} MB",
        "steps to\ntarget": _number(row.steps_to_target) + share_arrived(row.steps_to_target),
        "seconds to\ntarget": _number(row.seconds_to_target, 3) + share_arrived(row.seconds_to_target),
    }


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"
