"""How strongly the metric is damped, per block, and how that follows the reduction ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.linalg import KroneckerProduct, LinearOperator
from natgrad.step import _checks
from natgrad.step.local import Step


class Damping(Protocol):
    """Gives each block its damped inverse (F_b + λ_b I)⁻¹, and may change λ by what the steps turn out to do."""

    needs_loss: ClassVar[bool]
    """Whether ``update`` has something to go by only when the change of the loss is measured."""

    @property
    def value(self) -> float:
        """λ, in the unit that the rule defines."""
        ...

    def amount(self, operator: LinearOperator) -> float | Tensor:
        """λ_b, what is added to the diagonal of this block."""
        ...

    def inverse(self, operator: LinearOperator, solver: Any = None) -> LinearOperator:
        """The damped inverse of one block, by ``solver`` (natgrad.linalg.Solver) or else by the block's own method."""
        ...

    def update(self, step: Step) -> Damping:
        """The damping for the next step, given what this step did."""
        ...

    def state(self) -> dict[str, float]:
        """What changes during training, as numbers, for a checkpoint."""
        ...

    def restored(self, state: Mapping[str, float]) -> Damping:
        """This rule with the numbers of ``state``."""
        ...


class _Fixed:
    """What the rules that never change have in common."""

    needs_loss: ClassVar[bool] = False

    def update(self, step: Step) -> Any:
        """Unchanged."""
        return self

    def state(self) -> dict[str, float]:
        """Empty: nothing changes during training."""
        return {}

    def restored(self, state: Mapping[str, float]) -> Any:
        """Unchanged."""
        return self


@dataclass(frozen=True)
class Constant(_Fixed):
    """(F_b + λI)⁻¹ with the same λ in every block, in the unit of F: per prediction, in nats per squared parameter.

    Args:
        value: λ ≥ 0.

    Raises:
        ArgumentError: λ negative or not finite.
    """

    value: float

    def __post_init__(self) -> None:
        _checks.positive("Constant", "value", self.value, zero=True)

    def amount(self, operator: LinearOperator) -> float:
        """λ."""
        return self.value

    def inverse(self, operator: LinearOperator, solver: Any = None) -> LinearOperator:
        """(F_b + λI)⁻¹."""
        return operator.inverse(damping=self.value, solver=solver)


@dataclass(frozen=True)
class Proportional(_Fixed):
    """(F_b + λ_b I)⁻¹ with λ_b = c · trace(F_b) / n_b: relative to the block's mean eigenvalue.

    The damped direction then has the same shape whatever the scale of the loss, the likelihood or the layer. A block
    without curvature (trace not above 0) gets λ_b = c.

    Args:
        value: c ≥ 0, without unit.

    Raises:
        ArgumentError: c negative or not finite.
    """

    value: float

    def __post_init__(self) -> None:
        _checks.positive("Proportional", "value", self.value, zero=True)

    def amount(self, operator: LinearOperator) -> Tensor:
        """c · trace(F_b) / n_b, 0-d; no wait for the device."""
        mean = operator.trace() / operator.shape[0]
        return self.value * torch.where(torch.isfinite(mean) & (mean > 0), mean, torch.ones_like(mean))

    def inverse(self, operator: LinearOperator, solver: Any = None) -> LinearOperator:
        """(F_b + λ_b I)⁻¹."""
        return operator.inverse(damping=self.amount(operator), solver=solver)


@dataclass(frozen=True)
class FactoredTikhonov(_Fixed):
    """Damps the two factors of a Kronecker block by √λ/π and π√λ, and inverts those: cheap, and no eigenvectors needed.

    (G + √λ/π I) ⊗ (A + π√λ I) with π = √((tr A / q) / (tr G / p)), where G is [p, p] and A [q, q], is G ⊗ A + λI plus
    cross terms, which π makes as small as their trace bound can be (Martens & Grosse 2015, §6.3). Any other block gets
    (F_b + λI)⁻¹.

    Args:
        value: λ ≥ 0, in the unit of F.

    Raises:
        ArgumentError: λ negative or not finite.
    """

    value: float

    def __post_init__(self) -> None:
        _checks.positive("FactoredTikhonov", "value", self.value, zero=True)

    def amount(self, operator: LinearOperator) -> float:
        """λ."""
        return self.value

    def inverse(self, operator: LinearOperator, solver: Any = None) -> LinearOperator:
        """The inverse of the damped factors of a KroneckerProduct; (F_b + λI)⁻¹ of anything else."""
        if not isinstance(operator, KroneckerProduct):
            return operator.inverse(damping=self.value, solver=solver)
        damped = operator.damped_factors(self.value)
        return damped.cholesky_inverse() if solver is None else damped.inverse(solver=solver)


@dataclass(frozen=True)
class LevenbergMarquardt:
    """λ follows the reduction ratio ρ = measured / predicted change of the loss.

    ρ > ``upper``: the model is good, λ is divided by ``factor``. ρ < ``lower``, a rise of the loss, a ratio that is not
    finite, or a step rejected after a trial: λ is multiplied by it. A step that neither promised nor made a change says
    nothing, nor does one whose loss was not measured. The defaults are those of Moré 1978 and Martens 2010 (every step,
    3/2); Martens & Grosse 2015, §6.5 judge every fifth step by a factor (20/19)⁵.

    Args:
        damping: the rule whose value is adapted, with its first value; a number λ stands for Constant(λ).
        lower, upper: the thresholds of ρ, 0 < lower < upper.
        factor: above 1.
        every: how many steps make one judgement, by the last of them; the optimizer measures no other, unless its
            search does. A failed step counts at once.
        minimum, maximum: λ stays within them.
        count: steps since the last judgement; state, not a setting.

    Raises:
        ArgumentError: an argument out of its range, or a first value outside [minimum, maximum].
    """

    needs_loss: ClassVar[bool] = True

    damping: float | Constant | Proportional | FactoredTikhonov = 1e-2
    lower: float = 0.25
    upper: float = 0.75
    factor: float = 1.5
    every: int = 1
    minimum: float = 1e-10
    maximum: float = 1e10
    count: int = 0

    def __post_init__(self) -> None:
        owner = "LevenbergMarquardt"
        if isinstance(self.damping, LevenbergMarquardt):
            raise ArgumentError(f"{owner}: damping is itself a {owner}. Give a number, Constant or FactoredTikhonov.")
        if isinstance(self.damping, (int, float)):
            object.__setattr__(self, "damping", Constant(self.damping))
        for name in ("lower", "upper", "factor", "minimum", "maximum"):
            _checks.positive(owner, name, getattr(self, name))
        _checks.count(owner, "every", self.every, least=1)
        _checks.count(owner, "count", self.count, least=0)
        if not self.lower < self.upper:
            raise ArgumentError(f"{owner}: lower is {self.lower} and upper {self.upper}. lower must be the smaller.")
        if not self.factor > 1:
            raise ArgumentError(f"{owner}: factor is {self.factor}. It must be above 1.")
        if not self.minimum <= self.value <= self.maximum:
            raise ArgumentError(
                f"{owner}: the first damping is {self.value}, outside [minimum, maximum] = [{self.minimum}, "
                f"{self.maximum}]. It must be above 0, since a multiple of 0 stays 0."
            )

    @property
    def rule(self) -> Constant | Proportional | FactoredTikhonov:
        """The rule with the present value."""
        assert not isinstance(self.damping, (int, float))
        return self.damping

    @property
    def value(self) -> float:
        """λ at present."""
        return self.rule.value

    @property
    def due(self) -> bool:
        """Whether the next measured step is judged, so that a caller may spare the measurement otherwise."""
        return self.count + 1 >= self.every

    def amount(self, operator: LinearOperator) -> float | Tensor:
        """As the rule says, with the present value."""
        return self.rule.amount(operator)

    def inverse(self, operator: LinearOperator, solver: Any = None) -> LinearOperator:
        """As the rule says, with the present value."""
        return self.rule.inverse(operator, solver)

    def update(self, step: Step) -> LevenbergMarquardt:
        """λ times ``factor``, divided by it, or as it is. Waits for the device when it judges."""
        failed = _failed(step)
        if failed is None:
            unmeasured = step.delta is not None and step.loss_change_measured is None
            return replace(self, count=self.count + 1) if unmeasured and not self.due else self
        if not failed and not self.due:
            return replace(self, count=self.count + 1)
        ratio = math.nan if failed or step.ratio is None else float(step.ratio)
        value = self.value
        if ratio > self.upper:
            value /= self.factor
        elif not ratio >= self.lower:
            value *= self.factor
        return self.restored({"value": value, "count": 0})

    def state(self) -> dict[str, float]:
        """{"value": λ, "count": steps since the last judgement}."""
        return {"value": self.value, "count": float(self.count)}

    def restored(self, state: Mapping[str, float]) -> LevenbergMarquardt:
        """This rule with the λ and the count of ``state``."""
        value = min(max(float(state["value"]), self.minimum), self.maximum)
        return replace(self, damping=replace(self.rule, value=value), count=int(state["count"]))


def _failed(step: Step) -> bool | None:
    """Whether the step failed outright (rejected, not finite, the loss rose); None: it says nothing about λ."""
    if not bool(step.accepted):
        predicted = math.nan if step.kl_predicted is None else float(step.kl_predicted)
        return True if step.kl_measured is not None or not math.isfinite(predicted) else None
    if step.loss_change_measured is None or step.loss_change_predicted is None:
        return None
    measured, predicted = float(step.loss_change_measured), float(step.loss_change_predicted)
    if measured == 0 and predicted == 0:
        return None
    return not (math.isfinite(predicted) and math.isfinite(measured) and measured <= 0)


def as_damping(damping: float | Damping) -> Damping:
    """``damping``, with a number λ (or a 0-d tensor) read as Constant(λ).

    Raises:
        ArgumentError: it is neither a number nor a rule.
    """
    if isinstance(damping, Tensor) and damping.numel() == 1:
        damping = float(damping)
    if isinstance(damping, (int, float)) and not isinstance(damping, bool):
        return Constant(damping)
    if isinstance(damping, type) or not (callable(getattr(damping, "amount", None)) and hasattr(damping, "value")):
        raise ArgumentError(
            f"damping={damping!r} was given; it must be a number λ ≥ 0 or a rule: Constant, Proportional, "
            "FactoredTikhonov or LevenbergMarquardt."
        )
    return damping  # type: ignore[return-value]
