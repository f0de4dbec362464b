"""The report of ``natgrad compare``: one HTML file without outside resources, and a JSON file of every number."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from natgrad.report import page as pages
from natgrad.report import pictures, theme, words
from natgrad.report.svg import grouped, number
from natgrad.report.theme import Style
from natgrad.tasks.results import Comparison, SummaryRow, Tuning

HTML_NAME, JSON_NAME = "report.html", "comparison.json"


def write_comparison(comparison: Comparison, out_dir: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` and ``comparison.json`` into ``out_dir`` (made if missing) and returns the page's path.

    Raises MissingExtraError without the ``report`` extra, ArgumentError when the folder cannot be written.
    """
    page = render(comparison)
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        comparison.save(folder / JSON_NAME)
    except OSError as error:
        raise pages.unwritable(folder, error) from error
    return pages.write(page, folder, HTML_NAME)


def render(comparison: Comparison) -> str:
    """The page as text."""
    environment = pages.environment()
    looks = pictures.styles(comparison)
    environment.filters["named"] = lambda words_: _named(words_, looks)
    figures = pictures.pictures(comparison)
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        css=_css(looks),
        looks=looks,
        summary=words.summary(comparison),
        columns=COLUMNS,
        rows=table(comparison),
        figures=figures,
        keys={name: pages.key(style) for name, style in looks.items()},
        facts=facts(comparison),
        grid=grid(comparison),
        failures=[run for run in comparison.runs if run.failure],
        failed_trials=[t for t in comparison.settings.tuning.trials if t.failure] if comparison.settings.tuning else [],
        json_name=JSON_NAME,
    )


@dataclass(frozen=True)
class Column:
    """A column of the results table: ``best`` is 'low', 'high' or '' (no best), ``help`` its tooltip."""

    key: str
    label: str
    help: str
    best: str = "low"


COLUMNS = (
    Column(
        "lr",
        "setting",
        "Learning rate lr, or trust-region radius max_kl in nats; tuned ones are from the grid below",
        "",
    ),
    Column("runs", "runs ok", "Runs that reached their limit, of all runs", ""),
    Column("steps", "steps", "Updates made, median over seeds", ""),
    Column("train_loss", "train loss", "Final training loss (nats per prediction), median over seeds"),
    Column("test_loss", "test loss", "Final test loss (nats per prediction), median over seeds"),
    Column("test_metric", "test metric", "Final test metric, median over seeds"),
    Column("steps_to_target", "steps to target", "Median over seeds; a seed that never arrived counts as infinite"),
    Column("seconds_to_target", "seconds to target", "Median over seeds; a seed that never arrived counts as infinite"),
    Column("seconds_per_step", "ms per step", "Median time of one step"),
    Column("cost_ratio", "cost ratio", "Median step time over that of the cheapest optimizer"),
    Column("kl_per_update", "KL per update", "Median measured KL(old ‖ new) per prediction (nats)", ""),
    Column("peak_memory_bytes", "peak memory", "Most that tensors took in a step"),
    Column("state_bytes", "state", "Bytes of optimizer state"),
)


@dataclass(frozen=True)
class Cell:
    """``value`` is the input number in full (for sorting and reading by machine), ``shown`` what the reader sees."""

    value: str
    shown: str
    best: bool = False


def table(comparison: Comparison) -> list[tuple[str, list[Cell]]]:
    """(optimizer, cells in the order of COLUMNS) for every row of the summary."""
    rows = comparison.summary
    best = {column.key: _best(rows, column, comparison.task.metric_higher_is_better) for column in COLUMNS}
    return [(row.optimizer, [_cell(comparison, row, column, best[column.key]) for column in COLUMNS]) for row in rows]


def _best(rows: Sequence[SummaryRow], column: Column, higher: bool) -> float | None:
    """The best value of a column with at least two different ones."""
    if not column.best:
        return None
    values = [getattr(row, column.key) for row in rows]
    kept = {float(v) for v in values if v is not None and math.isfinite(v)}
    if len(kept) < 2:
        return None
    return max(kept) if column.key == "test_metric" and higher else min(kept)


def _cell(comparison: Comparison, row: SummaryRow, column: Column, best: float | None) -> Cell:
    if column.key == "runs":
        return Cell(str(row.runs - row.failed), f"{row.runs - row.failed} of {row.runs}")
    value = getattr(row, column.key)
    if value is None or not math.isfinite(value):
        missing = "not reached" if comparison.target is not None and column.key.endswith("to_target") else "–"
        return Cell("", missing)
    shown = number(value, 3 if column.key == "kl_per_update" else 4)
    if column.key == "seconds_per_step":
        shown = number(value * 1e3)
    elif column.key.endswith("_bytes"):
        divisor, unit = pictures.bytes_unit(value)
        shown = f"{number(value / divisor)} {unit}"
    elif column.key in ("steps", "steps_to_target"):
        shown = grouped(int(value)) if value % 1 == 0 else number(value, 4)
    elif column.key == "lr":
        shown = f"{comparison.knob_of(row.optimizer)} {value:.4g}"
    elif column.key == "cost_ratio":
        shown = f"{number(value)}×"
    if column.key.endswith("to_target") and row.reached < row.runs:
        shown += f" ({row.reached} of {row.runs})"
    return Cell(repr(value), shown, best is not None and value == best)


def facts(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings, task, optimizers and machine as titled lists of (name, value)."""
    task, settings, machine = comparison.task, comparison.settings, comparison.machine
    limit = (
        f"{number(settings.budget_seconds)} s of training"
        if settings.budget_seconds is not None
        else f"{settings.steps} steps"
    )
    target = comparison.target
    return [
        (
            "Task",
            [
                ("name", task.name),
                ("likelihood", task.likelihood),
                ("test metric", f"{task.metric} ({'higher' if task.metric_higher_is_better else 'lower'} is better)"),
                ("training rows", grouped(task.train_rows)),
                ("test rows", grouped(task.test_rows)),
                ("parameters", grouped(task.parameters)),
                ("batch size", grouped(task.batch_size)),
            ],
        ),
        (
            "Settings",
            [
                ("limit per run", limit),
                ("seeds", ", ".join(str(seed) for seed in settings.seeds) or "none"),
                ("rows per evaluation", f"at most {grouped(settings.evaluation_rows)} of each set"),
                ("learning rates, radii", "tuned on the grid below" if settings.tuning else "each optimizer's default"),
                ("target", f"training loss {number(target.train_loss, 5)}: {target.source}" if target else "none"),
            ],
        ),
        (
            "Machine",
            pages.machine_facts(machine),
        ),
    ]


@dataclass(frozen=True)
class GridCell:
    """One setting of one optimizer: median training loss over the trials, or why there is none."""

    lr: str
    shown: str
    chosen: bool
    failure: str = ""


def grid(comparison: Comparison) -> list[tuple[str, list[GridCell]]]:
    """(optimizer, cells by rising factor); empty without tuning."""
    tuning = comparison.settings.tuning
    if tuning is None:
        return []
    chosen = {row.optimizer: row.lr for row in comparison.summary}
    return [
        (info.name, [_grid_cell(tuning, info.name, info.default_lr * f, chosen.get(info.name)) for f in tuning.factors])
        for info in comparison.optimizers
    ]


def _grid_cell(tuning: Tuning, optimizer: str, lr: float, chosen: float | None) -> GridCell:
    trials = [t for t in tuning.trials if t.optimizer == optimizer and math.isclose(t.lr, lr, rel_tol=1e-6)]
    losses = [t.train_loss for t in trials if math.isfinite(t.train_loss) and not t.failure]
    failure = next((t.failure for t in trials if t.failure), "") or ""
    shown = number(float(np.median(losses)), 4) if losses else "failed" if trials else "not tried"
    picked = chosen is not None and math.isclose(chosen, lr, rel_tol=1e-6)
    return GridCell(f"{lr:.4g}", shown, picked, failure)


def _named(sentence: str, looks: Mapping[str, Style]) -> Any:
    """The sentence as HTML with every optimizer's name in its colour."""
    import markupsafe

    safe = str(markupsafe.escape(sentence))
    if not looks:
        return markupsafe.Markup(safe)
    escaped = {str(markupsafe.escape(name)): style for name, style in looks.items()}
    names = "|".join(re.escape(name) for name in sorted(escaped, key=len, reverse=True))

    def paint(match: re.Match[str]) -> str:
        return f'<b style="--c:var(--s{escaped[match[0]].slot})">{match[0]}</b>'

    return markupsafe.Markup(re.sub(rf"(?<![\w-])(?:{names})(?![\w-])", paint, safe))


def _css(looks: Mapping[str, Style]) -> str:
    """Theme, drawing rules, and one rule per optimizer that fades it when its box in the legend is cleared."""
    fading = "".join(
        f"body:has(#show-{s.index}:not(:checked)) svg.figure .o{s.index}{{opacity:.06;pointer-events:none}}"
        f"body:has(#legend label:nth-of-type({s.index + 1}):hover) svg.figure [class^=o]:not(.o{s.index}){{opacity:.1}}"
        for s in looks.values()
    )
    return theme.variables() + theme.drawing_css() + fading
