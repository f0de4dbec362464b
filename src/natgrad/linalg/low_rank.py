"""Low-rank matrices U Uᵀ, alone or with a diagonal, inverted in the small r x r space (Woodbury)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from natgrad.errors import ArgumentError, NotPositiveDefiniteError, ShapeError, UnsupportedError
from natgrad.linalg.basic import DenseMatrix, DiagonalMatrix
from natgrad.linalg.compose import ProductOperator, constant_of
from natgrad.linalg.factored import CholeskyInverse
from natgrad.linalg.operator import Inverse, LinearOperator, SolveReport, check_damping
from natgrad.linalg.psd import safe_cholesky, working_dtype

if TYPE_CHECKING:
    from natgrad.linalg.solvers import Solver

# The relative error in the range of U is about eps · tr(UᵀU)/λ; above this multiple of √eps the solve is corrected.
_REFINE_ABOVE = 0.1
# Up to this bound on it, eps · ‖UᵀU‖_F/λ, only vectors of which the range of U takes away more than this part.
_RANGE_ERROR, _CANCELLED = 1e-3, 0.5


class LowRankMatrix(LinearOperator):
    """U Uᵀ for ``root`` U of shape ``[n, r]``: a tensor, or a LinearOperator, which is never made dense if it has its
    own ``gram() -> [r, r]`` (UᵀU)."""

    kind: ClassVar[str] = "low_rank"

    def __init__(self, root: Tensor | LinearOperator) -> None:
        if isinstance(root, DenseMatrix):
            root = root.matrix
        if isinstance(root, Tensor) and root.ndim != 2:
            raise ShapeError(f"LowRankMatrix needs a root of shape [n, r], but got {tuple(root.shape)}.")
        n, self.rank = root.shape
        super().__init__((n, n), root.dtype, root.device, symmetric=True)
        self.root = root
        self._gram: Tensor | None = None

    def gram_matrix(self) -> Tensor:
        """UᵀU, ``[r, r]``; computed once."""
        if self._gram is None:
            if isinstance(self.root, Tensor):
                root = self.root.to(working_dtype(self.dtype))
                self._gram = root.mT @ root
            else:
                self._gram = self.root.gram()
        return self._gram

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        return _expand(self.root, _contract(self.root, v))

    def to_dense(self) -> Tensor:
        root = _dense_root(self.root)
        return root @ root.mT

    def diagonal(self) -> Tensor:
        return self.root.square().sum(-1) if isinstance(self.root, Tensor) else super().diagonal()

    def trace(self) -> Tensor:
        if self._gram is None and isinstance(self.root, Tensor):
            return self.root.square().sum()
        return self.gram_matrix().trace().to(self.dtype)

    def quad(self, v: Tensor) -> Tensor:
        return _contract(self.root, self._vector(v, self.shape[1], "quad")).square().sum(-1)

    def gram(self) -> Tensor:
        root = _dense_root(self.root)
        return root @ self.gram_matrix() @ root.mT

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        from natgrad.linalg.solvers import Woodbury

        if not (solver is None or isinstance(solver, Woodbury)):
            return None
        if solver is None and self._full():
            factor, jitter = safe_cholesky(self.to_dense(), damping)
            return Inverse(CholeskyInverse(factor), SolveReport("cholesky", jitter=jitter))
        self._require_damping(damping)
        factor, jitter = safe_cholesky(self.gram_matrix(), damping)
        inverse = WoodburyInverse(self.root, factor, damping, *self._corrections(factor.dtype, damping))
        return Inverse(inverse, SolveReport("woodbury", jitter=jitter))

    def _corrections(self, dtype: torch.dtype, damping: float | Tensor) -> tuple[int, bool]:
        """How often a solve is corrected, and whether only where its subtraction cancels."""
        gram, eps = self.gram_matrix().to(dtype), torch.finfo(dtype).eps
        if not bool(eps**0.5 * gram.trace() > _REFINE_ABOVE * damping):
            return 0, False
        # To ask whether it does is free on a CPU; a device would have to be waited for at every product.
        return 1, self.device.type == "cpu" and bool(eps * torch.linalg.matrix_norm(gram) <= _RANGE_ERROR * damping)

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        """(n − r) log λ + log det(λ I_r + UᵀU): the determinant lemma."""
        damping = check_damping(damping)
        inverse = self._structured_inverse(damping, solver)
        return super().logdet(damping=damping, solver=solver) if inverse is None else -inverse.logdet()

    def _full(self) -> bool:
        """Whether the n x n space is no larger than the r x r space (then a dense factorisation is cheaper)."""
        return self.rank >= self.shape[0] and isinstance(self.root, Tensor)

    def _require_damping(self, damping: float | Tensor) -> None:
        if float(damping) == 0.0:
            raise ArgumentError(
                f"A matrix of rank at most {self.rank} and size {self.shape[0]} has no inverse without damping. Pass "
                "damping > 0: the inverse is then 1/damping on the complement of its range."
            )

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, DiagonalMatrix):
            return DiagonalPlusLowRank(other.diag, self.root)
        if not isinstance(other, LowRankMatrix) or self.rank + other.rank > self.shape[0]:
            return None
        if isinstance(self.root, Tensor) and isinstance(other.root, Tensor):
            return LowRankMatrix(torch.cat([self.root, other.root], dim=1))
        return None

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        # Only a known positive number has a real square root without asking the device.
        if isinstance(scale, Tensor) or scale <= 0.0:
            return None
        scaled = LowRankMatrix(self.root * float(scale) ** 0.5)
        scaled._gram = None if self._gram is None else self._gram * scale
        return scaled

    def tensors(self) -> dict[str, Tensor]:
        if not isinstance(self.root, Tensor):
            raise UnsupportedError(
                "A LowRankMatrix whose root is an operator cannot be saved as tensors. Save what the root is made of, "
                "or make it dense first: LowRankMatrix(root.to_dense())."
            )
        return {"root": self.root}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LowRankMatrix:
        return cls(tensors["root"])


class WoodburyInverse(LinearOperator):
    """(U Uᵀ + λI)⁻¹ = (I − U (λI + UᵀU)⁻¹ Uᵀ) / λ; ``factor`` is the Cholesky factor of λI + UᵀU.

    For λ far below ‖U‖² the subtraction cancels what lies in the range of U. There Uᵀx = (λI + UᵀU)⁻¹Uᵀb must hold;
    each of the ``corrections`` restores it (a step of iterative refinement restricted to the range). With
    ``where_cancelled`` only where the subtraction leaves less than half of a vector's norm, as Gram–Schmidt is repeated
    (Daniel, Gragg, Kaufman & Stewart 1976); where it leaves more, the error is in proportion to x.
    """

    def __init__(
        self,
        root: Tensor | LinearOperator,
        factor: Tensor,
        damping: float | Tensor,
        corrections: int = 0,
        where_cancelled: bool = False,
    ) -> None:
        n = root.shape[0]
        super().__init__((n, n), torch.promote_types(root.dtype, factor.dtype), root.device, symmetric=True)
        self.root = root.to(self.dtype) if isinstance(root, Tensor) else root
        self.factor = factor
        self.damping = damping
        self.corrections = corrections
        self.where_cancelled = where_cancelled

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        inside = self._small_solve(_contract(self.root, v))
        x = _add_expanded(self.root, -inside, v)
        corrections = self.corrections
        if self.where_cancelled and _functorch.peek_interpreter_stack() is None:  # a transform could not ask
            before, after = torch.linalg.vector_norm(v, dim=-1), torch.linalg.vector_norm(x, dim=-1)
            corrections *= not bool((after >= _CANCELLED * before).all())
        x = x / self.damping if isinstance(self.damping, Tensor) else x.div_(self.damping)
        for _ in range(corrections):
            error = _contract(self.root, x) - inside
            x = _add_expanded(self.root, -self._small_solve(error), x)
        return x

    def _small_solve(self, c: Tensor) -> Tensor:
        rows = c.reshape(math.prod(c.shape[:-1]), c.shape[-1])
        return torch.cholesky_solve(rows.mT, self.factor).mT.reshape(c.shape)

    def diagonal(self) -> Tensor:
        half = torch.linalg.solve_triangular(self.factor, _dense_root(self.root).mT.to(self.dtype), upper=False)
        return (1.0 - half.square().sum(0)) / self.damping

    def trace(self) -> Tensor:
        """(n − r)/λ + tr (λI + UᵀU)⁻¹, without cancellation."""
        n, r = self.shape[0], self.factor.shape[0]
        return (n - r) / self.damping + CholeskyInverse(self.factor).trace()

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        if float(check_damping(damping)) != 0.0:
            return super().logdet(damping=damping, solver=solver)
        n, r = self.shape[0], self.factor.shape[0]
        small = 2.0 * self.factor.diagonal().log().sum()
        return -(small + (n - r) * torch.as_tensor(self.damping, dtype=self.dtype, device=self.device).log())


class DiagonalPlusLowRank(LinearOperator):
    """diag(d) + U Uᵀ for ``diag`` ``[n]`` and ``root`` ``[n, r]``; the inverse needs d + damping > 0 (Woodbury)."""

    kind: ClassVar[str] = "diagonal_plus_low_rank"

    def __init__(self, diag: Tensor, root: Tensor | LinearOperator) -> None:
        if diag.ndim != 1 or diag.shape[0] != root.shape[0]:
            raise ShapeError(f"diag {tuple(diag.shape)} and root {tuple(root.shape)} must share their first axis [n].")
        n = diag.shape[0]
        super().__init__((n, n), torch.promote_types(diag.dtype, root.dtype), diag.device, symmetric=True)
        self.diag = diag
        self.root = root
        self.low_rank = LowRankMatrix(root)

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        return self.diag * v + self.low_rank.matvec(v)

    def to_dense(self) -> Tensor:
        return torch.diag(self.diag) + self.low_rank.to_dense()

    def diagonal(self) -> Tensor:
        return self.diag + self.low_rank.diagonal()

    def trace(self) -> Tensor:
        return self.diag.sum() + self.low_rank.trace()

    def _whitened(self, damping: float | Tensor) -> tuple[Tensor, LowRankMatrix]:
        """D^-½ and V Vᵀ with V = D^-½ U for D = diag(d) + damping: D + UUᵀ = D^½ (I + VVᵀ) D^½."""
        damped = self.diag + damping
        if not bool(((damped > 0) & torch.isfinite(damped)).all()):
            raise NotPositiveDefiniteError(
                f"The diagonal of a diagonal plus low-rank matrix (with damping {float(damping):.3g} added) must be "
                f"finite and positive, but its smallest entry is {float(damped.min()):.3g}. Use more damping, or "
                "solver=Cholesky()."
            )
        scale = damped.rsqrt()
        if isinstance(self.root, Tensor):
            return scale, LowRankMatrix(scale[:, None] * self.root)
        return scale, LowRankMatrix(ProductOperator(DiagonalMatrix(scale), self.root))

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        from natgrad.linalg.solvers import Woodbury

        if not (solver is None or isinstance(solver, Woodbury)):
            return None
        scale, whitened = self._whitened(damping)
        inner = whitened.inverse(damping=1.0, solver=solver)
        outer = DiagonalMatrix(scale)
        return Inverse(ProductOperator(outer, inner.operator, outer, symmetric=True), inner.report)

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        if not (solver is None or _is_woodbury(solver)):
            return super().logdet(damping=damping, solver=solver)
        scale, whitened = self._whitened(check_damping(damping))
        return whitened.logdet(damping=1.0, solver=solver) - 2.0 * scale.log().sum()

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, DiagonalMatrix):
            return DiagonalPlusLowRank(self.diag + other.diag, self.root)
        constant = constant_of(other)
        return None if constant is None else DiagonalPlusLowRank(self.diag + constant, self.root)

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        if isinstance(scale, Tensor) or scale <= 0.0:
            return None
        return DiagonalPlusLowRank(self.diag * scale, self.root * float(scale) ** 0.5)

    def tensors(self) -> dict[str, Tensor]:
        return {"diag": self.diag, **self.low_rank.tensors()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DiagonalPlusLowRank:
        return cls(tensors["diag"], tensors["root"])


def _is_woodbury(solver: object) -> bool:
    from natgrad.linalg.solvers import Woodbury

    return isinstance(solver, Woodbury)


def _contract(root: Tensor | LinearOperator, v: Tensor) -> Tensor:
    """Uᵀ v for ``v [*batch, n]``."""
    if not isinstance(root, Tensor):
        return root.rmatvec(v)
    return torch.mv(root.mT, v) if v.ndim == 1 else v @ root


def _expand(root: Tensor | LinearOperator, c: Tensor) -> Tensor:
    """U c for ``c [*batch, r]``."""
    if not isinstance(root, Tensor):
        return root.matvec(c)
    return torch.mv(root, c) if c.ndim == 1 else c @ root.mT


def _add_expanded(root: Tensor | LinearOperator, c: Tensor, v: Tensor) -> Tensor:
    """v + U c for ``c [*batch, r]``, a new tensor."""
    if not isinstance(root, Tensor):
        return root.matvec_plus(c, v)
    return torch.addmv(v, root, c) if c.ndim == 1 else v + c @ root.mT


def _dense_root(root: Tensor | LinearOperator) -> Tensor:
    return root if isinstance(root, Tensor) else root.to_dense()
