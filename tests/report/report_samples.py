"""Invented comparisons with known numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from natgrad.tasks.results import (
    Comparison,
    Evaluation,
    Machine,
    OptimizerInfo,
    Run,
    Settings,
    SummaryRow,
    Target,
    TaskInfo,
    Tuning,
    TuningTrial,
)

MACHINE = Machine("0.1.0", "2.13.0", "3.11.2", "Linux", "Some processor", 2, 1, "cpu", 61.25)
TASK = TaskInfo(
    "digits-autoencoder", "Autoencoder 64-32-16-8-16-32-64 of handwritten digits.", "Bernoulli", "squared error", False,
    1437, 360, 6480, 256,
)  # fmt: skip
# name: (family, rate of decay per step, seconds per step, typical KL or None, state bytes)
PROFILES: dict[str, tuple[str, float, float, float | None, int]] = {
    "kfac": ("natgrad", 0.09, 0.021, 2e-3, 3_100_000),
    "sgd": ("torch", 0.006, 0.004, 2e-5, 0),
    "adamw": ("torch", 0.018, 0.0046, 2e-4, 103_000),
    "ekfac": ("natgrad", 0.1, 0.034, 2.2e-3, 4_200_000),
    "muon": ("torch", 0.02, 0.009, 4e-4, 61_000),
    "lbfgs": ("torch", 0.05, 0.03, None, 520_000),
    "ngd": ("natgrad", 0.14, 0.31, 3e-3, 168_000_000),
    "diagonal-ngd": ("natgrad", 0.02, 0.011, 3e-4, 52_000),
    "block-ngd": ("natgrad", 0.12, 0.14, 2.6e-3, 61_000_000),
    "gram-ngd": ("natgrad", 0.135, 0.09, 2.9e-3, 900_000),
    "hessian-free": ("natgrad", 0.15, 0.42, 9e-3, 52_000),
    "trust-region-ngd": ("natgrad", 0.08, 0.16, 1e-2, 52_000),
}


def run_of(name: str, seed: int, budget: float, floor: float = 0.09) -> Run:
    family, rate, cost, kl, state = PROFILES[name]
    rng = np.random.default_rng([seed, len(name), int(cost * 1e4)])
    steps = int(budget / cost)
    k = np.arange(steps)
    clean = floor + (0.69 - floor) * np.exp(-rate * k * rng.uniform(0.85, 1.15)) + 0.02 / (1 + rate * k)
    noisy = clean * np.exp(rng.normal(0, 0.04, steps))
    times = cost * rng.uniform(0.9, 1.2, steps) + (cost * 2.5 * (k % 10 == 0) if family == "natgrad" else 0)
    seconds = np.cumsum(times)
    measured = (kl if kl else math.nan) * np.exp(-1.5 * k / steps) * rng.lognormal(0, 0.4, steps)
    predicted = measured * rng.lognormal(-0.1, 0.25, steps) if family == "natgrad" else np.full(steps, math.nan)
    at = sorted({0, *range(0, steps, max(1, steps // 40)), steps - 1})
    evaluations = tuple(
        Evaluation(int(j), float(seconds[j - 1]) if j else 0.0, float(clean[j]), float(clean[j]) * 1.06 + 0.004,
                   float(clean[j]) * 8)
        for j in at
    )  # fmt: skip
    return Run(
        name, seed, 0.1, True, tuple(times.tolist()), tuple(seconds.tolist()), tuple(noisy.tolist()),
        tuple(measured.tolist()), tuple(predicted.tolist()), evaluations, 9_000_000 + state, state,
    )  # fmt: skip


def row_of(name: str, runs: list[Run], target: float | None, cheapest: float) -> SummaryRow:
    """Medians written out here on their own, as the engine's contract states them."""
    good = [r for r in runs if r.failure is None]

    def median(values: list[float]) -> float | None:
        return float(np.median(values)) if values and np.isfinite(np.median(values)) else None

    arrivals = []
    for r in runs:
        hit = [e for e in r.evaluations if target is not None and e.train_loss <= target]
        arrivals.append((hit[0].step, hit[0].seconds) if hit else (math.inf, math.inf))
    finals = [r.evaluations[-1] for r in good if r.evaluations]
    time = median([t for r in good for t in r.seconds_per_step])
    failure = next((r.failure for r in runs if r.failure), None)
    return SummaryRow(
        name, runs[0].lr if runs else 0.1, True, len(runs), len(runs) - len(good),
        int(median([r.steps for r in good]) or 0), time, time / cheapest if time else None,
        median([e.train_loss for e in finals]), median([e.test_loss for e in finals]),
        median([e.test_metric for e in finals]), sum(math.isfinite(a[0]) for a in arrivals),
        median([a[0] for a in arrivals]), median([a[1] for a in arrivals]),
        median([v for r in good for v in r.kl_measured if math.isfinite(v)]),
        good[0].peak_memory_bytes if good else None, good[0].state_bytes if good else None, failure,
    )  # fmt: skip


def comparison(
    names: tuple[str, ...] = ("kfac", "sgd", "adamw"),
    seeds: tuple[int, ...] = (0, 1, 2),
    *,
    budget: float = 4.0,
    target: float | None = 0.12,
    tune: bool = True,
) -> Comparison:
    runs = [run_of(name, seed, budget) for name in names for seed in seeds]
    return assembled(names, seeds, runs, budget=budget, target=target, tune=tune)


KNOBS = {"natgrad": "max_kl", "torch": "lr"}


def assembled(
    names: tuple[str, ...], seeds: tuple[int, ...], runs: list[Run], *, budget: float, target: float | None, tune: bool
) -> Comparison:
    infos = tuple(
        OptimizerInfo(n, PROFILES[n][0], 0.1, f"momentum 0.9, {n} defaults", KNOBS[PROFILES[n][0]]) for n in names
    )
    times = [float(np.median(r.seconds_per_step)) for r in runs if r.seconds_per_step]
    cheapest = min(times, default=1.0)
    rows = tuple(row_of(n, [r for r in runs if r.optimizer == n], target, cheapest) for n in names)
    factors = (0.1, 0.3, 1.0, 3.0, 10.0)
    trials = tuple(
        TuningTrial(n, 0.1 * f, 0, 40, 0.2 + abs(math.log(f)) * 0.1 if f < 10 else math.nan,
                    "the loss became NaN at step 12" if f >= 10 else None)
        for n in names for f in factors
    )  # fmt: skip
    tuning = Tuning(factors, 1.0, None, trials) if tune else None
    settings = Settings(
        seeds, budget, None, 1000, tuning,
        f"natgrad compare digits-autoencoder --optimizers {','.join(names)} --seeds {len(seeds)} --budget {budget:g}s",
    )  # fmt: skip
    goal = None if target is None else Target(target, "median final training loss of adamw")
    return Comparison(TASK, settings, MACHINE, infos, tuple(runs), goal, rows)


def failing(c: Comparison, optimizer: str, seeds: tuple[int, ...] | None = None, at: int = 30) -> Comparison:
    """The same comparison with runs of one optimizer broken off after ``at`` steps (all seeds by default)."""
    runs = []
    for run in c.runs:
        if run.optimizer == optimizer and (seeds is None or run.seed in seeds):
            run = dataclasses.replace(
                run,
                **{
                    f: getattr(run, f)[:at]
                    for f in ("seconds_per_step", "seconds", "train_loss", "kl_measured", "kl_predicted")
                },
                evaluations=tuple(e for e in run.evaluations if e.step < at),
                failure=f"the loss became NaN at step {at}",
            )
        runs.append(run)
    return assembled(
        tuple(i.name for i in c.optimizers), c.settings.seeds, runs, budget=c.settings.budget_seconds or 1.0,
        target=c.target.train_loss if c.target else None, tune=c.settings.tuning is not None,
    )  # fmt: skip
