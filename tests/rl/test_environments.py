"""Environments in step give what single environments stepped by hand give; what is wrong with one is said clearly."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from rl_environments import Faulty, Masked, Spaces
from torch import nn

import natgrad.rl as rl
from natgrad.errors import ArgumentError, EnvironmentFault, UnsupportedError
from natgrad.rl.environments import Environments
from natgrad.rl.networks import Recurrent
from natgrad.rl.rollout import Collector

N, T, SEED = 3, 60, 11
ASYNC_COMPLAINS = pytest.mark.filterwarnings("ignore::UserWarning:gymnasium.*")  # it logs what workers raise
SMALL = rl.Setup(environments=2, horizon=16, hidden=(8,))


def cartpole() -> gym.Env:
    """Some episodes of random actions end within 20 steps, others are cut off there."""
    return gym.make("CartPole-v1", max_episode_steps=20)


def action_table() -> np.ndarray:
    return np.random.default_rng(0).integers(2, size=(N, T))


def episode_seed(i: int, k: int, stream: int = 0) -> int:
    return int(np.random.SeedSequence((SEED, stream, i, k)).generate_state(1)[0] >> 1)


def by_hand(i: int, *, seeded: bool, steps: int) -> list[tuple]:
    """Transitions (start, state, action, reward, next state, terminated, truncated) of one environment."""
    env, actions, found, k = cartpole(), action_table()[i], [], 0
    state, start = env.reset(seed=episode_seed(i, 0))[0], True
    for action in actions[:steps]:
        following, reward, terminated, truncated, _ = env.step(int(action))
        found.append((start, state, action, reward, following, terminated, truncated and not terminated))
        state, start = following, False
        if terminated or truncated:
            k, start = k + 1, True
            state = env.reset(seed=episode_seed(i, k) if seeded else None)[0]
    return found


def in_step(environments: Environments) -> list[list[tuple]]:
    """The same of all environments, without the steps that only reset."""
    table, found = action_table(), [[] for _ in range(N)]
    for _ in range(T):
        actions = np.array([table[i, len(found[i])] for i in range(N)])
        states, starts = environments.observations, environments.starts
        seen = environments.step(actions)
        for i in np.flatnonzero(seen.valid):
            row = (starts[i], states[i], actions[i], seen.rewards[i], seen.observations[i])
            found[i].append((*row, seen.terminated[i], seen.truncated[i]))
    environments.close()
    return found


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def vectors() -> dict[str, tuple]:
    """By name: a function that makes the environments, and whether every episode has a seed of its own."""
    made = {
        "sync": (partial(rl.make, cartpole, N), True),
        "async": (partial(rl.make, cartpole, N, mode="async"), True),
    }
    for kind in (SyncVectorEnv, AsyncVectorEnv):
        for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
            made[f"{kind.__name__}-{mode.name}"] = (
                partial(kind, [cartpole] * N, autoreset_mode=mode),
                mode != AutoresetMode.SAME_STEP,
            )
    unshared = partial(AsyncVectorEnv, [cartpole] * N, shared_memory=False)
    made["unshared-NEXT_STEP"] = (unshared, False)
    made["unshared-DISABLED"] = (partial(unshared, autoreset_mode=AutoresetMode.DISABLED), True)
    return made


@pytest.mark.parametrize("name", vectors())
def test_transitions_are_those_of_single_environments_stepped_by_hand(name):
    make, seeded = vectors()[name]
    environments = Environments(make(), SEED)
    assert environments.name == "CartPole-v1"
    assert environments.replayable == seeded
    found = in_step(environments)
    for i in range(N):
        assert_same(found[i], by_hand(i, seeded=seeded, steps=len(found[i])))
    flags = [row[5:] for rows in found for row in rows]
    assert any(terminated for terminated, _ in flags) and any(truncated for _, truncated in flags)
    lost = sum(T - len(rows) for rows in found)
    assert (lost > 0) == (not seeded and environments.mode == AutoresetMode.NEXT_STEP)


def test_finished_episodes_are_those_of_single_environments():
    environments = Environments(rl.make(cartpole, N), SEED)
    found = in_step(environments)
    expected = []
    for rows in found:
        lengths, n = [], 0
        for row in rows:
            n += 1
            if row[5] or row[6]:
                lengths.append(n)
                n = 0
        expected += lengths
    ended = environments.take_finished()
    assert sorted(e.length for e in ended) == sorted(expected)
    assert all(e.episode_return == e.length for e in ended)
    assert environments.take_finished() == []


def test_a_vector_environment_of_another_kind_moves_as_single_ones_do():
    environments = Environments(CartPoleVectorEnv(N, max_episode_steps=20), SEED)
    assert not environments.replayable
    found = in_step(environments)
    single = gym.make("CartPole-v1").unwrapped
    for rows in found:
        for start, state, action, reward, following, terminated, truncated in rows:
            if start:
                assert np.abs(state).max() <= 0.05
            single.reset(seed=0)
            single.state = state.astype(np.float64)
            after, expected, ended, _, _ = single.step(int(action))
            np.testing.assert_allclose(following, after, atol=1e-6)
            assert (reward, terminated) == (expected, ended) and not (terminated and truncated)
        for row, following in pairwise(rows):
            if row[5] or row[6]:
                assert following[0]
            else:
                assert not following[0]
                np.testing.assert_array_equal(row[4], following[1])
    assert any(row[5] for rows in found for row in rows) and any(row[6] for rows in found for row in rows)


def test_episodes_have_seeds_of_their_own_and_evaluation_others():
    firsts = {}
    for stream in (0, 1):
        environments = Environments(rl.make(cartpole, N), SEED, stream)
        seen = [environments.observations.copy()]
        for t in range(T):
            environments.step(action_table()[:, t])
            seen.append(environments.observations[environments.starts].copy())
        environments.close()
        firsts[stream] = {tuple(row) for rows in seen for row in rows}
        assert len(firsts[stream]) == sum(map(len, seen)) > 2 * N
        assert tuple(cartpole().reset(seed=episode_seed(1, 0, stream))[0]) in firsts[stream]
    assert not firsts[0] & firsts[1]


@pytest.mark.parametrize("horizon", [1, 40])
def test_steps_that_only_reset_never_reach_an_update(horizon):
    """Advantages are those of each environment's own sequence of valid steps, and no other sample is there."""
    environments = Environments(CartPoleVectorEnv(N, max_episode_steps=15), SEED)
    policy, critic = rl.build(4, rl.head_for(gym.make("CartPole-v1").action_space), hidden=(8,))
    critic.returns.mean.fill_(3.0)
    policy, critic = policy.double(), critic.double()
    generator = torch.Generator().manual_seed(0)
    collector = Collector(environments, policy, critic, horizon=horizon, gamma=0.9, lam=0.8, generator=generator)
    seen = 0
    for _ in range(60 // horizon):
        rollout = collector.collect()
        samples = collector.samples(rollout)
        valid = rollout.valid
        seen += int((~valid).sum())
        assert len(samples) == int(valid.sum()) > 0
        assert torch.equal(samples.observations, rollout.observations[valid])
        assert torch.equal(rollout.rewards[valid], torch.ones(len(samples), dtype=torch.float64))
        raw = torch.full(valid.shape, torch.nan, dtype=torch.float64)
        with torch.no_grad():
            values = critic.values(critic(rollout.observations))[..., 0]
            following = critic.values(critic(rollout.following))[..., 0]
        for i in range(N):
            column = valid[:, i]
            parts = (rollout.rewards, values, following, rollout.terminated, rollout.truncated)
            own = (x[column, i].unsqueeze(1) for x in parts)
            if column.any():
                raw[column, i] = rl.advantages(*own, gamma=0.9, lam=0.8)[:, 0]
        torch.testing.assert_close(samples.returns, (raw + values)[valid], rtol=0, atol=1e-12)
        spread = raw[valid].std(unbiased=False).clamp(min=1e-8)
        torch.testing.assert_close(samples.advantages, (raw[valid] - raw[valid].mean()) / spread, rtol=0, atol=1e-9)
    assert seen > 0


OBSERVATIONS = {
    "Box": spaces.Box(-1, 1, (2, 3)),
    "Discrete": spaces.Discrete(4, start=2),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
    "Dict": spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(-1, 1, (2,))}),
    "Tuple": spaces.Tuple([spaces.Box(-1, 1, (1,)), spaces.MultiBinary(2)]),
}
ACTIONS = {
    "Discrete": spaces.Discrete(3, start=-1),
    "MultiDiscrete": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [-2, 5]]),
    "MultiBinary": spaces.MultiBinary([2, 2]),
    "Box": spaces.Box(np.array([-2.0, 0.0], dtype=np.float32), np.array([3.0, 0.5], dtype=np.float32)),
    "Box64": spaces.Box(-1, 1, (2, 1), dtype=np.float64),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("space", OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_observations_are_flattened_as_gymnasium_flattens_them(space, mode):
    single = Spaces(space, spaces.Discrete(2))
    environments = Environments(rl.make(partial(Spaces, space, spaces.Discrete(2)), 1, mode=mode), SEED)
    observation, ended = single.reset(seed=episode_seed(0, 0))[0], 0
    for _ in range(8):
        np.testing.assert_array_equal(environments.observations[0], spaces.flatten(space, observation).ravel())
        environments.step(np.array([1]))
        observation, _, terminated, truncated, _ = single.step(1)
        if terminated or truncated:
            ended += 1
            observation = single.reset(seed=episode_seed(0, ended))[0]
    assert ended
    environments.close()


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_actions_of_every_space_are_taken_and_learned_from(action):
    observation = OBSERVATIONS["Dict"]
    training = rl.Training(partial(Spaces, observation, action), rl.TRPO(), steps=64, setup=SMALL).run()
    assert training.policy.body[0].in_features == 5
    for record in training.history:
        assert math.isfinite(record["entropy"]) and 0 <= record["kl"] <= 0.01
    evaluation = rl.evaluate(training.policy, partial(Spaces, observation, action), episodes=3)
    assert len(evaluation.returns) == 3 and all(3 <= n <= 6 for n in evaluation.lengths)


@pytest.mark.parametrize("algorithm", [rl.NPG(), rl.TRPO(), rl.ACKTR(), rl.PPO()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    "environment",
    [
        partial(Masked, spaces.Discrete(5, start=3)),
        partial(Masked, spaces.Discrete(5), first=False),
        partial(Masked, spaces.MultiDiscrete([3, 4], start=[1, -1])),
        "Taxi-v4",
    ],
    ids=["discrete", "no first mask", "multi-discrete", "taxi"],
)
def test_masked_actions_are_never_taken_and_nothing_becomes_infinite(algorithm, environment):
    """``Masked`` raises where one is; Taxi is watched."""
    taken = []

    class Watched(gym.Wrapper):
        def reset(self, **options):
            observation, info = super().reset(**options)
            self.mask = info["action_mask"]
            return observation, info

        def step(self, action):
            taken.append(bool(self.mask[action]))
            result = super().step(action)
            self.mask = result[-1]["action_mask"]
            return result

    made = environment if callable(environment) else lambda: Watched(gym.make(environment, max_episode_steps=25))
    training = rl.Training(made, algorithm, steps=96, setup=SMALL).run()
    assert len(training.history) == 3 and all(taken) and bool(taken) == (environment == "Taxi-v4")
    for record in training.history:
        assert all(math.isfinite(record[name]) for name in ("kl", "entropy", "surrogate"))
        assert record["entropy"] > 0
    assert all(bool(torch.isfinite(p).all()) for p in training.policy.parameters())
    rl.evaluate(training.policy, made, episodes=2, deterministic=False)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_masks_are_those_of_the_present_state_in_every_autoreset_mode(mode):
    vector = SyncVectorEnv([partial(Masked, spaces.Discrete(4))] * 2, autoreset_mode=mode)
    environments = Environments(vector, SEED)
    for _ in range(40):
        for i, env in enumerate(vector.envs):
            np.testing.assert_array_equal(environments.mask[i], env.mask[0].astype(bool))
        environments.step(environments.mask.argmax(1))
    assert environments.take_finished()


class MaskAtTimes(gym.Env):
    """Allows action 1 alone at first, gives no mask in its second step, and none of the actions when it is over."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, dtype=np.float32), {"action_mask": np.array([0, 1, 0], dtype=np.int8)}

    def step(self, action):
        self.steps += 1
        over = self.steps == 3
        info = {"action_mask": np.full(3, not over, dtype=np.int8) * [0, 0, 1]} if self.steps != 2 else {}
        return np.zeros(2, dtype=np.float32), 1.0, over, False, info


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_a_mask_lasts_one_step_and_none_is_asked_of_an_episode_that_is_over(mode):
    environments = Environments(SyncVectorEnv([MaskAtTimes] * 2, autoreset_mode=mode), SEED)
    for _ in range(3):
        for expected in ([0, 1, 0], [0, 0, 1], [1, 1, 1]):
            np.testing.assert_array_equal(environments.mask, [expected] * 2)
            environments.step(environments.mask.argmax(1))
    assert [episode.length for episode in environments.take_finished()] == [3] * 6


def test_a_mask_for_actions_that_have_none_is_refused():
    class Other(Spaces):
        def reset(self, **options):
            return super().reset(**options)[0], {"action_mask": np.ones(2, dtype=np.int8)}

    for action in (spaces.MultiBinary(2), spaces.Box(-1, 1, (2,))):
        with pytest.raises(UnsupportedError, match="has no action masks"):
            rl.trpo(partial(Other, spaces.Box(-1, 1, (2,)), action), steps=32, setup=SMALL)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Hopper-v5"])
def test_a_step_in_turn_is_that_of_gymnasium(name):
    mine = rl.make(name, 3)
    theirs = SyncVectorEnv([partial(gym.make, name)] * 3, autoreset_mode=AutoresetMode.DISABLED)
    for vector in (mine, theirs):
        vector.action_space.seed(0)
        vector.reset(seed=[1, 2, 3])
    for _ in range(60):
        action = mine.action_space.sample()
        np.testing.assert_array_equal(action, theirs.action_space.sample())
        found, expected = mine.step(action), theirs.step(action)
        for x, y in zip(found[:4], expected[:4], strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        done = found[2] | found[3]
        if done.any():
            again = [vector.reset(seed=[4, 5, 6], options={"reset_mask": done.copy()})[0] for vector in (mine, theirs)]
            np.testing.assert_array_equal(*again)


FAULTS = {
    "nan reward": "gave the reward nan in environment [01]",
    "infinite reward": "gave the reward inf in environment [01]",
    "huge reward": "gave the reward 1e[+]300",
    "nan observation": "an observation that is not finite",
    "infinite observation": "an observation that is not finite",
    "shape": "gave observations of shape|raised .*Error in step",
    "raise in step": "raised OSError in step: the simulator is gone",
    "raise in reset": "raised OSError in reset: the simulator is gone",
    "vector reward": "gave the reward .*not one number|rewards of shape|raised .*Error in step",
    "no action": "allows no action in environment [01]",
    "mask": "an action_mask of 3 entries, but its actions Discrete[(]2[)] have 2",
}


@pytest.mark.filterwarnings(
    "ignore:.*WARN.*", "ignore:.*Received the following error:", "ignore::UserWarning:gymnasium.*"
)
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_names_the_environment_and_leaves_the_last_checkpoint(tmp_path, how, mode):
    training = rl.Training(
        partial(Faulty, how), rl.TRPO(), steps=10_000, setup=SMALL, folder=tmp_path, every=1, mode=mode
    )
    records = iter(training)
    next(records)
    next(records)  # 32 steps of each environment
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    before = {name: value.clone() for name, value in training.modules.state_dict().items()}
    with pytest.raises(EnvironmentFault, match=rf"^Faulty .*({FAULTS[how]})") as caught:
        for _ in records:
            pass
    assert str(tmp_path / "checkpoint.safetensors") + ", is kept" in str(caught.value)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept
    assert all(torch.equal(value, before[name]) for name, value in training.modules.state_dict().items())
    assert len(training.history) == 2
    assert training.environments.vector.closed


@ASYNC_COMPLAINS
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_environment_that_cannot_begin_is_named(mode):
    with pytest.raises(EnvironmentFault, match=r"^Faulty raised OSError in reset: the simulator is gone"):
        rl.Training(partial(Faulty, "raise in first reset"), rl.TRPO(), steps=10, setup=SMALL, mode=mode)


def test_an_environment_that_cannot_be_made_is_named():
    def broken() -> gym.Env:
        raise FileNotFoundError("model.xml")

    with pytest.raises(EnvironmentFault, match=r"^broken raised FileNotFoundError while it was made: model.xml"):
        rl.make(broken)
    with pytest.raises(ArgumentError, match="'NoSuchGame-v0' cannot be made"):
        rl.make("NoSuchGame-v0")
    with pytest.raises(ArgumentError, match="would import the module 'some_module'"):
        rl.make("some_module:Game-v0")
    with pytest.raises(ArgumentError, match="at least 1"):
        rl.make("CartPole-v1", 0)
    with pytest.raises(ArgumentError, match="'sync' or 'async'"):
        rl.make("CartPole-v1", mode="thread")
    for given in (gym.make("CartPole-v1"), 5):
        with pytest.raises(ArgumentError, match=r"^environment is .*, but copies are made of it: give a function that"):
            rl.make(given)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (spaces.Sequence(spaces.Discrete(2)), spaces.Discrete(2), "Observations of .*Sequence"),
        (spaces.Box(-1, 1, (2,)), spaces.Dict({"a": spaces.Discrete(2)}), "Actions of Dict"),
        (spaces.Box(-1, 1, (2,)), spaces.Box(0, 5, (2,), dtype=np.int64), "Actions of Box"),
        (spaces.Box(-1, 1, (0,)), spaces.Discrete(2), r"Observations of Box.* have no entries"),
        (spaces.Box(-1, 1, (2,)), spaces.Discrete(1), r"Actions of Discrete\(1\) leave nothing to decide"),
        (spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (0,)), "Actions of Box.* have no entries"),
    ],
)
def test_spaces_without_meaning_are_refused(observation, action, message):
    with pytest.raises(UnsupportedError, match=message):
        rl.Training(partial(Spaces, observation, action), rl.TRPO(), steps=10, setup=SMALL)


@pytest.mark.parametrize("action", [spaces.Discrete(2), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_discrete_actions_cannot_be_squashed(action):
    made = partial(Spaces, spaces.Box(-1, 1, (2,)), action)
    with pytest.raises(UnsupportedError, match=r"squashed is for continuous actions.*--no-squashed"):
        rl.Training(made, rl.TRPO(), steps=10, setup=rl.Setup(environments=2, horizon=16, squashed=True))


@pytest.mark.parametrize("action", [spaces.Discrete(2), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_discrete_actions_have_no_scale(action):
    made = partial(Spaces, spaces.Box(-1, 1, (2,)), action)
    with pytest.raises(ArgumentError, match="state_dependent_scale is about σ"):
        rl.Training(made, rl.TRPO(), steps=10, setup=rl.Setup(environments=2, horizon=16, state_dependent_scale=True))


def test_networks_that_do_not_fit_the_environment_are_refused():
    three = rl.build(4, rl.head_for(spaces.Discrete(3, start=4)))
    with pytest.raises(ArgumentError, match=r"CategoricalHead.* gives actions.*CartPole-v1 are Discrete\(2\)"):
        rl.Training("CartPole-v1", rl.TRPO(), steps=10, setup=SMALL, networks=three)
    five = rl.build(5, rl.head_for(spaces.Discrete(2)))
    with pytest.raises(ArgumentError, match="does not take observations of CartPole-v1, which have 4 entries"):
        rl.Training("CartPole-v1", rl.TRPO(), steps=10, setup=SMALL, networks=five)


@pytest.mark.parametrize("recurrent", [False, True])
def test_critics_that_do_not_fit_the_policy_or_the_environment_are_refused(recurrent):
    head = rl.head_for(spaces.Discrete(2))
    policy, good = rl.build(4, head, recurrent=recurrent)
    normaliser = good.normaliser
    _, other = rl.build(4, head, recurrent=not recurrent)
    _, five = rl.build(5, head, recurrent=recurrent)
    layer = Recurrent(4, 8, 2, last=1.0) if recurrent else nn.Linear(4, 2)
    bad = {
        "The (policy|critic) has a memory and the (critic|policy) has none.*give both one, or neither": other,
        "The critic does not take observations of CartPole-v1, which have 4 entries": five,
        r"The critic gave outputs of shape \(2, (1, )?2\) for 2 states, and must give .*one column": rl.Critic(
            layer, normaliser
        ),
        "The critic does not take .*(dtype|type)": copy.deepcopy(good).double(),
    }
    if not recurrent:
        bad[r"gave outputs of shape \(2,\) for 2 states"] = rl.Critic(
            nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), normaliser
        )
    for message, critic in bad.items():
        with pytest.raises(ArgumentError, match=message):
            rl.Training("CartPole-v1", rl.TRPO(), steps=10, setup=SMALL, networks=(policy, critic))
    rl.Training("CartPole-v1", rl.TRPO(), steps=64, setup=SMALL, networks=(policy, good)).run()


def test_an_environment_that_says_wrong_things_of_itself_is_told_so():
    class Liar(Spaces):
        """Declares three actions and has two."""

        def step(self, action):
            assert action < 2, "no such action"
            return super().step(action)

    with pytest.raises(EnvironmentFault, match="Liar raised AssertionError in step: no such action"):
        rl.trpo(partial(Liar, spaces.Box(-1, 1, (2,)), spaces.Discrete(3)), steps=1000, setup=SMALL)


def test_vector_environments_that_cannot_be_understood_are_refused():
    class Custom(CartPoleVectorEnv):
        metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.DISABLED}

    with pytest.raises(UnsupportedError, match="Custom does not reset its environments"):
        Environments(Custom(2), SEED)

    class Silent(CartPoleVectorEnv):
        metadata: ClassVar[dict[str, Any]] = {}

    with pytest.warns(UserWarning, match="Silent does not say how it resets.*NEXT_STEP is assumed"):
        Environments(Silent(2), SEED)

    class Forgetful(CartPoleVectorEnv):
        """Claims to reset in the same step, and gives no last states."""

        metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.SAME_STEP}

    environments = Environments(Forgetful(2), SEED)
    with pytest.raises(EnvironmentFault, match=r"Forgetful .*no info\['final_obs'\]"):
        for _ in range(60):
            environments.step(np.ones(2, dtype=np.int64))

    class Columns(CartPoleVectorEnv):
        def step(self, action):
            observations, rewards, *rest = super().step(action)
            return (observations, rewards[:, None], *rest)

    with pytest.raises(EnvironmentFault, match=r"Columns gave rewards of shape \(2, 1\)"):
        Environments(Columns(2), SEED).step(np.ones(2, dtype=np.int64))
    with pytest.raises(ArgumentError, match="seed must not be negative"):
        Environments(CartPoleVectorEnv(2), -1)


def test_a_recurrent_policy_refuses_environments_that_reset_in_a_step_of_their_own():
    setup = rl.Setup(environments=2, horizon=16, hidden=(8,), recurrent=True)
    with pytest.raises(UnsupportedError, match="NEXT_STEP"):
        rl.Training(CartPoleVectorEnv(2), rl.TRPO(), steps=10, setup=setup)
