"""Environments in step: every episode seeded by itself, ends told apart, faults named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FlattenObservation

from natgrad.errors import ArgumentError, EnvironmentFault, UnsupportedError

EnvironmentLike = str | Callable[[], gym.Env] | VectorEnv
Mode = Literal["sync", "async"]


def make(
    environment: EnvironmentLike, n: int = 1, *, mode: Mode = "sync", import_code: bool = False, **options: Any
) -> VectorEnv:
    """n copies of an environment; a ``VectorEnv`` is returned as it is.

    Args:
        environment: a Gymnasium id, a function that makes one environment, or a ``VectorEnv``.
        n: copies.
        mode: ``"sync"``: one after another in this process; ``"async"``: a process for each.
        import_code: whether an id ``module:id``, which imports the module, is allowed.
        options: of ``gymnasium.make``.

    Raises:
        ArgumentError: n below one, an unknown id, or ``module:id`` without ``import_code``.
    """
    if isinstance(environment, VectorEnv):
        return environment
    if n < 1:
        raise ArgumentError(f"The number of environments must be at least 1, got {n}.")
    if isinstance(environment, str) and ":" in environment and not import_code:
        module, _, name = environment.partition(":")
        raise ArgumentError(
            f"The environment {environment!r} would import the module {module!r}, which runs its code. If you trust "
            f"it, say so (import_code=True, or --import-code on the command line); otherwise use {name!r}."
        )

    def one() -> gym.Env:
        env = gym.make(environment, **options) if isinstance(environment, str) else environment()
        return env if isinstance(env.observation_space, gym.spaces.Box) else FlattenObservation(env)

    if mode not in ("sync", "async"):
        raise ArgumentError(f"mode must be 'sync' or 'async', got {mode!r}.")
    kind = SyncVectorEnv if mode == "sync" else AsyncVectorEnv
    try:
        return kind([one] * n, autoreset_mode=AutoresetMode.DISABLED)
    except gym.error.Error as error:
        raise ArgumentError(f"The environment {environment!r} cannot be made: {error}") from error


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
    Gymnasium's own vector environments; others reset themselves, and only their autoreset mode is respected.

    Args:
        vector: the environments.
        seed: of the episodes.
        stream: separates the episodes of, say, evaluation from those of training under one seed.

    Attributes:
        observations: [n, D] the states to act on.
        starts: [n] whether an episode begins there.
        mask: [n, C] allowed actions, where the environments give ``info["action_mask"]``; else None.
        finished: the episodes that ended since :meth:`take_finished`.
    """

    def __init__(self, vector: VectorEnv, seed: int, stream: int = 0) -> None:
        self.vector, self.seed, self.stream = vector, seed, stream
        self.n = vector.num_envs
        mode = vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.mode = AutoresetMode(mode)
        base = vector.unwrapped
        self.replayable = isinstance(base, (SyncVectorEnv, AsyncVectorEnv)) and self.mode != AutoresetMode.SAME_STEP
        if self.mode == AutoresetMode.DISABLED and not self.replayable:
            raise UnsupportedError(
                f"{type(base).__name__} does not reset its environments, and cannot be told which to reset. Use the "
                "autoreset mode SAME_STEP or NEXT_STEP."
            )
        self.finished: list[Episode] = []
        self._episodes = np.zeros(self.n, dtype=np.int64)
        self._returns, self._lengths = np.zeros(self.n), np.zeros(self.n, dtype=np.int64)
        self._actions: list[list[np.ndarray]] = [[] for _ in range(self.n)]
        self._resetting = np.zeros(self.n, dtype=bool)
        self.mask: np.ndarray | None = None
        self.starts = np.ones(self.n, dtype=bool)
        self.observations = self._reset_all()

    def _seeds(self) -> Any:  # a list, which gymnasium's annotations leave out
        words = [np.random.SeedSequence((self.seed, self.stream, i, int(k))) for i, k in enumerate(self._episodes)]
        return [int(w.generate_state(1)[0] >> 1) for w in words]

    def _reset_all(self) -> np.ndarray:
        with self._faults("reset"):
            observations, infos = self.vector.reset(seed=self._seeds())
        self._take_mask(infos)
        return self._flat(observations)

    def step(self, actions: np.ndarray) -> Transition:
        """Act, and reset what ended.

        Raises:
            EnvironmentFault: an environment raised, or gave a reward or an observation that is not finite.
        """
        with self._faults("step"):
            observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        self._take_mask(infos)
        following = self._flat(observations)
        valid, done = ~self._resetting, terminated | truncated
        rewards = np.asarray(rewards, dtype=np.float64)
        self._check_rewards(rewards)
        states = following
        if self.mode == AutoresetMode.SAME_STEP and done.any():
            states = following.copy()
            for i in np.flatnonzero(done):
                states[i] = np.asarray(infos["final_obs"][i], dtype=np.float32).reshape(-1)
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

    def _reset(self, which: np.ndarray) -> np.ndarray:
        with self._faults("reset"):
            observations, infos = self.vector.reset(seed=self._seeds(), options={"reset_mask": which})
        self._take_mask(infos)
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
            "actions": [[a.tolist() for a in actions] for actions in self._actions],
            "returns": self._returns.tolist(),
            "lengths": self._lengths.tolist(),
            "observations": self.observations.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Bring the environments back: every running episode is reset with its seed, and its actions taken again.

        Returns:
            Whether the states are those that were saved, bit for bit. If not (an environment that is not deterministic
            given seed and actions, or that cannot be reset by itself), new episodes begin.
        """
        self._episodes = np.array(state["episodes"], dtype=np.int64)
        if not self.replayable:
            self.observations = self._reset_all()
            return False
        space = self.vector.single_action_space
        given = [[np.asarray(a, dtype=space.dtype) for a in actions] for actions in state["actions"]]
        longest = max(len(actions) for actions in given)
        self.observations = self._reset_all()
        for t in range(longest):
            begin = np.array([len(actions) == longest - t for actions in given])
            if t and begin.any():
                self.observations = self._reset(begin)
            row = [a[max(0, t - longest + len(a))] if a else space.sample() for a in given]
            with self._faults("step"):
                observations, _, terminated, truncated, infos = self.vector.step(np.stack(row))
            self._take_mask(infos)
            self.observations = self._flat(observations)
            done = terminated | truncated
            if done.any():
                self.observations = self._reset(done)
        fresh = np.array([not actions for actions in given])
        if longest and fresh.any():
            self.observations = self._reset(fresh)
        same = np.array_equal(self.observations, np.array(state["observations"], dtype=np.float32))
        self._resetting[:] = False
        if not same:
            self._episodes += 1
            self._returns[:], self._lengths[:], self._actions = 0.0, 0, [[] for _ in range(self.n)]
            self.observations, self.starts = self._reset_all(), np.ones(self.n, dtype=bool)
            return False
        self._actions, self.starts = given, fresh
        self._returns = np.array(state["returns"], dtype=np.float64)
        self._lengths = np.array(state["lengths"], dtype=np.int64)
        return True

    # Checks

    def _faults(self, what: str) -> _Faults:
        return _Faults(self.vector, what)

    def _flat(self, observations: Any) -> np.ndarray:
        array = np.asarray(observations, dtype=np.float32)
        wanted = (self.n, *(self.vector.single_observation_space.shape or ()))
        if array.shape != wanted:
            raise EnvironmentFault(
                f"{_name(self.vector)} gave observations of shape {array.shape}, but its observation space promises "
                f"{wanted}. Mend the environment's observation_space or what it returns."
            )
        flat = array.reshape(self.n, -1)
        if not np.isfinite(flat).all():
            raise EnvironmentFault(
                f"{_name(self.vector)} gave an observation that is not finite (environment "
                f"{int(np.flatnonzero(~np.isfinite(flat).all(1))[0])}). No update was made with it."
            )
        return flat.copy()

    def _check_rewards(self, rewards: np.ndarray) -> None:
        if not np.isfinite(rewards).all():
            i = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise EnvironmentFault(
                f"{_name(self.vector)} gave the reward {rewards[i]} in environment {i}, step "
                f"{int(self._lengths[i]) + 1} of its episode. No update was made with it; mend the reward, or bound it "
                "with gymnasium.wrappers.TransformReward."
            )

    def _take_mask(self, infos: dict[str, Any]) -> None:
        given = infos.get("action_mask")
        if given is None:
            return
        there = np.asarray(infos.get("_action_mask", np.ones(self.n, dtype=bool)))
        if self.mask is None:
            first = np.asarray(given[int(np.flatnonzero(there)[0])]).reshape(-1)
            self.mask = np.ones((self.n, first.size), dtype=bool)
        for i in np.flatnonzero(there):
            self.mask[i] = np.asarray(given[i]).reshape(-1).astype(bool)


class _Faults:
    """Names the environment and what was asked of it where it raises."""

    def __init__(self, vector: VectorEnv, what: str) -> None:
        self.vector, self.what = vector, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise EnvironmentFault(
                f"{_name(self.vector)} raised {type(error).__name__} in {self.what}(): {error}. The last checkpoint is "
                "kept."
            ) from error


def _name(vector: VectorEnv) -> str:
    spec = getattr(vector, "spec", None)
    return getattr(spec, "id", None) or type(vector.unwrapped).__name__
