"""Rows of a Jacobian, kept in whatever form is cheapest.

For columns ``s_k`` of the output's Fisher factor, the row of example n is ``r_kn = J_nᵀ s_kn`` restricted to some
parameters; ``R`` of shape ``[K·N, p]`` stacks them, column index k outermost. The Fisher is ``RᵀR / M``; every
structure is a way to use R, and no structure needs to know from which layer it came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from natgrad.linalg.products import gram, product

_CHUNK_BYTES = 64 * 2**20
_KEPT_BYTES = 256 * 2**20


class Rows(ABC):
    """Jacobian rows of the parameters of one cell: a matrix ``R`` of shape ``[K·N, p]``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(K, N, p)``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """``R`` as a tensor ``[K, N, p]``."""

    @abstractmethod
    def scaled(self, factor: float | Tensor) -> Rows:
        """``factor · R``."""

    @abstractmethod
    def joined(self, other: Rows) -> Rows:
        """Rows of a second use of the same parameters by the same examples: the rows add up."""

    @abstractmethod
    def stacked(self, other: Rows) -> Rows:
        """Rows of further examples (another micro-batch), concatenated along N."""

    @abstractmethod
    def folded(self, n: int) -> Rows:
        """The same rows where a layer saw ``N = n·m`` rows, m consecutive ones for each of n examples."""

    @abstractmethod
    def largest(self) -> Tensor:
        """A bound on the size of each example's rows that is zero only where they are zero, shape ``[N]``."""

    def largest_by_position(self) -> Tensor:
        """As :meth:`largest`, for each position that K-FAC counts as an example: ``[N, S]``, or ``[N, 1]``."""
        return self.largest()[:, None]

    def total(self) -> Tensor:
        """``Σ_n r_kn`` of shape ``[K, p]``: what an ordinary backward pass gives."""
        return self.dense().sum(1)

    def squared_sum(self) -> Tensor:
        """``Σ_kn r_kn²`` elementwise, shape ``[p]``."""
        return self.dense().square().sum((0, 1))

    def gram(self) -> Tensor:
        """``R Rᵀ`` of shape ``[K·N, K·N]``."""
        return gram(self.dense().flatten(0, 1).mT)

    def matvec(self, v: Tensor) -> Tensor:
        """``R v`` for ``v`` of shape ``[*batch, p]``: ``[*batch, K·N]``."""
        return v @ self.dense().flatten(0, 1).T

    def rmatvec(self, u: Tensor) -> Tensor:
        """``Rᵀ u`` for ``u`` of shape ``[*batch, K·N]``: ``[*batch, p]``."""
        return u @ self.dense().flatten(0, 1)

    def rmatvec_plus(self, u: Tensor, b: Tensor, out: Tensor) -> None:
        """Write ``b + Rᵀ u`` to ``out``: ``u`` has shape ``[K·N]``, ``b`` and ``out`` (contiguous) have ``[p]``."""
        torch.add(b, self.rmatvec(u), out=out)


@dataclass(frozen=True)
class DenseRows(Rows):
    """Rows stored one by one: ``matrix`` of shape ``[K, N, p]``."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        k, n, p = self.matrix.shape
        return k, n, p

    def dense(self) -> Tensor:
        return self.matrix

    def scaled(self, factor: float | Tensor) -> DenseRows:
        return DenseRows(self.matrix * factor)

    def joined(self, other: Rows) -> DenseRows:
        return DenseRows(self.matrix + other.dense())

    def stacked(self, other: Rows) -> DenseRows:
        return DenseRows(torch.cat([self.matrix, other.dense()], 1))

    def folded(self, n: int) -> DenseRows:
        return DenseRows(self.matrix.unflatten(1, (n, -1)).sum(2))

    def largest(self) -> Tensor:
        return self.matrix.abs().amax((0, 2))


@dataclass(frozen=True)
class LinearRows(Rows):
    """``r_kn = vec Σ_s g_kns a_nsᵀ`` for a matrix parameter ``[groups, out, in]``, row-major.

    Args:
        a: inputs ``[groups, N, S, in]`` (with the homogeneous coordinate where there is a bias).
        g: output gradients ``[K, groups, N, S, out]``.
        spans: lengths of the parts of S that stem from different uses of the layer; empty for a single use.
        origin: equal for rows of one pass whose inputs are equal because their layers read the same memory; empty
            where nothing is known of that.
    """

    a: Tensor
    g: Tensor
    spans: tuple[int, ...] = ()
    origin: tuple[object, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        k, groups, n, _, out = self.g.shape
        return k, n, groups * out * self.a.shape[-1]

    @property
    def positions(self) -> int:
        return self.a.shape[2]

    def _matrices(self) -> Tensor:
        """Per-example gradients ``[K, N, groups, out, in]``."""
        if self.positions == 1:
            return torch.einsum("kgno,gni->kngoi", self.g[:, :, :, 0], self.a[:, :, 0])
        return torch.einsum("kgnso,gnsi->kngoi", self.g, self.a)

    def dense(self) -> Tensor:
        if self.positions == 1 or self.shape[0] * self.shape[1] * self.shape[2] * self.g.element_size() > _KEPT_BYTES:
            return self._matrices().flatten(2)
        return self._kept

    @cached_property
    def _kept(self) -> Tensor:
        """The rows, where positions make them dear: once a Gram matrix has formed them, products use them too."""
        return self._matrices().flatten(2)

    def _formed(self) -> bool:
        """Whether a product with the rows as they lie in memory is at hand and costs less than one by positions."""
        return "_kept" in self.__dict__ and self.shape[0] <= self.positions

    def scaled(self, factor: float | Tensor) -> LinearRows:
        return replace(self, g=self.g * factor)

    def joined(self, other: Rows) -> Rows:
        if not isinstance(other, LinearRows):
            return DenseRows(self.dense() + other.dense())
        if self.shape[1] != other.shape[1]:
            # One use saw other examples than the other (tokens that were picked): only sums have a meaning.
            return self.apart().stacked(other.apart())
        spans = (*(self.spans or (self.positions,)), *(other.spans or (other.positions,)))
        return LinearRows(torch.cat([self.a, other.a], 2), torch.cat([self.g, other.g], 3), spans)

    def stacked(self, other: Rows) -> Rows:
        if isinstance(other, LinearRows) and other.positions == self.positions:
            return replace(self, a=torch.cat([self.a, other.a], 1), g=torch.cat([self.g, other.g], 2), origin=())
        return DenseRows(torch.cat([self.dense(), other.dense()], 1))

    def folded(self, n: int) -> LinearRows:
        a, g = self.a.unflatten(1, (n, -1)).flatten(2, 3), self.g.unflatten(2, (n, -1)).flatten(3, 4)
        return LinearRows(a, g, origin=self.origin)

    def apart(self) -> LinearRows:
        """The same rows with every position as an example of its own."""
        return LinearRows(self.a.flatten(1, 2).unsqueeze(2), self.g.flatten(2, 3).unsqueeze(3))

    def largest(self) -> Tensor:
        return self.g.abs().amax((0, 1, 3, 4))

    def largest_by_position(self) -> Tensor:
        return self.g.abs().amax((0, 1, 4))

    def total(self) -> Tensor:
        return torch.einsum("kgnso,gnsi->kgoi", self.g, self.a).flatten(1)

    def squared_sum(self) -> Tensor:
        if self.positions == 1:
            g, a = self.g[:, :, :, 0], self.a[:, :, 0]
            return torch.einsum("gno,gni->goi", g.square().sum(0), a.square()).flatten()
        k, n, p = self.shape
        size = max(1, _CHUNK_BYTES // max(1, k * p * self.g.element_size()))
        total = self.g.new_zeros(p)
        for start in range(0, n, size):
            part = LinearRows(self.a[:, start : start + size], self.g[:, :, start : start + size])
            total += part.dense().square().sum((0, 1))
        return total

    def gram(self) -> Tensor:
        k, groups, n, s, out = self.g.shape
        if s == 1:
            inputs = gram(self.a[:, :, 0].mT)  # [groups, N, N]
            g = self.g[:, :, :, 0].permute(1, 0, 2, 3).reshape(groups, k * n, out)
            outputs = gram(g.mT)
            if groups == k == 1:
                return inputs[0] * outputs[0]
            outputs = outputs.reshape(groups, k, n, k, n)
            return torch.einsum("gnm,gknlm->knlm", inputs, outputs).reshape(k * n, k * n)
        fan_in = self.a.shape[-1]
        if n * s * s * (out + fan_in) < out * fan_in * (s + n):
            # Few positions: Σ_st (a_ns·a_mt)(g_ns·g_mt) costs less than the rows themselves.
            inputs = torch.einsum("gnsi,gmti->gnsmt", self.a, self.a)
            outputs = torch.einsum("kgnso,lgmto->gknslmt", self.g, self.g)
            return torch.einsum("gnsmt,gknslmt->knlm", inputs, outputs).reshape(k * n, k * n)
        return gram(self.dense().flatten(0, 1).mT)

    def matvec(self, v: Tensor) -> Tensor:
        k, groups, _, s, out = self.g.shape
        if self._formed():
            return super().matvec(v)
        if groups == s == 1:
            w = v.reshape(*v.shape[:-1], out, self.a.shape[-1])
            if k == 1 and v.ndim == 1:
                # The other way round the product has as many columns as there are examples: rarely an odd number.
                return torch.linalg.vecdot(product(w, self.a[0, :, 0].mT), self.g[0, 0, :, 0].mT, dim=0)
            pushed = product(self.a[0, :, 0], w.mT)  # [*batch, N, out]
            if k == 1:
                return torch.linalg.vecdot(pushed, self.g[0, 0, :, 0])
            return torch.einsum("...no,kno->...kn", pushed, self.g[:, 0, :, 0]).flatten(-2)
        w = v.reshape(*v.shape[:-1], groups, out, self.a.shape[-1])
        pushed = torch.einsum("...goi,gnsi->...gnso", w, self.a)
        return torch.einsum("...gnso,kgnso->...kn", pushed, self.g).flatten(-2)

    def rmatvec(self, u: Tensor) -> Tensor:
        k, groups, n, s, _ = self.g.shape
        if self._formed():
            return super().rmatvec(u)
        if groups == s == 1:
            return self._pulled(u).flatten(-2)
        u = u.reshape(*u.shape[:-1], k, n)
        weighted = torch.einsum("...kn,kgnso->...gnso", u, self.g)
        return torch.einsum("...gnso,gnsi->...goi", weighted, self.a).flatten(-3)

    def rmatvec_plus(self, u: Tensor, b: Tensor, out: Tensor) -> None:
        if self.a.shape[0] == self.positions == 1 and not self._formed():
            # The product may lie in padded storage: added from there, it is not copied first.
            width = self.a.shape[-1]
            torch.add(b.view(-1, width), self._pulled(u), out=out.view(-1, width))
        else:
            super().rmatvec_plus(u, b, out)

    def _pulled(self, u: Tensor) -> Tensor:
        """``Rᵀ u`` as matrices ``[*batch, out, in]``, where there is one group and one position."""
        k, _, n, _, _ = self.g.shape
        weighted = torch.einsum("...kn,kno->...no", u.reshape(*u.shape[:-1], k, n), self.g[:, 0, :, 0])
        return product(weighted.mT, self.a[0, :, 0])


@dataclass(frozen=True)
class EmbeddingRows(Rows):
    """Rows of an embedding table ``[vocabulary, width]``: ``r_kn = vec Σ_s onehot(index_ns) g_knsᵀ``.

    Args:
        index: token indices ``[N, S]``.
        g: output gradients ``[K, N, S, width]``.
        vocabulary: number of table rows.
        padding: index whose tokens are no examples (their ``g`` is zero); None where there is none.
        spans: lengths of the parts of S that stem from different uses of the layer; empty for a single use.
    """

    index: Tensor
    g: Tensor
    vocabulary: int
    padding: int | None = None
    spans: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        return self.index.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        k, n, _, width = self.g.shape
        return k, n, self.vocabulary * width

    def dense(self) -> Tensor:
        k, n, s, width = self.g.shape
        rows = self.g.new_zeros(k, n, self.vocabulary, width)
        index = self.index[None, :, :, None].expand(k, n, s, width)
        return rows.scatter_add_(2, index, self.g).flatten(2)

    def scaled(self, factor: float | Tensor) -> EmbeddingRows:
        return replace(self, g=self.g * factor)

    def joined(self, other: Rows) -> Rows:
        if not isinstance(other, EmbeddingRows):
            return DenseRows(self.dense() + other.dense())
        if self.shape[1] != other.shape[1]:
            return self.apart().stacked(other.apart())
        index, g = torch.cat([self.index, other.index], 1), torch.cat([self.g, other.g], 2)
        spans = (*(self.spans or (self.positions,)), *(other.spans or (other.positions,)))
        padding = self.padding if self.padding == other.padding else None  # of one table only: no token is none
        return replace(self, index=index, g=g, spans=spans, padding=padding)

    def stacked(self, other: Rows) -> Rows:
        if isinstance(other, EmbeddingRows) and other.index.shape[1] == self.index.shape[1]:
            index, g = torch.cat([self.index, other.index], 0), torch.cat([self.g, other.g], 1)
            return replace(self, index=index, g=g)
        return DenseRows(torch.cat([self.dense(), other.dense()], 1))

    def folded(self, n: int) -> EmbeddingRows:
        return replace(self, index=self.index.reshape(n, -1), g=self.g.unflatten(1, (n, -1)).flatten(2, 3))

    def apart(self) -> EmbeddingRows:
        """The same rows with every position as an example of its own."""
        return replace(self, index=self.index.reshape(-1, 1), g=self.g.flatten(1, 2).unsqueeze(2), spans=())

    def largest(self) -> Tensor:
        return self.g.abs().amax((0, 2, 3))

    def largest_by_position(self) -> Tensor:
        return self.g.abs().amax((0, 3))

    def total(self) -> Tensor:
        k, _, _, width = self.g.shape
        out = self.g.new_zeros(k, self.vocabulary, width)
        return out.index_add_(1, self.index.flatten(), self.g.flatten(1, 2)).flatten(1)

    def gram(self) -> Tensor:
        k, n = self.g.shape[:2]
        same = (self.index[:, :, None, None] == self.index[None, None]).to(self.g.dtype)  # [N, S, N, S]
        products = torch.einsum("knsw,lmtw->knslmt", self.g, self.g)
        return torch.einsum("nsmt,knslmt->knlm", same, products).reshape(k * n, k * n)

    def matvec(self, v: Tensor) -> Tensor:
        table = v.reshape(*v.shape[:-1], self.vocabulary, -1)
        return torch.einsum("...nsw,knsw->...kn", table[..., self.index, :], self.g).flatten(-2)

    def rmatvec(self, u: Tensor) -> Tensor:
        k, n, _, width = self.g.shape
        weighted = torch.einsum("...kn,knsw->...nsw", u.reshape(*u.shape[:-1], k, n), self.g)
        out = weighted.new_zeros(*u.shape[:-1], self.vocabulary, width)
        return out.index_add_(-2, self.index.flatten(), weighted.flatten(-3, -2)).flatten(-2)


def with_ones(a: Tensor, weight: bool, bias: bool) -> Tensor:
    """``a`` with the homogeneous coordinate that carries a trainable bias; only it where the weight is frozen."""
    if not bias:
        return a
    ones = a.new_ones(*a.shape[:-1], 1)
    return torch.cat([a, ones], dim=-1) if weight else ones


def scale_shift_rows(z: Tensor, g: Tensor, trainable: tuple[str, ...]) -> DenseRows:
    """Rows of a norm layer's scale and shift: ``Σ_s g_s ⊙ z_s`` and ``Σ_s g_s``, at most ``2C`` numbers an example.

    Args:
        z: normalised inputs ``[N, S, C]``.
        g: output gradients ``[K, N, S, C]``.
        trainable: which of ``weight`` and ``bias`` require a gradient.
    """
    parts = []
    if "weight" in trainable:
        parts.append(torch.einsum("knsc,nsc->knc", g, z))
    if "bias" in trainable:
        parts.append(g.sum(2))
    return DenseRows(torch.cat(parts, -1))
