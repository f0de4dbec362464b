"""Elementwise formulas the likelihoods share, stable at extreme arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below this size of x the direct formula for e^x - 1 - x loses digits. Σ x^k/k! from k = 2 up to the given power is
# then exact to rounding, the first term left out being below its precision.
_SMALL = 0.1
_HIGHEST_POWER = {torch.float64: 10, torch.float32: 6}


def promote(f: Tensor) -> Tensor:
    """`f` in at least float32: half precision is upcast, float32 and float64 are left alone."""
    return f.float() if f.dtype in (torch.float16, torch.bfloat16) else f


def expm1_minus(x: Tensor) -> Tensor:
    """φ(x) = eˣ − 1 − x ≥ 0 without cancellation near 0, where φ(x) ≈ x²/2; differentiable twice everywhere."""
    small = x.abs() < _SMALL
    near = torch.where(small, x, 0.0)
    highest = _HIGHEST_POWER.get(x.dtype, 10)
    series = near / math.factorial(highest) + 1 / math.factorial(highest - 1)
    for k in range(highest - 2, 1, -1):
        series = series * near + 1 / math.factorial(k)
    return torch.where(small, near.square() * series, torch.expm1(x) - x)


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """q − p − p (log q − log p) ≥ 0, elementwise, for positive measures given by their logarithms.

    Summed over the outcomes of two normalised distributions this is KL(p ‖ q), because Σq − Σp = 0; for two rates it
    is the KL divergence of Poisson distributions. Every term is non-negative and of second order in log q − log p, so
    that small divergences keep their relative precision, which Σ p (log p − log q) does not. log p = −∞ is allowed
    (the term is q); log q = −∞ where p > 0 gives +∞.
    """
    p, q = log_p.exp(), log_q.exp()
    positive = p > 0
    d = torch.where(positive, log_q - log_p, 0.0)
    # p e^d would be 0 · ∞ for large d, where it is q itself; where p = 0 the difference below is q.
    far = (d > 1.0) | ~positive
    return torch.where(far, q - p - p * d, p * expm1_minus(d.clamp(max=1.0)))


def diagonal_columns(diagonal: Tensor) -> Tensor:
    """The C columns [C, *batch, C] of the matrix diag(diagonal), diagonal of shape [*batch, C]."""
    return torch.diag_embed(diagonal).movedim(-2, 0)
