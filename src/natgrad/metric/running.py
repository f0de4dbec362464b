"""Averages over steps and the schedule of refreshes; no host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.errors import ArgumentError


@dataclass(frozen=True)
class Refresh:
    """When statistics and inverses are renewed.

    Args:
        statistics: observe the curvature every so many steps.
        inverse: renew inverses (and eigenbases) every so many steps. In the first ``inverse`` steps they are renewed
            at steps 0, 1, 2, 4, 8, … because the averages still change quickly.
        burn_in: in the first so many steps both are renewed at every step.

    Raises:
        ArgumentError: an interval below 1, or a negative burn-in.
    """

    statistics: int = 1
    inverse: int = 10
    burn_in: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field, value in (("statistics", self.statistics), ("inverse", self.inverse)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}({field}={value!r}) was given; an interval is a whole number of steps ≥ 1.")
        if not isinstance(self.burn_in, int) or self.burn_in < 0:
            raise ArgumentError(f"{name}(burn_in={self.burn_in!r}) was given; it is a whole number of steps ≥ 0.")

    def statistics_due(self, step: int) -> bool:
        """Whether curvature is observed at this step (counted from 0)."""
        return step < self.burn_in or step % self.statistics == 0

    def inverse_due(self, step: int) -> bool:
        """Whether the inverses of all blocks are renewed at this step (counted from 0)."""
        if step < max(self.burn_in, self.inverse):
            return step < self.burn_in or step & (step - 1) == 0
        return step % self.inverse == 0


@dataclass(frozen=True)
class Staggered(Refresh):
    """A ``Refresh`` that spreads the renewal of inverses evenly over the steps between two of them.

    Blocks are divided into ``inverse`` shares of about equal cost (the dearest first, to whichever share is least so
    far), and every step renews one share, so that no step takes much longer than another. In the first steps, as with
    ``Refresh``, all are renewed together.
    """

    def inverse_due(self, step: int) -> bool:
        """Whether the inverses of all blocks are renewed at this step (counted from 0): in the first steps only."""
        return step < max(self.burn_in, self.inverse) and super().inverse_due(step)

    def share_due(self, step: int) -> int | None:
        """Which of the ``inverse`` shares of blocks is renewed at this step; None in the first steps."""
        return None if step < max(self.burn_in, self.inverse) else step % self.inverse


@dataclass(frozen=True)
class Average:
    """Exponential averages of n tensors of one shape, side by side; the first value of each counts in full.

    Args:
        value: the means ``Σ_t β^(T−t) x_t / Σ_t β^(T−t)``, ``[n, *shape]``: the usual averages with zero start, their
            bias corrected.
        weight: ``Σ_t β^(T−t) (1 − β)``, ``[n]``, which grow from 0 to 1.
    """

    value: Tensor
    weight: Tensor

    @staticmethod
    def start(x: Tensor) -> Average:
        """Nothing taken in yet of tensors like ``x [n, *shape]``."""
        return Average(torch.zeros_like(x), torch.zeros(len(x), dtype=x.dtype, device=x.device))

    def update_(self, x: Tensor, decay: float, valid: Tensor | None = None) -> None:
        """Take in ``x [n, *shape]``, in place.

        One of the n tensors is left out where it is not finite, all where ``valid`` (0-d bool) is false.
        """
        axes = tuple(range(1, x.dim()))
        finite = torch.isfinite(x.sum(axes) if axes else x)
        if valid is not None:
            finite = finite & valid.to(finite.device)
        # In x's precision: Python numbers in torch.where would be rounded to float32.
        keep = torch.where(finite, x.new_full((), decay), x.new_ones(()))
        self.weight.mul_(keep).add_(1 - keep)
        share = (1 - keep) / self.weight.clamp_min(torch.finfo(x.dtype).tiny)
        each = (-1, *[1] * len(axes))
        # 0 · NaN is NaN, so that a share of 0 alone would not keep x out.
        self.value.lerp_(torch.where(finite.view(each), x, 0.0), share.view(each))

    def member(self, i: int) -> Average:
        """The i-th alone, in the same memory."""
        return Average(self.value[i : i + 1], self.weight[i : i + 1])

    @property
    def total(self) -> Tensor:
        """``Σ_t β^(T−t) (1 − β) x_t``, the averages before their bias is corrected."""
        return self.value * self.weight.view(-1, *[1] * (self.value.dim() - 1))
