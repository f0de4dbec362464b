"""A symmetric matrix on an orthonormal basis: all its eigenvectors, or the Ritz vectors in a Krylov space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.linalg import LinearOperator, lanczos, safe_eigh, tridiagonal


@dataclass(frozen=True)
class Subspace:
    """A and a vector g on an orthonormal basis q_j of eigenvectors, or of Ritz vectors in the Krylov space of g.

    Attributes:
        values: θ_j, ``[k]``, ascending.
        vectors: q_j, ``[k, n]``.
        coefficients: q_jᵀg, ``[k]``.
        complete: whether the basis spans an invariant subspace that holds g.
    """

    values: Tensor
    vectors: Tensor
    coefficients: Tensor
    complete: bool

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ_j function(θ_j) (q_jᵀg) q_j ≈ function(A) g."""
        return (function(self.values) * self.coefficients) @ self.vectors

    def negative_share(self, tolerance: float) -> tuple[float, tuple[float, float]]:
        """Share of ‖g‖² on θ_j < −tolerance, and an interval that holds the share of the whole matrix.

        The weights of a Gauss quadrature up to node i bound its measure from both sides (Golub & Meurant 2010, §2.5).
        """
        weights = self.coefficients.square()
        weights = weights / weights.sum()
        below = int((self.values < -tolerance).sum())
        share = float(weights[:below].sum())
        if self.complete:
            return share, (share, share)
        return share, (float(weights[: max(below - 1, 0)].sum()), float(weights[: below + 1].sum()))


def whole_space(a: LinearOperator, g: Tensor) -> Subspace:
    """All eigenvectors of the dense matrix, in double precision where the device has it."""
    dense = a.to_dense()
    values, vectors = safe_eigh(dense if dense.device.type == "mps" else dense.double())
    return Subspace(values, vectors.mT, vectors.mT @ g.to(values.dtype), True)


def krylov_space(a: LinearOperator, g: Tensor, steps: int) -> Subspace:
    """Ritz vectors of ``steps`` Lanczos steps from g."""
    start = g / g.abs().max() if bool((g != 0).any()) else torch.ones_like(g)
    alphas, betas, basis = lanczos(lambda v: a.matvec(v).to(v.dtype), start, steps)
    stopped = (betas == 0).nonzero()
    k = int(stopped[0, 0]) + 1 if len(stopped) else len(alphas)  # an invariant subspace: the rest is padding
    values, vectors = safe_eigh(tridiagonal(alphas[:k], betas[: k - 1]))
    ritz = vectors.mT @ basis[:k]
    return Subspace(values, ritz, ritz @ g, k < steps or k == len(g))
