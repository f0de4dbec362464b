"""Exploration noise that lasts: its law, its resets, and what it is refused for."""

from __future__ import annotations

import math

import pytest
import torch

import natgrad as ng
from natgrad import rl
from natgrad.rl.heads import CategoricalHead, GaussianHead
from natgrad.rl.noise import CorrelatedNoise

HEAD = GaussianHead((-1.0,), (1.0,), (1,))


def draws(correlation: float, steps: int, n: int = 2000) -> torch.Tensor:
    noise = CorrelatedNoise(n, HEAD, correlation, torch.Generator().manual_seed(0))
    first = torch.ones(n, dtype=torch.bool)
    return torch.stack([noise.draw(first if t == 0 else ~first)[:, 0] for t in range(steps)])


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_every_draw_is_standard_normal_and_successive_ones_have_the_correlation(correlation: float) -> None:
    z = draws(correlation, 30)
    band = 5 / math.sqrt(z.shape[1])
    assert float(z.mean(1).abs().max()) < band
    assert float((z.var(1) - 1).abs().max()) < 2 * band
    assert float(((z[1:] * z[:-1]).mean(1) - correlation).abs().max()) < 2 * band


def test_the_first_draw_of_an_episode_knows_nothing_of_the_one_before() -> None:
    noise = CorrelatedNoise(5000, HEAD, 0.99, torch.Generator().manual_seed(0))
    everywhere = torch.ones(5000, dtype=torch.bool)
    before, after = noise.draw(everywhere), noise.draw(everywhere)
    assert abs(float((before * after).mean())) < 5 / math.sqrt(5000)


def test_actions_are_mean_plus_scaled_noise() -> None:
    f, z = torch.tensor([[0.5, math.log(2.0)]]), torch.tensor([[0.25]])
    assert torch.allclose(HEAD.with_noise(f, z), torch.tensor([[1.0]]))


def test_what_has_no_gaussian_and_what_is_no_correlation_is_refused() -> None:
    with pytest.raises(ng.errors.UnsupportedError, match="continuous"):
        CorrelatedNoise(2, CategoricalHead(3), 0.5, torch.Generator())
    with pytest.raises(ng.errors.ArgumentError, match="noise_correlation"):
        CorrelatedNoise(2, HEAD, 1.0, torch.Generator())


def test_training_with_it_resumes_bit_for_bit(tmp_path) -> None:
    setup = rl.Setup(environments=2, horizon=16, noise_correlation=0.9)
    whole = rl.Training("Pendulum-v1", rl.TRPO(), steps=128, setup=setup).run()
    part = rl.Training("Pendulum-v1", rl.TRPO(), steps=128, setup=setup, folder=tmp_path, every=2)
    for _ in range(2):
        part.update()
    part.save()
    part.close()
    resumed = rl.Training("Pendulum-v1", rl.TRPO(), steps=128, setup=setup, folder=tmp_path).run()
    for ours, theirs in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
