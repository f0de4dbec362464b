"""Eigenbases of a layer's Kronecker factors, and the second moments of its gradient along them (George et al. 2018).

Second moments are sums over examples only in a basis that all examples share. Where a layer has none yet, the rows of
all parts of a batch (micro-batches, processes) are kept until the factors of the whole are known::

    A = Σ_parts A_part,   G = Σ_parts G_part,   A = U_A D U_Aᵀ,   G = U_G D' U_Gᵀ,   s = Σ_parts Σ_kn (U_Gᵀ r_kn U_A)²
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from natgrad.linalg import BlockStacks, DiagonalMatrix
from natgrad.metric.bases import EighBases
from natgrad.metric.statistics import Bases, Basis, BasisSide, Moment, Moments
from natgrad.metric.widths import factor_of, is_table
from natgrad.network import EmbeddingRows, LinearRows, Rows, Tape, TiedRows

_CHUNK_BYTES = 64 * 2**20


def completed(moments: Moments) -> Moments:
    """The moments of a whole batch, with the eigenvalues of all blocks: where there is no basis it is found here.

    Raises:
        NonFiniteError: a factor is not finite.
    """
    return projected(moments, {name: new_basis(moments, name) for name in moments.rows})


def new_basis(moments: Moments, name: str) -> Basis:
    """The eigenbasis of a block's factors, as far as ``moments`` go."""
    kinds = moments.values[name].items()
    return eigenbasis({kind: m.mean(moments.normaliser) for kind, m in kinds if kind != "eigenvalues"})


def projected(moments: Moments, bases: Bases) -> Moments:
    """The eigenvalues, along ``bases``, of the rows that are kept for these blocks; rows of others stay kept."""
    values, rows = dict(moments.values), dict(moments.rows)
    for name in [name for name in rows if name in bases]:
        for part in rows.pop(name):
            squares, previous = squares_in_basis(part, bases[name]), values[name].get("eigenvalues")
            moment = Moment(squares if previous is None else previous.sum + squares)
            values[name] = {**values[name], "eigenvalues": moment}
    return Moments(values, moments.normaliser, moments.bases | bases, rows)


def no_eigenvalues(moments: Moments, name: str, basis: Basis) -> Tensor:
    """Zeros of the shape that a block's eigenvalues have."""
    kinds = {kind: m.sum for kind, m in moments.values[name].items()}
    left, right = factor_of(kinds, "output"), factor_of(kinds, "input")
    left, right = (right, left) if is_table(kinds) else (left, right)
    stack = left.shape[:-2] if isinstance(left, Tensor) else ()
    return kinds["input"].new_zeros(*stack, left.shape[-1], right.shape[-1])


def kept_rows(rows: Iterable[Any], tape: Tape) -> tuple[Rows, ...]:
    """The rows, no longer in memory that the tape's layers share with the model: it may be written before the step."""
    memory = {use.input.untyped_storage().data_ptr() for uses in tape.uses.values() for use in uses}

    def own(t: Tensor) -> Tensor:
        return t.clone() if t.untyped_storage().data_ptr() in memory else t

    def kept(part: Any) -> Any:
        if isinstance(part, TiedRows):
            return TiedRows(tuple(kept(use) for use in part.parts))
        return replace(part, a=own(part.a)) if isinstance(part, LinearRows) else replace(part, index=own(part.index))

    return tuple(kept(part) for part in rows)


def rotated_eigenvalues(eigenvalues: Tensor, old: Basis, new: Basis) -> Tensor:
    """Second moments ``s`` along the basis ``old``, carried over to the basis ``new``.

    A second moment that is diagonal in the old basis has the diagonal ``(Q∘Q) s`` in the new one, with ``Q`` the
    rotation between them; its trace stays what it was. A side whose basis is the same tensor costs nothing.
    """
    (old_left, old_right), (left, right) = old, new
    if left is not None and old_left is not None and left is not old_left:
        turn = (left.mT @ old_left).square()  # type: ignore[operator]
        eigenvalues = turn.premultiply(eigenvalues) if isinstance(turn, BlockStacks) else turn @ eigenvalues
    if right is not None and old_right is not None and right is not old_right:
        eigenvalues = _times(eigenvalues, (right.mT @ old_right).square().mT)  # type: ignore[operator]
    return eigenvalues


def eigenbasis(kinds: Mapping[str, Tensor], old: Basis = (None, None), how: EighBases = EighBases()) -> Basis:
    """Eigenbases ``(left, right)`` in the order of the layer's Kronecker product, from the means of its factors.

    Args:
        kinds: the means.
        old: the bases before, in the same order; a side that is kept is the same object.
        how: they are renewed.
    """
    sides = ("input", "output") if is_table(kinds) else ("output", "input")
    left, right = (_basis_of(factor_of(kinds, side), before, how) for side, before in zip(sides, old, strict=True))
    return left, right


def _basis_of(factor: Tensor | DiagonalMatrix | BlockStacks, old: BasisSide, how: EighBases) -> BasisSide:
    if isinstance(factor, DiagonalMatrix):
        return None
    if isinstance(factor, Tensor):
        return how.renewed(factor, old if isinstance(old, Tensor) else None)
    before = old.stacks if isinstance(old, BlockStacks) else (None,) * len(factor.stacks)
    new = tuple(how.renewed(f, q) for f, q in zip(factor.stacks, before, strict=True))
    return old if all(b is q for b, q in zip(new, before, strict=True)) else BlockStacks(new)


def _times(x: Tensor, basis: BasisSide) -> Tensor:
    """``x U``."""
    if basis is None:
        return x
    return basis.postmultiply(x) if isinstance(basis, BlockStacks) else x @ basis


def squares_in_basis(rows: Rows, basis: Basis) -> Tensor:
    """``Σ_kn (U_leftᵀ r_kn U_right)²``, shape ``[*stack, p, q]``."""
    left, right = basis
    if isinstance(rows, LinearRows):
        groups, out, fan_in = rows.g.shape[1], rows.g.shape[-1], rows.a.shape[-1]
        if groups > 1:
            assert isinstance(left, Tensor) and isinstance(right, Tensor)
            left, right = left[:, None], right[:, None]
        squares = LinearRows(_times(rows.a, right), _times(rows.g, left)).squared_sum().reshape(groups, out, fan_in)
        return squares if groups > 1 else squares[0]
    if isinstance(rows, TiedRows):
        sides = ["a" if isinstance(use, LinearRows) else "g" for use in rows.parts]
        turned = [replace(use, **{s: _times(getattr(use, s), right)}) for use, s in zip(rows.parts, sides, strict=True)]
        return TiedRows(tuple(turned)).squared_sum().unflatten(0, (-1, getattr(turned[0], sides[0]).shape[-1]))
    assert isinstance(rows, EmbeddingRows)
    k, n, p = rows.shape
    size = max(1, _CHUNK_BYTES // max(1, k * p * rows.g.element_size()))
    total = rows.g.new_zeros(rows.vocabulary, rows.g.shape[-1])
    for start in range(0, n, size):
        g = _times(rows.g[:, start : start + size], right)
        part = EmbeddingRows(rows.index[start : start + size], g, rows.vocabulary)
        total += part.dense().square().sum((0, 1)).reshape(total.shape)
    return total
