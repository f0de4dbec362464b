"""Stable-Baselines3: natgrad as the optimizer of a policy, its trust region, saving and loading."""

from __future__ import annotations

import gymnasium
import pytest
import torch
from torch import Tensor

import natgrad as ng
from natgrad.errors import NotObservedError
from natgrad.testing.likelihoods import check_likelihood

pytest.importorskip("stable_baselines3")
from stable_baselines3.common.policies import ActorCriticPolicy

from natgrad.rl.stable_baselines3 import NaturalPolicy, likelihood_for
from test_examples import load

example = load("stable_baselines3_policy")
UPDATE = 256


def parameters(model: example.A2C) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.policy.named_parameters()}


def test_the_trust_region_earns_more_than_rmsprop_at_its_best_rate():
    scores = example.main()
    assert list(scores) == ["TrustRegionNGD", "RMSprop(0.01)"]  # the best rate is inside the grid
    natural, rmsprop = scores.values()
    assert sum(natural) / len(natural) > sum(rmsprop) / len(rmsprop) + 10
    assert min(natural) > 90


def test_no_update_leaves_the_trust_region():
    model, measured = example.agent(), []
    model.policy.optimizer.register_step_post_hook(lambda opt, *_: measured.append(float(opt.last.kl_measured)))
    model.learn(6 * UPDATE)
    assert len(measured) == 6 and 0 < min(measured) <= max(measured) <= 0.05


def test_the_observed_outputs_are_those_of_the_policy():
    policy = example.agent().policy
    plain = ActorCriticPolicy(policy.observation_space, policy.action_space, lambda _: 1.0, net_arch=[32])
    plain.load_state_dict(policy.state_dict())
    observations, actions = torch.randn(16, 4), torch.randint(2, (16,))
    for ours, theirs in zip(*[p.evaluate_actions(observations, actions) for p in (policy, plain)], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_loss_is_the_negative_log_likelihood():
    """SB3's policy and value loss with advantages of one, vf_coef = 1 / (2 scale²): what the likelihood says."""
    f, actions, returns = torch.randn(16, 3), torch.randint(2, (16,)), 20 * torch.randn(16)
    model = example.agent()
    loss = torch.nn.functional.cross_entropy(f[:, :-1], actions, reduction="none")
    loss = loss + model.vf_coef * (f[:, -1] - returns).square()
    likelihood = model.policy.optimizer.likelihood
    nll = likelihood.nll(f, torch.stack([actions.float(), returns], -1))
    torch.testing.assert_close((nll - loss).std(), torch.zeros(()), atol=1e-5, rtol=0)  # the same up to a constant


def test_the_likelihood_keeps_the_laws():
    f = torch.randn(5, 3, dtype=torch.float64)
    y = torch.stack([torch.randint(2, (5,)).double(), 20 * torch.randn(5, dtype=torch.float64)], -1)
    check_likelihood(likelihood_for(gymnasium.spaces.Discrete(2), 20.0), f, y, samples=4000)


def test_a_plain_policy_is_an_error_that_says_what_to_do():
    """The policy's own forward() is never called in training, so there is nothing to observe."""
    model = example.agent()
    plain = example.A2C(
        "MlpPolicy", model.get_env(), n_steps=32, device="cpu",
        policy_kwargs={"optimizer_class": ng.KFAC, "optimizer_kwargs": {"likelihood": ng.Categorical()}},
    )  # fmt: skip
    with pytest.raises(NotObservedError, match="attach"):
        plain.learn(UPDATE)
    plain.policy.optimizer.attach(plain.policy)
    with pytest.raises(NotObservedError, match="no training pass"):
        plain.learn(UPDATE)


def test_a_loaded_model_takes_the_same_steps(tmp_path):
    """With K-FAC, whose averages and inverses must come back from the file."""
    likelihood, envs = example.agent().policy.optimizer.likelihood, example.agent().get_env()
    kfac = {"net_arch": [32], "optimizer_class": ng.KFAC, "optimizer_kwargs": {"likelihood": likelihood}}
    model = example.A2C(NaturalPolicy, envs, 1.0, n_steps=32, device="cpu", seed=0, policy_kwargs=kfac)
    model.learn(3 * UPDATE)
    model.save(tmp_path / "agent")
    loaded = example.A2C.load(tmp_path / "agent", device="cpu")
    assert len(loaded.policy.optimizer.state) == 8

    before, observations, actions = parameters(model), torch.randn(64, 4), torch.randint(2, (64,))
    for agent in (model, loaded):
        agent.policy.set_training_mode(True)
        for _ in range(2):
            agent.policy.optimizer.zero_grad()
            values, log_prob, _ = agent.policy.evaluate_actions(observations, actions)
            (agent.vf_coef * (values - 10).square().mean() - log_prob.mean()).backward()
            agent.policy.optimizer.step()
    for name, p in parameters(model).items():
        assert torch.equal(p, parameters(loaded)[name]) and not torch.equal(p, before[name]), name
