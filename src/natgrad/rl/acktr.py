"""Actor–critic with Kronecker-factored curvature (Wu et al. 2017), with the KL of every step measured and bounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from natgrad.metric import Fisher, Kronecker, MonteCarlo, Structure
from natgrad.metric.running import Refresh
from natgrad.optim import NaturalGradient
from natgrad.rl.algorithm import Setup
from natgrad.rl.checks import check_finite, check_positive
from natgrad.rl.critic import CriticFit
from natgrad.rl.one_step import OneStepLearner, linear
from natgrad.rl.policy import Critic, Policy
from natgrad.rl.training import Training
from natgrad.rl.vector import EnvironmentLike
from natgrad.step import Damping, FactoredTikhonov, TrustRegion


@dataclass(frozen=True)
class ACKTR:
    """Many small updates, each one K-FAC step of the policy and some of the critic.

    The step is clipped to a KL of ``max_kl`` as K-FAC predicts it. K-FAC does not see that layers move together, so the
    measured KL can be larger: the step is then halved until the measured mean KL(old ‖ new), too, is within ``max_kl``.

    Args:
        max_kl: the radius, in nats per action.
        lr: longest multiple of the direction; falls linearly to zero over training where ``anneal``.
        anneal: see ``lr``.
        momentum: of the gradient, before it is preconditioned, so that the bound is on the whole step.
        entropy: weight of the policy's entropy in the objective.
        damping, structure, average, refresh: of the Fisher matrix of the policy.
        critic: how the critic is fitted; K-FAC, too.
    """

    max_kl: float = 0.01
    lr: float = 1.0
    anneal: bool = True
    momentum: float = 0.0
    entropy: float = 0.01
    damping: float | Damping = FactoredTikhonov(1e-2)
    structure: Structure = Kronecker()
    average: float = 0.99
    refresh: Refresh = Refresh(1, 5)
    critic: CriticFit = field(default_factory=CriticFit.kfac)

    def __post_init__(self) -> None:
        check_positive(self, "max_kl", "lr")
        check_finite(self, "max_kl", "lr", "entropy")

    def learner(self, policy: Policy, critic: Critic, seed: int) -> OneStepLearner:
        """Start learning."""
        optimizer = NaturalGradient(
            policy,
            policy.head.likelihood,
            lr=self.lr,
            damping=self.damping,
            momentum=self.momentum,
            metric=Fisher(MonteCarlo(), self.structure),
            search=TrustRegion(self.max_kl, require_improvement=False),
            average=self.average,
            refresh=self.refresh,
            seed=seed,
        )
        rate = linear(self.lr) if self.anneal else None
        return OneStepLearner(policy, optimizer, self.critic.fitter(critic, seed), entropy=self.entropy, rate=rate)


def acktr(
    environment: EnvironmentLike,
    *,
    steps: int,
    seed: int = 0,
    setup: Setup = Setup(horizon=64),
    folder: str | Path | None = None,
    **settings: Any,
) -> Training:
    """Train a policy with ACKTR; returns the finished :class:`natgrad.rl.Training`, which holds ``policy``.

    ``settings`` are those of :class:`ACKTR`; the rest is described at :class:`natgrad.rl.Training`.
    """
    return Training(environment, ACKTR(**settings), steps=steps, setup=setup, seed=seed, folder=folder).run()
