"""The abstract linear operator, its algebra, and the inverse of an operator."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from natgrad.linalg.solvers import Solver

# Columns produced at a time when a matrix is read off from its action.
_CHUNK = 256


def check_damping(damping: float | Tensor) -> float | Tensor:
    """Return ``damping`` if it is a finite number >= 0 (float or 0-d tensor), else raise ArgumentError.

    A Python number or a CPU tensor is checked for free; a tensor on an accelerator costs one synchronisation.
    """
    if isinstance(damping, Tensor) and damping.ndim != 0:
        raise ArgumentError(
            f"damping must be a number or a 0-d tensor, but has shape {tuple(damping.shape)}. "
            "Pass one value per operator (a BlockDiagonalMatrix also takes a mapping from block name to value)."
        )
    if not isinstance(damping, (Tensor, numbers.Real)):
        raise ArgumentError(f"damping must be a number or a 0-d tensor, but is a {type(damping).__name__}.")
    value = float(damping)
    if not math.isfinite(value) or value < 0.0:
        raise ArgumentError(
            f"damping must be finite and not negative, but is {value}. It is the lambda of (A + lambda I); "
            "a negative or non-finite value usually comes from a schedule or from a loss that diverged."
        )
    return damping


def is_scalar(value: object) -> bool:
    """Whether ``value`` can scale an operator: a real number or a 0-d tensor."""
    return isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0)


@dataclass(frozen=True)
class SolveReport:
    """How an inverse was obtained.

    ``residual`` is relative (‖b − A x‖ / ‖b‖, the largest over a batch) where the method measures one, ``jitter`` is
    what was added to the diagonal beyond the requested damping to make the factorisation succeed.
    """

    method: str
    iterations: int = 0
    residual: float | Tensor | None = None
    jitter: float | Tensor = 0.0
    note: str = ""


class LinearOperator(ABC):
    """A real matrix of shape ``(m, n)`` known by its action; vectors lie on the last axis.

    Operators work in their own dtype: a vector of another floating dtype is cast to it.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    symmetric: bool

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        symmetric: bool = False,
    ) -> None:
        if symmetric and shape[0] != shape[1]:
            raise ShapeError(f"An operator of shape {tuple(shape)} cannot be symmetric: it is not square.")
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = dtype
        self.device = torch.device(device)
        self.symmetric = symmetric

    # --- action -------------------------------------------------------------------------------------------------

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """A v for ``v`` of shape ``[*batch, n]``; returns ``[*batch, m]``."""

    def rmatvec(self, v: Tensor) -> Tensor:
        """Aᵀ v for ``v`` of shape ``[*batch, m]``; returns ``[*batch, n]``.

        The default is ``matvec`` for a symmetric operator, else the vector-Jacobian product of ``matvec``.
        """
        if self.symmetric:
            return self.matvec(v)
        v = self._vector(v, self.shape[0], "rmatvec")
        origin = torch.zeros(*v.shape[:-1], self.shape[1], dtype=v.dtype, device=v.device)
        pullback = torch.func.vjp(self.matvec, origin)[1]
        return pullback(v)[0]

    def matvec_plus(self, v: Tensor, b: Tensor) -> Tensor:
        """b + A v, a new tensor; for operators of parts without a copy of A v in between."""
        return b + self.matvec(v)

    def _vector(self, v: Tensor, size: int, where: str) -> Tensor:
        """Check the last axis of ``v`` and cast it to the operator's dtype (a no-op when it has it)."""
        if v.ndim == 0 or v.shape[-1] != size:
            raise ShapeError(
                f"{type(self).__name__}.{where} of an operator of shape {self.shape} needs vectors of length {size} on "
                f"the last axis, but got a tensor of shape {tuple(v.shape)}. For a matrix of column vectors use A @ x."
            )
        return v if v.dtype == self.dtype else v.to(self.dtype)

    def to_dense(self) -> Tensor:
        """The matrix, shape ``[m, n]``."""
        return self.matvec(torch.eye(self.shape[1], dtype=self.dtype, device=self.device)).mT

    def diagonal(self) -> Tensor:
        """The main diagonal, shape ``[n]``, of a square operator."""
        n = self._require_square("diagonal")
        parts = []
        for start in range(0, n, _CHUNK):
            size = min(_CHUNK, n - start)
            rows = torch.zeros(size, n, dtype=self.dtype, device=self.device)
            rows.diagonal(start).fill_(1.0)
            parts.append(self.matvec(rows).diagonal(start))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype, device=self.device)

    def trace(self) -> Tensor:
        """Sum of the diagonal, a 0-d tensor."""
        return self.diagonal().sum()

    def quad(self, v: Tensor) -> Tensor:
        """vᵀ A v for ``v`` of shape ``[*batch, n]``; returns ``[*batch]``."""
        self._require_square("quad")
        v = self._vector(v, self.shape[1], "quad")
        return torch.linalg.vecdot(v, self.matvec(v))

    def gram(self) -> Tensor:
        """AᵀA, shape ``[n, n]``. Operators that know it without forming A override this."""
        dense = self.to_dense()
        return dense.mT @ dense

    # --- inverse ------------------------------------------------------------------------------------------------

    def inverse(self, *, damping: float | Tensor = 0.0, solver: Solver | None = None) -> Inverse:
        """(A + damping I)⁻¹ as an operator.

        ``solver=None`` is the operator's own exact method where it has one, else ``default_solver()``.

        Raises ArgumentError for negative or non-finite damping, NotPositiveDefiniteError or NonFiniteError where the
        factorisation fails beyond repair.
        """
        self._require_square("inverse")
        damping = check_damping(damping)
        if solver is None:
            structured = self._structured_inverse(damping, None)
            if structured is not None:
                return structured
            solver = self.default_solver()
        return solver(self, damping)

    def solve(self, b: Tensor, *, damping: float | Tensor = 0.0, solver: Solver | None = None) -> Tensor:
        """x with (A + damping I) x = b, for ``b`` of shape ``[n]`` or ``[n, k]``."""
        return self.inverse(damping=damping, solver=solver) @ b

    def logdet(self, *, damping: float | Tensor = 0.0, solver: Solver | None = None) -> Tensor:
        """log det(A + damping I), a 0-d tensor, for A + damping I positive definite."""
        return -self.inverse(damping=damping, solver=solver).logdet()

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        """The exact inverse that this structure offers under ``solver``; None where it has none of its own."""
        return None

    def default_solver(self) -> Solver:
        """The solver used by ``inverse`` when none is given and the structure has no method of its own."""
        from natgrad.linalg.solvers import CG, LU, Cholesky

        if not self.symmetric:
            return LU()
        return Cholesky() if self.shape[0] <= 4096 else CG()

    def _require_square(self, what: str) -> int:
        m, n = self.shape
        if m != n:
            raise ShapeError(f"{what} needs a square operator, but {type(self).__name__} has shape {self.shape}.")
        return n

    # --- algebra ------------------------------------------------------------------------------------------------

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self if self.symmetric else self._transposed()

    def _transposed(self) -> LinearOperator:
        from natgrad.linalg.compose import TransposedOperator

        return TransposedOperator(self)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        """``self + other`` in a simpler form than a SumOperator, or None."""
        return None

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        """``scale * self`` in a simpler form than a ScaledOperator, or None."""
        return None

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        """``self @ other`` in a simpler form than a ProductOperator, or None."""
        return None

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, LinearOperator):
            from natgrad.linalg.compose import multiply

            return multiply(self, other)
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim not in (1, 2):
            raise ShapeError(
                f"A @ x takes x of shape [n] or [n, k], but got {tuple(other.shape)}. "
                "For a batch of vectors on the last axis use A.matvec(x)."
            )
        if other.shape[0] != self.shape[1]:
            raise ShapeError(f"A @ x: A has shape {self.shape}, but x has shape {tuple(other.shape)}.")
        return self.matvec(other) if other.ndim == 1 else self.matvec(other.mT).mT

    def __add__(self, other: Any) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        from natgrad.linalg.compose import add

        return add(self, other)

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def __mul__(self, scale: Any) -> LinearOperator:
        if not is_scalar(scale):
            return NotImplemented
        from natgrad.linalg.compose import ScaledOperator

        return self._scaled(scale) or ScaledOperator(self, scale)

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> LinearOperator:
        return self * (1.0 / scale) if is_scalar(scale) else NotImplemented

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


class Inverse(LinearOperator):
    """(A + damping I)⁻¹: acts as ``operator`` and says in ``report`` how it was obtained."""

    def __init__(self, operator: LinearOperator, report: SolveReport) -> None:
        super().__init__(operator.shape, operator.dtype, operator.device, symmetric=operator.symmetric)
        self.operator = operator
        self._report = report

    @property
    def report(self) -> SolveReport:
        """Of the factorisation; for an iterative method, of the latest solve; for blocks, the worst of them."""
        latest = getattr(self.operator, "latest", None)
        return latest if isinstance(latest, SolveReport) else self._report

    def matvec(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.rmatvec(v)

    def to_dense(self) -> Tensor:
        return self.operator.to_dense()

    def diagonal(self) -> Tensor:
        return self.operator.diagonal()

    def trace(self) -> Tensor:
        return self.operator.trace()

    def quad(self, v: Tensor) -> Tensor:
        return self.operator.quad(v)

    def inverse(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Inverse:
        return self.operator.inverse(damping=damping, solver=solver)

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        return self.operator.logdet(damping=damping, solver=solver)

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        return self.operator * scale


def merge_reports(reports: Mapping[str, SolveReport]) -> SolveReport:
    """One report for several blocks: their methods, and the worst iterations, residual and jitter."""
    values = list(reports.values())
    residuals = [float(r.residual) for r in values if r.residual is not None]
    return SolveReport(
        method="+".join(dict.fromkeys(r.method for r in values)) or "none",
        iterations=max((r.iterations for r in values), default=0),
        residual=max(residuals) if residuals else None,
        jitter=_worst_jitter([r.jitter for r in values]),
        note="; ".join(f"{name}: {r.note}" for name, r in reports.items() if r.note),
    )


def _worst_jitter(jitters: list[float | Tensor]) -> float | Tensor:
    """The largest of numbers and tensors without bringing a tensor to the host."""
    numbers_ = [j for j in jitters if not isinstance(j, Tensor)]
    tensors = [j.max() for j in jitters if isinstance(j, Tensor)]
    worst: float | Tensor = max(numbers_, default=0.0)
    for tensor in tensors:
        worst = (
            torch.clamp(tensor, min=worst)
            if not isinstance(worst, Tensor)
            else torch.maximum(worst, tensor.to(worst.dtype).to(worst.device))
        )
    return worst
