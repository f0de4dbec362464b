"""What a structure keeps of one batch. Statistics of micro-batches add up to those of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from natgrad.linalg import BlockStacks, LinearOperator
from natgrad.network import DenseRows, Rows

BasisSide = Tensor | BlockStacks | None

Basis = tuple[BasisSide, BasisSide]
"""Eigenbases of the left and right Kronecker factor; None stands for the identity."""

Bases = dict[str, Basis]
"""Eigenbases by block name."""


@dataclass(frozen=True)
class Moment:
    """A sum over examples and the count that turns it into a mean; None stands for the batch's normaliser M."""

    sum: Tensor
    count: Tensor | None = None

    def __add__(self, other: Moment) -> Moment:
        counts = [c for c in (self.count, other.count) if c is not None]
        return Moment(self.sum + other.sum, counts[0] + counts[1] if len(counts) == 2 else None)

    def repeated(self, times: float) -> Moment:
        """That of examples each of which is there so many times."""
        return self if times == 1.0 else Moment(self.sum * times, None if self.count is None else self.count * times)

    def mean(self, normaliser: Tensor) -> Tensor:
        count = normaliser if self.count is None else self.count
        return self.sum / count.clamp_min(torch.finfo(count.dtype).tiny)


@dataclass(frozen=True)
class Moments:
    """Means by block and by kind (``"matrix"``, ``"diagonal"``, ``"input"``, ``"output"``, ``"eigenvalues"``).

    Sides with blocks have the last, narrower one as ``"input_rest"`` and ``"output_rest"``. Only these may be averaged
    over steps.

    Args:
        values: the moments. A block that no example of a micro-batch reached is missing there, and counts as zero.
        normaliser: ``M`` of the batch, 0-d.
        bases: eigenbases in which eigenvalues are given.
        rows: of the blocks whose eigenvalues wait for a basis (see :mod:`natgrad.metric.eigenbasis`).
    """

    values: dict[str, dict[str, Moment]]
    normaliser: Tensor
    bases: Bases = field(default_factory=dict)
    rows: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict)

    def __add__(self, other: Moments) -> Moments:
        merged = {block: dict(kinds) for block, kinds in self.values.items()}
        for block, kinds in other.values.items():
            mine = merged.setdefault(block, {})
            for kind, moment in kinds.items():
                mine[kind] = mine[kind] + moment if kind in mine else moment
        rows = {name: (*self.rows.get(name, ()), *other.rows.get(name, ())) for name in {**self.rows, **other.rows}}
        return Moments(merged, self.normaliser + other.normaliser, self.bases | other.bases, rows)

    def means(self) -> dict[str, dict[str, Tensor]]:
        return {
            block: {kind: m.mean(self.normaliser) for kind, m in kinds.items()} for block, kinds in self.values.items()
        }


class JacobianRoot(LinearOperator):
    """``Rᵀ/√M`` as an operator of shape ``[P, K·N]``: the root of a Fisher matrix, never made dense.

    Args:
        rows: Jacobian rows by cell, in the block's order; None for a cell that took no part.
        sizes: length of each cell's vector.
        normaliser: ``M``.
    """

    def __init__(self, rows: Sequence[Rows | None], sizes: Sequence[int], normaliser: Tensor) -> None:
        k, n, _ = next(r for r in rows if r is not None).shape
        super().__init__((sum(sizes), k * n), normaliser.dtype, normaliser.device)
        self.rows, self.sizes = tuple(rows), list(sizes)
        # A batch without weight has rows of zero; 0/0 must not make them NaN.
        self.normaliser = normaliser.clamp_min(torch.finfo(normaliser.dtype).tiny)

    def matvec(self, v: Tensor) -> Tensor:
        u = v / self.normaliser.sqrt()
        parts = [
            u.new_zeros(*u.shape[:-1], size) if rows is None else rows.rmatvec(u)
            for rows, size in zip(self.rows, self.sizes, strict=True)
        ]
        return torch.cat(parts, -1)

    def matvec_plus(self, v: Tensor, b: Tensor) -> Tensor:
        if v.ndim > 1 or v.requires_grad or b.requires_grad:
            return super().matvec_plus(v, b)
        u, b = v / self.normaliser.sqrt(), b.to(torch.promote_types(b.dtype, self.dtype)).contiguous()
        out = torch.empty_like(b)
        for rows, part, of in zip(self.rows, b.split(self.sizes), out.split(self.sizes), strict=True):
            if rows is None:
                of.copy_(part)
            else:
                rows.rmatvec_plus(u, part, of)
        return out

    def rmatvec(self, v: Tensor) -> Tensor:
        out: Tensor | None = None
        for rows, part in zip(self.rows, v.split(self.sizes, -1), strict=True):
            if rows is not None:
                term = rows.matvec(part)
                out = term if out is None else out + term
        assert out is not None
        return out / self.normaliser.sqrt()

    def gram(self) -> Tensor:
        """``R Rᵀ / M`` of shape ``[K·N, K·N]``, summed over cells without forming any R."""
        total: Tensor | None = None
        for rows in self.rows:
            if rows is not None:
                term = rows.gram()
                total = term if total is None else total.add_(term)
        assert total is not None
        return total / self.normaliser


@dataclass(frozen=True)
class RowStatistics:
    """All Jacobian rows of the batch, by cell."""

    rows: Mapping[str, Rows]
    normaliser: Tensor

    def __add__(self, other: RowStatistics) -> RowStatistics:
        k, n, _ = next(iter(self.rows.values())).shape
        other_k, m, _ = next(iter(other.rows.values())).shape
        merged: dict[str, Rows] = {}
        for name in {**self.rows, **other.rows}:
            mine, theirs = self.rows.get(name), other.rows.get(name)
            mine = _zeros_like(theirs, k, n) if mine is None else mine
            theirs = _zeros_like(mine, other_k, m) if theirs is None else theirs
            merged[name] = mine.stacked(theirs)
        return RowStatistics(merged, self.normaliser + other.normaliser)


def _zeros_like(rows: Rows | None, k: int, n: int) -> DenseRows:
    assert rows is not None
    example = rows.dense()
    return DenseRows(example.new_zeros(k, n, example.shape[-1]))


@dataclass(frozen=True)
class ProductStatistics:
    """Matrices known by their products, one per micro-batch, each already multiplied by its normaliser."""

    operators: tuple[LinearOperator, ...]
    normaliser: Tensor

    def __add__(self, other: ProductStatistics) -> ProductStatistics:
        return ProductStatistics(self.operators + other.operators, self.normaliser + other.normaliser)


Statistics = Moments | RowStatistics | ProductStatistics
