"""Orthonormal bases that follow a slowly changing symmetric matrix: one step of orthogonal iteration by CholeskyQR."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.linalg.products import gram

# Of ‖C − I‖_F, C the Gram matrix of unit columns: up to the first its condition is at most 3 and one pass is exact to
# rounding; a first pass that leaves more than the second has lost too many digits for another one to mend.
_ONE_PASS, _LOST = 0.5, 0.5
_NOT_A_BASIS = 1e-3


def cholesky_qr(y: Tensor) -> Tensor | None:
    """The orthonormal factor Q of ``y = Q R`` with R's diagonal positive, for ``y`` ``[n, n]``; None on a breakdown.

    Columns are scaled to norm 1, ``C = YᵀY = L Lᵀ``, ``Q = Y L⁻ᵀ``; once more where ``‖C − I‖`` is large (CholeskyQR2,
    Fukaya et al. 2014). It breaks down where a column is zero up to rounding, or where C is not positive definite in
    the precision at hand.
    """
    norms = torch.linalg.vector_norm(y, dim=0)
    floor = torch.finfo(y.dtype).eps * torch.linalg.vector_norm(norms)
    if not bool(((norms > floor) & torch.isfinite(norms)).all()):
        return None
    q, distance = _pass(y / norms)
    if q is None or not distance > _ONE_PASS:
        return q
    q, distance = _pass(q)
    return q if distance <= _LOST else None


def _pass(y: Tensor) -> tuple[Tensor | None, float]:
    """``Y L⁻ᵀ`` (None where there is no L), and ``‖YᵀY − I‖_F``."""
    c = gram(y)
    identity = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    factor, info = torch.linalg.cholesky_ex(c)
    if bool(info):
        return None, float("inf")
    q = torch.linalg.solve_triangular(factor, y.mT, upper=False).mT
    return q, float(torch.linalg.matrix_norm(c - identity))


def followed(matrix: Tensor, basis: Tensor, tolerance: float) -> Tensor | None:
    """An orthonormal basis nearer to the eigenvectors of ``matrix`` than ``basis``, both ``[n, n]``.

    ``Q ← qr(A Q)`` with the columns in descending order of their Rayleigh quotients ``ρ_i = q_iᵀ A q_i``, each kept at
    its place and with its sign. The residual is ``‖A Q − Q diag(ρ)‖_F``, which for orthonormal Q is the norm of what
    is off the diagonal of ``QᵀAQ``, and costs no product of its own.

    Args:
        matrix: A, symmetric positive semi-definite.
        basis: Q, orthonormal.
        tolerance: ``basis`` itself comes back where its residual is at most ``tolerance · ‖A‖_F``.

    Returns:
        The basis; None where it must be had otherwise: A is not finite, Q is not orthonormal, or a breakdown.
    """
    y = matrix @ basis
    rayleigh = (basis * y).sum(0)
    norm = torch.linalg.vector_norm
    residual, size = norm(y - basis * rayleigh), norm(matrix)
    lengths = (norm(basis, dim=0) - 1).abs().amax()
    if not bool(torch.isfinite(residual) & (lengths <= _NOT_A_BASIS) & ((norm(y) - size).abs() <= _NOT_A_BASIS * size)):
        return None
    if bool(residual <= tolerance * size):
        return basis
    order = rayleigh.argsort(descending=True, stable=True)
    found = cholesky_qr(y[:, order])
    return None if found is None else torch.empty_like(y).index_copy_(1, order, found)
