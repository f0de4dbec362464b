"""The pictures of a learning run: from the records of its seeds to captioned figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from natgrad.report import figures, series
from natgrad.report.drawing import Figure
from natgrad.report.figures import Curve
from natgrad.report.learned import Learning, Record, SeedRun
from natgrad.report.svg import grouped, number, padded
from natgrad.report.theme import Style, styles

WINDOWS = 80
STEPS = "steps of the environments"
SEEDS = "Thick line: median over the seeds, as far as all have data; thin lines: the seeds."
CROSS = " A cross ends a seed that failed."
ONE_SEED = "One seed, so the line is that seed's."
POOLED = "Line: median over the updates of all seeds near that step; band: lowest to highest of them."


def pictures(learning: Learning) -> list[Figure]:
    """All pictures in the order of the page; one without data is a placeholder that says why."""
    return [
        _return(learning),
        _kl(learning),
        _entropy(learning),
        _explained(learning),
        _search(learning),
        _normaliser(learning),
    ]


def seed_curve(learning: Learning, name: str) -> Curve:
    """The median over seeds of one entry of the records against steps, with every seed thin."""
    pairs = [(run, _pairs(run, name)) for run in learning.runs]
    middle = series.band([pair for run, pair in pairs if pair[0] and run.failure is None])
    several = len(learning.runs) > 1
    return Curve(
        learning.algorithm,
        styles([learning.algorithm])[learning.algorithm],
        middle.x,
        middle.middle,
        extras=[pair for run, pair in pairs if pair[0] and run.failure is not None],
        seeds=[pair for run, pair in pairs if pair[0] and run.failure is None and several],
    )


def _pairs(run: SeedRun, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) where the values are finite, at most some hundred of them."""
    found = [(x, y) for x, y in zip(run.column("steps"), run.column(name), strict=True) if math.isfinite(y)]
    stride = max(1, math.ceil(len(found) / (2 * series.MAX_POINTS)))
    kept = [found[k] for k in sorted({*range(0, len(found), stride), len(found) - 1})] if found else []
    return [x for x, _ in kept], [y for _, y in kept]


def pooled(
    learning: Learning, column: Callable[[SeedRun], list[float]], label: str, style: Style, *, mean: bool = False
) -> Curve:
    """Median (or mean) and range of all seeds' updates in windows of steps, so that no single update is hidden."""
    x = np.array([v for run in learning.runs for v in run.column("steps")])
    y = np.array([v for run in learning.runs for v in column(run)])
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(x):
        return Curve(label, style, (), ())
    updates = max(len(run.records) for run in learning.runs)
    edges = np.linspace(0, x.max(), min(updates, WINDOWS) + 1)
    places = np.clip(np.searchsorted(edges, x, side="left"), 1, len(edges) - 1)
    middle_of = np.mean if mean else np.median
    rows = [
        (float(np.median(x[places == k])), float(middle_of(part)), float(part.min()), float(part.max()))
        for k in np.unique(places)
        if len(part := y[places == k])
    ]
    at, middle, low, high = zip(*rows, strict=True)
    return Curve(label, style, at, middle, () if mean else low, () if mean else high)


def _lines(
    name: str, title: str, curves: Sequence[Curve], y_label: str, caption: str, reading: str, **options: Any
) -> Figure:
    drawn = [c for c in curves if c.x or c.thin]
    if not drawn:
        return figures.empty(name, title, caption).worded(caption)
    figure = figures.lines(name, title, drawn, x_label=STEPS, y_label=y_label, **options)
    return figure.worded(caption, reading)


def _reading(learning: Learning) -> str:
    text = SEEDS if len(learning.runs) > 1 else ONE_SEED
    return text + (CROSS if any(run.failure for run in learning.runs) else "")


def _ends(curve: Curve) -> tuple[float, float, list[float]]:
    """First and last value of the median, and the last values of the seeds that it is of."""
    last = sorted(y[-1] for _, y in curve.seeds)
    return curve.middle[0], curve.middle[-1], last


def _between(last: Sequence[float]) -> str:
    if len(last) < 2:
        return ""
    return f" (median of {len(last)} seeds, which end between {number(last[0])} and {number(last[-1])})"


def _return(learning: Learning) -> Figure:
    curve = seed_curve(learning, "return")
    caption = "No episode ended, so there is no return."
    if curve.middle:
        first, end, last = _ends(curve)
        caption = (
            f"The mean return of the last 20 episodes goes from {number(first)} to {number(end)} in "
            f"{grouped(int(curve.x[-1]))} steps{_between(last)}."
        )
    elif curve.thin:
        caption = "Every seed failed before its end."
    reading = f"The policy samples its actions here; the evaluation above takes the most probable. {_reading(learning)}"
    return _lines("return", "Return while learning", [curve], "return, mean of the last 20 episodes", caption, reading)


def _kl(learning: Learning) -> Figure:
    style = styles([learning.algorithm])[learning.algorithm]
    curve = pooled(learning, lambda run: run.column("kl"), learning.algorithm, style)
    kl = series.finite([v for run in learning.runs for v in run.column("kl")])
    radius = learning.radius
    title = "Measured KL of every update"
    reading = (
        "Mean over the visited states of KL(old policy ‖ new policy) in nats per action, computed from both "
        f"distributions after the update. {POOLED}"
    )
    if radius is None:
        caption = "No update was made."
        if len(kl):
            caption = (
                f"The median of {grouped(len(kl))} updates moved the policy by {number(float(np.median(kl)))} nats, "
                f"the largest by {number(float(kl.max()))}; these settings bound the ratios, not the KL."
            )
        return _lines("kl", title, [curve], "KL(old ‖ new), nats per action", caption, reading)
    caption = kl_sentence(kl, radius.value, radius.hard)
    high = [v for v in (*curve.high, radius.value) if math.isfinite(v)]
    return _lines(
        "kl", title, [curve], "KL(old ‖ new), nats per action", caption, reading,
        reference=(radius.value, f"{radius.name} {radius.value:g}"),
        y_range=(0.0, padded([0.0, *high], log=False, pad=0.12)[1]),
    )  # fmt: skip


def kl_sentence(kl: np.ndarray, radius: float, hard: bool) -> str:
    """How the measured divergences of all updates compare with the radius or the aim."""
    if not len(kl):
        return "No update was made."
    over, most, middle = int((kl > radius).sum()), number(float(kl.max())), number(float(np.median(kl)))
    count = grouped(len(kl))
    if hard and not over:
        inside = f"None of {count} updates exceeded the radius {radius:g}"
        return f"{inside}: the largest KL was {most}, the median {middle}."
    if hard:
        return f"{grouped(over)} of {count} updates exceeded the radius {radius:g}; the largest KL was {most}."
    return (
        f"The median of {count} updates moved {middle} nats, where {radius:g} were aimed at; {grouped(over)} "
        f"went further, the largest {most}: this KL is predicted, not bounded."
    )


def _entropy(learning: Learning) -> Figure:
    curve = seed_curve(learning, "entropy")
    caption = "No entropy was recorded."
    if curve.middle:
        first, end, last = _ends(curve)
        change = "has become more certain" if end < first else "has not become more certain"
        caption = f"The entropy goes from {number(first)} to {number(end)} nats{_between(last)}: the policy {change}."
    reading = f"Mean over the visited states, after the update. {_reading(learning)}"
    return _lines("entropy", "Entropy of the policy", [curve], "entropy, nats", caption, reading)


def _explained(learning: Learning) -> Figure:
    curve = seed_curve(learning, "explained_variance")
    caption = "No explained variance was recorded."
    if curve.middle:
        _, end, last = _ends(curve)
        caption = f"At the end the critic explains {number(end)} of the variance of new returns{_between(last)}."
    values = [v for part in (curve.middle, *(y for _, y in curve.thin)) for v in part]
    low = min([0.0, *(v for v in values if math.isfinite(v))])
    cut = " Values below −1 are cut off." if low < -1 else ""
    reading = (
        "1: the critic predicts the returns exactly; 0: no better than a constant. Measured on returns that it was not "
        f"yet fitted to.{cut} {_reading(learning)}"
    )
    return _lines(
        "explained-variance", "What the critic explains", [curve], "explained variance", caption, reading,
        y_range=(max(low, -1.0) - 0.05, 1.05), reference=(1.0, "perfect"),
    )  # fmt: skip


def refused(record: Record) -> float:
    """1 where an update was refused or a minibatch step of it taken back, else 0."""
    return float(record.get("accepted", 1.0) == 0.0 or record.get("kl_refused", 0.0) > 0)


def _search(learning: Learning) -> Figure:
    """Halvings and refused updates; for PPO the clipped ratios."""
    title = "Steps shortened and refused"
    updates = [record for run in learning.runs for record in run.records]
    caption = search_sentence(updates)
    looks = styles(["halvings", "refused", "clipped ratios"])
    curves = []
    for label, name in (("halvings", "backtracks"), ("clipped ratios", "clipped")):
        if any(record.get(name, 0.0) > 0 for record in updates):
            curves.append(pooled(learning, lambda run, name=name: run.column(name), label, looks[label], mean=True))
    if any(map(refused, updates)):
        share = pooled(learning, lambda run: [refused(r) for r in run.records], "refused", looks["refused"], mean=True)
        curves.append(share)
    reading = "Means over the updates of all seeds near that step. What is refused leaves the policy as it was."
    top = max((v for c in curves for v in c.middle), default=1.0)
    return _lines("search", title, curves, "mean per update", caption, reading, y_range=(0.0, 1.08 * top))


def search_sentence(updates: Sequence[Record]) -> str:
    """How many steps were halved, clipped or refused."""
    if not updates:
        return "No update was made."
    count, stopped = grouped(len(updates)), sum(map(refused, updates))
    clipped = [r["clipped"] for r in updates if "clipped" in r]
    if clipped:
        back = f"a step was taken back in {grouped(int(stopped))}" if stopped else "no step was taken back"
        return f"In {count} updates {number(100 * float(np.mean(clipped)), 2)} % of the ratios were clipped; {back}."
    halved = [r.get("backtracks", 0.0) for r in updates if r.get("backtracks", 0.0) > 0]
    shorter = f"{grouped(len(halved))} of {count} steps were halved" if halved else f"None of {count} steps was halved"
    times = "once" if halved and max(halved) == 1 else f"{max(halved, default=0):.0f} times"
    most = f" (at most {times})" if halved else ""
    return f"{shorter}{most}, {grouped(int(stopped)) if stopped else 'none'} refused."


def _normaliser(learning: Learning) -> Figure:
    """What renewing the observations' moments does to the policy, beside what the updates do."""
    title = "Drift by normalising observations"
    looks = styles(["update", "normaliser"])
    curves = [
        pooled(learning, lambda run, name=name: run.column(name), label, looks[label])
        for label, name in (("update", "kl"), ("normaliser", "kl_normaliser"))
    ]
    drift = series.finite([v for run in learning.runs for v in run.column("kl_normaliser")], positive=True)
    if not len(drift):
        caption = "Observations are not normalised, so nothing moves the policy but its updates."
        return figures.empty("normaliser", title, caption).worded(caption)
    middle, most = number(float(np.median(drift)), 2), number(float(drift.max()), 2)
    caption = (
        f"Renewing the mean and variance of observations moved the policy by {middle} nats in the median, at most by "
        f"{most}."
    )
    reading = f"It is done after the update, outside of its radius, and fades as the moments settle. {POOLED}"
    return _lines("normaliser", title, curves, "KL, nats per action, log scale", caption, reading, log_y=True)
