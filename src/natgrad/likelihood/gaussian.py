"""The Gaussian likelihood: regression, with a known or a learned scale of the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from natgrad.errors import ArgumentError, ShapeError
from natgrad.likelihood._math import diagonal_columns, expm1_minus, promote
from natgrad.likelihood.base import Likelihood, Target, check_elementwise


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""y_c ~ N(mean_c, scale_c²), independently for each component.

    scale: the standard deviation σ of the noise, a positive number or one per component, in the units of y. Then f is
        the mean, [*batch, C], y is [*batch, C], score = (f − y)/σ² and Λ = I/σ². With σ = 1 the nll is half the summed
        squared error plus a constant.
    scale=None, or `Gaussian.learned()`: f = [mean, log σ], the two halves of the last axis, [*batch, 2C]; y is
        [*batch, C]; Λ = diag(1/σ², 2) in (mean, log σ).

    nll sums over components; `torch.nn.MSELoss` averages over them too and has no ½: see `of_mse_loss`.
    """

    scale: float | Sequence[float] | None = 1.0

    def __post_init__(self) -> None:
        if self.scale is None:
            return
        scale = self.scale.tolist() if isinstance(self.scale, Tensor) else self.scale
        scale = tuple(float(s) for s in scale) if isinstance(scale, Sequence) else float(scale)
        object.__setattr__(self, "scale", scale)
        values = scale if isinstance(scale, tuple) else (scale,)
        if not values or not all(math.isfinite(s) and s > 0 for s in values):
            raise ArgumentError(
                f"scale is the standard deviation of the noise and must be positive and finite, but got {scale}. "
                "Use Gaussian() for unit variance, or Gaussian.learned() when the model predicts log scales."
            )

    @classmethod
    def learned(cls) -> Gaussian:
        """The Gaussian whose scale is predicted: f = [mean, log σ] on the last axis."""
        return cls(scale=None)

    @classmethod
    def of_mse_loss(cls) -> Gaussian:
        """σ = 1/√2: the nll of a prediction is Σ_c (f_c − y_c)² plus a constant, Λ = 2I.

        The gradient of `mse_loss(reduction="sum")` is that of the summed nll; `reduction="mean"` divides by N·C.
        """
        return cls(scale=math.sqrt(0.5))

    def distribution(self, f: Tensor) -> Distribution:
        mean, log_scale = self._parameters(f)
        return Independent(Normal(mean, log_scale.exp(), validate_args=False), 1, validate_args=False)

    def nll(self, f: Tensor, y: Target) -> Tensor:
        mean, log_scale = self._parameters(f)
        z = (self._labels(f, y).to(mean.dtype) - mean) * (-log_scale).exp()
        return (0.5 * z.square() + log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._parameters(f.detach())
        noise = torch.randn((n, *mean.shape), dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + log_scale.exp() * noise

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        mean, log_scale = self._parameters(f)
        other_mean, other_log_scale = self._parameters(g)
        shift = (mean - other_mean) * (-other_log_scale).exp()
        # ½ (σ_f²/σ_g² − 1 − log σ_f²/σ_g²) without cancellation
        return 0.5 * (shift.square() + expm1_minus(2 * (log_scale - other_log_scale))).sum(-1)

    def score(self, f: Tensor, y: Target) -> Tensor:
        mean, log_scale = self._parameters(f)
        inverse = (-log_scale).exp()
        z = (mean - self._labels(f, y).to(mean.dtype)) * inverse
        if self.scale is not None:
            return z * inverse
        return torch.cat([z * inverse, 1 - z.square()], dim=-1)

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        return self._root(f).square() * promote(u)

    def fisher_factor(self, f: Tensor) -> Tensor:
        return diagonal_columns(self._root(f))

    def check_output(self, f: Tensor) -> None:
        super().check_output(f)
        if self.scale is None and (f.shape[-1] % 2 or f.shape[-1] == 0):
            raise ShapeError(
                f"{self} needs [mean, log scale] on the last axis of the output, an even number of columns, but got "
                f"shape {list(f.shape)}. For a model that predicts means only use Gaussian(scale=...)."
            )
        if isinstance(self.scale, tuple) and f.shape[-1] != len(self.scale):
            raise ShapeError(
                f"{self} has {len(self.scale)} scales, one per component, but the output has shape {list(f.shape)}. "
                "Give one scale per output, or a single number for all."
            )

    def check_target(self, f: Tensor, y: Target) -> None:
        self._labels(f, y)

    def _parameters(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log scale), each [*batch, components]."""
        f = promote(f)
        if self.scale is None:
            if f.shape[-1] % 2:
                self.check_output(f)
            mean, log_scale = f.chunk(2, dim=-1)
            return mean, log_scale
        if isinstance(self.scale, tuple):
            return f, f.new_tensor(self.scale).log().expand_as(f)
        return f, f.new_full((), math.log(float(self.scale))).expand_as(f)  # pyright: ignore[reportArgumentType]

    def _root(self, f: Tensor) -> Tensor:
        """The diagonal of Λ^½, shape [*batch, C]."""
        mean, log_scale = self._parameters(f)
        inverse = (-log_scale).exp()
        if self.scale is not None:
            return inverse
        return torch.cat([inverse, torch.full_like(mean, math.sqrt(2.0))], dim=-1)

    def _labels(self, f: Tensor, y: Target) -> Tensor:
        return check_elementwise(self, f, y, f.shape[-1] // 2 if self.scale is None else None)
