"""The list of speed targets: what is met and what is missed must be told apart."""

from __future__ import annotations

import pytest
import torch
from benchmarks.harness import Action, Plan
from benchmarks.targets import Outcome, Target, outcomes, small_layer_targets
from torch import nn

from benchmarks import targets


def test_a_missed_target_says_by_how_much() -> None:
    assert str(Outcome(1, "time", 2.0, 2.0)).endswith("target 2: met")
    assert str(Outcome(1, "time", 2.0, 3.0, 2.5, 3.5)).endswith("target 2: MISSED by 50 %")
    assert str(Outcome(3, "bytes", 0.0, 1.0)).endswith("MISSED")


def test_targets_are_made_of_the_times_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Clock:
        perf_counter = staticmethod(lambda: now[0])
        process_time = staticmethod(lambda: now[0])

    monkeypatch.setattr("benchmarks.harness.time", Clock)

    def lasts(seconds: float) -> None:
        now[0] += seconds

    actions = [Action("a", lambda: lasts(3.0)), Action("b", lambda: lasts(2.0))]
    found = outcomes([Target(1, "ratio", 1.0, lambda s: s["a"] / s["b"])], actions, Plan(4, 4, 1e9, 0.0))
    assert (found[0].value, found[0].low, found[0].high) == pytest.approx((1.5, 1.5, 1.5))


def test_what_is_written_out_layer_by_layer_is_kfac() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(32, 5), torch.arange(32) % 3
    by_layer = targets._ByLayer(model, targets.ng.Categorical())
    before = nn.functional.cross_entropy(model(x), y).item()
    for _ in range(12):
        by_layer.step(x, y)
    a = torch.cat([x, torch.ones(32, 1)], 1)
    expected = 0.95**12 * torch.eye(6) + (1 - 0.95**12) * a.T @ a / 32
    torch.testing.assert_close(by_layer.a[0], expected)
    assert nn.functional.cross_entropy(model(x), y).item() < before


def test_the_tape_retains_nothing_of_its_own() -> None:
    workload = targets.autoencoder(width=20, batch=8)
    assert targets._retained(workload) == 0


def test_every_group_can_be_measured() -> None:
    listed, actions = small_layer_targets(quick=True)
    found = outcomes(listed, actions, Plan(2, 2, 1e9, 0.0))
    assert [o.number for o in found] == [7] and found[0].value > 0
