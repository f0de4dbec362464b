"""Length and momentum of a step from the exact Fisher matrix between two vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.errors import ShapeError
from natgrad.step import _checks
from natgrad.step.backtracking import need_probe, not_finite
from natgrad.step.local import BlockVector, LocalModel, Probe, Step, dot, rejected, scaled

Rows = list[list[float]]


@dataclass(frozen=True)
class QuadraticFit:
    """Δ = −α d + μ Δ_prev, with α and μ minimising gᵀΔ + ½ Δᵀ(F + W + λI)Δ for the exact F of the batch.

    An approximate metric (K-FAC) gives good directions but poor lengths; the exact Fisher matrix between two vectors
    costs two products Jv, and gives length and momentum at once (Martens & Grosse 2015, §6.4 and §7). Where Δ_prev is
    zero, or parallel to d, the minimiser of least norm is taken. The result is multiplied by lr.

    Args:
        max_kl: where given, the step is shortened to the radius that the exact F predicts, and ``lr = math.inf``
            lengthens it to that radius. Predicted, not measured: TrustRegion is the hard bound.
        fraction: of the batch's examples, picked at random, on which the exact F is taken, in (0, 1]: two numbers need
            fewer examples than the gradient (Martens & Grosse 2015, §8 take a quarter). The slope is that of the whole
            batch. A model that couples the examples of a batch (BatchNorm in training mode) is always run on all.
        least: so many examples are taken at least, or all: the F of a few does not bound a step.

    Raises:
        ArgumentError: max_kl not above 0, a fraction out of range, no probe, or a lr that is NaN, negative, or infinite
            without max_kl.
    """

    needs_probe: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False

    max_kl: float | None = None
    fraction: float = 1.0
    least: int = 250

    def __post_init__(self) -> None:
        if self.max_kl is not None:
            _checks.positive("QuadraticFit", "max_kl", self.max_kl)
        if self.fraction != 1.0:
            _checks.fraction("QuadraticFit", "fraction", self.fraction)
        _checks.count("QuadraticFit", "least", self.least, least=1)

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        """Fit and take the step; costs one call of ``probe.curvature``, and no product with the metric."""
        _checks.learning_rate("QuadraticFit", lr, infinite=self.max_kl is not None)
        probe = need_probe("QuadraticFit", probe)
        basis, scale = _basis(local, direction)
        numbers = _numbers(local, basis, scale, probe)
        s = float(lr)
        if math.isnan(s):
            return rejected(local.damping, _checks.NAN_RATE, tried=False)
        if numbers is None:
            return not_finite(local)
        fisher, penalty, damped, slope, size = numbers
        eps = max(torch.finfo(v.dtype).eps for v in direction.values())
        x = minimise_quadratic(damped, slope, rank_tolerance=16 * eps)
        kl = max(0.0, 0.5 * _form(x, fisher))
        if self.max_kl is not None:
            s = min(s, math.sqrt(self.max_kl / kl) if kl > 0 else math.inf)
        curved = s * s * (kl + 0.5 * _form(x, penalty))
        x = [s * value for value in x]
        largest = min(torch.finfo(v.dtype).max for v in direction.values())
        if not all(abs(value) <= largest for value in x):
            return rejected(local.damping, f"no finite step: {x} times its vectors", tried=False)
        return Step(
            delta={name: _combine(x, [vector[name] for vector in basis]) for name in direction},
            accepted=True,
            lr=-x[0] / size,
            kl_predicted=s * s * kl,
            loss_change_predicted=math.fsum(b * value for b, value in zip(slope, x, strict=True)) + curved,
            damping=local.damping,
        )


def minimise_quadratic(
    matrix: Sequence[Sequence[float]], slope: Sequence[float], *, rank_tolerance: float
) -> list[float]:
    """argmin_x bᵀx + ½ xᵀKx for one or two unknowns, K positive semi-definite up to rounding.

    K is scaled to unit diagonal, where the eigenvectors of a 2 × 2 matrix [[1, r], [r, 1]] are (1, ±1)/√2 whatever r
    is; eigenvalues 1 ± r of at most ``rank_tolerance`` count as zero (the pseudo-inverse). An unknown without
    curvature, K_ii ≤ 0, stays at 0.

    Args:
        matrix: K, 1 × 1 or 2 × 2.
        slope: b.
        rank_tolerance: in units of K's unit diagonal.
    """
    scales = [1 / math.sqrt(matrix[i][i]) if matrix[i][i] > 0 else 0.0 for i in range(len(slope))]
    b = [scale * value for scale, value in zip(scales, slope, strict=True)]
    if len(b) == 1 or 0.0 in scales:
        return [-scale * value for scale, value in zip(scales, b, strict=True)]
    r = 0.5 * (matrix[0][1] + matrix[1][0]) * scales[0] * scales[1]
    plus = (b[0] + b[1]) / (2 * (1 + r)) if 1 + r > rank_tolerance else 0.0
    minus = (b[0] - b[1]) / (2 * (1 - r)) if 1 - r > rank_tolerance else 0.0
    return [-scales[0] * (plus + minus), -scales[1] * (plus - minus)]


def _basis(local: LocalModel, direction: BlockVector) -> tuple[list[BlockVector], Tensor]:
    """The direction and the last step, each divided by its own power of two, and the direction's power."""
    _checks.blocks("gradient", direction, local.gradient)
    unit, scale = scaled(direction)
    if local.previous is None:
        return [unit], scale
    _checks.blocks("previous step", direction, local.previous)
    return [unit, scaled({name: local.previous[name] for name in direction})[0]], scale


def _numbers(
    local: LocalModel, basis: Sequence[BlockVector], scale: Tensor, probe: Probe
) -> tuple[Rows, Rows, Rows, list[float], float] | None:
    """(F, W, F + W + λI, slope) between the basis vectors and the direction's scale; None where one is not finite."""
    k = len(basis)
    fisher = probe.curvature(basis)
    if fisher.shape != (k, k):
        raise ShapeError(f"probe.curvature gave shape {tuple(fisher.shape)} for {k} vectors. It must be [{k}, {k}].")
    damping, slope = local.damping_gram(basis), torch.stack([dot(v, local.gradient) for v in basis])
    parts = [fisher, local.penalty_gram(basis), damping, slope, scale]
    dtype = torch.promote_types(fisher.dtype, damping.dtype)
    flat = torch.cat([part.reshape(-1).to(damping.device, dtype) for part in parts]).tolist()
    if not all(map(math.isfinite, flat)):
        return None
    rows = [flat[i * k : (i + 1) * k] for i in range(3 * k)]
    terms = rows[:k], rows[k : 2 * k], rows[2 * k :]
    damped = [[math.fsum(entries) for entries in zip(*row, strict=True)] for row in zip(*terms, strict=True)]
    return terms[0], terms[1], damped, flat[3 * k * k : -1], flat[-1]


def _form(x: Sequence[float], matrix: Sequence[Sequence[float]]) -> float:
    return math.fsum(a * matrix[i][j] * b for i, a in enumerate(x) for j, b in enumerate(x))


def _combine(coefficients: Sequence[float], vectors: Sequence[Tensor]) -> Tensor:
    total = coefficients[0] * vectors[0]
    for coefficient, vector in zip(coefficients[1:], vectors[1:], strict=True):
        total = total + coefficient * vector
    return total
