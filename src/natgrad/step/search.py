"""From a direction to a step: fixed length, predicted-KL clip, sufficient decrease."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.step import _checks
from natgrad.step.backtracking import backtrack, need_probe, not_finite
from natgrad.step.local import BlockVector, LocalModel, Probe, Ray, Step, largest, rejected


class Search(Protocol):
    """Turns a direction d (the damped natural gradient) into a step Δ = −s·d.

    Attributes:
        needs_probe: whether it measures, or asks for exact curvature, and so must be given a probe.
        needs_loss: whether it cannot work without the loss at the current and at the new parameters.
    """

    needs_probe: ClassVar[bool]
    needs_loss: ClassVar[bool]

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        """Decide the step along −``direction``, for a user's learning rate ``lr``."""
        ...


@dataclass(frozen=True)
class LearningRate:
    """Δ = −lr·d. Waits for nothing: a direction that is not finite gives Δ = 0.

    Args:
        predict: whether to predict the KL and the change of the loss, which costs one product with the metric (about
            as much as preconditioning once). Without it ``Step.kl_predicted`` and ``loss_change_predicted`` are None.

    Raises:
        ArgumentError: a Python lr that is NaN, negative or infinite.
    """

    needs_probe: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False

    predict: bool = True

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        """The step of length ``lr``; ``probe`` is not used."""
        _checks.learning_rate("LearningRate", lr, infinite=False)
        if self.predict:
            ray = local.ray(direction)
            return _unmeasured(local, ray, lr * ray.scale)
        size = largest(direction)
        length = lr * torch.ones_like(size)
        finite = torch.isfinite(size) & torch.isfinite(length)
        return Step(
            delta={name: _kept(finite, -lr * v) for name, v in direction.items()},
            accepted=finite,
            lr=torch.where(finite, length, 0.0),
            kl_predicted=None,
            damping=local.damping,
        )


@dataclass(frozen=True)
class KLClip:
    """Δ = −s·d with s = lr·min(1, √(max_kl / b)), b = ½ lr² (|dᵀFd| + λdᵀd): the whole step is judged.

    The bound is on the KL that the metric predicts plus what the damping adds: outside the span of a batch's rows the
    metric is zero, and the damping alone keeps the step short. Nothing is measured and nothing waits for the device. A
    step within the radius is left as it is. Where the metric has negative curvature (a Hessian) its size counts. A
    block-diagonal metric does not see that layers move together: for a network of L layers the measured KL can be L
    times the predicted one.
    Source: the step-size rule min(η_max, √(2δ / ΔᵀFΔ)) of Ba, Grosse & Martens 2017 and of ACKTR (Wu et al. 2017).

    Args:
        max_kl: the radius, in nats per prediction.

    Raises:
        ArgumentError: max_kl not above 0, or a Python lr that is NaN or negative. An infinite lr goes to the boundary.
    """

    needs_probe: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False

    max_kl: float

    def __post_init__(self) -> None:
        _checks.positive("KLClip", "max_kl", self.max_kl)

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        """The clipped step; ``probe`` is not used."""
        _checks.learning_rate("KLClip", lr, infinite=True)
        ray = local.ray(direction)
        # A hair inside the boundary, so that rounding of the root cannot end outside it.
        bound = ray.bound
        inside = 1 - 4 * torch.finfo(bound.dtype).eps
        boundary = inside * torch.sqrt(2 * self.max_kl / bound)
        return _unmeasured(local, ray, torch.minimum(lr * ray.scale, boundary.to(ray.scale.dtype)))


def _kept(finite: Tensor, vector: Tensor) -> Tensor:
    """``vector`` itself, overwritten with zeros unless ``finite``."""
    zero = torch.zeros((), dtype=vector.dtype, device=vector.device)
    return torch.where(finite.to(vector.device), vector, zero, out=vector)


def _unmeasured(local: LocalModel, ray: Ray, t: Tensor) -> Step:
    """Δ(t), or zeros where anything about it is not finite, in tensor control flow only."""
    kl, change = ray.kl(t), ray.change(t)
    finite = ray.finite & torch.isfinite(t) & torch.isfinite(kl) & torch.isfinite(change)
    t = torch.where(finite, t, 0.0)
    return Step(
        delta={name: _kept(finite, v) for name, v in ray.delta(t).items()},
        accepted=finite,
        lr=t / ray.scale,
        kl_predicted=torch.where(finite, kl, math.nan),
        loss_change_predicted=torch.where(finite, change, math.nan),
        damping=local.damping,
    )


@dataclass(frozen=True)
class Armijo:
    """Backtracks from s = lr until the measured loss decreases enough: loss(θ − s d) ≤ loss(θ) − c·s·gᵀd.

    A direction that is not one of descent (gᵀd ≤ 0) is rejected without a trial, and so is the step after
    ``backtracks`` trials. Source: Armijo 1966; Nocedal & Wright 2006, algorithm 3.1.

    Args:
        c: the fraction of the first-order decrease that must be reached, in (0, 1).
        backtracks: how often the step may be shortened.
        shrink: the factor of each backtrack, in (0, 1).

    Raises:
        ArgumentError: an argument out of its range, a lr that is NaN, negative or infinite, no probe, or no loss.
    """

    needs_probe: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    c: float = 1e-4
    backtracks: int = 20
    shrink: float = 0.5

    def __post_init__(self) -> None:
        _checks.fraction("Armijo", "c", self.c)
        _checks.count("Armijo", "backtracks", self.backtracks, least=0)
        _checks.fraction("Armijo", "shrink", self.shrink)

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        """Search along −direction; costs one product with the metric and one evaluation per trial."""
        _checks.learning_rate("Armijo", lr, infinite=False)
        probe = need_probe("Armijo", probe)
        if local.loss is None:
            raise ArgumentError(_NO_LOSS)
        ray = local.ray(direction)
        numbers = ray.floats()
        if numbers is None:
            return not_finite(local)
        scale, slope, *_ = numbers
        t = float(lr) * scale
        if not 0 < t <= ray.largest_step():
            return rejected(local.damping, f"the step length is {t} (lr {float(lr)})", tried=False)
        if slope <= 0:
            return rejected(local.damping, f"not a descent direction: gᵀd is {slope * scale:.3g}", tried=False)

        def verdict(t: float, kl: float, change: float | None) -> str:
            if change is None:
                raise ArgumentError(_NO_LOSS)
            wanted = -self.c * t * slope
            return "" if change <= wanted else f"the loss changes by {change:.3g}, wanted {wanted:.3g} or less"

        return backtrack(local, ray, t, probe, verdict, shrink=self.shrink, backtracks=self.backtracks)


_NO_LOSS = (
    "Armijo compares the loss before and after the step, and the loss is not known. Call opt.observe(output, "
    "target) before backward(), give step() a closure that returns (loss, output), or use a search that needs no loss: "
    "QuadraticFit, KLClip, TrustRegion or LearningRate."
)
