"""The pictures of a comparison: from its runs to captioned figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from natgrad.report import figures, series, words
from natgrad.report.drawing import Figure
from natgrad.report.figures import Bar, Cloud, Curve, Interval, Style
from natgrad.report.series import Band
from natgrad.report.svg import number
from natgrad.tasks.results import Comparison, Run

Extract = Callable[[Run], tuple[list[float], list[float]]]
MANY_SEEDS = "Line: median over the seeds; band: lowest to highest seed, drawn as far as all seeds have data."
ONE_SEED = "One seed, so there is no band."
CROSS = " A thin line that ends in a cross is a run that failed."


def _seeds(comparison: Comparison) -> str:
    return MANY_SEEDS if len(comparison.settings.seeds) > 1 else ONE_SEED


def styles(comparison: Comparison) -> dict[str, Style]:
    """The look of every optimizer in all pictures of this comparison."""
    return figures.styles(
        [info.name for info in comparison.optimizers], {i.name: i.family == "natgrad" for i in comparison.optimizers}
    )


def pictures(comparison: Comparison) -> list[Figure]:
    """All pictures in the order of the page; one without data is a placeholder that says why."""
    looks = styles(comparison)
    metric = comparison.task.metric
    arrow = "higher is better" if comparison.task.metric_higher_is_better else "lower is better"
    higher = comparison.task.metric_higher_is_better
    return [
        _loss(comparison, looks, "train-loss-steps", "Training loss against steps", "steps", "train_loss"),
        _loss(comparison, looks, "train-loss-seconds", "Training loss against seconds", "seconds", "train_loss"),
        _loss(comparison, looks, "test-loss-seconds", "Test loss against seconds", "seconds", "test_loss"),
        _loss(
            comparison, looks, "test-metric-seconds", f"Test {metric} against seconds", "seconds", "test_metric",
            label=f"{metric} ({arrow})", higher=higher,
        ),
        _to_target(comparison, looks, "steps-to-target", "Steps to the target", "steps"),
        _to_target(comparison, looks, "seconds-to-target", "Seconds to the target", "seconds"),
        _kl(comparison, looks),
        _agreement(comparison, looks),
        _cost(comparison, looks),
        _memory(comparison, looks),
    ]  # fmt: skip


def _curve(name: str, style: Style, runs: tuple[Run, ...], extract: Extract, log_x: bool, offset: float = 0.0) -> Curve:
    """Seeds that ended well as a band, failed ones as thin lines."""
    whole = series.band([extract(run) for run in runs if run.failure is None], log_x=log_x, offset=offset)
    failed = [_shortened(*extract(run)) for run in runs if run.failure is not None]
    return Curve(name, style, whole.x, whole.middle, whole.low, whole.high, [pair for pair in failed if pair[0]])


def _shortened(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    stride = max(1, math.ceil(len(x) / series.MAX_POINTS))
    keep = sorted({*range(0, len(x), stride), len(x) - 1}) if x else []
    pairs = [(x[k], y[k]) for k in keep if math.isfinite(y[k])]
    return [u for u, _ in pairs], [v for _, v in pairs]


def _loss(
    comparison: Comparison,
    looks: Mapping[str, Style],
    name: str,
    title: str,
    unit: str,
    field: str,
    *,
    label: str = "",
    higher: bool = False,
) -> Figure:
    """Evaluations of every optimizer against steps or seconds of training."""
    x_field = "step" if unit == "steps" else "seconds"

    def extract(run: Run) -> tuple[list[float], list[float]]:
        return words.evaluations_of(run.evaluations, x_field), words.evaluations_of(run.evaluations, field)

    whole = [extract(run) for run in comparison.runs if run.evaluations and run.failure is None]
    log_x = series.spans([x[-1] for x, _ in whole], 12) or series.early(whole)
    # Zero gets a place on the logarithmic axis: left of the first evaluation after it.
    offset = min((u for x, _ in whole for u in x if u > 0), default=1.0) if log_x else 0.0
    curves = [
        _curve(i.name, looks[i.name], comparison.runs_of(i.name), extract, log_x, offset) for i in comparison.optimizers
    ]
    curves = [c for c in curves if c.x or c.extras]
    what = label.split(" (")[0] or ("training loss" if field == "train_loss" else "test loss")
    if not curves:
        return figures.empty(name, title, f"No run has a finite {what}.").worded(f"No run has a finite {what}.")
    y_range, log_y, cut = _vertical(curves, bounded=bool(label))
    target = comparison.target
    reference = (target.train_loss, f"target {number(target.train_loss)}") if target and field == "train_loss" else None
    if reference and log_y and reference[0] <= 0:
        log_y, y_range = False, None
    if reference and y_range:
        y_range = (min(y_range[0], reference[0] * (0.9 if log_y else 1.0)), y_range[1])
    x_label = "update steps" if unit == "steps" else "training time (s)"
    figure = figures.lines(
        name, title, curves, log_x=log_x, x_offset=offset, log_y=log_y, reference=reference, y_range=y_range,
        x_label=x_label + (", log scale" if log_x else ""),
        y_label=label or f"mean loss per prediction (nats{', log scale' if log_y else ''})",
    )  # fmt: skip
    bands = {c.name: Band(tuple(c.x), tuple(c.middle), tuple(c.low), tuple(c.high)) for c in curves if c.x}
    reading = _seeds(comparison) + (CROSS if any(c.extras for c in curves) else "") + cut
    return figure.worded(words.curves(bands, unit, what, higher=higher), reading)


def _vertical(curves: list[Curve], bounded: bool) -> tuple[tuple[float, float] | None, bool, str]:
    """(range or None, logarithmic?, note): the axis follows the runs that train; diverging ones are cut off."""
    middle = series.finite([v for c in curves for v in (*c.middle, *c.low, *c.high)])
    if not len(middle):
        return None, False, ""
    starts = series.finite([c.middle[0] for c in curves if c.middle])
    ends = series.finite([min(c.middle) for c in curves if c.middle])
    log = not bounded and bool(middle.min() > 0) and series.spans([*starts, *ends], 4)
    low, high = float(middle.min()), float(middle.max())
    # A loss of a few times the common start is worth showing, one of a million is not.
    usual = float(np.median(starts)) if len(starts) else high
    ceiling = usual * 3 if log else usual + 0.5 * max(usual - low, abs(usual) * 0.1)
    if bounded or high <= ceiling:
        return None, log, ""
    bottom = low / 1.15 if log else low - 0.05 * (ceiling - low)
    return (bottom, ceiling), log, f" Values above {number(ceiling)} (up to {number(high)}) are cut off."


def _to_target(comparison: Comparison, looks: Mapping[str, Style], name: str, title: str, unit: str) -> Figure:
    """Median arrival as a bar, seeds as circles; who did not arrive says so."""
    target = comparison.target
    if target is None:
        reason = "There is no target: no run gave a training loss to count to."
        return figures.empty(name, title, reason).worded(reason)
    which = 0 if unit == "steps" else 1
    rows, medians = [], {}
    for row in comparison.summary:
        runs = comparison.runs_of(row.optimizer)
        arrivals = [series.arrival(run, target.train_loss)[which] for run in runs]
        points = [a for a in arrivals if math.isfinite(a)]
        value = row.steps_to_target if unit == "steps" else row.seconds_to_target
        if value is not None:
            medians[row.optimizer] = float(value)
        short = f"{len(points)} of {len(runs)} seeds" if len(points) < len(runs) else ""
        shown = "" if value is None else words.amount(float(value), unit).removesuffix(" steps").removesuffix(" s")
        note = ", ".join(filter(None, [shown, short])) if points else "not reached"
        rows.append(Bar(row.optimizer, looks[row.optimizer], value, points, note=note))
    figure = figures.bars(name, title, rows, x_label="update steps" if unit == "steps" else "training time (s)")
    goal = f"training loss {number(target.train_loss)}"
    caption = words.to_target(comparison.summary, unit, medians, goal, len(comparison.settings.seeds))
    counted = f"at the first evaluation at or below the target ({target.source})"
    if len(comparison.settings.seeds) > 1:
        reading = f"Bar: median over seeds; circles: single seeds, {counted}. No bar: not reached in most seeds."
    else:
        reading = f"One seed, {counted}."
    return figure.worded(caption, reading)


def _kl(comparison: Comparison, looks: Mapping[str, Style]) -> Figure:
    """Measured KL of every update against steps."""
    name, title = "kl-per-update", "Measured KL per update"
    log_x = series.spans([float(run.steps) for run in comparison.runs], 8)
    curves, medians = [], {}
    for info in comparison.optimizers:
        runs = comparison.runs_of(info.name)
        pooled = series.finite([v for run in runs for v in run.kl_measured], positive=True)
        if not len(pooled):
            continue
        medians[info.name] = float(np.median(pooled))

        def extract(run: Run) -> tuple[list[float], list[float]]:
            positive = [v if v > 0 else math.nan for v in run.kl_measured]
            return series.windows(positive, log_x=log_x)

        curves.append(_curve(info.name, looks[info.name], runs, extract, log_x))
    if not curves:
        reason = "No optimizer measured a positive KL divergence."
        return figures.empty(name, title, reason).worded(reason)
    figure = figures.lines(
        name, title, curves, log_x=log_x, log_y=True, x_label="update steps" + (", log scale" if log_x else ""),
        y_label="mean KL(old ‖ new) per prediction (nats, log scale)",
    )  # fmt: skip
    missing = [info.name for info in comparison.optimizers if info.name not in medians]
    reading = "How far one update moves the model's predictions, as medians over windows of steps. " + _seeds(
        comparison
    )
    reading += f" Not measured: {words.listed(missing)}." if missing else ""
    return figure.worded(words.kl(medians), reading)


def _agreement(comparison: Comparison, looks: Mapping[str, Style], most: int = 2400) -> Figure:
    """What the quadratic model expected of an update against what it did."""
    name, title = "kl-predicted-measured", "Predicted against measured KL"
    pairs: dict[str, np.ndarray] = {}
    for info in comparison.optimizers:
        found = [
            (p, m)
            for run in comparison.runs_of(info.name)
            for p, m in zip(run.kl_predicted, run.kl_measured, strict=False)
            if math.isfinite(p) and math.isfinite(m) and p > 0 and m > 0
        ]
        if found:
            pairs[info.name] = np.array(found)
    if not pairs:
        reason = "No optimizer both predicted and measured the KL divergence of its updates."
        return figures.empty(name, title, reason).worded(reason)
    clouds = []
    for optimizer, data in pairs.items():
        stride = max(1, math.ceil(len(data) * len(pairs) / most))
        clouds.append(Cloud(optimizer, looks[optimizer], data[::stride, 0].tolist(), data[::stride, 1].tolist()))
    figure = figures.scatter(
        name, title, clouds, x_label="predicted KL, ½ ΔᵀFΔ (nats, log scale)", y_label="measured KL (nats, log scale)"
    )
    caption = words.agreement({n: data[:, 1] / data[:, 0] for n, data in pairs.items()})
    reading = (
        "One mark per update, all seeds (thinned when there are many). On the dashed diagonal the quadratic model is "
        "right; above it, updates move the predictions further than it expects."
    )
    return figure.worded(caption, reading)


def _cost(comparison: Comparison, looks: Mapping[str, Style]) -> Figure:
    """Step time over that of the cheapest optimizer."""
    name, title = "step-cost", "Cost of one step"
    found = series.cheapest(comparison)
    if found is None:
        return figures.empty(name, title, "No step was timed.").worded("No step was timed.")
    reference, unit = found
    ratios = {row.optimizer: row.cost_ratio for row in comparison.summary}
    rows, medians, means = [], {}, {}
    for info in comparison.optimizers:
        times = series.finite([t for run in comparison.runs_of(info.name) for t in run.seconds_per_step]) / unit
        if not len(times):
            continue
        low, middle, high = (float(q) for q in np.quantile(times, (0.1, 0.5, 0.9)))
        middle = ratios.get(info.name) or middle
        medians[info.name], means[info.name] = middle, float(times.mean())
        rows.append(Interval(info.name, looks[info.name], low, middle, high, means[info.name], f"{number(middle)}×"))
    figure = figures.intervals(
        name,
        title,
        rows,
        x_label=f"time of one step ÷ median step of {reference}",
        one=f"{reference}, {words.duration(unit)}",
    )
    reading = (
        "Mark: median step; bar: from the 10 % fastest to the 10 % slowest steps; upright line: mean, which counts the "
        "occasional refresh of the curvature at its full price."
    )
    return figure.worded(words.cost(medians, means, reference, unit), reading)


def _memory(comparison: Comparison, looks: Mapping[str, Style]) -> Figure:
    """Peak bytes with the optimizer's state inside."""
    name, title = "memory", "Memory"
    known = [b for row in comparison.summary for b in (row.peak_memory_bytes, row.state_bytes) if b is not None]
    if not known:
        return figures.empty(name, title, "No memory was measured.").worded("No memory was measured.")
    divisor, unit = bytes_unit(max(known))
    rows, peaks, states = [], {}, {}
    for row in comparison.summary:
        peak = None if row.peak_memory_bytes is None else row.peak_memory_bytes / divisor
        state = None if row.state_bytes is None else row.state_bytes / divisor
        if peak is not None:
            peaks[row.optimizer] = peak
        if state is not None:
            states[row.optimizer] = state
        note = "not measured" if peak is None and state is None else f"{number(state)} / {number(peak)}"
        rows.append(Bar(row.optimizer, looks[row.optimizer], peak, (), state, note))
    figure = figures.bars(name, title, rows, x_label=f"optimizer state / peak memory ({unit})")
    reading = (
        "Full colour: the optimizer's state; light: the most that tensors took in a step (parameters, gradients, state "
        "and activations). The most over the seeds."
    )
    return figure.worded(words.memory(peaks, states, unit), reading)


def bytes_unit(most: float) -> tuple[float, str]:
    """The binary unit in which ``most`` bytes is a handy number."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if most >= 1024**power:
            return 1024.0**power, unit
    return 1.0, "bytes"
