"""Iterative methods as pure functions of an action v -> A v; vectors lie on the last axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, ConvergenceError, NonFiniteError, ShapeError
from natgrad.linalg.operator import SolveReport
from natgrad.linalg.psd import symmetrise, working_dtype

Action = Callable[[Tensor], Tensor]

# On an accelerator the stopping test is read back every so many iterations; finished vectors are frozen meanwhile.
_CHECK_EVERY = 8


def conjugate_gradient(
    matvec: Action,
    b: Tensor,
    *,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
    preconditioner: Action | None = None,
    strict: bool = False,
) -> tuple[Tensor, SolveReport]:
    """Solve A x = b for symmetric positive (semi)definite A, starting at zero; ``b [*batch, n]`` vector by vector.

    Stops when ‖r‖ <= max(tolerance, eps) ‖b‖ (r as updated by the recurrence), after ``max_iterations`` (default 10 n),
    or where a search direction has zero or negative curvature, which returns the last iterate and says so in
    ``report.note``. Multiplying A or b by a constant does not change the iterates but for that constant.

    ``preconditioner`` is the action of a symmetric positive definite approximation of A⁻¹. ``strict`` makes missing the
    tolerance a ConvergenceError; a non-finite residual always is one. Hestenes & Stiefel 1952.
    """
    if not 0.0 <= tolerance < 1.0:
        raise ArgumentError(f"tolerance is relative to ‖b‖ and must lie in [0, 1), but is {tolerance}.")
    n = b.shape[-1]
    limit = 10 * n if max_iterations is None else max_iterations
    target = max(tolerance, torch.finfo(b.dtype).eps)
    every = 1 if b.device.type == "cpu" else _CHECK_EVERY

    scale = _norm(b)
    unit = torch.where(scale > 0, scale, 1.0)
    residual = b / unit
    x = torch.zeros_like(b)
    norm = torch.where(scale > 0, 1.0, scale)  # zero for b = 0, NaN for a b that is not finite
    z = residual if preconditioner is None else preconditioner(residual)
    direction, rho = z, _dot(residual, z)
    active = norm > target
    curved = torch.ones_like(active)
    iterations = 0
    while iterations < limit and (iterations % every or bool(active.any())):
        image = matvec(direction)
        curvature = _dot(direction, image)
        smallest = torch.finfo(b.dtype).eps * _norm(direction) * _norm(image)
        # The comparison is false for NaN, which then shows up in the residual.
        flat = active & ((curvature <= smallest) | (rho <= 0))
        curved = curved & ~flat
        active = active & ~flat
        alpha = torch.where(active, rho / torch.where(active, curvature, 1.0), 0.0)
        x = x + alpha * direction
        residual = residual - alpha * image
        z = residual if preconditioner is None else preconditioner(residual)
        rho_next = _dot(residual, z)
        beta = torch.where(active, rho_next / torch.where(active, rho, 1.0), 0.0)
        direction = z + beta * direction
        rho = torch.where(active, rho_next, rho)
        norm = torch.where(active, _norm(residual), norm)
        active = active & ~(norm <= target)
        iterations += 1
        if iterations % every == 0 and not bool(torch.isfinite(norm).all()):
            break
    return x * unit, _cg_report(norm, curved, iterations, target, strict)


def _cg_report(norm: Tensor, curved: Tensor, iterations: int, target: float, strict: bool) -> SolveReport:
    worst = float(norm.max()) if norm.numel() else 0.0
    if not bool(torch.isfinite(norm).all()):
        raise ConvergenceError(
            f"Conjugate gradients: the residual became non-finite after {iterations} iterations. The operator, the "
            "preconditioner or the right-hand side holds NaN or infinity, or overflows in this dtype."
        )
    note = ""
    if not bool(curved.all()):
        count = int((~curved).sum())
        note = f"stopped at zero or negative curvature for {count} of {curved.numel()} vectors"
    elif worst > target:
        note = "stopped at the iteration limit"
    if strict and worst > target:
        raise ConvergenceError(
            f"Conjugate gradients reached a relative residual of {worst:.3g} after {iterations} iterations, not the "
            f"{target:.3g} asked for{f' ({note})' if note else ''}. Use more damping, a preconditioner, more "
            "iterations or a looser tolerance."
        )
    return SolveReport("cg", iterations=iterations, residual=worst, note=note)


def lanczos(matvec: Action, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lanczos tridiagonalisation with full reorthogonalisation.

    ``start [*batch, n]`` need not be normalised. Returns alphas ``[*batch, k]`` (diagonal), betas ``[*batch, k-1]``
    (off diagonal) and the orthonormal basis ``[*batch, k, n]`` (rows) with k = min(steps, n). Where an invariant
    subspace is found early, the remaining alphas, betas and basis vectors are zero. Golub & Van Loan, section 10.1.
    """
    n = start.shape[-1]
    if steps < 1:
        raise ArgumentError(f"lanczos needs steps >= 1, but got {steps}.")
    k = min(steps, n)
    norm = _norm(start)
    if not bool((torch.isfinite(norm) & (norm > 0)).all()):
        raise NonFiniteError("lanczos needs finite, non-zero start vectors.")
    vector = start / norm
    basis = [vector]
    alphas, betas = [], []
    largest = torch.zeros_like(norm)
    for step in range(k):
        image = matvec(vector)
        alpha = _dot(vector, image)
        alphas.append(alpha)
        if step == k - 1:
            break
        done = torch.stack(basis, dim=-2)
        for _ in range(2):  # twice is enough (Kahan)
            image = image - (done.mT @ (done @ image[..., None]))[..., 0]
        beta = _norm(image)
        largest = torch.maximum(largest, alpha.abs() + beta)
        alive = beta > 10 * n**0.5 * torch.finfo(start.dtype).eps * largest
        beta = torch.where(alive, beta, 0.0)
        vector = torch.where(alive, image / torch.where(alive, beta, 1.0), 0.0)
        betas.append(beta)
        basis.append(vector)
    off = torch.cat(betas, dim=-1) if betas else start.new_zeros(*start.shape[:-1], 0)
    return torch.cat(alphas, dim=-1), off, torch.stack(basis, dim=-2)


def tridiagonal(alphas: Tensor, betas: Tensor) -> Tensor:
    """The symmetric tridiagonal matrix ``[*batch, k, k]`` of ``lanczos``."""
    return torch.diag_embed(alphas) + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)


def newton_schulz_inverse(
    matrix: Tensor, *, tolerance: float | None = None, max_iterations: int = 100
) -> tuple[Tensor, SolveReport]:
    """A⁻¹ of symmetric positive definite ``matrix [*batch, n, n]`` by X ← X (2I − A X): matrix products only.

    Starts at X = I / c with c >= λ_max (the largest absolute row sum), so that ‖I − A X‖₂ < 1 and convergence is
    quadratic once the smallest eigenvalue is reached, after about log₂ of the condition number iterations. Stops when
    ‖I − A X‖_F <= ``tolerance`` √n (default √eps of the dtype) and one further step has polished the result, or when
    rounding lets it shrink no more. Raises ConvergenceError where the tolerance is not met. Schulz 1933.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ShapeError(f"A square matrix [*batch, n, n] is needed, but got shape {tuple(matrix.shape)}.")
    a = matrix.to(working_dtype(matrix.dtype))
    n = a.shape[-1]
    eps = torch.finfo(a.dtype).eps
    target = eps**0.5 if tolerance is None else tolerance
    bound = a.abs().sum(-1).amax(-1)[..., None, None]
    identity = torch.eye(n, dtype=a.dtype, device=a.device)
    a = a / bound
    x = identity.expand_as(a)
    best = float("inf")
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        defect = identity - a @ x
        residual = float(torch.linalg.matrix_norm(defect).max()) / n**0.5
        if not residual < 4.0:  # diverged, or NaN
            best = residual
            break
        # ‖·‖_F < ½ bounds the spectral norm, so that each step must square it: if not, rounding has taken over.
        if best * n**0.5 < 0.5 and residual > 0.5 * best:
            best = min(best, residual)
            break
        best = residual
        x = x + x @ defect
        if residual <= eps:
            break
    if not best <= target:
        raise ConvergenceError(
            f"Newton–Schulz inversion of shape {tuple(matrix.shape)} ended with ‖I − A X‖ = {best:.3g} after "
            f"{iterations} iterations (tolerance {target:.3g}). The matrix is indefinite, not finite or too "
            f"ill-conditioned for {a.dtype}: use more damping, more iterations, or Cholesky."
        )
    return symmetrise(x) / bound, SolveReport("newton_schulz", iterations=iterations, residual=best)


def power_iteration(
    matvec: Action, start: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 1000
) -> tuple[Tensor, Tensor]:
    """The eigenvalue of largest magnitude and its unit eigenvector, by repeated application of a symmetric A.

    ``start [*batch, n]``. Stops when ‖A v − λ v‖ <= tolerance |λ| or after ``max_iterations``; the Rayleigh quotient λ
    ``[*batch]`` is then a lower bound of λ_max for a positive semidefinite A.
    """
    vector = start / _norm(start)
    value = torch.zeros_like(_norm(start))
    for _ in range(max_iterations):
        image = matvec(vector)
        value = _dot(vector, image)
        size = _norm(image)
        settled = _norm(image - value * vector) <= tolerance * value.abs()
        if bool((settled | (size == 0)).all()):
            break
        vector = torch.where(size > 0, image / torch.where(size > 0, size, 1.0), vector)
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError("power_iteration: the operator or the start vector holds NaN or infinity, or is zero.")
    return value[..., 0], vector


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[..., None]


def _norm(v: Tensor) -> Tensor:
    """‖v‖ over the last axis (kept), safe from overflow and underflow of the squares."""
    peak = v.abs().amax(-1, keepdim=True) if v.shape[-1] else v.new_zeros(*v.shape[:-1], 1)
    safe = torch.where(peak > 0, peak, 1.0)
    return peak * torch.linalg.vector_norm(v / safe, dim=-1, keepdim=True)
