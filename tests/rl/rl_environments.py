"""Environments for the tests: small, and bad in every way that environments are."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Spaces(gym.Env):
    """Random observations of one space, actions of another; complains about actions that are not in it.

    Episodes last 3 to 6 steps, by the seed; even ones terminate, odd ones are truncated.
    """

    def __init__(self, observation: spaces.Space, action: spaces.Space) -> None:
        self.observation_space, self.action_space = copy.deepcopy(observation), action  # it has a random state

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.left = self.length = int(self.np_random.integers(3, 7))
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.left -= 1
        done, even = self.left == 0, self.length % 2 == 0
        return self.observation_space.sample(), float(np.sum(action)), done and even, done and not even, {}


class Masked(gym.Env):
    """Allows a random part of the actions at each step, and raises where another is taken.

    ``first``: whether ``reset`` gives a mask, too. Masks of MultiDiscrete actions are a tuple of arrays.
    """

    def __init__(self, action: spaces.Discrete | spaces.MultiDiscrete, *, first: bool = True) -> None:
        self.observation_space, self.action_space, self.first = spaces.Box(-1, 1, (2,)), action, first
        self.sizes = (action.n,) if isinstance(action, spaces.Discrete) else tuple(action.nvec)

    def _observed(self, give: bool = True) -> tuple[Any, dict[str, Any]]:
        rng = self.np_random
        self.mask = tuple((rng.random(n) < 0.4).astype(np.int8) for n in self.sizes)
        for piece in self.mask:
            piece[rng.integers(len(piece))] = 1
        if not give:
            self.mask = tuple(np.ones_like(piece) for piece in self.mask)
            return rng.uniform(-1, 1, 2).astype(np.float32), {}
        given = self.mask[0] if isinstance(self.action_space, spaces.Discrete) else self.mask
        return rng.uniform(-1, 1, 2).astype(np.float32), {"action_mask": given}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.end = 0, int(self.np_random.integers(4, 9))
        return self._observed(self.first)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = np.atleast_1d(np.asarray(action) - self.action_space.start)
        assert all(piece[a] for piece, a in zip(self.mask, chosen, strict=True)), "a masked action was taken"
        self.steps += 1
        observation, info = self._observed()
        return observation, float(chosen.sum()), self.steps == self.end, False, info


class Faulty(gym.Env):
    """Goes wrong in the step ``at`` of the process, in the way that ``how`` says."""

    def __init__(self, how: str, at: int = 40) -> None:
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, (2,)), spaces.Discrete(2)
        self.how, self.at, self.steps = how, at, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self.how == "raise in reset" and self.steps >= self.at:
            raise OSError("the simulator is gone")
        if self.how == "raise in first reset":
            raise OSError("the simulator is gone")
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation: Any = self.np_random.normal(size=2).astype(np.float32)
        reward: Any = float(action)
        info: dict[str, Any] = {}
        if self.steps >= self.at:
            match self.how:
                case "nan reward":
                    reward = float("nan")
                case "infinite reward":
                    reward = float("inf")
                case "huge reward":
                    reward = 1e300
                case "nan observation":
                    observation[1] = np.nan
                case "infinite observation":
                    observation[0] = np.inf
                case "shape":
                    observation = np.zeros(3, dtype=np.float32)
                case "raise in step":
                    raise OSError("the simulator is gone")
                case "vector reward":
                    reward = np.zeros(2)
                case "no action":
                    info = {"action_mask": np.zeros(2, dtype=np.int8)}
                case "mask":
                    info = {"action_mask": np.ones(3, dtype=np.int8)}
        return observation, reward, self.steps % 10 == 0, False, info


class Random(gym.Env):
    """Not deterministic: its observations do not depend on the seed alone."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, (2,)), spaces.Discrete(2)
        self.rng = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return self.rng.normal(size=2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.rng.normal(size=2).astype(np.float32), float(action), self.steps == 7, False, {}


class SecretlyRandom(Random):
    """Only its rewards are not deterministic."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset()
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.zeros(2, dtype=np.float32), float(self.rng.normal()), self.steps == 7, False, {}


class Recall(gym.Env):
    """A cue at the first step, the answer at the last: 1 for the same, 0 for another; nothing to see in between."""

    def __init__(self, length: int = 4) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)
        self.length = length

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.steps = int(self.np_random.integers(2)), 0
        return np.array([2 * self.cue - 1, 0], dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        last = self.steps == self.length
        shown = 1.0 if self.steps == self.length - 1 else 0.0  # that it is time to answer
        return np.array([0, shown], dtype=np.float32), float(last and int(action) == self.cue), last, False, {}
