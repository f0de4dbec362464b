"""Which columns S of the output's Fisher matrix Λ = S Sᵀ are used: all, sampled, signed, or the data's own.

Every estimate yields columns ``s_kn`` per row n of the batch (its positions included), such that
``(1/M) Σ_kn (J_nᵀ s_kn)(J_nᵀ s_kn)ᵀ`` is the Fisher matrix, exactly or in expectation. ``M`` counts predictions: a
sequence of T tokens counts as T, and weights count as their sum, as in a mean-reduced loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, NotObservedError
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target

# Batched backward passes hold this many rows of every activation's gradient at once.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Factor:
    """Columns of S for one batch.

    Args:
        columns: ``[K, N, *positions, C]``, already weighted.
        separate: the positions of one row must not share a column: each column stands for as many columns as there
            are positions, each zero at all positions but one.
        normaliser: ``M``, the number of predictions or the sum of their weights (0-d tensor).
        weights: factors of the predictions' Λ, ``[N, *positions]``; None where all are one.
        copies: how many examples of the batch each row stands for; columns are already multiplied by its root.
    """

    columns: Tensor
    separate: bool
    normaliser: Tensor
    weights: Tensor | None
    copies: float = 1.0

    def standing_for(self, copies: float, normaliser: Tensor) -> Factor:
        """The same columns for examples that stand for ``copies`` each, of a batch with ``normaliser``."""
        return replace(self, columns=self.columns * copies**0.5, normaliser=normaliser, copies=copies)

    @property
    def positions(self) -> int:
        return self.columns.shape[2:-1].numel()

    @property
    def count(self) -> int:
        """Number of columns after separation."""
        return self.columns.shape[0] * (self.positions if self.separate else 1)

    def chunks(self, size: int | None = None) -> Iterator[Tensor]:
        """Columns ``[k, N, *positions, C]`` in chunks of at most ``size`` (default: what fits in a batched pass)."""
        k, n = self.columns.shape[:2]
        size = size or max(1, _ROWS_AT_ONCE // max(1, n * self.positions))
        if not self.separate or self.positions == 1:
            yield from self.columns.split(size)
            return
        flat = self.columns.reshape(k, n, self.positions, -1)
        pairs = [(column, position) for column in range(k) for position in range(self.positions)]
        for start in range(0, len(pairs), size):
            chunk = torch.zeros(len(pairs[start : start + size]), *flat.shape[1:], dtype=flat.dtype, device=flat.device)
            for i, (column, position) in enumerate(pairs[start : start + size]):
                chunk[i, :, position] = flat[column, :, position]
            yield chunk.reshape(-1, *self.columns.shape[1:])


class Estimate(ABC):
    """How the columns of S are chosen."""

    needs_target: bool = False
    independent: ClassVar[bool] = False
    """Whether columns of different examples are uncorrelated: cross terms between them then average out."""

    @abstractmethod
    def columns(
        self, likelihood: Likelihood, f: Tensor, y: Target | None, generator: torch.Generator | None
    ) -> tuple[Tensor, bool]:
        """Unweighted columns ``[K, *f.shape]``, and whether positions must be separated."""

    def weighted(self, columns: Tensor, weights: Tensor) -> Tensor:
        """Columns of ``w Λ``."""
        return columns * weights.sqrt()

    def factor(
        self, likelihood: Likelihood, f: Tensor, y: Target | None = None, generator: torch.Generator | None = None
    ) -> Factor:
        """Columns of S at the output ``f``.

        Args:
            likelihood: what ``f`` means.
            f: output ``[N, *positions, C]``.
            y: target; needed by ``Empirical`` and by likelihoods whose weights depend on it.
            generator: source of the random estimates' draws, on ``f``'s device.

        Raises:
            NotObservedError: a target is needed and was not given.
        """
        f = f.detach()
        # Labels cannot be sampled from NaN; columns of NaN make sure that what comes of it is left out of averages.
        finite = torch.isfinite(f).all()
        f = torch.where(finite, f, 0.0)
        _, curvature, normaliser = self.weighting(likelihood, f, y)
        columns, separate = self.columns(likelihood, f, y, generator)
        columns = columns * torch.where(finite, 1.0, torch.nan).to(columns.dtype)
        if curvature is not None:
            curvature = curvature.to(columns.dtype)
            columns = self.weighted(columns, curvature[..., None])
        return Factor(columns, separate, normaliser.to(columns.dtype), curvature)

    def weighting(
        self, likelihood: Likelihood, f: Tensor, y: Target | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Weights of the predictions, factors of their curvature (both None where all are one), and ``M``."""
        if y is None and (self.needs_target or likelihood.needs_target):
            who = type(self if self.needs_target else likelihood).__name__
            raise NotObservedError(
                f"{who} needs the target of the observed batch, but only its output was seen. Call "
                "opt.observe(output, target) before loss.backward(), pass y= to ng.fisher, or return "
                "(loss, output, target) from the closure."
            )
        weights = curvature = None
        if y is not None:
            likelihood.check_target(f, y)
            weights, curvature = likelihood.weights(f, y), likelihood.curvature_weights(f, y)
        predictions = f.new_full((), f.shape[:-1].numel())
        return weights, curvature, predictions if weights is None else weights.sum()


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise ArgumentError(f"samples={samples} was given; the number of samples per prediction must be at least 1.")


@dataclass(frozen=True)
class Exact(Estimate):
    """All columns of S: the true Fisher matrix, at the cost of one backward pass per output (and position)."""

    def columns(
        self, likelihood: Likelihood, f: Tensor, y: Target | None, generator: torch.Generator | None
    ) -> tuple[Tensor, bool]:
        return likelihood.unweighted.fisher_factor(f), True


@dataclass(frozen=True)
class MonteCarlo(Estimate):
    """Scores at labels sampled from the model: unbiased for the true Fisher at one backward pass per sample.

    Args:
        samples: labels per prediction; the error falls as ``1/√samples``.
    """

    independent: ClassVar[bool] = True

    samples: int = 1

    def __post_init__(self) -> None:
        _check_samples(self.samples)

    def columns(
        self, likelihood: Likelihood, f: Tensor, y: Target | None, generator: torch.Generator | None
    ) -> tuple[Tensor, bool]:
        inner = likelihood.unweighted
        labels = inner.sample(f, self.samples, generator=generator)
        return torch.stack([inner.score(f, label) for label in labels]) / self.samples**0.5, False


@dataclass(frozen=True)
class Signed(Estimate):
    """Random ±1 combinations of all columns: unbiased for the true Fisher at one backward pass per sample.

    Known as curvature propagation (Martens, Sutskever & Swersky 2012). Unlike ``MonteCarlo`` it draws no labels, so
    its noise does not depend on how peaked p(y | f) is.

    Args:
        samples: combinations per prediction.
    """

    independent: ClassVar[bool] = True

    samples: int = 1

    def __post_init__(self) -> None:
        _check_samples(self.samples)

    def columns(
        self, likelihood: Likelihood, f: Tensor, y: Target | None, generator: torch.Generator | None
    ) -> tuple[Tensor, bool]:
        factor = likelihood.unweighted.fisher_factor(f)
        combined = torch.zeros(self.samples, *f.shape, dtype=factor.dtype, device=f.device)
        for out in combined:
            for column in factor:
                out += column * random_signs(column.shape[:-1], column, generator)[..., None]
        return combined / self.samples**0.5, False


@dataclass(frozen=True)
class Empirical(Estimate):
    """Scores at the data's own labels.

    This is *not* the Fisher matrix: it depends on the labels' noise and vanishes as the model fits them (Kunstner,
    Balles & Hennig 2019). The unit is a row of the batch: the score of a sequence is the sum over its positions. A
    weight w counts a prediction w times, ``w s sᵀ``, as in the loss; the unit of the weights cancels.
    """

    needs_target: bool = True

    def columns(
        self, likelihood: Likelihood, f: Tensor, y: Target | None, generator: torch.Generator | None
    ) -> tuple[Tensor, bool]:
        assert y is not None
        return likelihood.score(f, y)[None], False

    def weighted(self, columns: Tensor, weights: Tensor) -> Tensor:
        # The score of the weighted loss is w s; one √w of it belongs here.
        return torch.where(weights > 0, columns / weights.sqrt(), 0.0)


def random_signs(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent ±1 of the given shape, in the dtype and on the device of ``like``."""
    bits = torch.randint(0, 2, shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)
