"""natgrad's optimizers inside Stable-Baselines3's policies, for every kind of action."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import natgrad as ng

sb3 = pytest.importorskip("stable_baselines3")

from natgrad.rl.stable_baselines3 import ActionAndValue, NaturalPolicy, likelihood_for  # noqa: E402

SPACES = {
    "discrete": gym.spaces.Discrete(3),
    "multi-discrete": gym.spaces.MultiDiscrete([2, 3]),
    "multi-binary": gym.spaces.MultiBinary(2),
    "box": gym.spaces.Box(-1.0, 1.0, (2,)),
}
WIDTHS = {"discrete": 3, "multi-discrete": 5, "multi-binary": 2, "box": 4}


class Anything(gym.Env):
    """Rewards for anything, three steps an episode."""

    def __init__(self, space: gym.Space) -> None:
        self.action_space, self.observation_space = space, gym.spaces.Box(-1.0, 1.0, (4,))

    def _state(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 4).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._state(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        return self._state(), float(np.sum(action)), self.t >= 3, False, {}


def f_and_labels(name: str, n: int = 5) -> tuple[ActionAndValue, torch.Tensor, torch.Tensor]:
    likelihood = likelihood_for(SPACES[name], scale=2.0)
    f = torch.randn(n, WIDTHS[name] + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return likelihood, f, likelihood.sample(f, generator=torch.Generator().manual_seed(1))[0]


@pytest.mark.parametrize("name", SPACES)
def test_fisher_is_the_hessian_of_the_kl_and_the_second_moment_of_the_score(name: str) -> None:
    likelihood, f, _ = f_and_labels(name)
    hessians = torch.stack(
        [torch.func.hessian(lambda g, row=row: likelihood.kl(row[None], g[None]).sum())(row) for row in f]
    )
    columns = likelihood.fisher_factor(f)
    assert torch.allclose(torch.einsum("kni,knj->nij", columns, columns), hessians, atol=1e-12)
    u = torch.randn_like(f)
    assert torch.allclose(likelihood.fisher_matvec(f, u), torch.einsum("nij,nj->ni", hessians, u), atol=1e-12)
    wide = f[:1].expand(40_000, -1)
    labels = likelihood.sample(wide, generator=torch.Generator().manual_seed(2))[0]
    scores = likelihood.score(wide, labels)
    assert torch.allclose(scores.T @ scores / len(scores), hessians[0], atol=0.05 * float(hessians[0].abs().max()))


@pytest.mark.parametrize("name", SPACES)
def test_evaluate_actions_is_that_of_sb3(name: str) -> None:
    env = Anything(SPACES[name])
    model = sb3.A2C(NaturalPolicy, env, policy_kwargs=natural(env), seed=0, device="cpu")
    observations = torch.rand(6, 4)
    with torch.no_grad():
        actions = model.policy(observations)[0]
        ours = model.policy.evaluate_actions(observations, actions)
        theirs = sb3.common.policies.ActorCriticPolicy.evaluate_actions(model.policy, observations, actions)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.flatten(), other.flatten(), atol=1e-6)


@pytest.mark.parametrize("name", SPACES)
def test_a2c_and_ppo_train_with_every_kind_of_action(name: str) -> None:
    env = Anything(SPACES[name])
    for kind, options in ((sb3.A2C, {"n_steps": 16}), (sb3.PPO, {"n_steps": 32, "batch_size": 16, "n_epochs": 2})):
        model = kind(
            NaturalPolicy, env, policy_kwargs=natural(env), learning_rate=1.0, max_grad_norm=1e9, seed=0,
            device="cpu", **options,
        )  # fmt: skip
        before = [p.detach().clone() for p in model.policy.parameters()]
        model.learn(64)
        assert model.policy.optimizer.last.accepted
        assert any(not torch.equal(p, q) for p, q in zip(model.policy.parameters(), before, strict=True))
        assert all(torch.isfinite(p).all() for p in model.policy.parameters())


def test_another_optimizer_leaves_it_sb3s_own_policy() -> None:
    runs = []
    for policy in (NaturalPolicy, "MlpPolicy"):
        model = sb3.A2C(policy, Anything(SPACES["discrete"]), n_steps=16, seed=0, device="cpu").learn(64)
        runs.append([p.detach().clone() for p in model.policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gsde_and_bad_scales_are_refused() -> None:
    env = Anything(SPACES["box"])
    with pytest.raises(ng.errors.UnsupportedError, match="gSDE"):
        sb3.A2C(NaturalPolicy, env, policy_kwargs=natural(env), use_sde=True, device="cpu")
    with pytest.raises(ng.errors.ArgumentError, match="scale"):
        likelihood_for(env.action_space, 0.0)


@pytest.mark.parametrize("given", [ng.Categorical(), likelihood_for(SPACES["box"])], ids=["plain", "of other actions"])
def test_a_likelihood_of_something_else_is_refused(given: Any) -> None:
    options = {"optimizer_class": ng.KFAC, "optimizer_kwargs": {"likelihood": given}}
    with pytest.raises(ng.errors.ArgumentError, match=r"Give likelihood_for\(env.action_space\)"):
        sb3.A2C(NaturalPolicy, Anything(SPACES["discrete"]), policy_kwargs=options, device="cpu")


def natural(env: gym.Env) -> dict[str, Any]:
    options = {"likelihood": likelihood_for(env.action_space, 1.0), "search": ng.KLClip(1e-3)}
    return {"net_arch": [8], "optimizer_class": ng.KFAC, "optimizer_kwargs": options}
