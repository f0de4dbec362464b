"""Inverses renewed a share at a time: each block as often as before, with the inverse of the averages at that step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import natgrad as ng

STEPS, INTERVAL = 24, 4
SIZES = (6, 9, 3, 8, 4)


def _run(refresh: Any, preset: Any = ng.KFAC) -> tuple[Any, list[dict[str, dict[str, torch.Tensor]]]]:
    """The optimizer, and the state of every block after each step."""
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in pairwise(SIZES)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()
    opt = preset(model, ng.Categorical(), lr=0.1, search=ng.LearningRate(), refresh=refresh)
    generator, states = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        x = torch.randn(16, SIZES[0], dtype=torch.float64, generator=generator)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), x.abs().argmax(1) % SIZES[-1]).backward()
        opt.step()
        states.append(
            {n: {k: v.clone() for k, v in opt.state[p].items()} for n, p in model.named_parameters() if "weight" in n}
        )
    return opt, states


def _renewed(states: list[dict[str, dict[str, torch.Tensor]]]) -> dict[str, list[int]]:
    """By block: the steps at which its inverse became another."""
    key = "inverse.kronecker.left" if "inverse.kronecker.left" in next(iter(states[0].values())) else "basis.left"
    return {
        name: [0, *(t for t in range(1, STEPS) if not torch.equal(states[t][name][key], states[t - 1][name][key]))]
        for name in states[0]
    }


@pytest.mark.parametrize("preset", [ng.KFAC, ng.EKFAC])
def test_every_block_is_renewed_once_in_an_interval_and_never_all_together(preset: Any) -> None:
    _, states = _run(ng.Staggered(1, INTERVAL), preset)
    steps = _renewed(states)
    for found in steps.values():
        later = [t for t in found if t >= INTERVAL]
        assert [t for t in found if t < INTERVAL] == [0, 1, 2]
        assert len(later) == (STEPS - INTERVAL) // INTERVAL
        assert all(b - a == INTERVAL for a, b in pairwise(later))
    assert len({found[-1] % INTERVAL for found in steps.values()}) == 4  # four blocks, four shares


def test_a_renewed_inverse_is_that_of_the_averages_of_its_step() -> None:
    _, states = _run(ng.Staggered(1, INTERVAL))
    for name, steps in _renewed(states).items():
        for t in steps:
            slot = states[t][name]
            left, right = slot["average.output"][0], slot["average.input"][0]
            pi = ((right.trace() / len(right)) / (left.trace() / len(left))).sqrt()
            expected = torch.linalg.inv(left + 1e-3**0.5 / pi * torch.eye(len(left), dtype=left.dtype))
            torch.testing.assert_close(slot["inverse.kronecker.left"], expected, rtol=1e-9, atol=0)


def test_an_interval_of_one_is_an_ordinary_refresh() -> None:
    _, staggered = _run(ng.Staggered(1, 1))
    _, plain = _run(ng.Refresh(1, 1))
    for name, slot in plain[-1].items():
        assert all(torch.equal(staggered[-1][name][key], value) for key, value in slot.items())


def test_a_resumed_run_goes_on_with_the_same_shares() -> None:
    opt, _ = _run(ng.Staggered(2, INTERVAL))
    other, _ = _run(ng.Staggered(2, INTERVAL))
    other.load_state_dict(opt.state_dict())
    share = [opt._curvature.share(i, INTERVAL) for i in range(INTERVAL)]
    assert share == [other._curvature.share(i, INTERVAL) for i in range(INTERVAL)]
    assert sorted(n for names in share for n in names) == sorted(opt._curvature.operators)


def test_shares_do_not_depend_on_the_storage() -> None:
    shares = []
    for storage in (ng.Unpacked(), ng.Packed(least=2)):
        structure = ng.Kronecker(storage=storage)
        opt, _ = _run(ng.Staggered(1, 3), lambda *a, s=structure, **k: ng.KFAC(*a, structure=s, **k))
        shares.append(opt._curvature._costs())
    assert shares[0] == shares[1] and min(shares[0].values()) > 0
