"""The local model of one step, the ray along a direction, what a trial measures and what a step did."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from natgrad.linalg import LinearOperator
from natgrad.step import _checks

BlockVector: TypeAlias = dict[str, Tensor]
"""One flat vector [n_b] per block, by the block's name."""

Scalar: TypeAlias = "float | Tensor"
"""A Python number, or a 0-d tensor that nobody has waited for yet."""


def _sum(values: Iterable[Tensor]) -> Tensor:
    """Sum of 0-d tensors, in the widest dtype among them (float32 at least), on the first one's device."""
    terms = list(values)
    if not terms:
        return torch.zeros(())
    dtype = torch.float32
    for term in terms:
        dtype = torch.promote_types(dtype, term.dtype)
    return torch.stack([term.to(device=terms[0].device, dtype=dtype) for term in terms]).sum()


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Σ over the blocks of ``a`` of aᵀb, 0-d."""
    return _sum(_dot(vector, b[name]) for name, vector in a.items())


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb in the wider dtype of the two, float32 at least: bf16 would keep two digits."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.dot(a.to(dtype), b.to(dtype))


def _quad(operator: LinearOperator, vector: Tensor) -> Tensor:
    """vᵀFv in the operator's precision (float32 factors under a bf16 model)."""
    v = vector.to(operator.dtype)
    if v.element_size() < 4:
        return _dot(v, operator.matvec(v))  # summed in float32, where the operator itself would sum in half precision
    # With a root or an eigenbasis this is half a product.
    return operator.quad(v)


def largest(vector: Mapping[str, Tensor]) -> Tensor:
    """max |v| over all blocks, 0-d; NaN where any entry is NaN, 0 for an empty vector."""
    # One vectorised pass, which passes NaN on; the norm of order inf is some twenty times slower on CPU.
    norms = [torch.stack(torch.aminmax(v)).abs().amax() for v in vector.values() if v.numel()]
    if not norms:
        return torch.zeros(())
    dtype = torch.float32
    for norm in norms:
        dtype = torch.promote_types(dtype, norm.dtype)
    return torch.stack([norm.to(device=norms[0].device, dtype=dtype) for norm in norms]).amax()


def _power_of_two(value: Tensor) -> Tensor:
    """The power of two above ``value`` (1 for 0 and for what is not finite), within the range whose inverse exists."""
    limit = 2.0 ** (math.frexp(torch.finfo(value.dtype).max)[1] - 8)
    # value = mantissa · power, so the quotient is representable and division gives it exactly.
    power = (value / torch.frexp(value).mantissa).clamp(1 / limit, limit)
    return torch.where(torch.isfinite(value) & (value > 0), power, torch.ones_like(value))


def scaled(vector: Mapping[str, Tensor]) -> tuple[BlockVector, Tensor]:
    """(unit, scale) with vector = scale · unit and max |unit| about 1.

    ``scale`` is a power of two, so the division loses no digit, and a quadratic form of ``unit`` neither underflows nor
    overflows whatever the size of the gradients.
    """
    scale = _power_of_two(largest(vector))
    return _scaled_by(vector, scale), scale


def _scaled_by(vector: Mapping[str, Tensor], scale: Tensor) -> BlockVector:
    return {name: v * (1 / scale).to(device=v.device, dtype=v.dtype) for name, v in vector.items()}


@dataclass(frozen=True)
class Ray:
    """The points Δ(t) = −t u, t ≥ 0, and the local model along them.

    Attributes:
        unit: u, the direction divided by ``scale``.
        scale: a power of two; a step of ``lr`` times the direction is t = lr · scale.
        size: max |u|, 0-d: NaN or infinite where the direction is.
        slope: gᵀu, 0-d.
        curvature: uᵀFu, 0-d, from the one product with the metric that the ray costs.
        damping: Σ_b λ_b u_bᵀu_b, 0-d.
        penalty: uᵀWu, 0-d: the curvature of what the loss has beside the likelihood.
    """

    unit: BlockVector
    scale: Tensor
    size: Tensor
    slope: Tensor
    curvature: Tensor
    damping: Tensor
    penalty: Tensor

    @property
    def bound(self) -> Tensor:
        """|uᵀFu| + uᵀWu + λuᵀu, 0-d: what limits the length of a step.

        The metric of a batch is blind outside the span of its rows, and there the damping alone has made the direction
        long; it must be what keeps the step short, too. TRPO's implementation bounds with the damped matrix as well.
        """
        return self.curvature.abs() + self.penalty + self.damping

    @property
    def finite(self) -> Tensor:
        """Whether direction, gradient and metric are finite along the ray: 0-d bool."""
        return torch.isfinite(self.size) & torch.isfinite(self.slope) & torch.isfinite(self.curvature)

    def floats(self) -> tuple[float, float, float, float] | None:
        """(scale, slope, curvature, penalty), as Python numbers; None where one is not finite. Waits for the device."""
        values = (self.scale, self.size, self.slope, self.curvature, self.penalty)
        dtype = torch.promote_types(self.slope.dtype, self.curvature.dtype)
        scale, size, *rest = torch.stack([v.to(self.scale.device, dtype) for v in values]).tolist()
        return (scale, *rest) if all(map(math.isfinite, (size, *rest))) else None

    def largest_step(self) -> float:
        """The largest t for which Δ(t) can be represented."""
        return min((torch.finfo(u.dtype).max for u in self.unit.values()), default=math.inf)

    def kl(self, t: Scalar) -> Tensor:
        """½ t² |uᵀFu|: the KL divergence that the metric predicts at Δ(t); of a negative curvature, its size."""
        return 0.5 * self.curvature.abs() * t * t

    def change(self, t: Scalar) -> Tensor:
        """−t gᵀu + ½ t² uᵀ(F + W)u: the change of the loss that the local model predicts at Δ(t)."""
        return 0.5 * (self.curvature + self.penalty) * t * t - t * self.slope

    def delta(self, t: Scalar) -> BlockVector:
        """Δ(t) = −t u."""
        return {name: u * _like(-t, u) for name, u in self.unit.items()}


def _like(value: Scalar, vector: Tensor) -> Scalar:
    return value.to(device=vector.device, dtype=vector.dtype) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class LocalModel:
    """The quadratic model of the loss at the current parameters: m(Δ) = gᵀΔ + ½ Δᵀ(F + W)Δ.

    Attributes:
        gradient: g per block.
        metric: F per block, undamped.
        inverse: the damped inverse per block.
        damping: λ.
        loss: the loss at the current parameters, 0-d; None where nobody measured it.
        previous: the change Δ of the last step, for QuadraticFit; None before the first.
        block_damping: λ of each block, where blocks differ (as with Proportional); None: ``damping`` in all.
        penalty: W per block, the curvature of what the loss has beside the likelihood (of weight decay, w·I); it counts
            in changes of the loss, and not in the KL. None: nothing.
    """

    gradient: BlockVector
    metric: Mapping[str, LinearOperator]
    inverse: Mapping[str, LinearOperator]
    damping: float
    loss: Tensor | None = None
    previous: BlockVector | None = None
    block_damping: Mapping[str, Scalar] | None = None
    penalty: Mapping[str, LinearOperator] | None = None

    def kl(self, delta: Mapping[str, Tensor]) -> Tensor:
        """½ ΔᵀFΔ, the predicted KL divergence in nats per prediction: 0-d. Costs one product with the metric."""
        _checks.blocks("metric", delta, self.metric)
        return 0.5 * _sum(_quad(self.metric[name], v) for name, v in delta.items())

    def change(self, delta: Mapping[str, Tensor]) -> Tensor:
        """gᵀΔ + ½ Δᵀ(F + W)Δ, the predicted change of the loss: 0-d. Costs one product with the metric."""
        _checks.blocks("gradient", delta, self.gradient)
        return dot(delta, self.gradient) + self.kl(delta) + 0.5 * self.penalty_gram([delta])[0, 0]

    def ray(self, direction: BlockVector) -> Ray:
        """The ray Δ(t) = −t·direction/scale. Costs one product with the metric, and no wait for the device."""
        _checks.blocks("gradient", direction, self.gradient)
        _checks.blocks("metric", direction, self.metric)
        size = largest(direction)
        scale = _power_of_two(size)
        unit = _scaled_by(direction, scale)
        damping = self.damping_gram([unit])[0, 0]
        penalty = self.penalty_gram([unit])[0, 0]
        return Ray(unit, scale, size / scale, dot(unit, self.gradient), 2 * self.kl(unit), damping, penalty)

    def damping_gram(self, vectors: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Σ_b λ_b v_iᵀv_j, [k, k]: what the damping adds to the curvature between ``vectors``."""
        rows = [
            _sum(self._lambda(name, v) * _dot(v, b[name]) for name, v in a.items()) for a in vectors for b in vectors
        ]
        return torch.stack(rows).reshape(len(vectors), len(vectors))

    def penalty_gram(self, vectors: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """v_iᵀWv_j, [k, k]: what the penalty adds to the curvature between ``vectors``."""
        if self.penalty is None:
            like = next(iter(vectors[0].values()), torch.zeros((), dtype=torch.float32))
            return like.new_zeros(len(vectors), len(vectors))
        _checks.blocks("penalty", vectors[0], self.penalty)
        pushed = [
            {name: self.penalty[name].matvec(v.to(self.penalty[name].dtype)) for name, v in b.items()} for b in vectors
        ]
        return torch.stack([dot(a, b) for a in vectors for b in pushed]).reshape(len(vectors), len(vectors))

    def _lambda(self, name: str, vector: Tensor) -> Scalar:
        if self.block_damping is None:
            return self.damping
        _checks.blocks("block_damping", {name: vector}, self.block_damping)
        return _like(self.block_damping[name], vector)


@dataclass(frozen=True)
class Trial:
    """What was measured at θ + Δ on the observed batch.

    Attributes:
        kl: mean over predictions of KL(old ‖ new), in nats, 0-d.
        loss: the loss there, 0-d; None without a closure.
    """

    kl: Tensor
    loss: Tensor | None = None


class Probe(Protocol):
    """Evaluates the model near the current parameters, on the batch that was observed, and leaves no trace."""

    def __call__(self, delta: BlockVector) -> Trial:
        """Measure at θ + ``delta``; the parameters are as before when it returns."""
        ...

    def curvature(self, deltas: Sequence[BlockVector]) -> Tensor:
        """[k, k]: the mean over predictions of (J δ_i)ᵀ Λ (J δ_j), the exact Fisher matrix between the vectors."""
        ...


@dataclass(frozen=True)
class Step:
    """What a search decided: the change to apply, with what was predicted and measured for it.

    Numbers are Python floats where the search had to measure, and 0-d tensors where it did not wait for the device
    (LearningRate, KLClip). A rejected step reports what then holds: no change, lr 0, measured KL 0. A non-finite
    direction or metric shows as a NaN ``kl_predicted``.

    Attributes:
        delta: Δ per block, to be added to the parameters. None: rejected, no change. LearningRate and KLClip, which
            cannot know without waiting, give zeros instead of None.
        accepted: whether there is a step to take (a 0-d bool tensor from LearningRate and KLClip).
        lr: the multiple s of the direction in Δ = −s·direction (in QuadraticFit the fitted α, times its lr).
        kl_predicted: ½ ΔᵀFΔ; None where the search was told not to predict.
        kl_measured: mean KL(old ‖ new) measured at θ + Δ; None where not measured.
        loss_change_predicted: gᵀΔ + ½ Δᵀ(F + W)Δ; None where the search was told not to predict.
        loss_change_measured: loss(θ + Δ) − loss(θ) of what is minimised: weight decay that is part of the loss counts,
            and with ``maximize`` it is the negative loss. None where not measured.
        backtracks: how often the step was shortened.
        damping: λ at this step.
        reason: why the step was rejected, for people; empty where it was accepted, or where knowing it would mean to
            wait for the device.
    """

    delta: BlockVector | None
    accepted: bool | Tensor
    lr: Scalar
    kl_predicted: Scalar | None
    kl_measured: Scalar | None = None
    loss_change_predicted: Scalar | None = None
    loss_change_measured: Scalar | None = None
    backtracks: int = 0
    damping: float = 0.0
    reason: str = ""

    @property
    def ratio(self) -> Scalar | None:
        """ρ = measured / predicted change of the loss; 1 for a perfect model, NaN for 0/0, None where not measured."""
        if self.loss_change_measured is None or self.loss_change_predicted is None:
            return None
        if not isinstance(self.loss_change_predicted, Tensor) and self.loss_change_predicted == 0:
            return self.loss_change_measured * math.nan
        return self.loss_change_measured / self.loss_change_predicted

    def numbers(self) -> dict[str, float]:
        """What is known of the step, by names for a logger. Waits for the device."""
        values = {
            "lr": self.lr,
            "accepted": self.accepted,
            "damping": self.damping,
            "backtracks": self.backtracks,
            "kl_predicted": self.kl_predicted,
            "kl_measured": self.kl_measured,
            "loss_change_predicted": self.loss_change_predicted,
            "loss_change_measured": self.loss_change_measured,
            "ratio": self.ratio,
        }
        return {f"natgrad/{name}": float(value) for name, value in values.items() if value is not None}

    def measured(self, trial: Trial, loss: Tensor | None) -> Step:
        """This step with the ``trial`` of it filled in; rejected if the trial is not finite. Waits for the device.

        For searches that do not measure (LearningRate, KLClip, QuadraticFit) under a damping that wants to know.

        Args:
            trial: what the probe found at θ + ``self.delta``.
            loss: the loss at θ, 0-d, or None.
        """
        if self.delta is None:
            return self
        kl = float(trial.kl)
        change = None if trial.loss is None or loss is None else float(trial.loss) - float(loss)
        if not math.isfinite(kl) or not (change is None or math.isfinite(change)):
            return rejected(
                self.damping, f"at the new parameters the KL is {kl} and the loss changes by {change}", tried=True
            )
        return replace(self, kl_measured=kl, loss_change_measured=change)


def joined(steps: Sequence[Step]) -> Step:
    """One record of steps that were found apart, in blocks of their own; predictions add up."""
    first, *others = steps
    for other in others:
        first = replace(
            first,
            delta={**(first.delta or {}), **(other.delta or {})},
            accepted=_both(first.accepted, other.accepted),
            kl_predicted=_total(first.kl_predicted, other.kl_predicted),
            loss_change_predicted=_total(first.loss_change_predicted, other.loss_change_predicted),
            reason=first.reason or other.reason,
        )
    return first


def _both(a: bool | Tensor, b: bool | Tensor) -> bool | Tensor:
    return torch.as_tensor(a) & torch.as_tensor(b) if isinstance(a, Tensor) or isinstance(b, Tensor) else a and b


def _total(a: Scalar | None, b: Scalar | None) -> Scalar | None:
    return None if a is None or b is None else a + b


def explained(step: Step) -> Step:
    """``step`` with the reason why it was rejected, where that is known without waiting for a device."""
    if step.reason or not isinstance(step.accepted, Tensor) or step.accepted.device.type != "cpu" or step.accepted:
        return step
    predicted = step.kl_predicted
    unknown = predicted is not None and math.isnan(predicted)
    what = "the direction, the gradient or the metric" if unknown else "the step, or its sum with the parameters,"
    return replace(step, reason=f"{what} is not finite")


def rejected(damping: float, reason: str, *, tried: bool, backtracks: int = 0, predicted: float = 0.0) -> Step:
    """The step that changes nothing.

    Args:
        damping: λ at this step.
        reason: why, for people.
        tried: whether anything was measured; the measured changes, 0, are given only then.
        backtracks: how often the step had been shortened.
        predicted: NaN where the prediction was not finite.
    """
    zero = 0.0 if tried else None
    return Step(
        delta=None,
        accepted=False,
        lr=0.0,
        kl_predicted=predicted,
        kl_measured=zero,
        loss_change_predicted=predicted,
        loss_change_measured=zero,
        backtracks=backtracks,
        damping=damping,
        reason=reason,
    )
