"""Rows of a matrix that is a table of embeddings and the weight of a linear layer at once (a tied output head)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.network.rows import DenseRows, EmbeddingRows, LinearRows, Rows

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TiedRows(Rows):
    """``r_kn = vec(Σ_s onehot(index_ns) e_knsᵀ + Σ_s g_kns a_nsᵀ)`` for a table ``[vocabulary, width]``.

    Args:
        parts: rows of its uses as a table and of its uses as a weight, each kind at most once. Where they differ in the
            number of examples (a head that sees masked tokens only) only sums over examples have a meaning.
    """

    parts: tuple[EmbeddingRows | LinearRows, ...]

    def _common(self) -> bool:
        return len({part.shape[1] for part in self.parts}) == 1

    @property
    def shape(self) -> tuple[int, int, int]:
        k, n, p = self.parts[0].shape
        return k, n if self._common() else sum(part.shape[1] for part in self.parts), p

    def dense(self) -> Tensor:
        first, *others = (part.dense() for part in self.parts)
        for other in others:
            first = first + other
        return first

    def scaled(self, factor: float | Tensor) -> TiedRows:
        return TiedRows(tuple(part.scaled(factor) for part in self.parts))

    def joined(self, other: Rows) -> Rows:
        if not isinstance(other, TiedRows):
            return DenseRows(self.dense() + other.dense())
        parts = list(self.parts)
        for part in other.parts:
            same = [i for i, own in enumerate(parts) if type(own) is type(part)]
            if same:
                parts[same[0]] = parts[same[0]].joined(part)  # type: ignore[assignment]
            else:
                parts.append(part)
        return TiedRows(tuple(parts))

    def stacked(self, other: Rows) -> Rows:
        if isinstance(other, TiedRows) and [type(p) for p in self.parts] == [type(p) for p in other.parts]:
            parts = [mine.stacked(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True)]
            if not any(isinstance(part, DenseRows) for part in parts):
                return TiedRows(tuple(parts))  # type: ignore[arg-type]
        return DenseRows(torch.cat([self.dense(), other.dense()], 1))

    def folded(self, n: int) -> TiedRows:
        return TiedRows(tuple(part.folded(n) for part in self.parts))

    def largest(self) -> Tensor:
        sizes = [part.largest() for part in self.parts]
        return torch.stack(sizes).sum(0) if self._common() else torch.cat(sizes)

    def largest_by_position(self) -> Tensor:
        if not self._common():
            return torch.cat([part.largest_by_position().flatten() for part in self.parts])[:, None]
        return torch.cat([part.largest_by_position() for part in self.parts], 1)

    def total(self) -> Tensor:
        return torch.stack([part.total() for part in self.parts]).sum(0)

    def squared_sum(self) -> Tensor:
        k, n, p = self.shape
        size = max(1, _CHUNK_BYTES // max(1, k * p * self.parts[0].g.element_size()))
        total = self.parts[0].g.new_zeros(p)
        for start in range(0, n, size):
            total += (
                TiedRows(tuple(_examples(part, start, start + size) for part in self.parts))
                .dense()
                .square()
                .sum((0, 1))
            )
        return total

    def gram(self) -> Tensor:
        total = self.parts[0].gram()
        if len(self.parts) == 2:
            cross = _cross(*sorted(self.parts, key=lambda part: isinstance(part, LinearRows)))  # type: ignore[arg-type]
            total = total + self.parts[1].gram() + cross + cross.mT
        return total

    def matvec(self, v: Tensor) -> Tensor:
        return torch.stack([part.matvec(v) for part in self.parts]).sum(0)

    def rmatvec(self, u: Tensor) -> Tensor:
        return torch.stack([part.rmatvec(u) for part in self.parts]).sum(0)


def _examples(part: EmbeddingRows | LinearRows, start: int, stop: int) -> EmbeddingRows | LinearRows:
    if isinstance(part, EmbeddingRows):
        return EmbeddingRows(part.index[start:stop], part.g[:, start:stop], part.vocabulary)
    return LinearRows(part.a[:, start:stop], part.g[:, :, start:stop])


def _cross(table: EmbeddingRows, weight: LinearRows) -> Tensor:
    """Inner products ``Σ_st g_lmt[index_ns] (e_kns · a_mt)`` of rows as a table and as a weight, ``[K·N, K·N]``."""
    k, n = table.g.shape[:2]
    a, g = weight.a[0], weight.g[:, 0]
    inner = torch.einsum("knsw,mtw->knsmt", table.g, a)
    chosen = g[..., table.index]  # [L, M, T, N, S]
    return torch.einsum("knsmt,lmtns->knlm", inner, chosen).reshape(k * n, k * n)
