"""Stochastic estimators: unbiased within standard errors, honest errors, exact where theory says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrices import close, eye, generator, randn, spd, with_spectrum
from torch import Tensor

import natgrad.linalg as la
from natgrad.errors import ArgumentError, NotPositiveDefiniteError

MATRIX = spd(30)
OPERATOR = la.DenseMatrix(MATRIX, True)
Estimator = Callable[[torch.Generator], tuple[Tensor, Tensor]]

SCALAR: dict[str, tuple[Estimator, float]] = {
    "hutchinson": (lambda g: la.hutchinson_trace(OPERATOR, samples=20, generator=g), float(MATRIX.trace())),
    "hutch++": (lambda g: la.hutch_plus_plus_trace(OPERATOR, samples=24, generator=g), float(MATRIX.trace())),
    "slq, trace of the square root": (
        lambda g: la.slq_trace(OPERATOR, torch.sqrt, samples=20, steps=25, generator=g),
        float(torch.linalg.eigvalsh(MATRIX).sqrt().sum()),
    ),
    "slq logdet": (
        lambda g: la.slq_logdet(OPERATOR, damping=0.1, samples=20, steps=25, generator=g),
        float(torch.logdet(MATRIX + 0.1 * eye(30))),
    ),
}


@pytest.mark.parametrize("name", SCALAR)
def test_unbiased_with_honest_standard_errors(name: str) -> None:
    estimator, truth = SCALAR[name]
    runs = [estimator(generator(seed)) for seed in range(150)]
    estimates = torch.stack([estimate for estimate, _ in runs])
    errors = torch.stack([error for _, error in runs])
    spread = float(estimates.std())
    assert abs(float(estimates.mean()) - truth) < 4 * spread / math.sqrt(150)
    # The reported error is the actual spread of the estimates, to the accuracy of 150 repetitions.
    assert 0.8 < float(errors.square().mean().sqrt()) / spread < 1.25


def test_diagonal_is_unbiased_with_honest_standard_errors() -> None:
    runs = [la.hutchinson_diagonal(OPERATOR, samples=10, generator=generator(seed)) for seed in range(200)]
    estimates, errors = (torch.stack(parts) for parts in zip(*runs, strict=True))
    spread = estimates.std(0)
    assert float(((estimates.mean(0) - MATRIX.diagonal()).abs() / (spread / math.sqrt(200))).max()) < 4.5
    ratio = errors.square().mean(0).sqrt() / spread
    assert float(ratio.min()) > 0.75 and float(ratio.max()) < 1.35


def test_hutchinson_variance_is_the_textbook_one() -> None:
    off = (MATRIX - torch.diag(MATRIX.diagonal())).square().sum()
    _, error = la.hutchinson_trace(OPERATOR, samples=4000, generator=generator())
    assert float(error) == pytest.approx(math.sqrt(2 * float(off) / 4000), rel=0.08)


def test_hutchinson_is_exact_for_diagonal_matrices() -> None:
    operator = la.DiagonalMatrix(randn(20))
    estimate, error = la.hutchinson_trace(operator, samples=2, generator=generator())
    close(estimate, operator.diag.sum(), 1e-13)
    assert float(error) < 1e-13
    diagonal, _ = la.hutchinson_diagonal(operator, samples=2, generator=generator())
    close(diagonal, operator.diag, 1e-14)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_hutch_plus_plus_is_exact_for_low_rank(rank: int) -> None:
    root = randn(50, rank)
    estimate, error = la.hutch_plus_plus_trace(la.LowRankMatrix(root), samples=24, generator=generator())
    close(estimate, root.square().sum(), 1e-12)
    assert float(error) < 1e-12 * float(estimate)


def test_hutch_plus_plus_beats_hutchinson_on_a_decaying_spectrum() -> None:
    operator = la.DenseMatrix(with_spectrum(torch.logspace(0, -6, 60, dtype=torch.float64)), True)
    truth = float(operator.trace())

    def error(estimator: Callable[..., Any]) -> float:
        values = [float(estimator(operator, samples=30, generator=generator(s))[0]) for s in range(30)]
        return math.sqrt(sum((value - truth) ** 2 for value in values) / 30)

    assert error(la.hutch_plus_plus_trace) < 0.5 * error(la.hutchinson_trace)


def test_hutch_plus_plus_of_a_tiny_matrix() -> None:
    operator = la.DenseMatrix(spd(2), True)
    close(la.hutch_plus_plus_trace(operator, samples=12, generator=generator())[0], operator.trace(), 1e-12)


def test_products_are_counted_as_promised() -> None:
    count = 0

    def action(v: Tensor) -> Tensor:
        nonlocal count
        count += v.shape[0]
        return v @ MATRIX

    la.hutch_plus_plus_trace(la.FunctionOperator(action, (30, 30), torch.float64), samples=20, generator=generator())
    assert count == 20


def test_slq_is_exact_for_polynomials() -> None:
    # Three nodes integrate degree five exactly, so that only the probes' own error is left: none for z z^T diagonal.
    operator = la.DiagonalMatrix(randn(12).abs() + 0.5)
    estimate, error = la.slq_trace(operator, lambda e: e**5, samples=3, steps=3, generator=generator())
    close(estimate, (operator.diag**5).sum(), 1e-11)
    assert float(error) < 1e-10


def test_slq_handles_an_early_invariant_subspace() -> None:
    operator = la.IdentityMatrix(10, torch.float64)
    estimate, error = la.slq_logdet(3.0 * operator, samples=4, steps=6, generator=generator())
    close(estimate, torch.tensor(10 * math.log(3.0), dtype=torch.float64), 1e-12)
    assert float(error) < 1e-12
    low = la.LowRankMatrix(randn(40, 3))
    estimate, error = la.slq_logdet(low, damping=0.1, samples=60, steps=10, generator=generator())
    assert abs(float(estimate - low.logdet(damping=0.1))) < 4 * float(error)


def test_slq_logdet_of_an_indefinite_matrix() -> None:
    operator = la.DenseMatrix(with_spectrum(torch.linspace(-1, 1, 10, dtype=torch.float64)), True)
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        la.slq_logdet(operator, generator=generator())
    assert bool(torch.isfinite(la.slq_logdet(operator, damping=2.0, generator=generator())[0]))


def test_spectral_density() -> None:
    eigenvalues = torch.cat([torch.full((30,), 1.0), torch.full((10,), 5.0)]).double()
    density = la.spectral_density(la.DenseMatrix(with_spectrum(eigenvalues), True), samples=200, generator=generator())
    assert torch.allclose(density.weights.sum(-1), torch.ones(200, dtype=torch.float64))
    count, error = density.count(4.5, 5.5)
    assert abs(float(count) - 10) < 4 * float(error) and float(error) < 0.5
    grid = torch.linspace(-3, 9, 2001, dtype=torch.float64)
    smooth = density.smoothed(grid, 0.3)
    assert float(torch.trapezoid(smooth, grid)) == pytest.approx(1.0, abs=1e-6)
    peak = 0.75 / (0.3 * math.sqrt(2 * math.pi))
    assert float(smooth[(grid - 1.0).abs().argmin()]) == pytest.approx(peak, rel=0.05)
    with pytest.raises(ArgumentError, match="width"):
        density.smoothed(grid, 0.0)


def test_only_the_given_generator_is_used() -> None:
    calls: list[Callable[[torch.Generator], Any]] = [
        lambda g: la.hutchinson_trace(OPERATOR, generator=g),
        lambda g: la.hutch_plus_plus_trace(OPERATOR, generator=g),
        lambda g: la.hutchinson_diagonal(OPERATOR, generator=g),
        lambda g: la.slq_logdet(OPERATOR, generator=g),
    ]
    before = torch.get_rng_state()
    for call in calls:
        first, again, other = call(generator(3))[0], call(generator(3))[0], call(generator(4))[0]
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_operators_are_estimated_in_float32() -> None:
    operator = la.DenseMatrix(MATRIX.bfloat16(), True)
    estimate, _ = la.hutchinson_trace(operator, samples=50, generator=generator())
    assert estimate.dtype == torch.float32
    assert float(estimate) == pytest.approx(float(MATRIX.trace()), rel=0.1)


def test_arguments() -> None:
    general = la.DenseMatrix(randn(3, 3))
    with pytest.raises(ArgumentError, match="at least 2"):
        la.hutchinson_trace(OPERATOR, samples=1, generator=generator())
    with pytest.raises(ArgumentError, match="at least 6"):
        la.hutch_plus_plus_trace(OPERATOR, samples=5, generator=generator())
    for estimator in (la.hutch_plus_plus_trace, la.slq_logdet, la.spectral_density):
        with pytest.raises(ArgumentError, match="symmetric"):
            estimator(general, generator=generator())
    with pytest.raises(ArgumentError, match="square"):
        la.hutchinson_trace(la.DenseMatrix(randn(2, 3)), generator=generator())
