"""Kronecker-factored matrices: the product of two factors, and a diagonal in a Kronecker eigenbasis.

Both act on the row-major vec of a matrix X [p, q]: (L ⊗ R) vec(X) = vec(L X Rᵀ). A leading ``stack`` of factors makes
the operator block diagonal over the stack, so that equal shapes share batched matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, ShapeError
from natgrad.linalg.basic import DenseMatrix, DiagonalMatrix
from natgrad.linalg.block_stacks import BlockStacks, found_in, named_tensors
from natgrad.linalg.operator import Inverse, LinearOperator, SolveReport, check_damping
from natgrad.linalg.products import product
from natgrad.linalg.psd import add_diagonal, damped_eigenvalues, safe_cholesky, safe_eigh, working_dtype

if TYPE_CHECKING:
    from natgrad.linalg.solvers import Solver

Factor = Tensor | DiagonalMatrix | BlockStacks


class _MatrixAction(LinearOperator):
    """Shared by the Kronecker matrices: apply one matrix per side to vectors seen as ``[*stack, p, q]``."""

    def __init__(self, stack: tuple[int, ...], p: int, q: int, dtype: torch.dtype, device: torch.device) -> None:
        n = math.prod(stack) * p * q
        super().__init__((n, n), dtype, device, symmetric=True)
        self.stack = stack
        self.p = p
        self.q = q

    def _fold(self, v: Tensor) -> Tensor:
        """``[*batch, n]`` -> ``[batch, *stack, p, q]``, without the batch axis for a single vector (then a view)."""
        shape = (*self.stack, self.p, self.q)
        return v.reshape(shape) if v.ndim == 1 else v.reshape(-1, *shape)

    def _left(self, matrix: Tensor | BlockStacks, x: Tensor) -> Tensor:
        """matrix X for X ``[*stack, p, q]`` or ``[batch, *stack, p, q]``."""
        if isinstance(matrix, BlockStacks):
            return matrix.premultiply(x)
        if x.ndim == matrix.ndim or not self.stack:
            return product(matrix, x)
        # One product per stack element: the batch goes beside the columns, or matmul would copy the matrices.
        batch, q = x.shape[0], x.shape[-1]
        columns = x.movedim(0, -2).reshape(*self.stack, self.p, batch * q)
        return (matrix @ columns).reshape(*self.stack, self.p, batch, q).movedim(-2, 0)

    def _right(self, x: Tensor, matrix: Tensor | BlockStacks) -> Tensor:
        """X matrix for X ``[*stack, p, q]`` or ``[batch, *stack, p, q]``."""
        if isinstance(matrix, BlockStacks):
            return matrix.postmultiply(x)
        if x.ndim == matrix.ndim or not self.stack:
            return product(x, matrix)
        batch, p = x.shape[0], x.shape[-2]
        rows = x.movedim(0, -3).reshape(*self.stack, batch * p, self.q)
        return (rows @ matrix).reshape(*self.stack, batch, p, self.q).movedim(-3, 0)


class KroneckerProduct(_MatrixAction):
    """L ⊗ R for symmetric positive semidefinite L ``[*stack, p, p]`` and R ``[*stack, q, q]``.

    A factor may be a ``DiagonalMatrix`` or ``BlockStacks`` where there is no stack. Vectors have length
    ``prod(stack) * p * q``.
    """

    kind: ClassVar[str] = "kronecker"

    def __init__(self, left: Factor | DenseMatrix, right: Factor | DenseMatrix) -> None:
        self.left: Factor = left.matrix if isinstance(left, DenseMatrix) else left
        self.right: Factor = right.matrix if isinstance(right, DenseMatrix) else right
        stacks = [_stack_of(self.left, "left"), _stack_of(self.right, "right")]
        if stacks[0] != stacks[1]:
            raise ShapeError(f"The factors of a KroneckerProduct must share one stack, but have {stacks}.")
        if self.left.dtype != self.right.dtype:
            raise ArgumentError(
                f"The factors of a KroneckerProduct must share one dtype, but have {self.left.dtype} and "
                f"{self.right.dtype}."
            )
        super().__init__(stacks[0], self.left.shape[-1], self.right.shape[-1], self.left.dtype, self.left.device)

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        x = self._fold(v)
        x = self.left.diag[:, None] * x if isinstance(self.left, DiagonalMatrix) else self._left(self.left, x)
        # The factors are symmetric, so that X Rᵀ = X R.
        x = x * self.right.diag if isinstance(self.right, DiagonalMatrix) else self._right(x, self.right)
        return x.reshape(v.shape)

    def to_dense(self) -> Tensor:
        left, right = _dense(self.left), _dense(self.right)
        n = self.p * self.q
        blocks = torch.einsum("...ij,...kl->...ikjl", left, right).reshape(*self.stack, n, n)
        return torch.block_diag(*blocks.reshape(-1, n, n)) if self.stack else blocks

    def diagonal(self) -> Tensor:
        left, right = _diagonal(self.left), _diagonal(self.right)
        return (left[..., :, None] * right[..., None, :]).reshape(-1)

    def trace(self) -> Tensor:
        return (_diagonal(self.left).sum(-1) * _diagonal(self.right).sum(-1)).sum()

    def damped_factors(self, damping: float | Tensor) -> KroneckerProduct:
        """Factored Tikhonov damping (L + √λ/π I) ⊗ (R + π√λ I), π² = (tr R / q) / (tr L / p).

        Martens & Grosse 2015, section 6.3. π is 1 where a trace is zero, negative or not finite. With a stack, π is
        taken per element. Undamped terms are kept apart: this is not L ⊗ R + λ I.
        """
        damping = check_damping(damping)
        left, right = _working(self.left), _working(self.right)
        left_mean = _diagonal(left).mean(-1)
        right_mean = _diagonal(right).mean(-1)
        pi = (right_mean / left_mean).sqrt()
        pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, 1.0)
        root = damping.to(pi).sqrt() if isinstance(damping, Tensor) else math.sqrt(damping)
        return KroneckerProduct(_shift(left, root / pi), _shift(right, root * pi))

    def cholesky_inverse(self) -> KroneckerProduct:
        """L⁻¹ ⊗ R⁻¹ through Cholesky factors; a failed factor climbs the ladder of ``safe_cholesky``."""
        return KroneckerProduct(_inverse_of(self.left)[0], _inverse_of(self.right)[0])

    def eigen(self) -> tuple[KroneckerEigen, Tensor, Tensor]:
        """The eigendecomposition, and the eigenvalues of the two factors (clamped at zero)."""
        left_values, left_basis = _eigh_of(self.left)
        right_values, right_basis = _eigh_of(self.right)
        values = left_values[..., :, None] * right_values[..., None, :]
        return KroneckerEigen(left_basis, right_basis, values), left_values, right_values

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        from natgrad.linalg.solvers import Cholesky, Eigh

        if solver is not None and not isinstance(solver, (Cholesky, Eigh)):
            return None
        if float(damping) == 0.0 and not isinstance(solver, Eigh):
            left, left_jitter = _inverse_of(self.left)
            right, right_jitter = _inverse_of(self.right)
            jitter = torch.maximum(left_jitter.max(), right_jitter.max())
            return Inverse(KroneckerProduct(left, right), SolveReport("cholesky", jitter=jitter))
        return self.eigen()[0]._structured_inverse(damping, solver)

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        """log det(L ⊗ R + λI); without damping q log det L + p log det R, summed over the stack."""
        if float(check_damping(damping)) != 0.0:
            return self.eigen()[0].logdet(damping=damping)
        return (self.q * _logdet_of(self.left) + self.p * _logdet_of(self.right)).sum()

    def tensors(self) -> dict[str, Tensor]:
        """``left`` and ``right``; a diagonal factor as a vector, blocks as ``left_0``, ``left_1``."""
        left, right = (f.diag if isinstance(f, DiagonalMatrix) else f for f in (self.left, self.right))
        return {**named_tensors("left", left), **named_tensors("right", right)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> KroneckerProduct:
        left, right = found_in(tensors, "left"), found_in(tensors, "right")
        assert left is not None and right is not None
        return cls(*(DiagonalMatrix(f) if isinstance(f, Tensor) and f.ndim == 1 else f for f in (left, right)))


class KroneckerEigen(_MatrixAction):
    """(U_L ⊗ U_R) diag(e) (U_L ⊗ U_R)ᵀ with orthonormal bases; a basis None is the identity.

    ``left_basis [*stack, p, p]``, ``right_basis [*stack, q, q]``, ``eigenvalues [*stack, p, q]``. Where there is no
    stack a basis may be ``BlockStacks``.
    """

    kind: ClassVar[str] = "kronecker_eigen"

    def __init__(
        self, left_basis: Tensor | BlockStacks | None, right_basis: Tensor | BlockStacks | None, eigenvalues: Tensor
    ) -> None:
        if eigenvalues.ndim < 2:
            raise ShapeError(f"eigenvalues must have shape [*stack, p, q], but have {tuple(eigenvalues.shape)}.")
        *stack, p, q = eigenvalues.shape
        for name, basis, size in (("left_basis", left_basis, p), ("right_basis", right_basis, q)):
            if basis is not None and tuple(basis.shape) != (*stack, size, size):
                raise ShapeError(
                    f"{name} must have shape {(*stack, size, size)} to go with eigenvalues of shape "
                    f"{tuple(eigenvalues.shape)}, but has {tuple(basis.shape)}."
                )
        super().__init__(tuple(stack), p, q, eigenvalues.dtype, eigenvalues.device)
        self.left_basis = left_basis
        self.right_basis = right_basis
        self.eigenvalues = eigenvalues

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        return self.from_basis(self.to_basis(self._fold(v)) * self.eigenvalues).reshape(v.shape)

    def to_basis(self, x: Tensor) -> Tensor:
        """U_Lᵀ X U_R: coordinates in the eigenbasis, for X ``[*stack, p, q]`` or ``[batch, *stack, p, q]``."""
        if self.left_basis is not None:
            x = self._left(self.left_basis.mT, x)
        return x if self.right_basis is None else self._right(x, self.right_basis)

    def from_basis(self, x: Tensor) -> Tensor:
        """U_L X U_Rᵀ: back from the eigenbasis."""
        if self.left_basis is not None:
            x = self._left(self.left_basis, x)
        return x if self.right_basis is None else self._right(x, self.right_basis.mT)

    def to_dense(self) -> Tensor:
        left = self._basis(self.left_basis, self.p)
        right = self._basis(self.right_basis, self.q)
        n = self.p * self.q
        basis = torch.einsum("...ij,...kl->...ikjl", left, right).reshape(*self.stack, n, n)
        blocks = (basis * self.eigenvalues.reshape(*self.stack, 1, n)) @ basis.mT
        return torch.block_diag(*blocks.reshape(-1, n, n)) if self.stack else blocks

    def _basis(self, basis: Tensor | BlockStacks | None, size: int) -> Tensor:
        if basis is not None:
            return _dense(basis)
        return torch.eye(size, dtype=self.dtype, device=self.device).expand(*self.stack, size, size)

    def diagonal(self) -> Tensor:
        x = self.eigenvalues
        if self.left_basis is not None:
            x = self._left(self.left_basis.square(), x)
        if self.right_basis is not None:
            x = self._right(x, self.right_basis.square().mT)
        return x.reshape(-1)

    def trace(self) -> Tensor:
        return self.eigenvalues.sum()

    def quad(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "quad")
        x = self.to_basis(self._fold(v))
        return (x.square() * self.eigenvalues).reshape(v.shape).sum(-1)

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        damped, raised = damped_eigenvalues(self.eigenvalues, damping, dims=2)
        inverse = KroneckerEigen(self.left_basis, self.right_basis, 1.0 / damped)
        return Inverse(inverse, SolveReport("eigh", jitter=raised))

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        return damped_eigenvalues(self.eigenvalues, check_damping(damping), dims=2)[0].log().sum()

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        return KroneckerEigen(self.left_basis, self.right_basis, self.eigenvalues * scale)

    def tensors(self) -> dict[str, Tensor]:
        """``eigenvalues``, and ``left_basis`` and ``right_basis`` where they are not the identity."""
        bases = {**named_tensors("left_basis", self.left_basis), **named_tensors("right_basis", self.right_basis)}
        return {"eigenvalues": self.eigenvalues, **bases}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> KroneckerEigen:
        return cls(found_in(tensors, "left_basis"), found_in(tensors, "right_basis"), tensors["eigenvalues"])


def _stack_of(factor: Factor, name: str) -> tuple[int, ...]:
    if isinstance(factor, (DiagonalMatrix, BlockStacks)):
        return ()
    if not isinstance(factor, Tensor) or factor.ndim < 2 or factor.shape[-1] != factor.shape[-2]:
        given = tuple(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
        raise ShapeError(
            f"The {name} factor of a KroneckerProduct must be a square tensor [*stack, k, k], a DiagonalMatrix or "
            f"BlockStacks, but got {given}."
        )
    return tuple(factor.shape[:-2])


def _working(factor: Factor) -> Factor:
    """The factor in the precision of factorisations (itself unless it is in half precision)."""
    dtype = working_dtype(factor.dtype)
    if isinstance(factor, BlockStacks):
        return factor.mapped(lambda s: s.to(dtype))
    return factor.to(dtype) if isinstance(factor, Tensor) else DiagonalMatrix(factor.diag.to(dtype))


def _dense(factor: Factor) -> Tensor:
    return factor if isinstance(factor, Tensor) else factor.to_dense()


def _diagonal(factor: Factor) -> Tensor:
    if isinstance(factor, BlockStacks):
        return factor.diagonal()
    return factor.diagonal(dim1=-2, dim2=-1) if isinstance(factor, Tensor) else factor.diag


def _shift(factor: Factor, shift: Tensor) -> Factor:
    if isinstance(factor, BlockStacks):
        return factor.mapped(lambda s: add_diagonal(s, shift))
    return add_diagonal(factor, shift) if isinstance(factor, Tensor) else DiagonalMatrix(factor.diag + shift)


def _inverse_of(factor: Factor) -> tuple[Factor, Tensor]:
    """The inverse of a factor, and the jitter it needed."""
    if isinstance(factor, DiagonalMatrix):
        inverse = DiagonalMatrix(1.0 / factor._positive(0.0))
        return inverse, inverse.diag.new_zeros(())
    if isinstance(factor, BlockStacks):
        found = [safe_cholesky(s) for s in factor.stacks]
        inverses = BlockStacks(tuple(torch.cholesky_inverse(triangular) for triangular, _ in found))
        return inverses, torch.cat([jitter for _, jitter in found])
    triangular, jitter = safe_cholesky(factor)
    return torch.cholesky_inverse(triangular), jitter


def _eigh_of(factor: Factor) -> tuple[Tensor, Tensor | BlockStacks | None]:
    """Eigenvalues of a positive semidefinite factor (what rounding made negative is zero) and its basis."""
    factor = _working(factor)
    if isinstance(factor, BlockStacks):
        found = [safe_eigh(s) for s in factor.stacks]
        values = torch.cat([own.flatten() for own, _ in found])
        basis = BlockStacks(tuple(vectors for _, vectors in found))
    else:
        values, basis = (factor.diag, None) if isinstance(factor, DiagonalMatrix) else safe_eigh(factor)
    top = values.amax(-1, keepdim=True).clamp(min=0.0)
    # Checked per factor: the product of two negative eigenvalues would hide them.
    if values.numel() and bool((values < -(torch.finfo(values.dtype).eps ** 0.5) * top).any()):
        damped_eigenvalues(values, 0.0)  # raises the error that describes them
    return values.clamp(min=0.0), basis


def _logdet_of(factor: Factor) -> Tensor:
    """log det over the last two axes, shape ``[*stack]``."""
    if isinstance(factor, DiagonalMatrix):
        return factor.logdet()
    if isinstance(factor, BlockStacks):
        return torch.stack([_logdet_of(s).sum() for s in factor.stacks]).sum()
    triangular, _ = safe_cholesky(factor)
    return 2.0 * triangular.diagonal(dim1=-2, dim2=-1).log().sum(-1)
