"""Natural policy gradient (Kakade 2002) with steps of a given length in KL (Rajeswaran et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from natgrad.linalg import Solver
from natgrad.metric import Exact, Fisher, MatrixFree, Structure
from natgrad.metric.running import Refresh
from natgrad.optim import NaturalGradient
from natgrad.rl.algorithm import Setup
from natgrad.rl.checks import check_finite, check_positive
from natgrad.rl.critic import CriticFit
from natgrad.rl.one_step import OneStepLearner, solver_for
from natgrad.rl.policy import Critic, Policy
from natgrad.rl.training import Training
from natgrad.rl.vector import EnvironmentLike
from natgrad.step import Damping, KLClip


@dataclass(frozen=True)
class NPG:
    """Each update is one step along F⁻¹g whose predicted KL is ``target_kl``; nothing is searched.

    That is TRPO without its line search: the KL of a step is predicted by the metric and not bounded. What it was is
    measured and recorded.

    Args:
        target_kl: predicted KL of a step, ½ ΔᵀFΔ, in nats per action; what the damping adds to F counts.
        lr: longest multiple of F⁻¹g; ``inf`` goes to ``target_kl``.
        damping: λ of the solve.
        structure: of the Fisher matrix.
        solver: of the structure; None takes its own (conjugate gradients of at most 15 steps, relative tolerance).
        critic: how the critic is fitted.
    """

    target_kl: float = 0.01
    lr: float = math.inf
    damping: float | Damping = 0.1
    structure: Structure = MatrixFree()
    solver: Solver | None = None
    critic: CriticFit = field(default_factory=CriticFit)

    def __post_init__(self) -> None:
        check_positive(self, "target_kl", "lr")
        check_finite(self, "target_kl")

    def learner(self, policy: Policy, critic: Critic, seed: int) -> OneStepLearner:
        """Start learning."""
        optimizer = NaturalGradient(
            policy,
            policy.head.likelihood,
            lr=self.lr,
            damping=self.damping,
            metric=Fisher(Exact(), self.structure),
            solver=solver_for(self.structure, self.solver),
            search=KLClip(self.target_kl),
            average=0.0,
            refresh=Refresh(1, 1),
            seed=seed,
        )
        return OneStepLearner(policy, optimizer, self.critic.fitter(critic, seed))


def npg(
    environment: EnvironmentLike,
    *,
    steps: int,
    seed: int = 0,
    setup: Setup = Setup(),
    folder: str | Path | None = None,
    **settings: Any,
) -> Training:
    """Train with natural policy gradient; returns the finished :class:`natgrad.rl.Training`, which holds ``policy``.

    ``settings`` are those of :class:`NPG`; the rest is described at :class:`natgrad.rl.Training`.
    """
    return Training(environment, NPG(**settings), steps=steps, setup=setup, seed=seed, folder=folder).run()
