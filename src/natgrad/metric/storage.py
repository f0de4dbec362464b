"""How a structure's symmetric matrices are kept between steps: whole, or one triangle of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.linalg import MATRICES, Inverse, KroneckerProduct, LinearOperator
from natgrad.linalg.packed import PackedKronecker, fold, folded_shape, kronecker_of, unfold, unfolded, width_of
from natgrad.metric.statistics import Moments

_FACTORS = ("input", "output")


@dataclass(frozen=True)
class Unpacked:
    """Averaged factors and inverses are kept whole, as they were computed.

    A state that was saved under one storage loads into an optimizer with another.
    """

    def shape(self, shape: torch.Size) -> torch.Size:
        """The shape in which a factor of this shape, or its inverse, is kept."""
        return shape

    def inverse_dtype(self, shape: torch.Size, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the inverse of a factor of this shape is kept."""
        return dtype

    def average(self, kind: str, moment: Tensor) -> Tensor:
        """A moment, kept in whichever way, as its average is kept here."""
        return self._kept(moment) if kind.startswith(_FACTORS) else moment

    def moments(self, moments: Moments) -> Moments:
        """The moments of a batch as their averages are kept."""
        kept = {
            block: {kind: replace(m, sum=self.average(kind, m.sum)) for kind, m in kinds.items()}
            for block, kinds in moments.values.items()
        }
        return replace(moments, values=kept)

    def inverse(self, matrix: LinearOperator) -> LinearOperator:
        """An inverse as it is kept, which is also the one in use: what a resumed run loads is what this one had."""
        own = matrix.operator if isinstance(matrix, Inverse) else matrix
        if not isinstance(own, KroneckerProduct | PackedKronecker):
            return matrix
        tensors = own.tensors()
        kept = {name: self._kept_inverse(t, own.dtype) for name, t in tensors.items()}
        return matrix if all(kept[name] is t for name, t in tensors.items()) else kronecker_of(kept)

    def restored(self, kind: str, tensors: Mapping[str, Tensor]) -> LinearOperator:
        """The inverse of this kind that is made of these tensors, in whichever way they were kept."""
        matrix: Any = MATRICES[kind]
        return self.inverse(kronecker_of(tensors) if matrix is KroneckerProduct else matrix.from_tensors(tensors))

    def _kept(self, factor: Tensor) -> Tensor:
        return unfolded(factor)

    def _kept_inverse(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return unfolded(factor).to(dtype)


@dataclass(frozen=True)
class Packed(Unpacked):
    """Of every wide Kronecker factor and inverse one triangle is kept, in half the memory: n (n + 1) / 2 numbers.

    Whole matrices are made of them for the moment of their use, so that results are those of ``Unpacked`` up to
    rounding. Diagonals and eigenvectors stay as they are.

    Args:
        dtype: in which folded inverses are kept: None, as they were computed, or ``torch.bfloat16``, in half as much
            again. Every number is then off by at most 2⁻⁸ of itself, and the inverse B in norm by at most 2⁻⁸ ‖|B|‖₂.
            This can exceed its smallest eigenvalues, those along the largest curvature, unless damping keeps the
            condition number of each damped factor below about 2⁸. Averages stay in float32 or better: in bfloat16 they
            would stand still as soon as a step changes them by less than that. So does all arithmetic.
        least: narrower matrices are kept whole: the time of their products is that of calling operations, which
            unfolding would multiply.

    Raises:
        ArgumentError: another dtype, or a width below 2.
    """

    dtype: torch.dtype | None = None
    least: int = 128

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.bfloat16):
            raise ArgumentError(
                f"Packed(dtype={self.dtype!r}) was given; it must be None (inverses as computed) or torch.bfloat16. "
                "float16 has too small a range for inverses."
            )
        if not isinstance(self.least, int) or self.least < 2:
            raise ArgumentError(f"Packed(least={self.least!r}) was given; a width is a whole number ≥ 2.")

    def shape(self, shape: torch.Size) -> torch.Size:
        return folded_shape(shape) if self._folds(shape) else shape

    def inverse_dtype(self, shape: torch.Size, dtype: torch.dtype) -> torch.dtype:
        return self.dtype or dtype if self._folds(shape) else dtype

    def _folds(self, shape: torch.Size) -> bool:
        return len(shape) > 1 and shape[-1] == shape[-2] and shape[-1] >= self.least

    def _kept(self, factor: Tensor) -> Tensor:
        width = width_of(factor.shape)
        if width is not None:
            return factor if width >= self.least else unfold(factor)
        return fold(factor) if self._folds(factor.shape) else factor

    def _kept_inverse(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        kept = self._kept(factor)
        return kept.to(dtype if width_of(kept.shape) is None else self.dtype or dtype)


def whole(kinds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block's averages by kind, as the structure computes with them."""
    return {kind: unfolded(t) if kind.startswith(_FACTORS) else t for kind, t in kinds.items()}
