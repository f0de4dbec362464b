"""Policies with a memory: emptied where an episode begins, the same unrolled as step by step, and of use."""

from __future__ import annotations

import math
from functools import partial

import gymnasium as gym
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rl_environments import Masked, Recall
from torch import Tensor, nn

import natgrad.rl as rl
from natgrad.rl.environments import Environments
from natgrad.rl.networks import Recurrent
from natgrad.rl.objective import behaviour, ratios
from natgrad.rl.rollout import Collector, Rollout

GAMMA, LAM = 0.9, 0.8
MEMORY = rl.Setup(environments=16, horizon=16, hidden=(16,), recurrent=True, normalise=False, gamma=1.0, lam=1.0)


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1", max_episode_steps=15)


class Steps(nn.Module):
    """The same network, step by step, with torch's own cell; the memory starts anew for each call."""

    def __init__(self, body: Recurrent) -> None:
        super().__init__()
        self.body, self.cell = body, nn.GRUCell(body.hidden, body.hidden, dtype=torch.float64)
        with torch.no_grad():
            for name, layer in (("ih", body.input_gates), ("hh", body.memory_gates)):
                getattr(self.cell, f"weight_{name}").copy_(layer.weight)
                getattr(self.cell, f"bias_{name}").copy_(layer.bias)

    def forward(self, episode: Tensor) -> Tensor:
        """Outputs [T, C] for the observations [T, D] of one episode from its start."""
        memory, outputs = torch.zeros(self.body.hidden, dtype=torch.float64), []
        for x in episode:
            memory = self.cell(torch.tanh(self.body.encoder(x)), memory)
            outputs.append(self.body.output(memory))
        return torch.stack(outputs)


def collector(vector: gym.vector.VectorEnv, horizon: int) -> Collector:
    environments = Environments(vector, 5)
    head = rl.head_for(vector.single_action_space)
    policy, critic = rl.build(4, head, hidden=(8,), recurrent=True)
    for network in (policy, critic):
        network.double()
        for p in network.parameters():  # so that the memory matters
            p.data.mul_(1.5).add_(0.1)
    critic.returns.mean.fill_(2.0)
    generator = torch.Generator().manual_seed(0)
    return Collector(environments, policy, critic, horizon=horizon, gamma=GAMMA, lam=LAM, generator=generator)


def episodes(rollouts: list[Rollout], i: int) -> list[slice]:
    """Of environment i, in the rollouts one after another."""
    starts = torch.cat([r.starts[:, i] for r in rollouts]).nonzero().ravel().tolist()
    total = sum(len(r.starts) for r in rollouts)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], total], strict=True)]


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_stepping_unrolling_and_a_cell_of_torch_agree_over_episodes_and_rollouts(mode):
    """Policy and critic, whose memory outlives a rollout and not an episode; and the values that follow a step."""
    acting = collector(SyncVectorEnv([cartpole] * 3, autoreset_mode=mode), horizon=14)
    rollouts, samples = [], []
    for _ in range(3):
        rollouts.append(acting.collect())
        samples.append(acting.samples(rollouts[-1]))
        f = behaviour(acting.policy, samples[-1])
        torch.testing.assert_close(f.transpose(0, 1), rollouts[-1].f, rtol=0, atol=1e-12)
        ones = torch.ones_like(samples[-1].advantages)
        torch.testing.assert_close(ratios(acting.policy, f, samples[-1]), ones, rtol=0, atol=1e-12)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(r, name) for r in rollouts])

    policy, critic = Steps(acting.policy.body), Steps(acting.critic.body)
    targets = torch.cat([s.returns.transpose(0, 1) for s in samples])
    with torch.no_grad():
        for i in range(3):
            assert len(episodes(rollouts, i)) > 2
            for part in episodes(rollouts, i):
                observations = acting.policy.normaliser(joined("observations")[part, i])
                torch.testing.assert_close(policy(observations), joined("f")[part, i], rtol=0, atol=1e-12)
                last = joined("following")[part, i][-1:]
                values = acting.critic.values(critic(torch.cat([observations, last])))[:, 0]
                expected = by_rollout(rollouts, part, i, values)
                torch.testing.assert_close(targets[part, i], expected, rtol=0, atol=1e-10)


def by_rollout(rollouts: list[Rollout], part: slice, i: int, values: Tensor) -> Tensor:
    """λ-returns of one episode; at the end of a rollout the value of the next state stands for what is to come."""
    horizon = len(rollouts[0].starts)
    rewards, terminated, truncated = (
        torch.cat([getattr(r, name)[:, i] for r in rollouts])[part] for name in ("rewards", "terminated", "truncated")
    )
    cut = torch.tensor([(t + 1) % horizon == 0 for t in range(part.start, part.stop)])
    columns = (x.unsqueeze(1) for x in (rewards, values[:-1], values[1:], terminated, truncated | cut))
    return rl.advantages(*columns, gamma=GAMMA, lam=LAM)[:, 0] + values[:-1]


def test_the_memory_is_emptied_where_an_episode_begins():
    policy, _ = rl.build(2, rl.head_for(spaces.Discrete(2)), hidden=(8,), recurrent=True)
    x, filled = torch.randn(3, 2), torch.randn(3, 8)
    starts = torch.tensor([True, False, True])
    f, after = policy.act(x, memory=filled, starts=starts)[1:]
    fresh, fresh_after = policy.act(x, memory=policy.start(3), starts=torch.zeros(3))[1:]
    assert torch.equal(f[starts], fresh[starts]) and torch.equal(after[starts], fresh_after[starts])
    assert not torch.isclose(f[1], fresh[1]).all()


def test_evaluation_empties_the_memory_and_keeps_it_within_an_episode():
    """Actions of a policy that takes its cue from the first step only."""
    policy, _ = rl.build(2, rl.head_for(spaces.Discrete(2)), hidden=(1,), recurrent=True, normalise=False)
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
        policy.body.encoder.weight[0, 0] = 5.0
        policy.body.input_gates.weight[2, 0] = 20.0  # candidate: the sign of the cue
        policy.body.input_gates.bias[2] = 0.0
        policy.body.input_gates.weight[1, 0] = 0.0
        policy.body.memory_gates.weight[2, 0] = 20.0  # and then of the memory
        policy.body.output.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    assert rl.evaluate(policy, partial(Recall, 6), episodes=30).returns == (1.0,) * 30


ALGORITHMS = {"TRPO": rl.TRPO(max_kl=0.05), "PPO": rl.PPO(lr=1e-2, batch=128, epochs=4)}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_only_a_policy_with_a_memory_recalls_the_cue(name):
    """Whatever a policy without one does at the last step is right half of the time."""
    trained = rl.Training(Recall, ALGORITHMS[name], steps=5000, setup=MEMORY).run()
    assert rl.evaluate(trained.policy, Recall, episodes=100).mean == 1.0
    forgetful = rl.Setup(**{**vars(MEMORY), "recurrent": False})
    trained = rl.Training(Recall, ALGORITHMS[name], steps=5000, setup=forgetful).run()
    assert 0.3 < rl.evaluate(trained.policy, Recall, episodes=100).mean < 0.7


@pytest.mark.parametrize("algorithm", [rl.TRPO(), rl.PPO(batch=32)], ids=lambda a: type(a).__name__)
def test_masks_reach_policies_with_a_memory(algorithm):
    setup = rl.Setup(environments=4, horizon=8, hidden=(8,), recurrent=True)
    training = rl.Training(partial(Masked, spaces.MultiDiscrete([3, 2])), algorithm, steps=96, setup=setup).run()
    assert all(math.isfinite(r["kl"]) and math.isfinite(r["entropy"]) for r in training.history)
