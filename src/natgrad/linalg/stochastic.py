"""Estimates of trace, diagonal, log-determinant and spectrum from products with A alone.

Every function takes a ``torch.Generator`` and draws from nothing else. Standard errors are those of the mean over the
probe vectors, given A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, NotPositiveDefiniteError
from natgrad.linalg.iterations import lanczos, tridiagonal
from natgrad.linalg.operator import LinearOperator, check_damping
from natgrad.linalg.psd import working_dtype


def rademacher(shape: tuple[int, ...], operator: LinearOperator, generator: torch.Generator) -> Tensor:
    """Independent ±1 entries in the operator's working dtype and device; drawn where the generator lives."""
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return (bits * 2 - 1).to(device=operator.device, dtype=working_dtype(operator.dtype))


def hutchinson_trace(
    operator: LinearOperator, *, samples: int = 32, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Unbiased estimate of tr A and its standard error: the mean of zᵀAz over Rademacher z (Hutchinson 1990).

    For symmetric A the variance is 2 Σ_{i≠j} A_ij² / samples: zero for a diagonal matrix.
    """
    n = _check(operator, samples, least=2)
    z = rademacher((samples, n), operator, generator)
    return _mean(torch.linalg.vecdot(z, operator.matvec(z).to(z.dtype)))


def hutch_plus_plus_trace(
    operator: LinearOperator, *, samples: int = 48, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Unbiased estimate of tr A for symmetric A from ``samples`` products (Meyer, Musco, Musco & Woodruff 2021).

    A third of the products finds an approximate range Q of A, a third gives tr(QᵀAQ) exactly, and a third estimates the
    rest by Hutchinson's method. Exact (up to rounding) where the rank of A is at most ``samples // 3``. The standard
    error is that of the last part, given Q.
    """
    n = _check(operator, samples, least=6)
    if not operator.symmetric:
        raise ArgumentError(f"hutch_plus_plus_trace needs a symmetric operator, but {operator!r} is not.")
    third = min(samples // 3, n)
    rest = samples - 2 * third
    sketch = operator.matvec(rademacher((third, n), operator, generator))
    q = torch.linalg.qr(sketch.to(working_dtype(operator.dtype)).mT).Q
    captured = torch.linalg.vecdot(q.mT, operator.matvec(q.mT).to(q.dtype)).sum()
    z = rademacher((rest, n), operator, generator)
    z = z - (z @ q) @ q.mT
    remainder, error = _mean(torch.linalg.vecdot(z, operator.matvec(z).to(z.dtype)))
    return captured + remainder, error


def hutchinson_diagonal(
    operator: LinearOperator, *, samples: int = 32, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Unbiased estimate of the diagonal ``[n]`` and its standard errors ``[n]``: the mean of z ∘ Az over Rademacher z.

    Bekas, Kokiopoulou & Saad 2007; for Rademacher probes the normaliser z ∘ z is one. The variance of entry i is
    Σ_{j≠i} A_ij² / samples.
    """
    n = _check(operator, samples, least=2)
    z = rademacher((samples, n), operator, generator)
    return _mean(z * operator.matvec(z).to(z.dtype))


def slq_trace(
    operator: LinearOperator,
    function: Callable[[Tensor], Tensor],
    *,
    samples: int = 16,
    steps: int = 32,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Estimate of tr f(A) for symmetric A and its standard error, by stochastic Lanczos quadrature.

    ``function`` maps eigenvalues to values elementwise. Each Rademacher probe gives a Gauss quadrature with ``steps``
    nodes, exact for polynomials f of degree 2 steps − 1; the standard error covers the probes, not the quadrature.
    Ubaru, Chen & Saad 2017.
    """
    nodes, weights = _quadrature(operator, samples, steps, generator)
    values = function(nodes)
    # Weightless nodes come from an invariant subspace that was found early; f may be infinite there.
    terms = torch.where(weights > 0, weights * values, 0.0)
    return _mean(operator.shape[0] * terms.sum(-1))


def slq_logdet(
    operator: LinearOperator,
    *,
    damping: float | Tensor = 0.0,
    samples: int = 16,
    steps: int = 32,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Estimate of log det(A + damping I) for symmetric positive definite A + damping I, and its standard error.

    Raises NotPositiveDefiniteError where a quadrature node (a Ritz value) plus damping is not positive.
    """
    damping = check_damping(damping)

    def log(nodes: Tensor) -> Tensor:
        return (nodes + damping).log()

    estimate, error = slq_trace(operator, log, samples=samples, steps=steps, generator=generator)
    if not bool(torch.isfinite(estimate)):
        raise NotPositiveDefiniteError(
            f"slq_logdet: A + damping I (damping {float(damping):.3g}) has no finite log-determinant: it has zero or "
            "negative eigenvalues, or A is not finite. Use more damping."
        )
    return estimate, error


@dataclass(frozen=True)
class SpectralDensity:
    """Eigenvalue density of a symmetric matrix as a weighted set of points.

    ``nodes`` and ``weights`` ``[samples, k]``: each row of weights sums to one. ``size`` is n, so that ``size`` times a
    sum of weights is an expected number of eigenvalues.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def smoothed(self, grid: Tensor, width: float | Tensor) -> Tensor:
        """The density at ``grid [m]`` with each node widened to a Gaussian of standard deviation ``width``."""
        if not float(width) > 0.0:
            raise ArgumentError(f"width must be positive, but is {float(width)}.")
        distance = (grid.reshape(-1, 1, 1) - self.nodes) / width
        kernel = torch.exp(-0.5 * distance.square()) / (width * math.sqrt(2.0 * math.pi))
        return (kernel * self.weights).sum(-1).mean(-1)

    def count(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Estimated number of eigenvalues in [low, high], and its standard error."""
        inside = (self.nodes >= low) & (self.nodes <= high)
        return _mean(self.size * torch.where(inside, self.weights, 0.0).sum(-1))


def spectral_density(
    operator: LinearOperator, *, samples: int = 8, steps: int = 64, generator: torch.Generator
) -> SpectralDensity:
    """Spectral density of a symmetric operator by stochastic Lanczos quadrature (Lin, Saad & Yang 2016)."""
    nodes, weights = _quadrature(operator, samples, steps, generator)
    return SpectralDensity(nodes, weights, operator.shape[0])


def _quadrature(
    operator: LinearOperator, samples: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights ``[samples, k]`` of the spectral measures of Rademacher probes."""
    n = _check(operator, samples, least=2)
    if not operator.symmetric:
        raise ArgumentError(f"Lanczos quadrature needs a symmetric operator, but {operator!r} is not.")
    start = rademacher((samples, n), operator, generator)
    alphas, betas, _ = lanczos(lambda v: operator.matvec(v).to(v.dtype), start, steps)
    nodes, vectors = torch.linalg.eigh(tridiagonal(alphas, betas))
    return nodes, vectors[..., 0, :].square()


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the first axis."""
    return values.mean(0), values.std(0, correction=1) / math.sqrt(values.shape[0])


def _check(operator: LinearOperator, samples: int, least: int) -> int:
    if samples < least:
        raise ArgumentError(f"samples must be at least {least} for a standard error, but is {samples}.")
    return operator._require_square("A stochastic estimate")
