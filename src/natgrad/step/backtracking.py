"""Shorten a step until what is measured at its end is acceptable."""

from __future__ import annotations

import math
from collections.abc import Callable

from natgrad.errors import ArgumentError
from natgrad.step.local import LocalModel, Probe, Ray, Step, rejected

Verdict = Callable[[float, float, "float | None"], str]
"""(t, measured KL, measured change of the loss or None) -> why Δ(t) will not do; empty: it will."""


def need_probe(owner: str, probe: Probe | None) -> Probe:
    """``probe``, or ArgumentError where there is none."""
    if probe is None:
        raise ArgumentError(
            f"{owner} measures at the new parameters, and was given no probe to do so. Pass probe=..., a callable that "
            "evaluates the model at θ + delta (see natgrad.step.Probe), or use a search that does not measure: KLClip."
        )
    return probe


def backtrack(
    local: LocalModel, ray: Ray, t: float, probe: Probe, verdict: Verdict, *, shrink: float, backtracks: int
) -> Step:
    """The first of Δ(t), Δ(shrink·t), Δ(shrink²·t) … that ``verdict`` accepts; rejected after ``backtracks`` of them.

    Whatever the verdict, a trial whose KL or loss is not finite is not accepted. Predictions are recomputed for the
    length at hand, never multiplied up from trial to trial.
    """
    numbers = ray.floats()
    if numbers is None:
        return not_finite(local)
    scale, slope, curvature, penalty = numbers
    base = None if local.loss is None else float(local.loss)
    reason = ""
    for taken in range(backtracks + 1):
        delta = ray.delta(t)
        trial = probe(delta)
        kl = float(trial.kl)
        change = None if base is None or trial.loss is None else float(trial.loss) - base
        reason = _unusable(kl, change) or verdict(t, kl, change)
        if not reason:
            return Step(
                delta=delta,
                accepted=True,
                lr=t / scale,
                kl_predicted=0.5 * abs(curvature) * t * t,
                kl_measured=kl,
                loss_change_predicted=0.5 * (curvature + penalty) * t * t - slope * t,
                loss_change_measured=change,
                backtracks=taken,
                damping=local.damping,
            )
        t *= shrink
    return rejected(local.damping, f"{reason} (after {backtracks} backtracks)", tried=True, backtracks=backtracks)


def not_finite(local: LocalModel) -> Step:
    """The rejection of a direction, gradient or metric with NaN or infinity in it."""
    return rejected(
        local.damping, "the direction, the gradient or the metric is not finite", tried=False, predicted=math.nan
    )


def _unusable(kl: float, change: float | None) -> str:
    if not math.isfinite(kl):
        return f"the measured KL is {kl}"
    if change is not None and not math.isfinite(change):
        return f"the measured change of the loss is {change}"
    return ""
