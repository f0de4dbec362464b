"""What the algorithms maximise, and what they measure: surrogate, entropy, KL(old ‖ new), fit of the critic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError
from natgrad.rl.policy import Policy
from natgrad.rl.rollout import Samples

# float32 forward passes of different batch sizes differ in their last bits.
_TOLERANCE = 1e-3


def ratios(policy: Policy, f: Tensor, samples: Samples) -> Tensor:
    """π(a | s) / π_old(a | s), with all components of an action in one product; old is the policy that acted."""
    return torch.exp(-policy.head.likelihood.nll(f, samples.actions) - samples.log_probs)


def surrogate(policy: Policy, f: Tensor, samples: Samples) -> Tensor:
    """Mean of ratio × advantage, 0-d: to first order the improvement of the return (Schulman et al. 2015, eq. 14)."""
    return (ratios(policy, f, samples) * samples.advantages).mean()


def entropy(policy: Policy, f: Tensor) -> Tensor:
    """Mean entropy of the policy, 0-d, in nats."""
    return policy.head.entropy(f).mean()


def mean_kl(policy: Policy, old: Tensor, new: Tensor) -> Tensor:
    """Mean of KL(old ‖ new) over the states, 0-d, in nats per action: exact, by the head's likelihood."""
    return policy.head.likelihood.kl(old, new).mean()


@torch.no_grad()
def behaviour(policy: Policy, samples: Samples) -> Tensor:
    """f of the policy that acted, detached, for all samples.

    Raises:
        ArgumentError: ``policy`` is not the policy that acted: the ratios are not one.
    """
    f = policy(*samples.inputs)
    worst = float((ratios(policy, f, samples) - 1).abs().max())
    if not worst < _TOLERANCE:
        raise ArgumentError(
            f"Before the update, probabilities of the actions differ by up to {worst:.2g} from those they were taken "
            "with, so the policy is not the one that acted. Random or running layers (dropout, BatchNorm) in the "
            "policy's body do this, and so does changing the normaliser between acting and update. Remove them."
        )
    return f


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns), 0-d: 1 for a perfect critic, 0 for a constant one."""
    spread = returns.var(unbiased=False)
    return torch.where(spread > 0, 1 - (returns - values).var(unbiased=False) / spread, torch.nan)


def saved(module: nn.Module) -> list[Tensor]:
    """Copies of the parameters, for :func:`restore`."""
    return [p.detach().clone() for p in module.parameters()]


@torch.no_grad()
def restore(module: nn.Module, copies: list[Tensor]) -> None:
    """Put the parameters back, bit for bit."""
    for p, copy in zip(module.parameters(), copies, strict=True):
        p.copy_(copy)
