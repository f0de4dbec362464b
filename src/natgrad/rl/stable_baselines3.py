"""natgrad's optimizers inside the actor-critic policies of Stable-Baselines3 (A2C, PPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from natgrad.errors import ArgumentError, MissingExtraError, UnsupportedError
from natgrad.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, MultiCategorical, Target
from natgrad.optim import NaturalGradient

try:
    from stable_baselines3.common import distributions
    from stable_baselines3.common.policies import ActorCriticPolicy
except ImportError as error:
    raise MissingExtraError(
        "natgrad.rl.stable_baselines3 needs Stable-Baselines3: pip install stable-baselines3."
    ) from error


@dataclass(frozen=True)
class ActionAndValue(Likelihood):
    """What an actor-critic network means: f = [parameters of the action's distribution, value].

    The action has the likelihood ``action``; the return is Gaussian around the value with standard deviation ``scale``,
    in units of the reward, and independent of it. A value loss of c·(v − R)² is the Gaussian's nll for
    c = 1 / (2 scale²): give SB3 ``vf_coef = 0.5 / scale**2``, as its A2C averages squared errors.

    The labels are [*batch, labels of the action…, return], as one tensor of floats.
    """

    action: Likelihood
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ArgumentError(f"scale must be positive, got {self.scale}.")

    @property
    def _value(self) -> Gaussian:
        return Gaussian(self.scale)

    def distribution(self, f: Tensor) -> Distribution:
        return _Pair(self, f)

    def nll(self, f: Tensor, y: Target) -> Tensor:
        assert isinstance(y, Tensor)
        discrete = isinstance(self.action, Categorical | MultiCategorical)
        labels = y[..., :-1].long() if discrete else y[..., :-1]
        if isinstance(self.action, Categorical):
            labels = labels.squeeze(-1)
        return self.action.nll(f[..., :-1], labels) + self._value.nll(f[..., -1:], y[..., -1:])

    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        action = self.action.sample(f[..., :-1], n, generator=generator)
        if isinstance(self.action, Categorical):
            action = action.unsqueeze(-1)
        value = self._value.sample(f[..., -1:], n, generator=generator)
        return torch.cat([action.to(value.dtype), value], -1)

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        return self.action.kl(f[..., :-1], g[..., :-1]) + self._value.kl(f[..., -1:], g[..., -1:])

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        parts = [
            self.action.fisher_matvec(f[..., :-1], u[..., :-1]),
            self._value.fisher_matvec(f[..., -1:], u[..., -1:]),
        ]
        return torch.cat(parts, -1)

    def fisher_factor(self, f: Tensor) -> Tensor:
        pad = nn.functional.pad
        action, value = self.action.fisher_factor(f[..., :-1]), self._value.fisher_factor(f[..., -1:])
        return torch.cat([pad(action, (0, 1)), pad(value, (f.shape[-1] - 1, 0))])


class _Pair(Distribution):
    """Action and return, one tensor."""

    def __init__(self, likelihood: ActionAndValue, f: Tensor) -> None:
        self.likelihood, self.f = likelihood, f
        super().__init__(f.shape[:-1], likelihood.sample(f).shape[f.ndim :], validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # pyright: ignore
        found = self.likelihood.sample(self.f, sample_shape.numel())
        return found.reshape(*sample_shape, *found.shape[1:])

    def log_prob(self, value: Tensor) -> Tensor:
        lead = value.shape[: value.ndim - self.f.ndim]
        return -self.likelihood.nll(self.f.expand(*lead, *self.f.shape), value)


def likelihood_for(space: gym.Space, scale: float = 1.0) -> ActionAndValue:
    """The likelihood of SB3's actor-critic policies for actions of ``space``.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary, or Box (with SB3's plain diagonal Gaussian).
        scale: standard deviation of a return around the value, in units of the reward.

    Raises:
        UnsupportedError: another space.
    """
    if isinstance(space, gym.spaces.Discrete):
        return ActionAndValue(Categorical(), scale)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return ActionAndValue(MultiCategorical([int(n) for n in space.nvec]), scale)
    if isinstance(space, gym.spaces.MultiBinary):
        return ActionAndValue(Bernoulli(), scale)
    if isinstance(space, gym.spaces.Box):
        return ActionAndValue(Gaussian.learned(), scale)
    raise UnsupportedError(f"Stable-Baselines3 has no actor-critic policy for actions of {space}.")


class Outputs(nn.Module):
    """All that an SB3 policy computes in training, f of :class:`ActionAndValue`, in one pass that can be observed."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Any) -> Tensor:
        """[B, C + 1] for a batch of observations."""
        policy = self.policy
        features = policy.extract_features(observations)
        if policy.share_features_extractor:
            actor, critic = policy.mlp_extractor(features)
        else:
            actor = policy.mlp_extractor.forward_actor(features[0])
            critic = policy.mlp_extractor.forward_critic(features[1])
        parameters = policy.action_net(actor)
        if isinstance(policy.action_dist, distributions.DiagGaussianDistribution):
            parameters = torch.cat([parameters, policy.log_std.expand_as(parameters)], -1)
        return torch.cat([parameters, policy.value_net(critic)], -1)


class NaturalPolicy(ActorCriticPolicy):
    """SB3's actor-critic policy, trained by one of natgrad's optimizers.

    ::

        PPO(NaturalPolicy, env, policy_kwargs={
            "optimizer_class": ng.KFAC,
            "optimizer_kwargs": {"likelihood": likelihood_for(env.action_space), "search": ng.KLClip(1e-3)},
        }, learning_rate=1.0, max_grad_norm=float("inf"))

    SB3 calls a policy's networks one by one, never the policy itself; this one calls a module of them all, which is
    observed. With another optimizer it is SB3's own policy.

    Raises:
        UnsupportedError: gSDE (``use_sde=True``), whose noise the likelihood does not know.
        ArgumentError: a likelihood that is not :func:`likelihood_for` the actions.
    """

    outputs: Outputs

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        # Not a child of the policy, whose state dict stays as SB3 knows it.
        object.__setattr__(self, "outputs", Outputs(self))
        if isinstance(self.optimizer, NaturalGradient):
            if self.use_sde:
                raise UnsupportedError("gSDE has no likelihood in natgrad. Use the policy without use_sde=True.")
            self._check_likelihood(self.optimizer_kwargs.get("likelihood", likelihood_for(self.action_space)))
            self.optimizer.attach(self.outputs)

    def _check_likelihood(self, given: Any) -> None:
        expected = likelihood_for(self.action_space)
        if not (isinstance(given, ActionAndValue) and given.action == expected.action):
            raise ArgumentError(
                f"The likelihood {given} is not that of this policy, whose outputs are those of the action and the "
                "value. Give likelihood_for(env.action_space)."
            )

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-probabilities and entropy, by one observed pass."""
        if not isinstance(self.optimizer, NaturalGradient):
            return super().evaluate_actions(obs, actions)
        f = self.outputs(obs)
        parameters, values = f[..., :-1], f[..., -1:]
        if isinstance(self.action_dist, distributions.DiagGaussianDistribution):
            mean, log_std = parameters.chunk(2, -1)
            distribution = self.action_dist.proba_distribution(mean, log_std)
        else:
            distribution = self.action_dist.proba_distribution(parameters)  # pyright: ignore
        return values, distribution.log_prob(actions), distribution.entropy()
