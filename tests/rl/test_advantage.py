"""Generalised advantage estimation against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from natgrad.rl import advantages


def by_definition(rewards, values, following, terminated, truncated, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k} up to the end of the episode that t is in, each sum on its own."""
    steps, n = rewards.shape
    result = torch.zeros_like(rewards)
    for i in range(n):
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                future = 0.0 if terminated[k, i] else gamma * following[k, i]
                result[t, i] += weight * (rewards[k, i] + future - values[k, i])
                weight *= gamma * lam
                if terminated[k, i] or truncated[k, i]:
                    break
    return result


def test_two_episodes_by_hand():
    """γ = 1/2, λ = 1/2; the first episode ends, the second is cut off, the third goes on."""
    rewards = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
    values = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0]], dtype=torch.float64)
    following = torch.tensor([[20.0], [7.0], [40.0], [6.0], [60.0]], dtype=torch.float64)
    terminated = torch.tensor([[False], [True], [False], [False], [False]])
    truncated = torch.tensor([[False], [False], [False], [True], [False]])
    # δ = (1+10−10, 2−20, 3+20−30, 4+3−40, 5+30−50) = (1, −18, −7, −33, −15)
    expected = [1 - 18 / 4, -18.0, -7 - 33 / 4, -33.0, -15.0]
    found = advantages(rewards, values, following, terminated, truncated, gamma=0.5, lam=0.5)
    assert found[:, 0].tolist() == expected


@st.composite
def problems(draw):
    steps, n = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    often = draw(st.sampled_from([0.0, 0.1, 0.5]))
    rewards, values, following = (torch.randn(steps, n, generator=generator, dtype=torch.float64) for _ in range(3))
    terminated, truncated = (torch.rand(steps, n, generator=generator) < often for _ in range(2))
    rates = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
    return rewards, values, following, terminated, truncated, draw(rates), draw(rates)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_the_recursion_is_the_definition(problem):
    *tensors, gamma, lam = problem
    found = advantages(*tensors, gamma=gamma, lam=lam)
    torch.testing.assert_close(found, by_definition(*tensors, gamma, lam), rtol=1e-12, atol=1e-12)


@given(problems())
@settings(max_examples=40, deadline=None)
def test_with_lambda_one_the_target_is_the_discounted_return(problem):
    """Whatever the critic says inside an episode; where it is cut off, the critic's value there counts."""
    rewards, values, _, terminated, truncated, gamma, _ = problem
    following = torch.cat([values[1:], values[:1]])  # consistent inside an episode, as it is in a rollout
    returns = advantages(rewards, values, following, terminated, truncated, gamma=gamma, lam=1.0) + values
    running = following[-1]
    for t in range(len(rewards) - 1, -1, -1):
        ahead = torch.where(truncated[t], following[t], running)
        running = rewards[t] + gamma * torch.where(terminated[t], 0.0, ahead)
        torch.testing.assert_close(returns[t], running, rtol=1e-10, atol=1e-10)


@given(problems())
@settings(max_examples=40, deadline=None)
def test_of_a_perfect_critic_all_advantages_are_zero(problem):
    *_, terminated, truncated, gamma, lam = problem
    values, following, *_ = problem[1:]
    rewards = values - gamma * torch.where(terminated, 0.0, following)
    found = advantages(rewards, values, following, terminated, truncated, gamma=gamma, lam=lam)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_what_comes_after_an_end_does_not_count():
    generator = torch.Generator().manual_seed(0)
    rewards, values, following = (torch.randn(6, 2, generator=generator) for _ in range(3))
    ends = torch.zeros(6, 2, dtype=torch.bool)
    ends[2] = True
    for kind in ("terminated", "truncated"):
        flags = {"terminated": torch.zeros_like(ends), "truncated": torch.zeros_like(ends)} | {kind: ends}
        options = {**flags, "gamma": 0.9, "lam": 0.9}
        before = advantages(rewards, values, following, **options)
        later = rewards.clone()
        later[3:] += 100
        assert torch.equal(advantages(later, values, following, **options)[:3], before[:3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_value_after_the_end_of_an_episode_is_not_looked_at(bad):
    zeros, ends = torch.zeros(2, 1), torch.tensor([[False], [True]])
    following = torch.tensor([[0.0], [bad]])
    found = advantages(zeros, zeros, following, ends, torch.zeros_like(ends), gamma=0.9, lam=0.9)
    assert torch.equal(found, zeros)
