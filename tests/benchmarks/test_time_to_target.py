from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from benchmarks import budget, time_to_target
from natgrad.tasks import load_task
from natgrad.tasks.task import validate
from natgrad.tasks.train import Limit


def _ratios(**by_preset: tuple[float, float]) -> dict[str, float]:
    found = {f"{p}, {kind}": math.inf for p in time_to_target.PRESETS for kind in ("tuned", "default")}
    for preset, (tuned, default) in by_preset.items():
        found |= {f"{preset}, tuned": tuned, f"{preset}, default": default}
    return found


def test_the_best_preset_of_each_task_and_one_default_for_all():
    ratios = {"a": _ratios(kfac=(0.2, 0.5), ekfac=(0.5, 3.0)), "b": _ratios(kfac=(1.0, 1.1), ekfac=(0.8, 0.1))}
    mean, worst = time_to_target.verdicts(ratios)
    assert " 0.400 " in mean and mean.endswith("met")  # the root of 0.2 times 0.8
    assert " 1.100 " in worst and "(kfac)" in worst and worst.endswith("met")


def test_a_task_that_is_never_won_misses_the_target():
    mean, worst = time_to_target.verdicts({"a": _ratios(kfac=(0.2, 0.5)), "b": _ratios()})
    assert mean.endswith("MISSED") and worst.endswith("MISSED")


def test_twelve_trials_with_the_default_among_them_and_the_best_one_wins(monkeypatch):
    tried: list[float] = []

    def train(task, spec, lr, seed, limit, **options):
        tried.append(lr)
        failure = "diverged" if lr > 4 else None
        return SimpleNamespace(final=SimpleNamespace(train_loss=abs(lr - 3.0) - lr * (lr > 4)), failure=failure), False

    monkeypatch.setattr(time_to_target, "train", train)
    assert time_to_target.tuned(None, None, 0.5, Limit(steps=1), 12) == 2.0  # type: ignore[arg-type]
    assert len(tried) == 12 == len(set(tried)) and 0.5 in tried


@pytest.mark.parametrize("build", [time_to_target.ill_conditioned, time_to_target.upsampled_digits])
def test_the_tasks_of_its_own_fit_together(build):
    validate(build())


def test_a_budget_of_steps():
    run = budget.train(load_task("digits-autoencoder"), 0, 0.0, 4)
    assert run.steps == 4 and math.isfinite(run.average) and run.average != run.last
