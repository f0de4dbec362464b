"""Symmetric matrices by one triangle, folded into a rectangle: n (n + 1) / 2 numbers instead of n².

With h = ⌈n/2⌉ the triangle below the diagonal is a trapezium (its first h columns) and a small triangle, which is
turned over into the corner that the trapezium leaves free::

    a                    a  q  r          d  f
    b  e            →    b  e  s    or    a  h      (n = 5 or 4; odd n: [n, h], even n: [n + 1, h])
    c  f  .  .           c  f  i          b  e
    …                    …                …

the rectangular full packed format of Gustavson, Waśniewski, Dongarra & Langou 2010. The shape tells the width, and is
never that of a square matrix (but for n = 1, which is the same both ways).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from natgrad.errors import ShapeError
from natgrad.linalg.kronecker import KroneckerProduct
from natgrad.linalg.operator import Inverse, LinearOperator
from natgrad.linalg.psd import working_dtype

if TYPE_CHECKING:
    from natgrad.linalg.solvers import Solver


def fold(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The lower triangle of ``matrix [*stack, n, n]`` as a rectangle, rounded to ``dtype`` (None: as it is)."""
    n = matrix.shape[-1]
    if matrix.ndim < 2 or matrix.shape[-2] != n:
        raise ShapeError(f"Only square matrices [*stack, n, n] are folded, but got shape {tuple(matrix.shape)}.")
    h, k = n - n // 2, n // 2
    rectangle = matrix.new_empty(folded_shape(matrix.shape), dtype=dtype)
    trapezium, corner = _parts(rectangle, n)
    trapezium.copy_(matrix[..., :, :h])
    if k:
        corner.copy_(corner.tril(-1).add_(matrix[..., h:, h:].mT.triu()))
    return rectangle


def unfold(rectangle: Tensor) -> Tensor:
    """The symmetric matrix ``[*stack, n, n]`` that :func:`fold` was given, in float32 at least."""
    n = width_of(rectangle.shape)
    if n is None:
        raise ShapeError(f"No symmetric matrix folds into the shape {tuple(rectangle.shape)}.")
    h = n - n // 2
    trapezium, corner = _parts(rectangle, n)
    out = rectangle.new_empty((*rectangle.shape[:-2], n, n), dtype=working_dtype(rectangle.dtype))
    out[..., :, :h] = trapezium
    out[..., :h, h:] = trapezium[..., h:, :].mT
    _mirror_lower(out[..., :h, :h])
    out[..., h:, h:] = corner.mT
    _mirror_lower(out[..., h:, h:])
    return out


def _parts(rectangle: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Views of the trapezium ``[*stack, n, ⌈n/2⌉]``, and of the square whose upper triangle holds the rest."""
    even = 1 - n % 2
    return rectangle[..., even:, :], rectangle[..., : n // 2, 1 - even :]


def _mirror_lower(square: Tensor) -> None:
    """Overwrite what is above the diagonal by what is below it."""
    square.tril_()
    square.add_(square.tril(-1).mT)


def folded_shape(shape: tuple[int, ...]) -> torch.Size:
    """Shape of the rectangle into which a matrix of shape ``[*stack, n, n]`` folds."""
    n = shape[-1]
    return torch.Size((*shape[:-2], n + 1 - n % 2, n - n // 2))


def width_of(shape: tuple[int, ...]) -> int | None:
    """The width of the matrix that was folded into this shape; None where none was."""
    if len(shape) < 2 or shape[-2] == shape[-1]:
        return None
    rows, columns = shape[-2:]
    return rows - 1 if rows == 2 * columns + 1 else rows if rows == 2 * columns - 1 else None


def unfolded(t: Tensor) -> Tensor:
    """:func:`unfold` of what is folded; anything else as it is."""
    return t if width_of(t.shape) is None else unfold(t)


class PackedKronecker(LinearOperator):
    """A :class:`KroneckerProduct` that keeps its factors folded, and unfolds them whenever it is used.

    Args:
        parts: what ``KroneckerProduct.tensors`` gives, symmetric factors folded or not.
    """

    kind: ClassVar[str] = KroneckerProduct.kind

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self._parts = dict(parts)
        left, right = (self._diagonals(side) for side in ("left", "right"))
        n = left.numel() * right.shape[-1]
        super().__init__((n, n), torch.promote_types(left.dtype, right.dtype), left.device, symmetric=True)

    @property
    def unpacked(self) -> KroneckerProduct:
        """The product with whole factors, made anew."""
        return KroneckerProduct.from_tensors({name: unfolded(t).to(self.dtype) for name, t in self._parts.items()})

    def matvec(self, v: Tensor) -> Tensor:
        return self.unpacked.matvec(v)

    def to_dense(self) -> Tensor:
        return self.unpacked.to_dense()

    def diagonal(self) -> Tensor:
        left, right = (self._diagonals(side) for side in ("left", "right"))
        return (left[..., :, None] * right[..., None, :]).reshape(-1)

    def trace(self) -> Tensor:
        left, right = (self._diagonals(side).sum(-1) for side in ("left", "right"))
        return (left * right).sum()

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        return self.unpacked.logdet(damping=damping, solver=solver)

    def inverse(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Inverse:
        return self.unpacked.inverse(damping=damping, solver=solver)

    def _diagonals(self, side: str) -> Tensor:
        """The diagonal of one factor, ``[*stack, k]``."""
        blocks = [t for name, t in self._parts.items() if name.startswith(f"{side}_")]
        return torch.cat([_diagonal(t).flatten() for t in blocks]) if blocks else _diagonal(self._parts[side])

    def tensors(self) -> dict[str, Tensor]:
        """Those of the product, folded."""
        return dict(self._parts)


def unpacked(operator: LinearOperator) -> LinearOperator:
    """The operator with whole factors."""
    return operator.unpacked if isinstance(operator, PackedKronecker) else operator


def _diagonal(t: Tensor) -> Tensor:
    n = width_of(t.shape)
    t = t.to(working_dtype(t.dtype))
    if n is None:
        return t if t.ndim == 1 else t.diagonal(dim1=-2, dim2=-1)
    return torch.cat([part.diagonal(dim1=-2, dim2=-1) for part in _parts(t, n)], -1)


def kronecker_of(tensors: Mapping[str, Tensor]) -> KroneckerProduct | PackedKronecker:
    """The Kronecker product whose ``tensors`` these are, folded or not."""
    folded = any(width_of(t.shape) is not None for t in tensors.values())
    return PackedKronecker(tensors) if folded else KroneckerProduct.from_tensors(tensors)
