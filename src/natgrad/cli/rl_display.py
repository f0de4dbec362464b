"""What `natgrad rl` shows: a line per seed while it learns, and the table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from natgrad.report.learned import Learning, SeedRun

_REFRESH = 0.1  # seconds between updates of the display
_TENTHS = 10  # lines of a seed in a log, which has no display
_SHOWN = (("return", "return", 4), ("kl", "KL", 3), ("entropy", "entropy", 3), ("explained_variance", "EV", 2))


class RLDisplay:
    """A context manager that shows where each seed is; in a log it writes a line at every tenth of the steps."""

    def __init__(self, console: Console, seeds: Sequence[int], steps: int) -> None:
        self.console, self.seeds, self.steps = console, seeds, steps
        self.last, self.tenth = 0.0, 0
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(6, min(20, console.width - 100))),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            refresh_per_second=8,
        )
        self.tasks: dict[int, TaskID] = {}

    def __enter__(self) -> RLDisplay:
        self.bars.start()
        for seed in self.seeds:
            self.tasks[seed] = self.bars.add_task(f"seed {seed}", total=self.steps, detail="", start=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def begin(self, seed: int, record: Mapping[str, float] | None, same: bool | None) -> None:
        """A seed begins, or goes on after ``record``; ``same``: whether its environments are in their very states."""
        taken = 0 if record is None else int(record["steps"])
        self.tenth = taken * _TENTHS // self.steps
        self.bars.start_task(self.tasks[seed])
        self.bars.update(self.tasks[seed], completed=taken)
        if record is not None:
            done = taken >= self.steps
            how = "is complete" if done else "goes on, bit for bit" if same else "goes on, with new episodes"
            self.console.print(f"seed {seed}  {how}: {taken:,} steps are in its checkpoint")

    def progress(self, seed: int, record: Mapping[str, float]) -> None:
        """An update was made."""
        taken, now = int(record["steps"]), time.monotonic()
        if not self.console.is_terminal:
            tenth = taken * _TENTHS // self.steps
            if tenth > self.tenth and taken < self.steps:
                self.tenth = tenth
                self.console.print(f"seed {seed}  {taken:,} steps  {detail(record)}")
        elif now - self.last >= _REFRESH or taken >= self.steps:
            self.last = now
            self.bars.update(self.tasks[seed], completed=taken, detail=detail(record))

    def done(self, run: SeedRun) -> None:
        """One line that stays."""
        self.bars.update(self.tasks[run.seed], visible=False)
        head = f"seed {run.seed}  "
        if run.failure is not None:
            self.console.print(f"{head}[red]{escape(run.failure)}[/]", soft_wrap=True)
        elif run.records:
            last = run.records[-1]
            line = f"{head}{int(last['steps']):,} steps in {last['seconds']:.0f} s  {detail(last)}"
            if run.evaluation is not None:
                line += f"  evaluation {_number(run.evaluation.mean)} ± {_number(run.evaluation.std, 3)}"
            self.console.print(line)


def detail(record: Mapping[str, float]) -> str:
    """Return, KL, entropy, explained variance and speed, in a line."""
    parts = [f"{label} {_number(record.get(name, math.nan), digits)}" for name, label, digits in _SHOWN]
    if record.get("seconds", 0.0) > 0:
        parts.append(f"{record['steps'] / record['seconds']:,.0f} steps/s")
    return "  ".join(parts)


def table(learning: Learning) -> Table:
    """A row per seed."""
    result = Table(title=f"{learning.algorithm} on {learning.environment}", title_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("seed", no_wrap=True)
    for name in ("evaluation", "worst", "best", "while learning", "updates", "largest KL", "seconds"):
        result.add_column(name, justify="right")
    for run in learning.runs:
        result.add_row(str(run.seed), *_cells(run))
    return result


def _cells(run: SeedRun) -> list[str]:
    evaluation, last = run.evaluation, run.records[-1] if run.records else {}
    played = ["–"] * 3
    if evaluation is not None:
        mean = f"{_number(evaluation.mean)} ± {_number(evaluation.std, 3)}"
        played = [mean, _number(min(evaluation.returns)), _number(max(evaluation.returns))]
    largest = max((kl for kl in run.column("kl") if math.isfinite(kl)), default=math.nan)
    updates, seconds = str(len(run.records)), _number(last.get("seconds", math.nan), 3)
    return [*played, _number(last.get("return", math.nan)), updates, _number(largest, 3), seconds]


def _number(value: float, digits: int = 4) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
