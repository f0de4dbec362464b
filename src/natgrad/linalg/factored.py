"""Inverses held as factors: triangular, LU, and eigenvectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from natgrad.errors import ShapeError
from natgrad.linalg.operator import Inverse, LinearOperator, SolveReport, check_damping
from natgrad.linalg.psd import damped_eigenvalues

if TYPE_CHECKING:
    from natgrad.linalg.solvers import Solver


class CholeskyInverse(LinearOperator):
    """A⁻¹ for A = L Lᵀ, held as the lower triangular ``factor`` L ``[n, n]``; acts by two triangular solves."""

    kind: ClassVar[str] = "cholesky_inverse"

    def __init__(self, factor: Tensor) -> None:
        if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
            raise ShapeError(f"CholeskyInverse needs a triangular factor [n, n], but got shape {tuple(factor.shape)}.")
        super().__init__((factor.shape[0], factor.shape[1]), factor.dtype, factor.device, symmetric=True)
        self.factor = factor

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        columns = v.reshape(-1, self.shape[1]).mT
        return torch.cholesky_solve(columns, self.factor).mT.reshape(v.shape)

    def to_dense(self) -> Tensor:
        return torch.cholesky_inverse(self.factor)

    def _inverse_factor(self) -> Tensor:
        identity = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return torch.linalg.solve_triangular(self.factor, identity, upper=False)

    def diagonal(self) -> Tensor:
        return self._inverse_factor().square().sum(0)

    def trace(self) -> Tensor:
        return self._inverse_factor().square().sum()

    def quad(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "quad")
        half = torch.linalg.solve_triangular(self.factor, v.reshape(-1, self.shape[1]).mT, upper=False)
        return half.square().sum(0).reshape(v.shape[:-1])

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        if float(check_damping(damping)) != 0.0:
            return super().logdet(damping=damping, solver=solver)
        return -2.0 * self.factor.diagonal().log().sum()

    def tensors(self) -> dict[str, Tensor]:
        return {"factor": self.factor}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CholeskyInverse:
        return cls(tensors["factor"])


class LUInverse(LinearOperator):
    """A⁻¹ of a general square matrix, held as its LU factors with pivots."""

    def __init__(self, factors: Tensor, pivots: Tensor) -> None:
        super().__init__((factors.shape[0], factors.shape[1]), factors.dtype, factors.device)
        self.factors = factors
        self.pivots = pivots

    def matvec(self, v: Tensor) -> Tensor:
        return self._solve(self._vector(v, self.shape[1], "matvec"), adjoint=False)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self._solve(self._vector(v, self.shape[0], "rmatvec"), adjoint=True)

    def _solve(self, v: Tensor, adjoint: bool) -> Tensor:
        columns = v.reshape(-1, self.shape[1]).mT
        return torch.linalg.lu_solve(self.factors, self.pivots, columns, adjoint=adjoint).mT.reshape(v.shape)

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        """log |det A⁻¹|; NaN where the determinant of A is negative."""
        if float(check_damping(damping)) != 0.0:
            return super().logdet(damping=damping, solver=solver)
        entries = self.factors.diagonal()
        count = torch.arange(1, self.shape[0] + 1, device=self.device, dtype=self.pivots.dtype)
        swaps = (self.pivots != count).sum()
        negative = ((entries < 0).sum() + swaps) % 2 == 1
        value = -entries.abs().log().sum()
        return torch.where(negative, torch.nan, value)


class EigenMatrix(LinearOperator):
    """U diag(e) Uᵀ with orthonormal ``basis`` U ``[n, n]`` and ``eigenvalues`` e ``[n]``."""

    kind: ClassVar[str] = "eigen"

    def __init__(self, basis: Tensor, eigenvalues: Tensor) -> None:
        if basis.ndim != 2 or eigenvalues.shape != basis.shape[1:] or basis.shape[0] != basis.shape[1]:
            raise ShapeError(
                f"EigenMatrix needs a basis [n, n] and eigenvalues [n], but got {tuple(basis.shape)} and "
                f"{tuple(eigenvalues.shape)}."
            )
        super().__init__((basis.shape[0], basis.shape[0]), basis.dtype, basis.device, symmetric=True)
        self.basis = basis
        self.eigenvalues = eigenvalues

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        return ((v @ self.basis) * self.eigenvalues) @ self.basis.mT

    def to_dense(self) -> Tensor:
        return (self.basis * self.eigenvalues) @ self.basis.mT

    def diagonal(self) -> Tensor:
        return self.basis.square() @ self.eigenvalues

    def trace(self) -> Tensor:
        return self.eigenvalues.sum()

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        damped, raised = damped_eigenvalues(self.eigenvalues, damping)
        return Inverse(EigenMatrix(self.basis, 1.0 / damped), SolveReport("eigh", jitter=raised))

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        return damped_eigenvalues(self.eigenvalues, check_damping(damping))[0].log().sum()

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        return EigenMatrix(self.basis, self.eigenvalues * scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "eigenvalues": self.eigenvalues}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> EigenMatrix:
        return cls(tensors["basis"], tensors["eigenvalues"])
