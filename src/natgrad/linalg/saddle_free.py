"""The inverse of |A| + λI for an indefinite A: its eigenvectors, and the magnitudes of its eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, UnsupportedError
from natgrad.linalg.basic import DiagonalMatrix, IdentityMatrix
from natgrad.linalg.compose import BlockDiagonalMatrix, ScaledOperator
from natgrad.linalg.factored import EigenMatrix
from natgrad.linalg.iterations import lanczos, tridiagonal
from natgrad.linalg.kronecker import KroneckerEigen, KroneckerProduct
from natgrad.linalg.low_rank import LowRankMatrix
from natgrad.linalg.operator import Inverse, LinearOperator, SolveReport, check_damping
from natgrad.linalg.psd import damped_eigenvalues, safe_eigh, working_dtype
from natgrad.linalg.solvers import CG, dense_symmetric

if TYPE_CHECKING:
    from natgrad.linalg.solvers import Solver


@dataclass(frozen=True)
class SaddleFree:
    """(|A| + λI)⁻¹ for a symmetric A that may be indefinite, such as a Hessian; |A| = U |E| Uᵀ for A = U E Uᵀ.

    The inverse is positive definite, so that the direction always descends, and along negative curvature it leads away
    from a saddle point, where (A + λI)⁻¹ leads to it. On a positive semidefinite A it is (A + λI)⁻¹. Dauphin et al.
    2014.

    Diagonal matrices and those in an eigenbasis (Kronecker products, too) are served entry by entry, block-diagonal
    ones block by block, others by an eigendecomposition of the dense matrix. For an operator known only by its products
    the magnitudes are taken in the Krylov space of each right-hand side, as in that paper: exact where the space holds
    it, and what as many conjugate gradient iterations give where A + λI is positive definite.

    Args:
        steps: dimension of the Krylov space, for operators known only by their products.

    Raises:
        ArgumentError: ``steps`` below 1; an operator that is not symmetric, or too large to be made dense.
        NotPositiveDefiniteError: |A| + λI is zero.
    """

    steps: int = 64

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ArgumentError(f"SaddleFree: steps must be at least 1, but is {self.steps}.")

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        damping = check_damping(damping)
        if isinstance(operator, Inverse):
            operator = operator.operator
        if isinstance(operator, BlockDiagonalMatrix):
            return operator.inverse(damping=damping, solver=self)
        if isinstance(operator, ScaledOperator) and bool(operator.scale != 0):
            size = abs(operator.scale)  # |cA| + λI = |c| (|A| + λ/|c| I)
            inner = self(operator.operator, damping / size)
            return Inverse(inner.operator * (1.0 / size), inner.report)
        if not operator.symmetric:
            raise ArgumentError(
                f"SaddleFree needs a symmetric operator, but {operator!r} is not: |A| is made of its real eigenvalues."
            )
        if isinstance(operator, (IdentityMatrix, KroneckerProduct, LowRankMatrix)):
            return operator.inverse(damping=damping)  # positive semidefinite by what they are
        if isinstance(operator, DiagonalMatrix):
            return _inverse(operator.diag, DiagonalMatrix(operator.diag.abs()), damping)
        if isinstance(operator, KroneckerEigen):
            values, left, right = operator.eigenvalues, operator.left_basis, operator.right_basis
            return _inverse(values, KroneckerEigen(left, right, values.abs()), damping)
        if isinstance(operator, EigenMatrix):
            return _inverse(operator.eigenvalues, EigenMatrix(operator.basis, operator.eigenvalues.abs()), damping)
        if isinstance(operator.default_solver(), CG):
            return Inverse(KrylovInverse(operator, damping, self.steps), SolveReport("saddle-free Lanczos"))
        values, basis = safe_eigh(dense_symmetric(operator, "SaddleFree"))
        return _inverse(values, EigenMatrix(basis, values.abs()), damping)


def _inverse(values: Tensor, magnitudes: LinearOperator, damping: float | Tensor) -> Inverse:
    """The damped inverse of ``magnitudes``, |A|, for an A with eigenvalues ``values``."""
    inverse = magnitudes.inverse(damping=damping)
    return Inverse(inverse.operator, SolveReport("saddle-free", jitter=inverse.report.jitter, note=_note(values)))


def _note(values: Tensor) -> str:
    negative = int((values < 0).sum())
    return f"{negative} of {values.numel()} eigenvalues are negative" if negative else ""


class KrylovInverse(LinearOperator):
    """b ↦ V (|T| + λI)⁻¹ Vᵀ b, where VᵀAV = T is the tridiagonal matrix of Lanczos' method started at b.

    Each b has a space of its own, so that the map is linear only where that space is exhausted. ``latest`` reports the
    most recent one. Products with A: ``steps`` per vector; memory: as many vectors.
    """

    def __init__(self, operator: LinearOperator, damping: float | Tensor, steps: int) -> None:
        super().__init__(operator.shape, working_dtype(operator.dtype), operator.device, symmetric=True)
        self.operator = operator
        self.damping = damping
        self.steps = steps
        self.latest: SolveReport | None = None

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        # Scaled by the largest entry, so that the squares of its norm neither vanish nor overflow.
        size = v.abs().amax(-1, keepdim=True)
        some = size > 0
        start = torch.where(some, v / torch.where(some, size, 1.0), 1.0)
        alphas, betas, basis = lanczos(lambda u: self.operator.matvec(u).to(u.dtype), start, self.steps)
        values, vectors = safe_eigh(tridiagonal(alphas, betas))
        damped, _ = damped_eigenvalues(values.abs(), self.damping)
        length = torch.linalg.vector_norm(start, dim=-1, keepdim=True)
        coefficients = (vectors @ (vectors[..., 0, :] / damped)[..., None])[..., 0] * length
        self.latest = SolveReport("saddle-free Lanczos", iterations=alphas.shape[-1], note=_note(values))
        return torch.where(some, (coefficients[..., None, :] @ basis)[..., 0, :] * size, 0.0)

    def logdet(self, *, damping: object = 0.0, solver: Solver | None = None) -> Tensor:
        raise UnsupportedError(
            "A Krylov space gives no log-determinant. Make the operator dense where it fits in memory, or use "
            "natgrad.linalg.slq_trace with the function log(|x| + damping) for a stochastic estimate."
        )
