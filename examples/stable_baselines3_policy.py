"""A2C of Stable-Baselines3 with a natural-gradient trust region, beside its own RMSprop at its best rate, on CartPole.

SB3 trains a policy through `evaluate_actions`, which calls the policy's networks one by one, never the policy itself.
So here it calls one module for all outputs, and that module is observed. Its likelihood has two parts: the action is
categorical, and the return is Gaussian around the critic's value, of which SB3's value loss is the negative logarithm.

    python examples/stable_baselines3_policy.py
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal, kl_divergence, register_kl

import natgrad as ng

RATES = (3e-3, 1e-2, 3e-2)  # of RMSprop, A2C's own choice; the best on seed 0 is taken
SCALE = 20.0  # standard deviation of a return around the critic's value


class ActionAndReturn(Distribution):
    """Of an output [*batch, A + 1]: the logits of A actions, and the mean of the return."""

    def __init__(self, f: Tensor) -> None:
        self.action = Categorical(logits=f[..., :-1], validate_args=False)
        self.value = Normal(f[..., -1], SCALE, validate_args=False)
        super().__init__(f.shape[:-1], torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return torch.stack([self.action.sample(sample_shape), self.value.sample(sample_shape)], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.action.log_prob(value[..., 0]) + self.value.log_prob(value[..., 1])


@register_kl(ActionAndReturn, ActionAndReturn)
def _kl(p: ActionAndReturn, q: ActionAndReturn) -> Tensor:
    return kl_divergence(p.action, q.action) + kl_divergence(p.value, q.value)


class Outputs(nn.Module):
    """All that a policy computes in training, in one pass."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor) -> Tensor:
        actor, critic = self.policy.mlp_extractor(self.policy.extract_features(observations))
        return torch.cat([self.policy.action_net(actor), self.policy.value_net(critic)], -1)


class ObservedPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.__dict__["outputs"] = Outputs(self)  # not a child of the policy, whose state dict stays as it is
        self.optimizer.attach(self.outputs)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = self.outputs(obs)
        distribution = self.action_dist.proba_distribution(f[..., :-1])
        return f[..., -1:], distribution.log_prob(actions), distribution.entropy()


def agent(rmsprop: float | None = None, seed: int = 0) -> A2C:
    options = {"n_steps": 32, "gae_lambda": 0.95, "normalize_advantage": True, "seed": seed, "device": "cpu"}
    envs = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
    if rmsprop is not None:
        return A2C("MlpPolicy", envs, learning_rate=rmsprop, policy_kwargs={"net_arch": [32]}, **options)
    likelihood = ng.FromDistribution(lambda f: ActionAndReturn(f))
    natural = {"likelihood": likelihood, "max_kl": 0.05, "damping": 0.01, "structure": ng.Dense()}
    policy = {"net_arch": [32], "optimizer_class": ng.TrustRegionNGD, "optimizer_kwargs": natural}
    options |= {"learning_rate": 1.0, "vf_coef": 0.5 / SCALE**2, "max_grad_norm": float("inf")}
    return A2C(ObservedPolicy, envs, policy_kwargs=policy, **options)


def score(model: A2C, steps: int = 40) -> float:
    """Train for ``steps`` optimizer steps, and return the mean return of the last 100 episodes."""
    model.learn(steps * model.n_steps * model.n_envs)
    return sum(episode["r"] for episode in model.ep_info_buffer) / len(model.ep_info_buffer)


def main(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, list[float]]:
    """Train on each seed, and return the scores of both optimizers."""
    best = max(RATES, key=lambda rate: score(agent(rate)))
    scores = {}
    for name, rate in (("TrustRegionNGD", None), (f"RMSprop({best})", best)):
        scores[name] = [score(agent(rate, seed)) for seed in seeds]
        print(f"{name}: mean return of the last 100 episodes {', '.join(f'{s:.0f}' for s in scores[name])}")
    return scores


if __name__ == "__main__":
    main()
