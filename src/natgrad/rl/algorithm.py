"""What every algorithm is: settings that make a learner, which updates policy and critic from samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.rl.checks import check_finite, check_fraction, check_whole, widths
from natgrad.rl.policy import Critic, Policy
from natgrad.rl.rollout import Samples


@dataclass(frozen=True)
class Setup:
    """How an algorithm acts and what its networks are.

    Args:
        environments: copies that act in step.
        horizon: steps of each per update; an update learns from environments × horizon steps.
        gamma: discount of rewards. That of the states is left out, as everywhere in practice.
        lam: λ of generalised advantage estimation.
        hidden: widths of policy and critic, or one; with ``recurrent`` the last is the memory's.
        recurrent: whether they have a memory.
        normalise: whether observations are normalised by their running moments.
        squashed: tanh of the Gaussian instead of clipping, for bounded continuous actions.
        state_dependent_scale: whether the network gives σ, too.
        log_scale: the first log σ, in units where a bounded action runs from −1 to 1.
        noise_correlation: ρ of the noise of continuous actions from step to step; see
            :class:`natgrad.rl.noise.CorrelatedNoise`.
    """

    environments: int = 8
    horizon: int = 256
    gamma: float = 0.99
    lam: float = 0.95
    hidden: tuple[int, ...] = (64, 64)
    recurrent: bool = False
    normalise: bool = True
    squashed: bool = False
    state_dependent_scale: bool = False
    log_scale: float = 0.0
    noise_correlation: float = 0.0

    def __post_init__(self) -> None:
        check_whole(self, "environments", "horizon")
        check_fraction(self, "gamma", "lam")
        check_finite(self, "log_scale")
        object.__setattr__(self, "hidden", widths(self.hidden))
        if self.recurrent and not self.hidden:
            raise ArgumentError("hidden is empty, but with recurrent its last width is that of the memory.")


class Learner(Protocol):
    """Policy and critic being learned."""

    def update(self, samples: Samples, old: Tensor, progress: float) -> dict[str, float]:
        """Learn from samples of the present policy.

        Args:
            samples: what it did.
            old: f of the policy that acted, at all samples.
            progress: the fraction of training that is done, in [0, 1).

        Returns:
            Numbers for the record.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides policy and critic."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        ...


class Algorithm(Protocol):
    """Settings of an algorithm."""

    def learner(self, policy: Policy, critic: Critic, seed: int) -> Learner:
        """Start learning."""
        ...
