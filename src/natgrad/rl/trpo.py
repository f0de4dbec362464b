"""Trust-region policy optimization (Schulman et al. 2015): natural gradient with a hard, measured KL radius."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from natgrad.linalg import Solver
from natgrad.metric import MatrixFree, Structure
from natgrad.optim import TrustRegionNGD
from natgrad.rl.algorithm import Setup
from natgrad.rl.checks import check_finite, check_positive, check_whole
from natgrad.rl.critic import CriticFit
from natgrad.rl.one_step import OneStepLearner, solver_for
from natgrad.rl.policy import Critic, Policy
from natgrad.rl.training import Training
from natgrad.rl.vector import EnvironmentLike
from natgrad.step import Damping


@dataclass(frozen=True)
class TRPO:
    """Each update maximises the surrogate within ``max_kl`` of the policy that acted.

    The direction is F⁻¹g with the exact Fisher matrix of the policy; the step goes to the boundary of the trust region
    and is halved until the measured mean KL(old ‖ new) is at most ``max_kl`` and the surrogate grows. After
    ``backtracks`` halvings the policy stays as it was, bit for bit.

    Args:
        max_kl: the radius, in nats per action.
        damping: λ of the solve.
        structure: of the Fisher matrix: ``MatrixFree()`` (conjugate gradients), ``Kronecker()``, ``Gram()``, …
        solver: of the structure; None takes its own (conjugate gradients of at most 15 steps, relative tolerance).
        backtracks: halvings.
        critic: how the critic is fitted.
    """

    max_kl: float = 0.01
    damping: float | Damping = 0.1
    structure: Structure = MatrixFree()
    solver: Solver | None = None
    backtracks: int = 10
    critic: CriticFit = field(default_factory=CriticFit)

    def __post_init__(self) -> None:
        check_positive(self, "max_kl")
        check_finite(self, "max_kl")
        check_whole(self, "backtracks", least=0)

    def learner(self, policy: Policy, critic: Critic, seed: int) -> OneStepLearner:
        """Start learning."""
        optimizer = TrustRegionNGD(
            policy,
            policy.head.likelihood,
            max_kl=self.max_kl,
            damping=self.damping,
            structure=self.structure,
            solver=solver_for(self.structure, self.solver),
            backtracks=self.backtracks,
            seed=seed,
        )
        return OneStepLearner(policy, optimizer, self.critic.fitter(critic, seed))


def trpo(
    environment: EnvironmentLike,
    *,
    steps: int,
    seed: int = 0,
    setup: Setup = Setup(),
    folder: str | Path | None = None,
    **settings: Any,
) -> Training:
    """Train a policy with TRPO; returns the finished :class:`natgrad.rl.Training`, which holds ``policy``.

    ``settings`` are those of :class:`TRPO`; the rest is described at :class:`natgrad.rl.Training`.
    """
    return Training(environment, TRPO(**settings), steps=steps, setup=setup, seed=seed, folder=folder).run()
