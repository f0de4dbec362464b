"""Eigenbases of a layer's Kronecker factors, and the second moments of its gradient along them (George et al. 2018).

Second moments are sums over examples only in a basis that all examples share. Where a layer has none yet, the rows of
all parts of a batch (micro-batches, processes) are kept until the factors of the whole are known::

    A = Σ_parts A_part,   G = Σ_parts G_part,   A = U_A D U_Aᵀ,   G = U_G D' U_Gᵀ,   s = Σ_parts Σ_kn (U_Gᵀ r_kn U_A)²
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from natgrad.linalg.psd import safe_eigh
from natgrad.metric.statistics import Bases, Basis, Moment, Moments
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
    kinds = moments.values[name]
    return eigenbasis(kinds["input"].mean(moments.normaliser), kinds["output"].mean(moments.normaliser))


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
    left, right = basis
    assert right is not None
    outputs = moments.values[name]["input"].sum.shape[0] if left is None else left.shape[-1]
    return right.new_zeros(*right.shape[:-2], outputs, right.shape[-1])


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
    rotation between them; its trace stays what it was.
    """
    (old_left, old_right), (left, right) = old, new
    if left is not None and old_left is not None:
        eigenvalues = (left.mT @ old_left).square() @ eigenvalues
    if right is not None and old_right is not None:
        eigenvalues = eigenvalues @ (right.mT @ old_right).square().mT
    return eigenvalues


def eigenbasis(inputs: Tensor, outputs: Tensor) -> Basis:
    """Eigenbases ``(left, right)`` in the order of the layer's Kronecker product."""
    output_basis = safe_eigh(outputs)[1]
    if inputs.dim() == 1:
        return None, output_basis
    input_basis = safe_eigh(inputs)[1]
    if inputs.shape[0] == 1:
        return output_basis[0], input_basis[0]
    return output_basis, input_basis


def squares_in_basis(rows: Rows, basis: Basis) -> Tensor:
    """``Σ_kn (U_leftᵀ r_kn U_right)²``, shape ``[*stack, p, q]``."""
    left, right = basis
    if isinstance(rows, LinearRows):
        assert left is not None and right is not None
        stack = left.dim() == 3
        a, g = rows.a @ right[..., None, :, :] if stack else rows.a @ right, rows.g
        g = g @ left[:, None] if stack else g @ left
        rotated = LinearRows(a, g)
        k, groups, _, _, out = g.shape
        squares = rotated.squared_sum().reshape(groups, out, a.shape[-1])
        return squares if stack else squares[0]
    if isinstance(rows, TiedRows):
        assert right is not None
        turned = tuple(
            replace(use, a=use.a @ right) if isinstance(use, LinearRows) else replace(use, g=use.g @ right)
            for use in rows.parts
        )
        return TiedRows(turned).squared_sum().unflatten(0, (-1, right.shape[-1]))
    assert isinstance(rows, EmbeddingRows) and right is not None
    k, n, p = rows.shape
    size = max(1, _CHUNK_BYTES // max(1, k * p * rows.g.element_size()))
    total = rows.g.new_zeros(rows.vocabulary, right.shape[-1])
    for start in range(0, n, size):
        part = EmbeddingRows(rows.index[start : start + size], rows.g[:, start : start + size] @ right, rows.vocabulary)
        total += part.dense().square().sum((0, 1)).reshape(total.shape)
    return total
