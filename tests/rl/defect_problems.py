"""Small policies, samples and episodes on which the 18 known defects of reinforcement-learning code show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from natgrad.metric import Exact, Fisher, MatrixFree
from natgrad.metric.running import Refresh
from natgrad.optim import NaturalGradient
from natgrad.rl import Critic, CriticFit, Policy, build
from natgrad.rl.heads import GaussianHead, Head
from natgrad.rl.normalise import Unchanged
from natgrad.rl.one_step import OneStepLearner, solver_for
from natgrad.rl.rollout import Samples
from natgrad.step import Search


def must_fail(check: Callable[..., None], *args: object, match: str) -> None:
    """The check tells the defective variant: it fails, and for the reason that it names."""
    with pytest.raises(AssertionError, match=match):
        check(*args)


def free(dims: int) -> tuple[float, ...]:
    return (math.inf,) * dims


def gaussian_head(dims: int, kind: type[GaussianHead] = GaussianHead) -> GaussianHead:
    return kind(tuple(-x for x in free(dims)), free(dims), (dims,))


def networks(head: Head, size: int = 3, seed: int = 0, **options: object) -> tuple[Policy, Critic]:
    """A policy and a critic in float64, small and far enough from zero to have curvature everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy, critic = build(size, head, **{"hidden": (5,), "normalise": False, **options})  # type: ignore[arg-type]
        for module in (policy, critic):
            for p in module.parameters():
                p.data.add_(0.3 * torch.randn_like(p))
    return policy.double(), critic.double()


def samples_of(
    policy: Policy, n: int = 64, seed: int = 0, advantage: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Samples, Tensor]:
    """States, actions of ``policy`` and advantages of mean 0 and variance 1; with f of the policy at them."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(policy.parameters()).dtype
    observations = torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        f = policy(observations)
        actions = policy.head.likelihood.sample(f, generator=generator)[0]
        noise = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
        given = noise if advantage is None else advantage(observations, actions)
        advantages = (given - given.mean()) / given.std(unbiased=False)
        return _samples(policy, observations, actions, f, advantages, noise), f


def shrinking(head: GaussianHead | None = None, n: int = 200) -> tuple[Policy, Critic, Samples, Tensor]:
    """A bandit in which the best step shrinks σ alone: N(0, 1), its quantiles as actions, advantage −a²."""
    body = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(body.weight)
    policy = Policy(body, head or gaussian_head(1), Unchanged(), log_scale=0.0).double()
    critic = Critic(nn.Linear(1, 1), Unchanged()).double()
    observations = torch.ones(n, 1, dtype=torch.float64)
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    actions = (math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).unsqueeze(-1)
    given = -actions.square()[:, 0]
    advantages = (given - given.mean()) / given.std(unbiased=False)
    with torch.no_grad():
        f = policy(observations)
    return policy, critic, _samples(policy, observations, actions, f, advantages, given), f


def _samples(policy: Policy, x: Tensor, actions: Tensor, f: Tensor, advantages: Tensor, returns: Tensor) -> Samples:
    log_probs = -policy.head.likelihood.nll(f, actions)
    return Samples(x, None, None, None, actions, log_probs, advantages, returns, None)


def learner_with(search: Search, policy: Policy, critic: Critic, *, lr: float = math.inf) -> OneStepLearner:
    """TRPO's learner with another search."""
    optimizer = NaturalGradient(
        policy,
        policy.head.likelihood,
        lr=lr,
        damping=1e-6,
        metric=Fisher(Exact(), MatrixFree()),
        solver=solver_for(MatrixFree(), None),
        search=search,
        average=0.0,
        refresh=Refresh(1, 1),
    )
    return OneStepLearner(policy, optimizer, CriticFit(epochs=1).fitter(critic, 0))


def gaussian_kl(old: Tensor, new: Tensor) -> float:
    """Mean of KL(old ‖ new) over the states, as written in textbooks; f = [mean, log σ]."""
    (m, s), (n, r) = old.double().chunk(2, -1), new.double().chunk(2, -1)
    variance, other = (2 * s).exp(), (2 * r).exp()
    return float((r - s + (variance + (m - n).square()) / (2 * other) - 0.5).sum(-1).mean())


def moved(policy: Policy, samples: Samples, old: Tensor) -> float:
    """KL(old ‖ new) of a Gaussian policy after an update, by the oracle."""
    with torch.no_grad():
        return gaussian_kl(old, policy(*samples.inputs))


def vector(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


class Corridor(gym.Env):
    """Walks a few steps whatever it is told, then ends by termination, truncation, or both at once.

    The observation (environment, episode, step) / 4 names the state; an episode's end and its length depend on it.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, index: int) -> None:
        self.index, self.episode, self.t = index, 0, 0

    def observation(self) -> np.ndarray:
        return np.array([self.index, self.episode, self.t], dtype=np.float32) / 4

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action: object) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = math.sin(self.index + 2 * self.episode + 3 * self.t)
        self.t += 1
        over, kind = self.t >= 2 + (self.index + self.episode) % 3, (self.index + self.episode) % 4
        return self.observation(), reward, over and kind in (0, 2), over and kind != 0, {}


@dataclass(frozen=True)
class Moment:
    """One step of an episode: the states before and after it, each as the observations since the episode began."""

    rollout: int
    episode: int
    before: list[np.ndarray]
    after: list[np.ndarray]
    reward: float
    terminated: bool


def walk(index: int, calls: int, horizon: int, *, reset_costs_a_call: bool) -> Iterator[Moment]:
    """What one Corridor does in ``calls`` steps, of which resets may be some, cut into rollouts of ``horizon``."""
    env, resetting = Corridor(index), False
    seen = [env.reset()[0]]
    for call in range(calls):
        if resetting and reset_costs_a_call:
            seen, resetting = [env.reset()[0]], False
            continue
        if resetting:
            seen, resetting = [env.reset()[0]], False
        following, reward, terminated, truncated, _ = env.step(0)
        yield Moment(call // horizon, env.episode, seen, [*seen, following], reward, terminated)
        seen, resetting = [*seen, following], terminated or truncated


def expected_advantages(
    moments: list[Moment], value: Callable[[list[np.ndarray]], float], gamma: float, lam: float
) -> dict[tuple[float, ...], float]:
    """A_t = Σ_k (γλ)^k δ_{t+k} over the rest of the episode within its rollout, by state: the definition, summed."""
    result = {}
    for i, first in enumerate(moments):
        total = 0.0
        for k, m in enumerate(moments[i:]):
            if (m.rollout, m.episode) != (first.rollout, first.episode):
                break
            future = 0.0 if m.terminated else value(m.after)
            total += (gamma * lam) ** k * (m.reward + gamma * future - value(m.before))
        result[tuple(first.before[-1].tolist())] = total
    return result
