"""What `natgrad compare` shows: live progress on a terminal, one line per finished run, the final table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from natgrad.tasks.compare import Plan
    from natgrad.tasks.results import Comparison, Run, SummaryRow
    from natgrad.tasks.train import Progress as Report

_REFRESH = 0.1  # seconds between updates of the display: drawing must not slow the training it shows
_PHASES = {"tune": "tuning", "measure": "memory of", "train": "training"}


class Display:
    """A context manager whose methods are the engine's listeners."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self.console, self.plan = console, plan
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
        rate = f" lr {report.lr:.3g}" if report.phase == "tune" else ""
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


def table(comparison: Comparison) -> Table:
    """The summary, best final training loss first."""
    metric = comparison.task.metric
    columns = ["optimizer", "lr", "train loss", "test loss", metric, "steps", "ms/step", "cost", "KL/update", "memory"]
    result = Table(title=f"{comparison.task.name}: medians over the seeds", title_justify="left")
    for position, name in enumerate([*columns, "steps to target", "seconds to target"]):
        result.add_column(name, justify="left" if position == 0 else "right", no_wrap=position == 0)
    for row in sorted(comparison.summary, key=lambda row: math.inf if row.train_loss is None else row.train_loss):
        result.add_row(*_cells(row, metric))
    return result


def failures(comparison: Comparison) -> Iterator[str]:
    """One line per optimizer with failed runs."""
    for row in comparison.summary:
        if row.failed:
            yield f"[red]{row.optimizer}[/]: {row.failed} of {row.runs} runs failed: {escape(row.failure or '')}"


def _cells(row: SummaryRow, metric: str) -> list[str]:
    share = row.test_metric
    shown = f"{100 * share:.1f}%" if share is not None and metric == "accuracy" else _number(share)
    memory = row.peak_memory_bytes
    return [
        row.optimizer,
        _number(row.lr, 3) + ("†" if row.tuned else ""),
        _number(row.train_loss),
        _number(row.test_loss),
        shown,
        str(row.steps),
        _number(None if row.seconds_per_step is None else 1e3 * row.seconds_per_step, 3),
        "–" if row.cost_ratio is None else f"{row.cost_ratio:.1f}x",
        _number(row.kl_per_update, 2),
        "–" if memory is None else f"{memory / 1e6:.1f} MB",
        _number(row.steps_to_target),
        _number(row.seconds_to_target, 3),
    ]


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"
