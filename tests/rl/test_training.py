"""What a training counts, anneals and normalises; policies of other environments; what the records say."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

import natgrad.rl as rl
from natgrad.errors import ArgumentError
from natgrad.rl.heads import CategoricalHead
from natgrad.rl.normalise import RunningMoments
from natgrad.rl.objective import explained_variance
from natgrad.rl.policy import Critic, Policy
from natgrad.rl.presets import settings_for

SMALL = rl.Setup(environments=2, horizon=16, hidden=(8,))


@pytest.mark.parametrize(("algorithm", "first"), [(rl.PPO(lr=0.01, epochs=1), 0.01), (rl.ACKTR(lr=0.5), 0.5)])
def test_rates_fall_linearly_to_zero(algorithm, first):
    training = rl.Training("CartPole-v1", algorithm, steps=4 * 32, setup=SMALL)
    rates = [training.learner.optimizer.param_groups[0]["lr"] for _ in training]
    assert rates == pytest.approx([first, 0.75 * first, 0.5 * first, 0.25 * first])


def test_every_normaliser_learns():
    policy = Policy(nn.Linear(4, 2), CategoricalHead(2), RunningMoments(4))
    critic = Critic(nn.Linear(4, 1), RunningMoments(4))
    training = rl.Training("CartPole-v1", rl.TRPO(), steps=64, setup=SMALL, networks=(policy, critic)).run()
    assert float(training.policy.normaliser.count) == 64
    torch.testing.assert_close(training.critic.normaliser.state_dict(), training.policy.normaliser.state_dict())


def test_steps_in_which_an_environment_only_resets_itself_do_not_count():
    """Three steps and a reset, over and over: of 16 calls 12 are steps."""
    short = partial(gym.make, "CartPole-v1", max_episode_steps=3)
    vector = SyncVectorEnv([short] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    vector = gym.wrappers.vector.RecordEpisodeStatistics(vector)  # wrapped, it is left to reset itself
    record = next(iter(rl.Training(vector, rl.TRPO(), steps=1_000, setup=SMALL)))
    assert record["steps"] == 24
    assert record["length"] == 3 and record["return"] == 3


def test_a_constant_error_leaves_all_variance_explained():
    returns = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(explained_variance(returns + 5, returns)) == pytest.approx(1)
    assert float(explained_variance(torch.ones_like(returns), returns)) == pytest.approx(0)


def test_a_policy_that_is_random_by_itself_is_refused():
    body = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 2))
    policy = Policy(body, CategoricalHead(2), RunningMoments(4))
    networks = (policy, Critic(nn.Linear(4, 1), RunningMoments(4)))
    training = rl.Training("CartPole-v1", rl.TRPO(), steps=64, setup=SMALL, networks=networks)
    with pytest.raises(ArgumentError, match="is not the one that acted"):
        training.run()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("choices", [2, 7])
def test_a_policy_of_other_actions_is_not_evaluated(choices, deterministic):
    policy, _ = rl.build(2, rl.head_for(spaces.Discrete(choices)))
    with pytest.raises(ArgumentError, match=r"those of MountainCar-v0 are Discrete\(3\)"):
        rl.evaluate(policy, "MountainCar-v0", episodes=1, deterministic=deterministic)


def test_a_policy_of_other_observations_is_not_evaluated():
    policy, _ = rl.build(4, rl.head_for(gym.make("Pendulum-v1").action_space))
    with pytest.raises(ArgumentError, match=r"does not take observations of Pendulum-v1, which have 3 entries"):
        rl.evaluate(policy, "Pendulum-v1", episodes=1)
    with pytest.raises(ArgumentError, match="episodes must be at least 1"):
        rl.evaluate(policy, "Pendulum-v1", episodes=0)


def test_a_set_point_without_a_penalty_is_refused():
    with pytest.raises(ArgumentError, match="set-point of the penalty, and there is none"):
        rl.PPO(target_kl=0.02)
    assert rl.PPO(target_kl=0.02, penalty=1.0).target_kl == 0.02


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="is a file"):
        rl.Training("CartPole-v1", rl.TRPO(), steps=64, setup=SMALL, folder=tmp_path / "file")


def test_settings_of_the_results_table():
    """The settings that docs/reinforcement-learning.md reports."""
    found = {name: settings_for("trpo", f"{name}-v5") for name in ("Swimmer", "Hopper", "HalfCheetah", "Walker2d")}
    assert {name: (a.max_kl, a.damping) for name, (a, _) in found.items()} == {
        "Swimmer": (0.02, 0.1), "Hopper": (0.05, 0.1), "HalfCheetah": (0.1, 0.6), "Walker2d": (0.03, 0.6),
    }  # fmt: skip
    assert {name: s.environments * s.horizon for name, (_, s) in found.items()} == dict.fromkeys(found, 2_048)
    assert found["Swimmer"][1].gamma == 0.9999
