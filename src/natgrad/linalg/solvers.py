"""Ways to obtain (A + λI)⁻¹ as an operator. Each solver is a frozen value, called with an operator and a damping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, NotPositiveDefiniteError, UnsupportedError
from natgrad.linalg.basic import DenseMatrix
from natgrad.linalg.factored import CholeskyInverse, EigenMatrix, LUInverse
from natgrad.linalg.iterations import conjugate_gradient, newton_schulz_inverse
from natgrad.linalg.operator import Inverse, LinearOperator, SolveReport, check_damping
from natgrad.linalg.psd import add_diagonal, safe_cholesky, safe_eigh, working_dtype

# Above this size a dense factorisation is refused: 20 000² float32 numbers are 1.6 GB, and work grows with the cube.
MAX_DENSE = 20_000


@runtime_checkable
class Solver(Protocol):
    """Anything that turns an operator and a damping into the inverse of A + damping I."""

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse: ...


@dataclass(frozen=True)
class Cholesky:
    """Cholesky factorisation with the failure ladder of ``safe_cholesky``; the default for dense positive matrices.

    Structures with an exact factored inverse (diagonal, Kronecker, block diagonal) use it and are not made dense.
    """

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        damping = check_damping(damping)
        structured = operator._structured_inverse(damping, self)
        if structured is not None:
            return structured
        factor, jitter = safe_cholesky(dense_symmetric(operator, "Cholesky"), damping)
        return Inverse(CholeskyInverse(factor), SolveReport("cholesky", jitter=jitter))


@dataclass(frozen=True)
class Eigh:
    """Eigendecomposition; about ten times the cost of Cholesky, but it also serves singular matrices.

    Eigenvalues of A + λI below ``floor`` times the largest are raised to it. ``floor=None`` raises only what rounding
    spoils (eps times the largest) and refuses a matrix with materially negative eigenvalues; an explicit one takes it.
    """

    floor: float | None = None

    def __post_init__(self) -> None:
        if self.floor is not None and not 0.0 < self.floor < 1.0:
            raise ArgumentError(f"floor is relative to the largest eigenvalue and must be in (0, 1), got {self.floor}.")

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        damping = check_damping(damping)
        if self.floor is None:
            structured = operator._structured_inverse(damping, self)
            if structured is not None:
                return structured
        values, basis = safe_eigh(dense_symmetric(operator, "Eigh"))
        if self.floor is None:
            return EigenMatrix(basis, values).inverse(damping=damping)
        damped = values + damping
        lowest = self.floor * damped.max()
        if not bool(lowest > 0):
            raise NotPositiveDefiniteError(
                f"Eigh: the largest eigenvalue (with damping {float(damping):.3g} added) is {float(damped.max()):.3g}, "
                "so that no floor relative to it is positive. The matrix is zero or negative: use damping."
            )
        raised = torch.maximum(damped, lowest)
        return Inverse(EigenMatrix(basis, 1.0 / raised), SolveReport("eigh", jitter=(raised - damped).max()))


@dataclass(frozen=True)
class LU:
    """LU factorisation, for square matrices that are not symmetric."""

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        damping = check_damping(damping)
        structured = operator._structured_inverse(damping, self)
        if structured is not None:
            return structured
        _guard(operator, "LU")
        dense = operator.to_dense()
        matrix = add_diagonal(dense.to(working_dtype(dense.dtype)), damping)
        factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
        if int(info) != 0 or not bool(torch.isfinite(factors).all()):
            raise NotPositiveDefiniteError(
                f"LU: the matrix of shape {operator.shape} is singular or not finite (info {int(info)}). Use damping."
            )
        return Inverse(LUInverse(factors, pivots), SolveReport("lu"))


@dataclass(frozen=True)
class CG:
    """Conjugate gradients: needs only products with A. See ``conjugate_gradient`` for the stopping rule.

    ``tolerance`` is relative to ‖b‖; ``preconditioner`` acts as an approximate inverse of A + λI; ``strict`` makes a
    missed tolerance an error. ``report`` of the result is that of its latest solve.
    """

    tolerance: float = 1e-10
    max_iterations: int | None = None
    preconditioner: LinearOperator | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.tolerance < 1.0:
            raise ArgumentError(f"tolerance is relative to ‖b‖ and must lie in [0, 1), but is {self.tolerance}.")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ArgumentError(f"max_iterations must be at least 1, but is {self.max_iterations}.")

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        return Inverse(CGInverse(operator, check_damping(damping), self), SolveReport("cg"))


class CGInverse(LinearOperator):
    """(A + λI)⁻¹ acting by conjugate gradients; ``latest`` reports the most recent solve."""

    def __init__(self, operator: LinearOperator, damping: float | Tensor, solver: CG) -> None:
        if not operator.symmetric:
            raise ArgumentError(f"CG needs a symmetric operator, but {operator!r} is not. Use LU().")
        super().__init__(operator.shape, working_dtype(operator.dtype), operator.device, symmetric=True)
        self.operator = operator
        self.damping = damping
        self.solver = solver
        self.latest: SolveReport | None = None

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        preconditioner = self.solver.preconditioner
        x, self.latest = conjugate_gradient(
            self._damped,
            v,
            tolerance=self.solver.tolerance,
            max_iterations=self.solver.max_iterations,
            preconditioner=None if preconditioner is None else preconditioner.matvec,
            strict=self.solver.strict,
        )
        return x

    def _damped(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v).to(v.dtype) + self.damping * v

    def logdet(self, *, damping: object = 0.0, solver: Solver | None = None) -> Tensor:
        raise UnsupportedError(
            "Conjugate gradients give no log-determinant. Use solver=Cholesky() where the matrix fits in memory, or "
            "natgrad.linalg.slq_logdet for a stochastic estimate."
        )


@dataclass(frozen=True)
class Woodbury:
    """The Woodbury identity, for low-rank matrices with or without a diagonal (and multiples of them)."""

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        structured = operator._structured_inverse(check_damping(damping), self)
        if structured is None:
            raise UnsupportedError(
                f"Woodbury needs a LowRankMatrix (with or without a diagonal), but got {operator!r}. "
                "Use solver=None for the operator's own method."
            )
        return structured


@dataclass(frozen=True)
class NewtonSchulz:
    """Newton–Schulz iteration on the dense matrix: only matrix products, for devices where factorisations are slow.

    ``tolerance`` bounds ‖I − A X‖_F / √n (default √eps of the dtype). See ``newton_schulz_inverse``.
    """

    tolerance: float | None = None
    max_iterations: int = 100

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        damping = check_damping(damping)
        dense = dense_symmetric(operator, "NewtonSchulz")
        matrix = add_diagonal(dense.to(working_dtype(dense.dtype)), damping)
        inverse, report = newton_schulz_inverse(matrix, tolerance=self.tolerance, max_iterations=self.max_iterations)
        return Inverse(DenseMatrix(inverse, symmetric=True), report)


def dense_symmetric(operator: LinearOperator, method: str) -> Tensor:
    """The dense matrix of a symmetric operator of bearable size."""
    if not operator.symmetric:
        raise ArgumentError(f"{method} needs a symmetric operator, but {operator!r} is not. Use LU().")
    _guard(operator, method)
    return operator.to_dense()


def _guard(operator: LinearOperator, method: str) -> None:
    n = operator._require_square(method)
    if n > MAX_DENSE:
        raise ArgumentError(
            f"{method} would make an operator of size {n} dense ({n * n * 4 / 1e9:.1f} GB in float32; the limit is "
            f"{MAX_DENSE}). Use solver=CG(), or a structured matrix (Kronecker, low rank, block diagonal)."
        )
