"""Evaluation: whole episodes of a policy that does not learn, with seeds of their own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from natgrad.errors import ArgumentError
from natgrad.rl.environments import Environments
from natgrad.rl.fit import check_policy
from natgrad.rl.policy import Policy
from natgrad.rl.vector import EnvironmentLike, Mode, make

HELD_OUT = 1  # the stream of episodes that training never sees


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of the episodes, in order."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(np.std(self.returns))


@torch.no_grad()
def evaluate(
    policy: Policy,
    environment: EnvironmentLike,
    *,
    episodes: int = 20,
    seed: int = 0,
    deterministic: bool = True,
    mode: Mode = "sync",
    import_code: bool = False,
    max_steps: int | None = 100_000,
) -> Evaluation:
    """Let ``policy`` act for ``episodes`` whole episodes.

    Each episode has its own environment, so that short ones do not count more often than long ones. The seeds are those
    of another stream than training's, whatever ``seed`` is.

    Args:
        policy: not changed.
        environment: see :func:`natgrad.rl.make`; a ``VectorEnv`` must have ``episodes`` environments, and stays open.
        episodes: how many.
        seed: of the episodes, and of the actions where they are sampled.
        deterministic: take the most probable action; otherwise sample.
        mode, import_code: see :func:`natgrad.rl.make`.
        max_steps: of an episode, which is cut off there, with a warning; None: no limit, and an episode that does not
            end is waited for without end.

    Raises:
        ArgumentError: ``episodes`` or ``max_steps`` below one, a policy of another environment, or a ``VectorEnv``
            of another number of environments.
        EnvironmentFault: an environment failed.
        NonFiniteError: the policy's output is not finite.
    """
    if max_steps is not None and max_steps < 1:
        raise ArgumentError(f"max_steps must be at least 1, or None for no limit, got {max_steps}.")
    if episodes < 1:
        raise ArgumentError(f"episodes must be at least 1, got {episodes}.")
    vector = make(environment, episodes, mode=mode, import_code=import_code)
    try:
        if vector.num_envs != episodes:
            raise ArgumentError(f"{vector.num_envs} environments cannot run {episodes} episodes: one each.")
        environments = Environments(vector, seed, HELD_OUT)
        check_policy(policy, environments)
        return _whole_episodes(policy, environments, None if deterministic else seed, max_steps)
    finally:
        if vector is not environment:
            vector.close()


def _whole_episodes(policy: Policy, environments: Environments, seed: int | None, max_steps: int | None) -> Evaluation:
    """One episode of each environment; ``seed`` samples the actions, None takes the most probable ones."""
    n, parameter = environments.n, next(policy.parameters())
    generator = None if seed is None else torch.Generator(device=parameter.device).manual_seed(seed)
    memory, running = policy.start(n), np.ones(n, dtype=bool)
    returns, lengths = np.zeros(n), np.zeros(n, dtype=int)
    while running.any():
        if lengths.max() == max_steps:
            _warn_cut_off(environments.name, int(running.sum()), n, int(lengths.max()))
            break
        mask = environments.mask
        actions, _, memory = policy.act(
            torch.from_numpy(environments.observations).to(parameter),
            None if mask is None else torch.from_numpy(mask).to(parameter.device),
            memory=memory,
            starts=torch.from_numpy(environments.starts).to(parameter.device),
            generator=generator,
        )
        seen = environments.step(policy.head.to_environment(actions))
        returns += np.where(running, seen.rewards, 0.0)
        lengths += running
        running &= ~(seen.terminated | seen.truncated)
    return Evaluation(tuple(returns.tolist()), tuple(lengths.tolist()))


def _warn_cut_off(name: str, cut: int, episodes: int, steps: int) -> None:
    warnings.warn(
        f"{cut} of {episodes} episodes of {name} had not ended after {steps} steps and were cut off there; their "
        "returns are those until then. Give the environment a time limit (gymnasium.wrappers.TimeLimit), or change "
        "max_steps.",
        UserWarning,
        stacklevel=5,
    )
