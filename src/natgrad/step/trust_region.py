"""The hard trust region: no step whose measured KL divergence exceeds the radius."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.step import _checks
from natgrad.step.backtracking import backtrack, need_probe, not_finite
from natgrad.step.local import BlockVector, LocalModel, Probe, Step, rejected


@dataclass(frozen=True)
class TrustRegion:
    """The largest step, up to lr, whose KL divergence stays within ``max_kl``, as measured and not as predicted.

    Starts at s = min(lr, √(2 max_kl / dᵀ(F + W + λI)d)), where the damped metric predicts the boundary, and multiplies
    s by ``shrink`` until the measured mean KL(old ‖ new) is at most ``max_kl``, the loss, where there is one, falls,
    and everything is finite. After ``backtracks`` of these the step is rejected: nothing changes. ``lr = math.inf``
    starts at the boundary itself, as TRPO does (Schulman et al. 2015, appendix C); a direction without curvature then
    has no boundary, and is rejected. No tolerance is added to ``max_kl``.

    Args:
        max_kl: the radius, in nats per prediction.
        backtracks: how often the step may be shortened.
        shrink: the factor of each backtrack, in (0, 1).
        require_improvement: whether a measured loss must be strictly lower than before. Strictly, because otherwise
            a batch without any signal, whose gradient is rounding error, would move the model a full radius.

    Raises:
        ArgumentError: an argument out of its range, a NaN or negative lr, or no probe.
    """

    needs_probe: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False

    max_kl: float
    backtracks: int = 10
    shrink: float = 0.5
    require_improvement: bool = True

    def __post_init__(self) -> None:
        _checks.positive("TrustRegion", "max_kl", self.max_kl)
        _checks.count("TrustRegion", "backtracks", self.backtracks, least=0)
        _checks.fraction("TrustRegion", "shrink", self.shrink)

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        """Search along −direction; costs one product with the metric and one evaluation per trial."""
        _checks.learning_rate("TrustRegion", lr, infinite=True)
        probe = need_probe("TrustRegion", probe)
        ray = local.ray(direction)
        numbers = ray.floats()
        if math.isnan(float(lr)):
            return rejected(local.damping, _checks.NAN_RATE, tried=False)
        if numbers is None:
            return not_finite(local)
        scale, slope, curvature, _ = numbers
        bound = float(ray.bound)
        if slope == 0 and curvature == 0 and not float(ray.size):
            return rejected(local.damping, "the direction is zero", tried=False)
        # A hair inside: where the KL is exactly quadratic, rounding would else cost half of all steps a backtrack.
        inside = 1 - 64 * torch.finfo(ray.curvature.dtype).eps
        boundary = inside * math.sqrt(2 * self.max_kl / bound) if bound > 0 else math.inf
        t = min(float(lr) * scale, boundary)
        if t > ray.largest_step():
            return rejected(local.damping, "there is no curvature along the direction to bound the step", tried=False)
        if t <= 0:
            return rejected(local.damping, f"the step length is {t} (lr {float(lr)})", tried=False)
        return backtrack(local, ray, t, probe, self._verdict, shrink=self.shrink, backtracks=self.backtracks)

    def _verdict(self, t: float, kl: float, change: float | None) -> str:
        if not kl <= self.max_kl:
            return f"the measured KL {kl:.3g} exceeds max_kl {self.max_kl:.3g}"
        if self.require_improvement and change is not None and not change < 0:
            return f"the loss does not fall (measured change {change:.3g})"
        return ""
