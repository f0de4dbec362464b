"""With a hard radius no update moves the model further, whatever the gradient; and what that means for other data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import adversary
import pytest
import torch

import natgrad as ng

SETTINGS = 40
# The two sides compute the same sum in different orders; in float32, whose outputs have seven digits, natgrad's KL of
# 1e-4 nats is a difference of numbers of order one.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-2}


def figures(taken: list[adversary.Taken]) -> str:
    ratios = torch.tensor([t.held_out / t.setting.max_kl for t in taken if t.moved], dtype=torch.float64)
    top = f"mean {ratios.mean():.3g}, 99 % {ratios.quantile(0.99):.3g}, max {ratios.max():.3g}"
    return f"held-out KL / max_kl over {len(ratios)} accepted steps of {len(taken)}: {top}"


def check(taken: list[adversary.Taken]) -> None:
    """No violation, no step where there should be none, and no bound that holds because nothing moves."""
    for t in taken:
        assert t.excess <= 1 + ROUNDING[t.setting.dtype], t
        assert t.reported == pytest.approx(t.observed, rel=ROUNDING[t.setting.dtype], abs=1e-6 * t.setting.max_kl), t
        assert t.moved <= t.accepted, t
        assert t.observed == t.observed and t.held_out == t.held_out
    moved = [t for t in taken if t.moved]
    assert len(moved) > 0.5 * len(taken)
    boundary = torch.tensor([t.excess for t in moved if t.lr == float("inf")])
    assert boundary.median() > 0.1  # steps to the boundary, up to backtracks
    hurt = Counter(t.attack for t in moved)
    assert all(hurt[kind] for kind in adversary.ATTACKS), hurt
    forms = Counter((t.setting.closure, t.setting.mixed) for t in moved)
    assert len(forms) == 4, forms


def run(steps: int, capsys) -> None:
    taken = [t for setting in adversary.settings(SETTINGS) for t in adversary.run(setting, steps)]
    check(taken)
    with capsys.disabled():
        worst = max(t.excess for t in taken)
        print(f"\n{len(taken)} steps, 0 violations, largest KL / max_kl observed {worst:.9g}; {figures(taken)}")


def test_a_thousand_adversarial_steps_stay_within_the_radius(capsys):
    run(25, capsys)


@pytest.mark.slow
def test_ten_thousand_adversarial_steps_stay_within_the_radius(capsys):
    run(250, capsys)


@pytest.mark.parametrize("search", [ng.LearningRate(), ng.KLClip(0.01), ng.QuadraticFit(max_kl=0.01)], ids=str)
def test_the_attacks_do_break_searches_that_do_not_measure(search):
    """Else the bound would be no achievement."""
    settings = [replace(s, momentum=0.0, closure=False, mixed=False) for s in adversary.settings(6)]
    taken = [t for s in settings for t in adversary.run(s, 20, search=search)]
    assert sum(not t.excess <= 1 for t in taken) > 10
