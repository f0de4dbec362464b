"""Environments in step: every episode seeded by itself, ends told apart, faults named."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from natgrad.errors import ArgumentError, EnvironmentFault, UnsupportedError
from natgrad.rl import masks
from natgrad.rl.spaces import observation_size
from natgrad.rl.vector import name_of


@dataclass(frozen=True)
class Transition:
    """What one step of n environments gave.

    Attributes:
        observations: [n, D] the states that the actions led to, before any reset.
        rewards: [n].
        terminated: [n] the episode ended in a state without a future.
        truncated: [n] the episode was cut off (and not terminated): what follows still has a value.
        valid: [n] False where the environment only reset itself and no action was taken.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class Episode:
    """A finished episode: the sum of its rewards and its length."""

    episode_return: float
    length: int


class Environments:
    """n environments whose episodes are seeded one by one, so that any state can be reached again.

    Episode k of environment i is reset with a seed of (seed, i, k). A checkpoint therefore needs the episode's number
    and its actions so far, and no pickled environment. That holds for environments made by :func:`make` and for
    Gymnasium's own vector environments without wrappers; others reset themselves, as their autoreset mode says.

    Args:
        vector: the environments.
        seed: of the episodes.
        stream: separates the episodes of, say, evaluation from those of training under one seed.

    Attributes:
        name: of the environment.
        observations: [n, D] the states to act on.
        starts: [n] whether an episode begins there.
        mask: [n, C] allowed actions, where the environments give ``info["action_mask"]``; else None.
        replayable: whether a state can be reached again.
        finished: the episodes that ended since :meth:`take_finished`.

    Raises:
        UnsupportedError: observations that are not an array, or no autoreset where one is needed.
        ArgumentError: a negative seed.
        EnvironmentFault: the first reset failed.
    """

    def __init__(self, vector: VectorEnv, seed: int, stream: int = 0) -> None:
        if seed < 0:
            raise ArgumentError(f"seed must not be negative, got {seed}.")
        self.vector, self.seed, self.stream = vector, seed, stream
        self.n, self.name = vector.num_envs, name_of(vector)
        observation_size(vector.single_observation_space)
        base = vector.unwrapped
        self.mode = _mode(vector, self.name)
        self._seeded_singly = isinstance(base, (SyncVectorEnv, AsyncVectorEnv))
        self.replayable = self._seeded_singly and self.mode != AutoresetMode.SAME_STEP
        if self.mode == AutoresetMode.NEXT_STEP and (vector is not base or not getattr(base, "shared_memory", True)):
            # Not every wrapper can reset some environments alone; and workers without shared memory, which reset
            # themselves, do so once more after they were reset.
            self.replayable = False
        if self.mode == AutoresetMode.DISABLED and not self.replayable:
            raise UnsupportedError(
                f"{type(base).__name__} does not reset its environments, and cannot be told which to reset. Use the "
                "autoreset mode SAME_STEP or NEXT_STEP."
            )
        self.finished: list[Episode] = []
        self._episodes = np.zeros(self.n, dtype=np.int64)
        self.mask: np.ndarray | None = None
        self._begin()

    def _begin(self) -> None:
        """New episodes everywhere."""
        self._returns, self._lengths = np.zeros(self.n), np.zeros(self.n, dtype=np.int64)
        self._actions: list[list[np.ndarray]] = [[] for _ in range(self.n)]
        self._resetting = np.zeros(self.n, dtype=bool)
        self.starts = np.ones(self.n, dtype=bool)
        self.observations = self._reset_all()

    def _seeds(self) -> Any:  # a list, which gymnasium's annotations leave out
        words = [np.random.SeedSequence((self.seed, self.stream, i, int(k))) for i, k in enumerate(self._episodes)]
        seeds = [int(w.generate_state(1)[0] >> 1) for w in words]
        return seeds if self._seeded_singly else seeds[0]

    def _reset_all(self) -> np.ndarray:
        with _Faults(self.name, "reset"):
            observations, infos = self.vector.reset(seed=self._seeds())
        self._take_mask(infos, np.ones(self.n, dtype=bool))
        return self._flat(observations)

    def step(self, actions: np.ndarray) -> Transition:
        """Act, and reset what ended.

        Raises:
            EnvironmentFault: an environment raised, or gave a reward or an observation that is not finite.
        """
        with _Faults(self.name, "step"):
            observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        terminated, truncated = (self._column(x, bool, "terminations") for x in (terminated, truncated))
        valid, done = ~self._resetting, terminated | truncated
        ended = done if self.mode != AutoresetMode.SAME_STEP else np.zeros_like(done)
        self._take_mask(infos, np.ones(self.n, dtype=bool), ended)
        following = self._flat(observations)
        rewards = self._column(rewards, np.float64, "rewards")
        self._check_rewards(rewards)
        states = following
        if self.mode == AutoresetMode.SAME_STEP and done.any():
            states = self._final(following, done, infos)
        if self.replayable:
            for i in range(self.n):
                self._actions[i].append(np.array(actions[i]))
        self._count(rewards, done, valid)
        self.starts = done.copy()
        if self.replayable and done.any():
            following = self._reset(done)
        elif self.mode == AutoresetMode.NEXT_STEP:
            self.starts = self._resetting  # the episode begins where the reset that was just made led to
            self._resetting = done
        self.observations = following
        return Transition(states, rewards, terminated, truncated & ~terminated, valid)

    def _count(self, rewards: np.ndarray, done: np.ndarray, valid: np.ndarray) -> None:
        self._returns += np.where(valid, rewards, 0.0)
        self._lengths += valid
        for i in np.flatnonzero(done):
            self.finished.append(Episode(float(self._returns[i]), int(self._lengths[i])))
            self._returns[i], self._lengths[i] = 0.0, 0
            self._episodes[i] += 1
            self._actions[i] = []

    def _final(self, following: np.ndarray, done: np.ndarray, infos: dict[str, Any]) -> np.ndarray:
        """``following`` with the last states of the episodes that ended, which ``infos`` keeps."""
        if "final_obs" not in infos:
            raise EnvironmentFault(
                f"{self.name} resets itself in the step that ends an episode, but gives no info['final_obs']: without "
                "the last state of an episode that was cut off, its value is not known."
            )
        given = [infos["final_obs"][i] if done[i] else following[i] for i in range(self.n)]
        shape = self.vector.single_observation_space.shape or ()
        with _Faults(self.name, "step"):
            stacked = np.stack([np.asarray(x, dtype=np.float32).reshape(shape) for x in given])
        return self._flat(stacked)

    def _reset(self, which: np.ndarray) -> np.ndarray:
        with _Faults(self.name, "reset"):
            observations, infos = self.vector.reset(seed=self._seeds(), options={"reset_mask": which.copy()})
        self._take_mask(infos, which)
        return self._flat(observations)

    def take_finished(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def close(self) -> None:
        """Close the environments."""
        self.vector.close()

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs: numbers and actions, no pickled environment."""
        return {
            "episodes": self._episodes.tolist(),
            "actions": [torch.from_numpy(np.stack(a)) if a else None for a in self._actions],
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "observations": torch.from_numpy(self.observations),
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Bring the environments back: every running episode is reset with its seed, and its actions taken again.

        Returns:
            Whether observations and returns are those that were saved, bit for bit. If not (an environment that is not
            deterministic given seed and actions, or that cannot be reset by itself), new episodes begin.
        """
        self._episodes = np.array(state["episodes"], dtype=np.int64)
        same = False
        if self.replayable:
            given = [[] if actions is None else list(actions.numpy()) for actions in state["actions"]]
            returns = self._replay(given)
            same = np.array_equal(self.observations, state["observations"].numpy())
            same = same and returns.tolist() == state["returns"]
        if not same:
            self._episodes += 1
            self._begin()
            return False
        self._actions, self.starts = given, np.array([not actions for actions in given])
        self._resetting[:] = False
        self._returns = returns
        self._lengths = np.array(state["lengths"], dtype=np.int64)
        return True

    def _replay(self, given: list[list[np.ndarray]]) -> np.ndarray:
        """Take the actions of every environment's episode again; all of them end together. Returns their returns.

        Environments with fewer actions wait: they do anything that is allowed, and are reset when their turn comes.
        """
        longest, space = max(map(len, given)), self.vector.single_action_space
        returns = np.zeros(self.n)
        self.observations = self._reset_all()
        for t in range(longest):
            begin = np.array([len(actions) == longest - t for actions in given])
            if t and begin.any():
                self.observations = self._reset(begin)
            row, playing = [], np.zeros(self.n, dtype=bool)
            for i, actions in enumerate(given):
                k = t - longest + len(actions)
                playing[i] = k >= 0
                mask = None if self.mask is None else self.mask[i]
                row.append(actions[k] if playing[i] else masks.first_allowed(mask, space))
            with _Faults(self.name, "step"):
                observations, rewards, terminated, truncated, infos = self.vector.step(np.stack(row))
            done = np.asarray(terminated, dtype=bool) | np.asarray(truncated, dtype=bool)
            self._take_mask(infos, np.ones(self.n, dtype=bool), done)
            self.observations = self._flat(observations)
            returns += np.where(playing, rewards, 0.0)
            if done.any():
                self.observations = self._reset(done)
        fresh = np.array([not actions for actions in given])
        if longest and fresh.any():
            self.observations = self._reset(fresh)
        return returns

    # Checks

    def _column(self, given: Any, dtype: type, what: str) -> np.ndarray:
        with _Faults(self.name, "step"):
            column = np.asarray(given, dtype=dtype)
        if column.shape != (self.n,):
            raise EnvironmentFault(f"{self.name} gave {what} of shape {column.shape} instead of ({self.n},).")
        return column

    def _flat(self, observations: Any) -> np.ndarray:
        with _Faults(self.name, "step or reset"), np.errstate(over="ignore"):
            array = np.asarray(observations, dtype=np.float32)
        wanted = (self.n, *(self.vector.single_observation_space.shape or ()))
        if array.shape != wanted:
            raise EnvironmentFault(
                f"{self.name} gave observations of shape {array.shape}, but its observation space promises {wanted}. "
                "Mend the environment's observation_space or what it returns."
            )
        flat = array.reshape(self.n, -1)
        if not np.isfinite(flat).all():
            raise EnvironmentFault(
                f"{self.name} gave an observation that is not finite (environment "
                f"{int(np.flatnonzero(~np.isfinite(flat).all(1))[0])}). No update was made with it."
            )
        return flat.copy()

    def _check_rewards(self, rewards: np.ndarray) -> None:
        bad = ~(np.abs(rewards) <= np.finfo(np.float32).max)  # NaN compares as false
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise EnvironmentFault(
                f"{self.name} gave the reward {rewards[i]} in environment {i}, step {int(self._lengths[i]) + 1} of its "
                "episode: it must be finite, and within float32. No update was made with it; mend the reward, or bound "
                "it with gymnasium.wrappers.TransformReward."
            )

    def _take_mask(self, infos: dict[str, Any], which: np.ndarray, ended: np.ndarray | None = None) -> None:
        """The masks of the environments in ``which``; all is allowed to one that gives none.

        ``ended``: those whose episode is over, where nothing need be allowed.
        """
        given, space = infos.get("action_mask"), self.vector.single_action_space
        found = {}
        if given is not None:
            there = np.asarray(infos.get("_action_mask", np.ones(self.n, dtype=bool)))
            found = {int(i): masks.read(given[i], space, self.name) for i in np.flatnonzero(there & which)}
        if self.mask is None:
            if not found:
                return
            self.mask = np.ones((self.n, next(iter(found.values())).size), dtype=bool)
        self.mask[which] = True
        for i, mask in found.items():
            self.mask[i] = mask
        running = which if ended is None else which & ~ended
        masks.check(self.mask, running, space, self.name)


class _Faults:
    """Names the environment and what was asked of it where it raises."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, EnvironmentFault):
            raise EnvironmentFault(f"{self.name} raised {type(error).__name__} in {self.what}: {error}") from error


def _mode(vector: VectorEnv, name: str) -> AutoresetMode:
    given = vector.metadata.get("autoreset_mode")
    if given is None:
        warnings.warn(
            f"{name} does not say how it resets its environments (metadata['autoreset_mode']); NEXT_STEP is assumed. "
            "If that is wrong, what is learned is wrong.",
            UserWarning,
            stacklevel=4,
        )
        return AutoresetMode.NEXT_STEP
    return AutoresetMode(given)
