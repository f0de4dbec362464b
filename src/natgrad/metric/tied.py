"""Kronecker factors of a matrix that is a table of embeddings and the weight of an output head at once.

Every use contributes products of two vectors, one over the vocabulary and one over the width: ``onehot(token)`` and
the gradient of the embedding; the gradient of the logits and the input of the head. With pairs ``(l, r)`` of all uses,
columns, examples and positions (aggregated first for reduce) the block is ``(1/M) Σ llᵀ ⊗ rrᵀ``, whose approximation

    diag(Σ |r|² l∘l) / M  ⊗  (Σ |l|² rrᵀ) / (Σ |l|²|r|²)

has the same partial traces (over the vocabulary only its diagonal, so that nothing of size V × V is formed), and its
trace. One-hot vectors and gradients have different units; products of both sides do not, which is why uses add up here
and not factor by factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from natgrad.metric.statistics import Moment
from natgrad.metric.widths import WidthLimits
from natgrad.network import EmbeddingRows, LinearRows, TiedRows

Weights = Callable[[int, tuple[int, ...]], "Tensor | None"]
"""From a number of examples and the spans of uses to weights ``[N, S]`` of positions; None where all count alike."""


def tied_moments(rows: TiedRows, sharing: str, weights: Weights, widths: WidthLimits) -> dict[str, Moment]:
    """Sums over one chunk of columns: ``input`` over the vocabulary ``[V]``, ``output`` over the width."""
    vocabulary = trace = None
    width: dict[str, Tensor] = {}
    for part in rows.parts:
        n, spans = part.shape[1], part.spans or (part.positions,)
        shares = _shares(weights(n, spans), part) if sharing == "reduce" else None
        if isinstance(part, EmbeddingRows):
            left, right, weighted, size = _table(part, shares)
        else:
            a, g = part.a[0], part.g[:, 0]
            if shares is not None:
                a, g = (shares[..., None] * a).sum(1, keepdim=True), g.sum(2, keepdim=True)
            a2, g2 = a.square().sum(-1), g.square().sum(-1)
            left = torch.einsum("knsv,ns->v", g.square(), a2)
            right = a.flatten(0, 1)
            weighted = right * g2.sum(0).reshape(-1, 1)
            size = (a2 * g2).sum()
        vocabulary = left if vocabulary is None else vocabulary + left
        found = widths.second_moments("output", right, weighted)
        width = {kind: t + width[kind] if kind in width else t for kind, t in found.items()}
        trace = size if trace is None else trace + size
    assert vocabulary is not None
    return {"input": Moment(vocabulary)} | {kind: Moment(t, trace) for kind, t in width.items()}


def _table(part: EmbeddingRows, shares: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Vocabulary side, vectors of the width's side and these as they are weighted, and the trace."""
    g, index = part.g, part.index
    if shares is None:
        g2 = g.square().sum(-1)
        left = g.new_zeros(part.vocabulary).index_add_(0, index.flatten(), g2.sum(0).flatten())
        return left, g.flatten(0, 2), None, g2.sum()
    g = g.sum(2)
    mean = g.new_zeros(len(index), part.vocabulary).scatter_add_(1, index, shares)
    g2, l2 = g.square().sum(-1), mean.square().sum(-1)
    left = torch.einsum("nv,kn->v", mean.square(), g2)
    flat = g.flatten(0, 1)
    return left, flat, flat * l2.expand(g2.shape).reshape(-1, 1), (g2 * l2).sum()


def _shares(weights: Tensor | None, part: EmbeddingRows | LinearRows) -> Tensor:
    """What every position counts in the mean over positions, ``[N, S]``; tokens that are padding count nothing."""
    weights = part.g.new_ones(part.shape[1], part.positions) if weights is None else weights
    if isinstance(part, EmbeddingRows) and part.padding is not None:
        weights = weights * (part.index != part.padding)
    return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
