"""Positive (semi)definite matrices: factorisations that survive rounding, and say so when they cannot.

The failure ladder of both factorisations: as given -> symmetrised, with a little more on the diagonal (x10 per rung)
-> float64 -> NotPositiveDefiniteError. A successful first try costs one host synchronisation and no extra work.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]

from natgrad.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError

# A pivot below this multiple of eps times its diagonal entry is rounding error: the matrix is numerically singular.
_LOST_PIVOT = 4.0
# Rungs of diagonal jitter, as multiples of the damping floor: first in the input's precision, then in float64.
_RUNGS = (1.0, 10.0, 100.0)
_RUNGS_FLOAT64 = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of factorisations: float32 for half precisions, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def symmetrise(matrix: Tensor) -> Tensor:
    """(A + Aᵀ) / 2 over the last two axes, ``[*batch, n, n]``."""
    return (matrix + matrix.mT) * 0.5


def damping_floor(matrix: Tensor, c: float = 1.0) -> Tensor:
    """c · eps · (an upper bound of λ_max): the smallest damping that rounding does not swallow; shape ``[*batch]``.

    The bound is the smaller of the largest absolute row sum and the Frobenius norm of ``matrix [*batch, n, n]``; eps is
    that of the working dtype.
    """
    matrix = matrix.to(working_dtype(matrix.dtype))
    if matrix.shape[-1] == 0:
        return matrix.new_zeros(matrix.shape[:-2])
    magnitude = matrix.abs()
    peak = magnitude.amax(dim=(-2, -1))
    # Scaled by the largest entry so that the squares neither overflow nor vanish.
    scaled = magnitude / torch.where(peak > 0, peak, 1.0)[..., None, None]
    bound = torch.minimum(scaled.sum(-1).amax(-1), torch.linalg.matrix_norm(scaled))
    return c * torch.finfo(matrix.dtype).eps * peak * bound


def add_diagonal(matrix: Tensor, shift: float | Tensor) -> Tensor:
    """A + shift I as a new tensor; ``shift`` is a number or a tensor that broadcasts over ``[*batch]``."""
    shifted = matrix.clone(memory_format=torch.contiguous_format)
    if isinstance(shift, Tensor):
        shift = shift.to(matrix.dtype).to(matrix.device)[..., None]
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    return shifted


def safe_cholesky(matrix: Tensor, damping: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor L of A + damping I + jitter I, and the jitter that was needed.

    ``matrix`` is ``[*batch, n, n]``, symmetric (the first try reads its lower triangle); ``damping`` is a number or a
    tensor ``[*batch]``. Returns L ``[*batch, n, n]`` and the jitter ``[*batch]``, zero where the first try succeeded.
    A factor with a pivot that is mere rounding error counts as failed, so that damping is in effect never below
    eps · λ_max. Half precision is upcast to float32.

    Raises NonFiniteError for NaN or infinity in ``matrix``; NotPositiveDefiniteError when every rung fails.
    """
    damped = _damped(matrix, damping)
    factor, good = _cholesky(damped)
    if bool(good.all()):
        return factor, damped.new_zeros(damped.shape[:-2])
    _require_finite(damped, "Cholesky factorisation")
    return _cholesky_ladder(damped, factor, good)


def safe_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[*batch, n]`` (ascending) and eigenvectors ``[*batch, n, n]`` of a symmetric ``[*batch, n, n]``.

    Climbs the same ladder as ``safe_cholesky``; a jitter is taken off the eigenvalues again. Half precision is upcast.
    Raises NonFiniteError for NaN or infinity in ``matrix``; NotPositiveDefiniteError when every rung fails.
    """
    work = _damped(matrix, 0.0)
    found = _eigh(work)
    if found is not None:
        return found
    _require_finite(work, "Eigendecomposition")
    floor = damping_floor(work)
    tries = [(work.dtype, rung) for rung in (0.0, *_RUNGS)] + [(torch.float64, rung) for rung in _RUNGS_FLOAT64]
    for dtype, rung in tries:
        jitter = (floor * rung).to(dtype)
        found = _eigh(add_diagonal(symmetrise(work.to(dtype)), jitter))
        if found is not None:
            values, vectors = found
            return (values - jitter[..., None]).to(work.dtype), vectors.to(work.dtype)
    raise NotPositiveDefiniteError(
        f"The eigendecomposition of a matrix of shape {tuple(matrix.shape)} did not converge, not even in float64 with "
        f"{float((floor * _RUNGS_FLOAT64[-1]).max()):.3g} added to the diagonal, although all its entries are finite "
        f"(largest magnitude {float(work.abs().max()):.3g}). Rescale the matrix or use Cholesky with damping."
    )


def damped_eigenvalues(eigenvalues: Tensor, damping: float | Tensor, dims: int = 1) -> tuple[Tensor, Tensor]:
    """e + damping, kept at or above eps · max(e + damping), and by how much at most a value was raised.

    ``dims`` trailing axes of ``eigenvalues`` belong to one matrix. Values that rounding made negative are raised; a
    materially negative one (beyond √eps of the largest) is an error. Costs one host synchronisation.
    """
    damped = eigenvalues + damping
    if damped.numel() == 0:
        return damped, damped.new_zeros(())
    axes = tuple(range(-dims, 0))
    top = damped.amax(dim=axes, keepdim=True)
    low = damped.amin(dim=axes, keepdim=True)
    eps = torch.finfo(damped.dtype).eps
    good = (top > 0) & torch.isfinite(top) & torch.isfinite(low) & (low >= -(eps**0.5) * top)
    if not bool(good.all()):
        _require_finite(damped, "Inversion through eigenvalues")
        raise NotPositiveDefiniteError(
            f"A matrix that must be positive definite has eigenvalues (with damping {float(damping):.3g} added) from "
            f"{float(low.min()):.3g} to {float(top.max()):.3g}. It is zero, or indefinite as a Hessian can be. "
            f"Use damping above {max(-float((low - damping).min()), 0.0):.3g}."
        )
    floored = torch.maximum(damped, eps * top)
    return floored, (floored - damped).max()


def _damped(matrix: Tensor, damping: float | Tensor) -> Tensor:
    """Check the shape, upcast half precision, add the damping."""
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ShapeError(f"A square matrix [*batch, n, n] is needed, but got shape {tuple(matrix.shape)}.")
    if not matrix.is_floating_point():
        raise ArgumentError(f"A floating point matrix is needed, but got dtype {matrix.dtype}.")
    matrix = matrix.to(working_dtype(matrix.dtype))
    if isinstance(damping, Tensor) or damping != 0.0:
        return add_diagonal(matrix, damping)
    return matrix


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """One try: the factor and which elements of the batch succeeded (no synchronisation)."""
    try:
        factor, info = torch.linalg.cholesky_ex(matrix, check_errors=False)
    except RuntimeError as error:
        if not _is_numerical(error):
            raise
        return torch.zeros_like(matrix), torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    least = matrix.diagonal(dim1=-2, dim2=-1) * (_LOST_PIVOT * torch.finfo(matrix.dtype).eps)
    # False for NaN, and for the infinite pivot of an infinite entry.
    return factor, (info == 0) & (pivots > least).all(-1)


def _cholesky_ladder(damped: Tensor, factor: Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
    """Retry the failed elements of the batch with growing jitter, then in float64."""
    floor = damping_floor(damped)
    jitter = torch.zeros_like(floor)
    tries = [(damped.dtype, rung) for rung in _RUNGS] + [(torch.float64, rung) for rung in _RUNGS_FLOAT64]
    for dtype, rung in tries:
        trial = floor * rung
        again, now_good = _cholesky(add_diagonal(symmetrise(damped.to(dtype)), trial.to(dtype)))
        rescued = now_good & ~good
        factor = torch.where(rescued[..., None, None], again.to(damped.dtype), factor)
        jitter = torch.where(rescued, trial, jitter)
        good = good | now_good
        if bool(good.all()):
            return factor, jitter
    raise NotPositiveDefiniteError(_cholesky_message(damped, floor * _RUNGS_FLOAT64[-1], good))


def _cholesky_message(damped: Tensor, tried: Tensor, good: Tensor) -> str:
    worst = "unknown"
    with contextlib.suppress(RuntimeError):  # the message is still useful without it
        worst = f"{float(torch.linalg.eigvalsh(symmetrise(damped.double())).min()):.3g}"
    failed = int((~good).sum())
    return (
        f"{failed} of {good.numel()} matrices of shape {tuple(damped.shape[-2:])} could not be Cholesky factorised, "
        f"not even in float64 with {float(tried.max()):.3g} added to the diagonal; the smallest eigenvalue (damping "
        f"included) is {worst}. The matrix is indefinite (a Hessian away from a minimum, an asymmetric or corrupted "
        "factor) or damping is far too small for it. Use more damping than the magnitude of that eigenvalue, or a "
        "positive semidefinite metric such as the Fisher, or solver=SaddleFree(), for magnitudes of eigenvalues."
    )


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """One try of eigh; None when it failed or gave non-finite numbers."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError as error:
        if not _is_numerical(error):
            raise
        return None
    good = torch.isfinite(values).all() & torch.isfinite(vectors).all()
    return (values, vectors) if bool(good) else None


def _is_numerical(error: RuntimeError) -> bool:
    """Whether a linear algebra back end gave up on the numbers (as opposed to running out of memory, say)."""
    if isinstance(error, LinAlgError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("cusolver", "magma", "rocsolver", "failed to converge"))


def _require_finite(matrix: Tensor, what: str) -> None:
    finite = torch.isfinite(matrix)
    if bool(finite.all()):
        return
    bad = int((~finite).sum())
    raise NonFiniteError(
        f"{what}: {bad} of {matrix.numel()} entries of a tensor of shape {tuple(matrix.shape)} are NaN or infinite. "
        "The usual cause is a loss or an activation that overflowed (check the learning rate, mixed precision, and the "
        "data); do not add such a batch to a running average."
    )
