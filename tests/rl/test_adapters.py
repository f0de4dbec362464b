"""natgrad.rl trains from a ``VectorEnv`` from anywhere: wrapped, written for arrays, of every autoreset mode."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import NormalizeObservation, RecordEpisodeStatistics, RescaleAction

import natgrad.rl as rl
from natgrad.errors import ArgumentError


class Target(VectorEnv):
    """Written for arrays, not for copies of an environment: the reward is −(action − 0.6 · observation)².

    Episodes are cut off after five steps. ``last_observation`` is large, to be seen where it leaks.
    """

    def __init__(self, mode: AutoresetMode, num_envs: int = 16) -> None:
        self.num_envs, self.metadata = num_envs, {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps = np.arange(self.num_envs) % 5  # they do not end together
        self.state = self.np_random.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        return self.state.copy(), {}

    def step(self, actions: np.ndarray):
        assert actions.shape == (self.num_envs, 1) and self.action_space.contains(actions)
        next_step = self.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        resetting = (self.steps == 5) & next_step
        rewards = np.where(resetting, 0.0, -((actions - 0.6 * self.state)[:, 0] ** 2))
        self.steps = np.where(resetting, 0, self.steps + 1)
        self.state = self.np_random.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        truncated, infos = self.steps == 5, {}
        if not next_step and truncated.any():
            infos = {"final_obs": self.state.copy(), "_final_obs": truncated.copy()}
            self.state = self.np_random.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
            self.steps[truncated] = 0
        return self.state.copy(), rewards, np.zeros_like(truncated), truncated, infos


@pytest.mark.parametrize(
    "algorithm", [rl.TRPO(max_kl=0.05), rl.PPO(lr=1e-2, batch=128)], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_an_environment_written_for_arrays_is_learned(mode, algorithm):
    """Its best policy is known."""
    setup = rl.Setup(horizon=32, hidden=(16,), gamma=0.0, lam=0.0, normalise=False)
    policy = rl.Training(Target(mode), algorithm, steps=10_000, setup=setup).run().policy
    x = torch.linspace(-0.9, 0.9, 7).unsqueeze(1)
    torch.testing.assert_close(policy.head.mode(policy(x)), 0.6 * x, rtol=0, atol=0.1)
    evaluation = rl.evaluate(policy, Target(mode, 10), episodes=10)
    assert set(evaluation.lengths) == {1, 2, 3, 4, 5} and min(evaluation.returns) > -0.05


CARTPOLE: dict[str, Callable[[], VectorEnv]] = {
    "vector entry point": lambda: gym.make_vec("CartPole-v1", num_envs=8, vectorization_mode="vector_entry_point"),
    "sync": lambda: gym.make_vec("CartPole-v1", num_envs=8, vectorization_mode="sync"),
    "same step": lambda: SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 8, autoreset_mode=AutoresetMode.SAME_STEP),
    "recorded": lambda: RecordEpisodeStatistics(gym.make_vec("CartPole-v1", num_envs=8, vectorization_mode="sync")),
    "normalised": lambda: NormalizeObservation(gym.make_vec("CartPole-v1", num_envs=8, vectorization_mode="sync")),
}


@pytest.mark.parametrize("name", CARTPOLE)
def test_cartpole_is_learned_from_every_kind_of_vector_environment(name):
    setup = rl.Setup(horizon=64, hidden=(32,), gamma=0.98)
    history = rl.trpo(CARTPOLE[name](), steps=10_000, setup=setup, max_kl=0.05).history
    assert history[0]["return"] < 40
    assert history[-1]["return"] > 100
    assert all(record["kl"] <= 0.05 for record in history)
    assert all(400 <= after["steps"] - before["steps"] <= 512 for before, after in pairwise(history))


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
def test_a_wrapper_that_changes_the_actions_is_respected():
    vector = RescaleAction(gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync"), -1.0, 1.0)
    training = rl.Training(vector, rl.TRPO(), steps=64, setup=rl.Setup(horizon=16, hidden=(8,)))
    assert training.policy.head.low == (-1.0,) and training.policy.head.high == (1.0,)
    training.run()


def test_evaluation_leaves_a_vector_environment_open_and_wants_one_of_each_episode():
    vector = gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync")
    policy, _ = rl.build(4, rl.head_for(vector.single_action_space))
    first = rl.evaluate(policy, vector, episodes=3)
    assert not vector.closed and rl.evaluate(policy, vector, episodes=3) == first
    assert first == rl.evaluate(policy, "CartPole-v1", episodes=3)
    with pytest.raises(ArgumentError, match="3 environments cannot run 4 episodes"):
        rl.evaluate(policy, vector, episodes=4)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_an_evaluation_does_not_wait_forever(mode):
    """Episodes are cut off after ``max_steps``, and counted until then; those that ended before are whole."""
    policy, _ = rl.build(1, rl.head_for(Target(mode).single_action_space))
    whole = rl.evaluate(policy, Target(mode, 5), episodes=5)  # they end after 5, 4, 3, 2 and 1 steps
    assert rl.evaluate(policy, Target(mode, 5), episodes=5, max_steps=5) == whole
    assert rl.evaluate(policy, Target(mode, 5), episodes=5, max_steps=None) == whole
    message = "^2 of 5 episodes of Target had not ended after 3 steps and were cut off there"
    with pytest.warns(UserWarning, match=message) as warned:
        cut = rl.evaluate(policy, Target(mode, 5), episodes=5, max_steps=3)
    assert warned[0].filename == __file__
    assert cut.lengths == (3, 3, 3, 2, 1) and cut.returns[2:] == whole.returns[2:]
    assert all(short > long for short, long in zip(cut.returns[:2], whole.returns[:2], strict=True))  # rewards are < 0
    with pytest.raises(ArgumentError, match="max_steps must be at least 1, or None"):
        rl.evaluate(policy, "CartPole-v1", max_steps=0)
