"""Learning by one natural-gradient step of the policy per rollout, and a fit of the critic after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from natgrad.linalg import CG, Solver
from natgrad.metric import MatrixFree, Structure
from natgrad.optim import NaturalGradient
from natgrad.rl.critic import CriticFitter
from natgrad.rl.objective import entropy, surrogate
from natgrad.rl.policy import Policy, check_apart
from natgrad.rl.rollout import Samples

Rate = Callable[[float], float]


def linear(first: float) -> Rate:
    """A learning rate that falls from ``first`` to zero."""
    return lambda progress: first * (1 - progress)


def solver_for(structure: Structure, solver: Solver | None) -> Solver | None:
    """``solver``; where it is None and ``structure`` matrix-free: conjugate gradients, at most 15 steps.

    Their tolerance is relative, so that the direction does not depend on the scale of the rewards.
    """
    if solver is None and isinstance(structure, MatrixFree):
        return CG(tolerance=1e-3, max_iterations=15)
    return solver


class OneStepLearner:
    """Maximises the surrogate by one step of ``optimizer``; the critic is fitted after it, to targets from before.

    Args:
        policy: what ``optimizer`` moves.
        optimizer: of the policy.
        critic: fits the critic.
        entropy: weight of the policy's entropy in what is maximised.
        rate: the learning rate at a fraction of training; None: that of the optimizer throughout.

    Raises:
        ArgumentError: policy and critic share parameters.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: NaturalGradient,
        critic: CriticFitter,
        *,
        entropy: float = 0.0,
        rate: Rate | None = None,
    ) -> None:
        check_apart(policy, critic.critic)
        self.policy, self.optimizer, self.critic, self.entropy, self.rate = policy, optimizer, critic, entropy, rate

    def update(self, samples: Samples, old: Tensor, progress: float) -> dict[str, float]:
        """One step of the policy, then the critic's."""

        def closure() -> tuple[Tensor, Tensor]:
            f = self.policy(*samples.inputs)
            objective = surrogate(self.policy, f, samples)
            if self.entropy:
                objective = objective + self.entropy * entropy(self.policy, f)
            return -objective, f

        if self.rate is not None:
            self.optimizer.param_groups[0]["lr"] = self.rate(progress)
        self.optimizer.step(closure)
        self.critic.update(samples)
        return {name.removeprefix("natgrad/"): value for name, value in self.optimizer.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        """States of both optimizers."""
        return {"policy": self.optimizer.state_dict(), "critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.optimizer.load_state_dict(state["policy"])
        self.critic.load_state_dict(state["critic"])
