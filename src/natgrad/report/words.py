"""Sentences computed from the numbers: the page's summary and what each picture shows for these data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from natgrad.report import series
from natgrad.report.series import Band
from natgrad.report.svg import number
from natgrad.tasks.results import Comparison, Evaluation, SummaryRow


def summary(comparison: Comparison) -> list[str]:
    """Two to four sentences: who was first by steps, who by seconds, the test result, and what failed."""
    if all(not run.evaluations for run in comparison.runs):
        reason = next((run.failure for run in comparison.runs if run.failure), None)
        return [
            "No run was evaluated, so there is nothing to compare." + (f" First reason: {reason}" if reason else "")
        ]
    last = [_test(comparison), _failures(comparison)]
    if len(comparison.settings.seeds) == 1 and len(comparison.optimizers) > 1:
        last.append("There is one seed only, so small differences may be chance.")
    if comparison.interrupted:
        last.append("The comparison was interrupted: runs after that are missing.")
    return [s for s in (*_race(comparison), " ".join(filter(None, last))) if s]


def _race(comparison: Comparison) -> list[str]:
    target = comparison.target
    if target is None:
        return _final_losses(comparison)
    goal = f"training loss {number(target.train_loss)}"
    rows = comparison.summary
    steps = {row.optimizer: float(row.steps_to_target) for row in rows if row.steps_to_target is not None}
    seconds = {row.optimizer: float(row.seconds_to_target) for row in rows if row.seconds_to_target is not None}
    if not steps or not seconds:
        return [
            f"No optimizer reached the target, {goal} ({target.source}), in most of its seeds.",
            *_final_losses(comparison),
        ]
    if len(comparison.optimizers) == 1:
        name, needed = (
            next(iter(steps)),
            f"{amount(min(steps.values()), 'steps')} and {amount(min(seconds.values()), 'seconds')}",
        )
        return [
            f"{name} reached the target, {goal} ({target.source}), after {needed}.",
            "It ran alone, so there is nothing to compare it with.",
        ]
    by_steps = _winner(comparison, steps, 0, "steps", f"reached the target, {goal} ({target.source}), after")
    by_seconds = _winner(comparison, seconds, 1, "seconds", "got there after")
    seeds = len(comparison.settings.seeds)
    late = [info.name for info in comparison.optimizers if info.name not in steps]
    rest = f" {listed(late)} did not reach it{_mostly(seeds)}." if late and len(steps) > 1 else ""
    return [by_steps, by_seconds + rest]


def _winner(comparison: Comparison, medians: Mapping[str, float], which: int, unit: str, reached: str) -> str:
    """'By steps, kfac was first: …', with the runner-up, the best natural gradient if it lost, and seed overlap."""
    ranking = sorted(medians, key=lambda name: medians[name])
    first, value = ranking[0], medians[ranking[0]]
    families = {info.name: info.family for info in comparison.optimizers}
    won = families.get(first) == "natgrad"
    # The best of the other kind is always named: who won within a family says little.
    kind = "the best other method" if won else "the best natural gradient"
    rival = next((name for name in ranking if (families.get(name) == "natgrad") != won), None)
    raced = any((family == "natgrad") != won for family in families.values())
    seeds = len(comparison.runs_of(first))
    over = f" (median of {seeds} seeds)" if seeds > 1 else ""
    head = f"By {unit}, {first} was first: it {reached} {amount(value, unit)}{over}"
    if len(ranking) == 1:
        return f"{head}, and no other optimizer did{_mostly(seeds)}."
    second = ranking[1]
    also = ", the best natural gradient" if second == rival and not won else ""
    head += f", against {amount(medians[second], unit)} of {second}{also}{_factor(medians[second], value, unit)}"
    if _overlap(comparison, first, second, which):
        head += "; their seeds overlap, so the order of these two is not settled"
    if rival is None and raced:
        head += f"; {'no other' if won else 'no natural-gradient'} method did{_mostly(seeds)}"
    elif rival is not None and rival != second:
        head += f"; {kind}, {rival}, took {amount(medians[rival], unit)}{_factor(medians[rival], value, unit)}"
    return head + "."


def _factor(larger: float, smaller: float, unit: str) -> str:
    if not smaller > 0 or larger / smaller < 1.005:
        return ""
    return f" ({number(larger / smaller)} times as {'long' if unit == 'seconds' else 'many'})"


def _mostly(seeds: int) -> str:
    return " in most seeds" if seeds > 1 else ""


def _overlap(comparison: Comparison, first: str, second: str, which: int) -> bool:
    """Whether the slowest seed of the first was no earlier than the quickest of the second."""
    if comparison.target is None:
        return False
    target = comparison.target.train_loss
    ours, theirs = (
        [series.arrival(run, target)[which] for run in comparison.runs_of(name)] for name in (first, second)
    )
    return len(ours) > 1 and len(theirs) > 1 and max(ours) >= min(theirs)


def _final_losses(comparison: Comparison) -> list[str]:
    rows = [row for row in comparison.summary if row.train_loss is not None and math.isfinite(row.train_loss)]
    if not rows:
        return ["Every run failed before its end; the reasons are below."]
    rows = sorted(rows, key=lambda row: row.train_loss or 0.0)
    text = f"{rows[0].optimizer} ended with the lowest training loss, {number(rows[0].train_loss)}"
    if len(rows) > 1:
        best, second = apart(rows[0].train_loss or 0.0, rows[1].train_loss or 0.0)
        text = (
            f"{rows[0].optimizer} ended with the lowest training loss, {best}, before {rows[1].optimizer} with {second}"
        )
        families = {info.name: info.family for info in comparison.optimizers}
        own = next((r for r in rows if families.get(r.optimizer) == "natgrad"), None)
        if own is not None and own not in rows[:2]:
            text += f"; the best natural gradient, {own.optimizer}, ended with {number(own.train_loss)}"
    limit = comparison.settings.budget_seconds
    steps = comparison.settings.steps
    given = f" after {number(limit)} s each" if limit is not None else f" after {steps} steps each" if steps else ""
    lost = [r.optimizer for r in comparison.summary if r not in rows and r.failed < r.runs]
    return [text + given + "." + (f" {listed(lost)} ended without a finite loss." if lost else "")]


def _test(comparison: Comparison) -> str:
    rows = [row for row in comparison.summary if row.test_metric is not None and math.isfinite(row.test_metric)]
    if len(rows) < 2:
        return ""
    sign = -1 if comparison.task.metric_higher_is_better else 1
    rows = sorted(rows, key=lambda row: sign * (row.test_metric or 0.0))
    best, worst = rows[0], rows[-1]
    if best.test_metric == worst.test_metric:
        return f"On test data all end at the same {comparison.task.metric}, {number(best.test_metric)}."
    return (
        f"On test data {best.optimizer} ends with the best {comparison.task.metric}, {number(best.test_metric)}; "
        f"{worst.optimizer} with the worst, {number(worst.test_metric)}."
    )


def _failures(comparison: Comparison) -> str:
    failed = [run for run in comparison.runs if run.failure]
    if not failed:
        return ""
    names = list(dict.fromkeys(run.optimizer for run in failed))
    return f"{len(failed)} of {len(comparison.runs)} runs failed ({listed(names)})."


def listed(names: Sequence[str], most: int = 6) -> str:
    """'a', 'a and b', 'a, b and c', or 'a, b and 5 more'."""
    shown = list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""


def duration(seconds: float) -> str:
    """A short time in seconds or milliseconds."""
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(seconds * 1e3)} ms"


def apart(one: float, other: float) -> tuple[str, str]:
    """Both numbers with as many digits, 3 to 6, as it takes to tell them apart."""
    shown = [(number(one, digits), number(other, digits)) for digits in range(3, 7)]
    return next((pair for pair in shown if pair[0] != pair[1]), shown[0])


def amount(value: float, unit: str) -> str:
    """'40 steps', '1.34 s'."""
    return f"{number(value)} s" if unit == "seconds" else f"{number(value) if value % 1 else f'{value:.0f}'} steps"


def curves(bands: Mapping[str, Band], unit: str, what: str, *, higher: bool = False) -> str:
    """Who leads at the last x that all optimizers share, by how much, and who ends best if that is another."""
    known = {name: b for name, b in bands.items() if b.x}
    if not known:
        return f"No run has a finite {what}."
    shared = min(b.x[-1] for b in known.values())
    at = {name: b.at(shared) for name, b in known.items()}
    ranking = sorted((n for n in at if math.isfinite(at[n])), key=lambda name: -at[name] if higher else at[name])
    ends = sorted(known, key=lambda name: -known[name].middle[-1] if higher else known[name].middle[-1])
    best_end = f"{ends[0]} ends {'highest' if higher else 'lowest'}, at {number(known[ends[0]].middle[-1])}"
    if len(known) == 1 or not ranking:
        return (
            f"{best_end[0].upper()}{best_end[1:]}."
            if len(known) > 1
            else (
                f"{ends[0]} goes from {number(known[ends[0]].middle[0])} to {number(known[ends[0]].middle[-1])} in "
                f"{amount(known[ends[0]].x[-1], unit)}."
            )
        )
    first, second = ranking[0], ranking[1] if len(ranking) > 1 else None
    mine, theirs = apart(at[first], at[second]) if second is not None else (number(at[first]), "")
    text = f"After {amount(shared, unit)}, as far as all of them got, {first} leads with {what} {mine}"
    if second is not None:
        text += f", then {second} with {theirs}"
    return text + (f"; {best_end}." if ends[0] != first else ".")


def to_target(rows: Sequence[SummaryRow], unit: str, values: Mapping[str, float], goal: str, seeds: int) -> str:
    """Who needed least and most, and who did not arrive."""
    arrived = sorted(values, key=lambda name: values[name])
    missing = [row.optimizer for row in rows if row.optimizer not in values]
    if not arrived:
        return f"No optimizer reached {goal}{_mostly(seeds)}."
    order = " first" if len(arrived) > 1 else ""
    text = f"{arrived[0]} reached {goal}{order}, in {amount(values[arrived[0]], unit)}"
    if len(arrived) > 1:
        last = arrived[-1]
        text += f"; {last} last, in {amount(values[last], unit)}{_factor(values[last], values[arrived[0]], unit)}"
    return text + (f"; {listed(missing)} did not{_mostly(seeds)}." if missing else ".")


def kl(medians: Mapping[str, float]) -> str:
    """Typical size of an update for the optimizers that move most and least."""
    ranking = sorted(medians, key=lambda name: -medians[name])
    if not ranking:
        return "No optimizer measured a positive KL divergence."
    most, least = ranking[0], ranking[-1]
    text = f"The median update of {most} moved the predictions by {number(medians[most], 2)} nats"
    if most == least:
        return text + "."
    return f"{text}, the most; that of {least} by {number(medians[least], 2)}, the least."


def agreement(ratios: Mapping[str, np.ndarray]) -> str:
    """Median measured / predicted KL of the optimizers that predict, and the spread of the worst."""
    if not ratios:
        return "No optimizer predicted a KL divergence."
    medians = {name: float(np.median(r)) for name, r in ratios.items()}
    ranking = sorted(medians, key=lambda name: abs(math.log(medians[name])))
    best, worst = ranking[0], ranking[-1]

    def spread(name: str) -> str:
        low, high = np.quantile(ratios[name], (0.1, 0.9))
        return f"{number(medians[name], 2)} times the predicted (80% of updates: {number(low, 2)} to {number(high, 2)})"

    text = f"For {best} the measured KL is {spread(best)}"
    return text + (f"; furthest off is {worst}, {spread(worst)}." if worst != best else ".")


def cost(medians: Mapping[str, float], means: Mapping[str, float], reference: str, unit: float) -> str:
    """The dearest step against the reference, and whether its mean hides behind the median."""
    others = {name: value for name, value in medians.items() if name != reference}
    if not others:
        return f"The median step of {reference} takes {duration(unit)}."
    near, far = min(others, key=lambda n: others[n]), max(others, key=lambda n: others[n])
    text = f"A median step of {near} takes {number(others[near])} times as long as the {duration(unit)} of {reference}"
    if far != near:
        text += f", one of {far} {number(others[far])} times"
    gap = max(others, key=lambda name: means[name] / medians[name])
    if means[gap] > 1.15 * medians[gap]:
        text += f"; with its occasional dear steps {gap} averages {number(means[gap])} times"
    return text + "."


def memory(peaks: Mapping[str, float], states: Mapping[str, float], unit: str) -> str:
    """Largest and smallest state, and the spread of the peaks."""
    if not states and not peaks:
        return "No memory was measured."
    parts = []
    if states:
        most, least = max(states, key=lambda n: states[n]), min(states, key=lambda n: states[n])
        text = f"{most} keeps the most state, {number(states[most])} {unit}"
        parts.append(text + (f"; {least} the least, {number(states[least])} {unit}" if most != least else ""))
    if peaks:
        most, least = max(peaks, key=lambda n: peaks[n]), min(peaks, key=lambda n: peaks[n])
        text = f"the peak is highest for {most}, {number(peaks[most])} {unit}"
        if most != least:
            text += f", {number(peaks[most] / peaks[least])} times that of {least}"
        parts.append(text)
    joined = "; ".join(parts)
    return joined[0].upper() + joined[1:] + "." if not states else joined + "."


def evaluations_of(evaluations: Sequence[Evaluation], field: str) -> list[float]:
    """One field of every evaluation."""
    return [float(getattr(e, field)) for e in evaluations]
