"""Elementary matrices: identity, diagonal, dense, and a matrix known only by a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from natgrad.errors import NotPositiveDefiniteError, ShapeError
from natgrad.linalg.operator import Inverse, LinearOperator, SolveReport, check_damping
from natgrad.linalg.psd import add_diagonal, working_dtype

if TYPE_CHECKING:
    from natgrad.linalg.solvers import Solver


class IdentityMatrix(LinearOperator):
    """The n x n identity."""

    kind: ClassVar[str] = "identity"

    def __init__(self, n: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__((n, n), dtype or torch.get_default_dtype(), device, symmetric=True)

    def matvec(self, v: Tensor) -> Tensor:
        return self._vector(v, self.shape[1], "matvec")

    def to_dense(self) -> Tensor:
        return torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def diagonal(self) -> Tensor:
        return torch.ones(self.shape[0], dtype=self.dtype, device=self.device)

    def gram(self) -> Tensor:
        return self.to_dense()

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        return Inverse(self * (1.0 / (1.0 + damping)), SolveReport("diagonal"))

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        shift = torch.as_tensor(check_damping(damping), dtype=self.dtype, device=self.device)
        return self.shape[0] * torch.log1p(shift)

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        return other if other.dtype == self.dtype else None

    def tensors(self) -> dict[str, Tensor]:
        return {"size": torch.tensor(self.shape[0]), "one": torch.ones((), dtype=self.dtype, device=self.device)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> IdentityMatrix:
        return cls(int(tensors["size"]), tensors["one"].dtype, tensors["one"].device)


class DiagonalMatrix(LinearOperator):
    """diag(d) for ``diag`` of shape ``[n]``."""

    kind: ClassVar[str] = "diagonal"

    def __init__(self, diag: Tensor) -> None:
        if diag.ndim != 1:
            raise ShapeError(f"DiagonalMatrix needs the diagonal as a vector [n], but got shape {tuple(diag.shape)}.")
        super().__init__((diag.shape[0], diag.shape[0]), diag.dtype, diag.device, symmetric=True)
        self.diag = diag

    def matvec(self, v: Tensor) -> Tensor:
        return self._vector(v, self.shape[1], "matvec") * self.diag

    def to_dense(self) -> Tensor:
        return torch.diag(self.diag)

    def diagonal(self) -> Tensor:
        return self.diag

    def gram(self) -> Tensor:
        return torch.diag(self.diag.square())

    def _positive(self, damping: float | Tensor) -> Tensor:
        """diag + damping in the working dtype, all entries positive; one host synchronisation."""
        damped = self.diag.to(working_dtype(self.dtype)) + damping
        if not bool(((damped > 0) & torch.isfinite(damped)).all()):
            raise NotPositiveDefiniteError(
                f"A diagonal matrix of size {self.shape[0]} has entries (with damping {float(damping):.3g} added) "
                f"between {float(damped.min()):.3g} and {float(damped.max()):.3g}; all must be finite and above zero. "
                "Zeros belong to parameters the data says nothing about, negative values to an indefinite matrix: use "
                "more damping, or solver=SaddleFree() for the latter."
            )
        return damped

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        return Inverse(DiagonalMatrix(1.0 / self._positive(damping)), SolveReport("diagonal"))

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        return self._positive(check_damping(damping)).log().sum()

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        from natgrad.linalg.compose import constant_of

        if isinstance(other, DiagonalMatrix):
            return DiagonalMatrix(self.diag + other.diag)
        constant = constant_of(other)
        return None if constant is None else DiagonalMatrix(self.diag + constant)

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        return DiagonalMatrix(self.diag * scale)

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, DiagonalMatrix):
            return DiagonalMatrix(self.diag * other.diag)
        if isinstance(other, DenseMatrix):
            return DenseMatrix(self.diag[:, None] * other.matrix)
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {"diag": self.diag}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DiagonalMatrix:
        return cls(tensors["diag"])


class DenseMatrix(LinearOperator):
    """A matrix held as a tensor ``[m, n]``; ``symmetric=True`` is the caller's promise (Cholesky, no transpose)."""

    kind: ClassVar[str] = "dense"

    def __init__(self, matrix: Tensor, symmetric: bool = False) -> None:
        if matrix.ndim != 2:
            raise ShapeError(f"DenseMatrix needs a matrix [m, n], but got shape {tuple(matrix.shape)}.")
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device, symmetric=symmetric)
        self.matrix = matrix

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        return torch.mv(self.matrix, v) if v.ndim == 1 else v @ self.matrix.mT

    def rmatvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[0], "rmatvec")
        return torch.mv(self.matrix.mT, v) if v.ndim == 1 else v @ self.matrix

    def to_dense(self) -> Tensor:
        return self.matrix

    def default_solver(self) -> Solver:
        from natgrad.linalg.solvers import LU, Cholesky

        return Cholesky() if self.symmetric else LU()

    def diagonal(self) -> Tensor:
        self._require_square("diagonal")
        return self.matrix.diagonal()

    def _transposed(self) -> LinearOperator:
        return DenseMatrix(self.matrix.mT)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        from natgrad.linalg.compose import constant_of

        if isinstance(other, DenseMatrix):
            return DenseMatrix(self.matrix + other.matrix, self.symmetric and other.symmetric)
        if isinstance(other, DiagonalMatrix):
            return DenseMatrix(torch.diagonal_scatter(self.matrix, self.matrix.diagonal() + other.diag), self.symmetric)
        constant = constant_of(other)
        return None if constant is None else DenseMatrix(add_diagonal(self.matrix, constant), self.symmetric)

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        return DenseMatrix(self.matrix * scale, self.symmetric)

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, DenseMatrix):
            return DenseMatrix(self.matrix @ other.matrix)
        if isinstance(other, DiagonalMatrix):
            return DenseMatrix(self.matrix * other.diag)
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix, "symmetric": torch.tensor(self.symmetric)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DenseMatrix:
        return cls(tensors["matrix"], bool(tensors["symmetric"]))


class FunctionOperator(LinearOperator):
    """A matrix known only by its action ``function: [*batch, n] -> [*batch, m]``, symmetric unless said otherwise.

    ``rmatvec`` is the action of the transpose where the matrix is not symmetric; without it the transpose is derived as
    the vector-Jacobian product of ``function``. ``inverse`` uses conjugate gradients unless another solver is given.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        symmetric: bool = True,
        rmatvec: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(shape, dtype, device, symmetric=symmetric)
        self._function = function
        self._rfunction = rmatvec

    def matvec(self, v: Tensor) -> Tensor:
        return self._function(self._vector(v, self.shape[1], "matvec"))

    def rmatvec(self, v: Tensor) -> Tensor:
        if self._rfunction is None:
            return super().rmatvec(v)
        return self._rfunction(self._vector(v, self.shape[0], "rmatvec"))

    def default_solver(self) -> Solver:
        from natgrad.linalg.solvers import CG, LU

        return CG() if self.symmetric else LU()
