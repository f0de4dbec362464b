"""What the policies ascend, against formulas written by hand: clipped and penalised surrogates, the entropy bonus."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import natgrad.rl as rl
from natgrad.rl.heads import CategoricalHead, GaussianHead
from natgrad.rl.normalise import Unchanged
from natgrad.rl.policy import Critic, Policy
from natgrad.rl.rollout import Samples

N, SIZE, CLIP = 96, 3, 0.2
Array = np.ndarray


class Choice:
    """A softmax over four actions, whose logits are linear in the observation. Formulas are per sample, [N, …]."""

    head = CategoricalHead(4)

    @staticmethod
    def policy() -> Policy:
        return Policy(nn.Linear(SIZE, 4), Choice.head, Unchanged()).double()

    @staticmethod
    def probabilities(f: Array) -> Array:
        p = np.exp(f - f.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    @staticmethod
    def log_prob(f: Array, a: Array) -> Array:
        return np.log(Choice.probabilities(f))[np.arange(len(a)), a]

    @staticmethod
    def score(f: Array, a: Array) -> Array:
        """∂ log p(a) / ∂f = e_a − p."""
        return np.eye(4)[a] - Choice.probabilities(f)

    @staticmethod
    def kl_slope(old: Array, f: Array) -> Array:
        """∂ KL(old ‖ new) / ∂f = p − p_old."""
        return Choice.probabilities(f) - Choice.probabilities(old)

    @staticmethod
    def entropy_slope(f: Array) -> Array:
        """∂H/∂f_j = −p_j (log p_j + H)."""
        p = Choice.probabilities(f)
        return -p * (np.log(p) - (p * np.log(p)).sum(-1, keepdims=True))


class Normal:
    """Two Gaussian actions; f = [mean, log σ] is linear in the observation."""

    head = GaussianHead((-math.inf,) * 2, (math.inf,) * 2, (2,))

    @staticmethod
    def policy() -> Policy:
        return Policy(nn.Linear(SIZE, 4), Normal.head, Unchanged()).double()

    @staticmethod
    def log_prob(f: Array, a: Array) -> Array:
        m, s = f[:, :2], f[:, 2:]
        return (-0.5 * ((a - m) / np.exp(s)) ** 2 - s - 0.5 * math.log(2 * math.pi)).sum(-1)

    @staticmethod
    def score(f: Array, a: Array) -> Array:
        """∂/∂m = (a − m)/σ², ∂/∂log σ = (a − m)²/σ² − 1."""
        m, s = f[:, :2], f[:, 2:]
        return np.concatenate([(a - m) * np.exp(-2 * s), (a - m) ** 2 * np.exp(-2 * s) - 1], -1)

    @staticmethod
    def kl_slope(old: Array, f: Array) -> Array:
        """∂ KL(old ‖ new): (m − m_old)/σ², and 1 − (σ_old² + (m − m_old)²)/σ²."""
        d, s = f[:, :2] - old[:, :2], f[:, 2:]
        return np.concatenate([d * np.exp(-2 * s), 1 - (np.exp(2 * old[:, 2:]) + d**2) * np.exp(-2 * s)], -1)

    @staticmethod
    def entropy_slope(f: Array) -> Array:
        """H = Σ log σ + constant."""
        return np.repeat([[0.0, 0.0, 1.0, 1.0]], len(f), 0)


KINDS = pytest.mark.parametrize("kind", [Choice, Normal])


def problem(kind: Any) -> tuple[Policy, Critic, Samples, torch.Tensor]:
    """A policy some way from the one that acted, so that ratios lie on both sides of the clip; and that one's f."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy, critic = kind.policy(), Critic(nn.Linear(SIZE, 1), Unchanged()).double()
        x = torch.randn(N, SIZE, dtype=torch.float64)
        advantages, returns = torch.randn(2, N, dtype=torch.float64)
        with torch.no_grad():
            old = policy(x)
            actions = policy.head.likelihood.sample(old, generator=torch.Generator().manual_seed(1))[0]
            for p in policy.parameters():
                p.add_(0.2 * torch.randn_like(p))
    log_probs = torch.from_numpy(kind.log_prob(old.numpy(), actions.numpy()))
    return policy, critic, Samples(x, None, None, None, actions, log_probs, advantages, returns, None), old


def outputs(weight: Array, bias: Array, x: Array) -> Array:
    return x @ weight.T + bias


def gradient(slope: Array, x: Array) -> tuple[Array, Array]:
    """Of the mean of a function of f = W x + b with derivative ``slope``, for W and b."""
    return slope.T @ x / len(x), slope.mean(0)


def clipped_slope(kind: Any, f: Array, a: Array, advantage: Array, ratio: Array) -> Array:
    """∂ min(r A, clip(r, 1 ± ε) A): that of r A, but zero where r has already left the interval to A's liking."""
    beyond = np.where(advantage > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)
    return np.where(beyond, 0.0, advantage * ratio)[:, None] * kind.score(f, a)


@KINDS
@pytest.mark.parametrize("bonus", [0.0, 0.3])
@pytest.mark.parametrize("penalty", [None, 0.7])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_every_minibatch_step_of_ppo_follows_the_gradient_of_its_objective(kind, clip, penalty, bonus):
    """min(r A, clip(r) A) or r A, − β KL(old ‖ new), + c H: each with its sign and size, on its own samples."""
    policy, critic, samples, old = problem(kind)
    settings = rl.PPO(
        clip=clip, penalty=penalty, max_kl=1e9, entropy=bonus, lr=1e-2, epochs=1, batch=N // 2, gradient_norm=1e9,
        anneal=False,
    )  # fmt: skip
    learner, seen = settings.learner(policy, critic, seed=5), []
    step = learner.optimizer.step

    def remember() -> None:
        before = [p.detach().clone().numpy() for p in policy.parameters()]
        seen.append((before, [p.grad.clone().numpy() for p in policy.parameters() if p.grad is not None]))
        step()

    learner.optimizer.step = remember
    order = torch.Generator()
    order.set_state(learner.generator.get_state())
    learner.update(samples, old, 0.0)
    assert len(seen) == 2
    parts = torch.randperm(N, generator=order).split(N // 2)
    sides = set()
    for index, ((weight, bias), found) in zip(parts, seen, strict=True):
        part, before = samples.take(index), old[index].numpy()
        x, a, advantage = (t.numpy() for t in (part.observations, part.actions, part.advantages))
        f = outputs(weight, bias, x)
        ratio = np.exp(kind.log_prob(f, a) - part.log_probs.numpy())
        sides |= set(zip(advantage > 0, np.digitize(ratio, [1 - CLIP, 1 + CLIP]), strict=True))
        slope = (advantage * ratio)[:, None] * kind.score(f, a)
        if clip is not None:
            slope = clipped_slope(kind, f, a, advantage, ratio)
        if penalty is not None:
            slope = slope - penalty * kind.kl_slope(before, f)
        slope = slope + bonus * kind.entropy_slope(f)
        for ours, expected in zip(found, gradient(slope, x), strict=True):
            np.testing.assert_allclose(-ours, expected, rtol=1e-9, atol=1e-12)
    assert len(sides) == 6  # ratios below, within and above the interval, for advantages of either sign


@KINDS
@pytest.mark.parametrize("bonus", [0.0, 0.3, -0.3])
def test_one_step_learners_ascend_surrogate_and_entropy(kind, bonus):
    """The gradient of mean(r A) + c H, where an optimizer minimises: with a minus."""
    policy, critic, samples, _ = problem(kind)
    learner, seen = rl.ACKTR(entropy=bonus).learner(policy, critic, seed=0), []
    parameters = list(policy.parameters())
    weight, bias = (p.detach().clone().numpy() for p in parameters)

    def differentiated(closure: Any) -> None:
        """In the place of the optimizer's step, which needs the graph for itself."""
        seen.extend(g.numpy() for g in torch.autograd.grad(closure()[0], parameters))

    learner.optimizer.step = differentiated  # type: ignore[method-assign]
    learner.update(samples, torch.empty(0), 0.0)
    x, a, advantage = (t.numpy() for t in (samples.observations, samples.actions, samples.advantages))
    f = outputs(weight, bias, x)
    ratio = np.exp(kind.log_prob(f, a) - samples.log_probs.numpy())
    slope = (advantage * ratio)[:, None] * kind.score(f, a) + bonus * kind.entropy_slope(f)
    for ours, expected in zip(seen, gradient(slope, x), strict=True):
        np.testing.assert_allclose(-ours, expected, rtol=1e-9, atol=1e-12)


class Watched(gym.Env):
    """Three steps; remembers the seeds that it was reset with."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def __init__(self, seeds: list[int | None]) -> None:
        self.seeds = seeds

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 1.0, self.steps == 3, False, {}


def test_no_episode_of_an_evaluation_is_one_of_training():
    """Under one seed and under others; and a seed of the evaluation gives the same episodes again."""
    trained: list[int | None] = []
    setup = rl.Setup(environments=4, horizon=12, hidden=(4,))
    policy = rl.trpo(partial(Watched, trained), steps=96, setup=setup, seed=2).policy
    assert None not in trained and len(set(trained)) == len(trained) >= 32
    held_out: list[list[int | None]] = []
    for seed in (2, 0, 1, 2):
        held_out.append([])
        rl.evaluate(policy, partial(Watched, held_out[-1]), episodes=4, seed=seed)
        seeds = held_out[-1][:4]
        assert None not in seeds and len(set(seeds)) == 4
        assert not set(held_out[-1]) & set(trained)
    assert held_out[0] == held_out[3] and not set(held_out[0]) & set(held_out[1])
