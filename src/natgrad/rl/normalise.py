"""Running mean and variance, of observations and of returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Normalises its input by the mean and variance of all that :meth:`update` was given.

    Nothing changes while a policy acts or is updated: a policy whose normaliser moved between the two would no longer
    be the one that acted, and its ratio not one.

    Args:
        size: entries of the last axis.
        limit: normalised values are clipped to ±limit.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, size: int, limit: float = 10.0) -> None:
        super().__init__()
        self.limit = limit
        self._kept: tuple[tuple, Tensor, Tensor] | None = None
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @property
    def scale(self) -> Tensor:
        """Standard deviation of each entry, [size]; one where nothing varied."""
        return torch.where(self.variance > 1e-12, self.variance, 1.0).sqrt()

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take the rows of ``values`` [*, size] into the moments (Chan, Golub & LeVeque 1979)."""
        rows = values.reshape(-1, values.shape[-1]).to(self.mean)
        n = float(rows.shape[0])
        if n == 0:
            return
        mean, variance = rows.mean(0), rows.var(0, unbiased=False)
        total = self.count + n
        shift = mean - self.mean
        spread = self.variance * self.count + variance * n + shift.square() * self.count * n / total
        self.mean += shift * n / total
        self.variance.copy_(spread / total)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        mean, scale = self._terms(x)
        return ((x - mean) / scale).clamp(-self.limit, self.limit)

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale in the precision of ``x``, kept while the moments stay as they are: acting is many passes."""
        key = (id(self.mean), self.mean._version, self.variance._version, x.dtype, x.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.mean.to(x), self.scale.to(x)
        return self._kept[1:]


class Unchanged(nn.Module):
    """No normalisation, in the place of :class:`RunningMoments`."""

    def update(self, values: Tensor) -> None:
        """Takes nothing from ``values``."""

    def forward(self, x: Tensor) -> Tensor:
        return x
