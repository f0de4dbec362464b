"""The eigenvalues of a curvature matrix: all of them where that is cheap, else their extremes and density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, NonFiniteError, ShapeError
from natgrad.linalg import (
    BlockDiagonalMatrix,
    BlockStacks,
    DenseMatrix,
    DiagonalMatrix,
    IdentityMatrix,
    Inverse,
    KroneckerEigen,
    KroneckerProduct,
    LinearOperator,
    LowRankMatrix,
    ScaledOperator,
    lanczos,
    rademacher,
    tridiagonal,
)
from natgrad.linalg.psd import symmetrise, working_dtype
from natgrad.metric import ParameterOperator


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a symmetric matrix as counted points on the line: exact ones, estimated ones, or both.

    The estimated part is one set of Gauss quadrature nodes per random probe vector (stochastic Lanczos quadrature).
    Every sum over eigenvalues is the exact part's plus the mean over the probes; standard errors are those of that
    mean, and zero where all is exact.

    Attributes:
        size: n, the number of eigenvalues.
        values, counts: ``[k]``: eigenvalues that are known, and how often each occurs.
        nodes, weights: ``[samples, m]``: quadrature nodes, and how many eigenvalues each stands for.
        largest, smallest: extreme eigenvalues; where estimated, Ritz values from inside the spectrum.
        largest_error, smallest_error: the matrix has an eigenvalue at most this far from the Ritz value (the norm of
            its residual); 0 where exact.
        tolerance: what rounding makes of zero, √n · eps · max |λ|: eigenvalues below count as zero.
    """

    size: int
    values: Tensor
    counts: Tensor
    nodes: Tensor
    weights: Tensor
    largest: float
    smallest: float
    largest_error: float
    smallest_error: float
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether every eigenvalue is known."""
        return self.nodes.shape[-1] == 0

    @property
    def eigenvalues(self) -> Tensor | None:
        """All n eigenvalues, ``[n]``, largest first; None where only their density is known."""
        if not self.exact:
            return None
        return self.values.repeat_interleave(self.counts.round().long()).sort(descending=True).values

    @property
    def support(self) -> tuple[float, float]:
        """The interval that holds the spectrum, as far as it was seen."""
        return self.smallest, self.largest

    def sum_of(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Σ_i f(λ_i) for an elementwise ``function``, and its standard error."""
        known = (self.counts * function(self.values)).sum()
        if self.exact:
            return float(known), 0.0
        terms = (self.weights * function(self.nodes)).sum(-1)
        return float(known + terms.mean()), float(terms.std(correction=1)) / math.sqrt(len(terms))

    @property
    def trace(self) -> float:
        """Σ_i λ_i."""
        return self.sum_of(lambda x: x)[0]

    @property
    def trace_error(self) -> float:
        """Standard error of :attr:`trace`."""
        return self.sum_of(lambda x: x)[1]

    @property
    def anisotropy(self) -> float:
        """Largest over mean eigenvalue: 1 for a multiple of the identity, n for rank one; NaN without curvature."""
        mean = self.trace / self.size
        return self.largest / mean if mean > 0 else math.nan

    @property
    def negative_count(self) -> float:
        """Number of negative eigenvalues, beyond what rounding explains."""
        return self.sum_of(lambda x: (x < -self.tolerance).to(x.dtype))[0]

    @property
    def negative_mass(self) -> float:
        """Σ |λ_i| over negative eigenvalues, as a share of Σ |λ_i|."""
        total = self.sum_of(torch.abs)[0]
        negative = self.sum_of(lambda x: torch.where(x < -self.tolerance, -x, 0.0))[0]
        return negative / total if total > 0 else 0.0

    def effective_dimension(self, damping: float) -> float:
        """tr F(F + λI)⁻¹ = Σ_i λ_i / (λ_i + λ): how many directions the data determine beyond the damping λ.

        With λ = 0 it is the number of eigenvalues that are not zero. The standard error is that of
        ``sum_of(lambda x: x / (x + damping))``.

        Raises:
            ArgumentError: ``damping`` is negative, not finite, or does not make F + λI positive semidefinite.
        """
        damping = _check_damping(damping)
        if damping == 0:
            return self.sum_of(lambda x: (x.abs() > self.tolerance).to(x.dtype))[0]
        if self.smallest < -self.tolerance and self.smallest + damping <= 0:
            raise ArgumentError(
                f"The effective dimension needs F + λI to be positive definite, but the smallest eigenvalue is "
                f"{self.smallest:.3g} and the damping {damping:.3g}. Use more damping, or the Fisher instead of the "
                "Hessian."
            )
        return self.sum_of(lambda x: _filtered(x, damping, self.tolerance))[0]

    def condition(self, damping: float = 0.0) -> float:
        """Condition number of F + λI, (largest + λ) / (smallest + λ); infinite unless it is positive definite."""
        damping = _check_damping(damping)
        low = 0.0 if abs(self.smallest) <= self.tolerance else self.smallest
        return (self.largest + damping) / (low + damping) if low + damping > 0 else math.inf

    def density(self, grid: Tensor, width: float) -> Tensor:
        """The density, of integral one, at ``grid [m]``: each point widened to a Gaussian of deviation ``width``."""
        if not width > 0 or not math.isfinite(width):
            raise ArgumentError(f"width={width} was given; it is a standard deviation and must be positive and finite.")
        points = torch.cat([self.values, self.nodes.flatten()])
        shares = torch.cat([self.counts, self.weights.flatten() / max(len(self.weights), 1)]) / self.size
        kernel = torch.exp(-0.5 * ((grid.to(points)[:, None] - points) / width).square())
        return (kernel * shares).sum(-1) / (width * math.sqrt(2 * math.pi))

    def __str__(self) -> str:
        how = "exact" if self.exact else f"Lanczos, {self.nodes.shape[0]} probes"
        rows = [
            ("largest", self.largest, self.largest_error),
            ("smallest", self.smallest, self.smallest_error),
            ("trace", self.trace, self.trace_error),
        ]
        lines = [f"spectrum of {self.size} eigenvalues ({how})"]
        lines += [f"  {name:<12} {value:>12.4g}" + (f" ± {e:.2g}" if e else "") for name, value, e in rows]
        lines.append(f"  {'anisotropy':<12} {self.anisotropy:>12.4g}")
        lines.append(f"  {'negative':<12} {self.negative_count:>12.4g} ({self.negative_mass:.2%} of the mass)")
        top = max(abs(self.largest), abs(self.smallest))
        if top > 0 and self.negative_count == 0:
            lines.append(f"  {'damping':<12} {'effective dimension':>20} {'condition':>12}")
            for damping in (top * 1e-1, top * 1e-3, top * 1e-5):
                dimension, condition = self.effective_dimension(damping), self.condition(damping)
                lines.append(f"  {damping:<12.3g} {dimension:>20.4g} {condition:>12.4g}")
        return "\n".join(lines)


def spectrum(
    operator: LinearOperator,
    *,
    steps: int = 64,
    samples: int = 8,
    largest_exact: int = 2000,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """The spectrum of a symmetric operator, such as the result of :func:`natgrad.fisher` or :func:`natgrad.hessian`.

    Exact where the structure gives it away (diagonal, Kronecker) and where the dimension, or the rank of a low-rank
    matrix such as ``Gram()``'s, is at most ``largest_exact``; blocks of a block-diagonal matrix are taken one by one.
    Elsewhere by Lanczos iteration from random probe vectors: extremes, and the density by stochastic Lanczos
    quadrature (Ubaru, Chen & Saad 2017). That costs ``samples · steps`` products and memory for ``steps`` vectors.

    Args:
        operator: a symmetric matrix; it may be indefinite.
        steps: Lanczos steps per probe: nodes of the quadrature.
        samples: random probes, at least 2.
        largest_exact: largest matrix whose eigenvalues are computed by a dense decomposition.
        generator: of the probes (default: a fresh one with a fixed seed).

    Raises:
        ArgumentError: the operator is not symmetric, or an argument is out of range.
        NonFiniteError: the matrix holds NaN or infinite values.
    """
    if operator.shape[0] != operator.shape[1]:
        raise ShapeError(f"A spectrum needs a square operator, but {type(operator).__name__} is {operator.shape}.")
    if not operator.symmetric:
        raise ArgumentError(
            f"A spectrum needs a symmetric operator, but {operator!r} is not marked as one. Pass symmetric=True where "
            "the operator is made, or look at A.T @ A."
        )
    for name, value, least in (("steps", steps, 2), ("samples", samples, 2), ("largest_exact", largest_exact, 0)):
        if value < least:
            raise ArgumentError(f"{name}={value} was given; it must be at least {least}.")
    if operator.shape[0] == 0:
        raise ArgumentError("The operator has size 0, so it has no eigenvalues.")
    source = generator or torch.Generator(device=operator.device).manual_seed(0)
    parts = _Search(steps, samples, largest_exact, source).parts(operator)
    merged = _merge(parts, samples, operator.dtype)
    if not math.isfinite(merged.largest) or not math.isfinite(merged.smallest):
        raise NonFiniteError("The matrix holds NaN or infinite values: look at the model's parameters and inputs.")
    return merged


@dataclass(frozen=True)
class _Part:
    """Eigenvalues of one block: points ``[k]`` with counts (exact), or ``[samples, k]`` with weights."""

    points: Tensor
    counts: Tensor
    low: float
    high: float
    low_error: float = 0.0
    high_error: float = 0.0

    @property
    def exact(self) -> bool:
        return self.points.dim() == 1

    def scaled(self, c: float) -> _Part:
        ends = ((c * self.low, abs(c) * self.low_error), (c * self.high, abs(c) * self.high_error))
        (low, low_error), (high, high_error) = sorted(ends)
        return _Part(c * self.points, self.counts, low, high, low_error, high_error)


def _known(values: Tensor, counts: Tensor | None = None) -> _Part:
    """An exact part, in double precision where the device has it."""
    values = values.detach().flatten().to(_precise(values))
    if values.numel() and not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "The matrix has eigenvalues that are not finite: look at the model's parameters and inputs."
        )
    counts = torch.ones_like(values) if counts is None else counts.to(values)
    ends = (float(values.min()), float(values.max())) if values.numel() else (math.inf, -math.inf)
    return _Part(values, counts, *ends)


def _precise(t: Tensor) -> torch.dtype:
    return torch.float32 if t.device.type == "mps" else torch.float64


def _factor_eigenvalues(factor: Tensor | DiagonalMatrix | BlockStacks) -> Tensor:
    """Eigenvalues of one side of a Kronecker product, ``[*stack, n]``."""
    if isinstance(factor, BlockStacks):
        return torch.cat([_dense_eigenvalues(s).flatten() for s in factor.stacks])
    return factor.diag if isinstance(factor, DiagonalMatrix) else _dense_eigenvalues(factor)


def _dense_eigenvalues(matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("The matrix holds NaN or infinite values: look at the model's parameters and inputs.")
    return torch.linalg.eigvalsh(symmetrise(matrix.detach().to(_precise(matrix))))


@dataclass(frozen=True)
class _Search:
    """How the spectrum of each kind of operator is found."""

    steps: int
    samples: int
    largest_exact: int
    generator: torch.Generator

    def parts(self, operator: LinearOperator) -> list[_Part]:
        if isinstance(operator, ParameterOperator):
            return self.parts(operator.blocks)  # the same matrix with rows and columns in another order
        if isinstance(operator, Inverse):
            return self.parts(operator.operator)
        if isinstance(operator, BlockDiagonalMatrix):
            return [part for block in operator.blocks.values() for part in self.parts(block)]
        if isinstance(operator, ScaledOperator):
            return [part.scaled(float(operator.scale)) for part in self.parts(operator.operator)]
        if isinstance(operator, IdentityMatrix):
            one = torch.ones(1, dtype=operator.dtype, device=operator.device)
            return [_known(one, one * operator.shape[0])]
        if isinstance(operator, DiagonalMatrix):
            return [_known(operator.diag)]
        if isinstance(operator, KroneckerEigen):
            return [_known(operator.eigenvalues)]
        if isinstance(operator, KroneckerProduct):
            left, right = (_factor_eigenvalues(f) for f in (operator.left, operator.right))
            return [_known(left[..., :, None] * right[..., None, :])]
        if isinstance(operator, LowRankMatrix) and operator.rank < operator.shape[0]:
            return self._low_rank(operator)
        if operator.shape[0] <= self.largest_exact:
            return [_known(_dense_eigenvalues(operator.to_dense()))]
        return [self._lanczos(operator)]

    def _low_rank(self, operator: LowRankMatrix) -> list[_Part]:
        """U Uᵀ has the eigenvalues of UᵀU, and n − r zeros."""
        gram = operator.gram_matrix()
        zeros = _known(gram.new_zeros(1), gram.new_full((1,), operator.shape[0] - operator.rank))
        if operator.rank > self.largest_exact:
            return [self._lanczos(DenseMatrix(symmetrise(gram), symmetric=True)), zeros]
        return [_known(_dense_eigenvalues(gram).clamp(min=0.0)), zeros]

    def _lanczos(self, operator: LinearOperator) -> _Part:
        """Quadrature of the spectral measures of random probes, one at a time to keep a single basis in memory."""
        n, dtype = operator.shape[0], working_dtype(operator.dtype)
        nodes, weights = [], []
        ends: dict[str, tuple[float, Tensor]] = {}

        def product(v: Tensor) -> Tensor:
            return operator.matvec(v).to(dtype)

        for _ in range(self.samples):
            start = rademacher((1, n), operator, self.generator)[0]
            alphas, betas, basis = lanczos(product, start, self.steps)
            stopped = (betas == 0).nonzero()
            k = int(stopped[0, 0]) + 1 if len(stopped) else len(alphas)  # an invariant subspace: the rest is padding
            if not bool(torch.isfinite(alphas).all()):
                raise NonFiniteError("Products with the matrix are NaN or infinite: look at the model's parameters.")
            ritz, vectors = torch.linalg.eigh(tridiagonal(alphas[:k], betas[: k - 1]))
            padding = ritz.new_zeros(min(self.steps, n) - k)
            nodes.append(torch.cat([ritz, padding]))
            weights.append(n * torch.cat([vectors[0].square(), padding]))
            for name, index, sign in (("low", 0, -1), ("high", k - 1, 1)):
                value = float(ritz[index])
                if name not in ends or sign * value > sign * ends[name][0]:
                    ends[name] = (value, vectors[:, index] @ basis[:k])
        precise = _precise(nodes[0])
        errors = {name: float(torch.linalg.vector_norm(product(y) - value * y)) for name, (value, y) in ends.items()}
        return _Part(
            torch.stack(nodes).to(precise),
            torch.stack(weights).to(precise),
            ends["low"][0],
            ends["high"][0],
            errors["low"],
            errors["high"],
        )


def _merge(parts: Sequence[_Part], samples: int, dtype: torch.dtype) -> Spectrum:
    like = parts[0].points
    known, estimated = [p for p in parts if p.exact], [p for p in parts if not p.exact]
    empty, none = like.new_zeros(0), like.new_zeros(samples, 0)
    low = min(parts, key=lambda p: p.low)
    high = max(parts, key=lambda p: p.high)
    size = round(float(sum(p.counts.sum() if p.exact else p.counts.sum(-1).mean() for p in parts)))
    eps = torch.finfo(working_dtype(dtype)).eps
    return Spectrum(
        size=size,
        values=torch.cat([empty, *(p.points for p in known)]),
        counts=torch.cat([empty, *(p.counts for p in known)]),
        nodes=torch.cat([none, *(p.points for p in estimated)], -1),
        weights=torch.cat([none, *(p.counts for p in estimated)], -1),
        largest=high.high,
        smallest=low.low,
        largest_error=high.high_error,
        smallest_error=low.low_error,
        tolerance=math.sqrt(size) * eps * max(abs(high.high), abs(low.low)),
    )


def _check_damping(damping: float) -> float:
    value = float(damping)
    if not math.isfinite(value) or value < 0:
        raise ArgumentError(f"damping={value} was given; it must be finite and not negative.")
    return value


def _filtered(x: Tensor, damping: float, tolerance: float) -> Tensor:
    x = torch.where(x.abs() <= tolerance, x.clamp(min=0.0), x)
    return x / (x + damping)
