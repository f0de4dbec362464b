"""Spectra against dense eigenvalues, and Lanczos estimates against matrices whose spectrum is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad import linalg
from natgrad.diagnostics import Spectrum, spectrum
from natgrad.errors import ArgumentError, NonFiniteError, ShapeError
from support import Problem, problem

DOUBLE = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=values.dtype, generator=generator)).Q
    return basis @ torch.diag(values) @ basis.mT


def dense_eigenvalues(matrix: Tensor) -> Tensor:
    """Largest first, by LAPACK through scipy."""
    return torch.from_numpy(scipy.linalg.eigvalsh(matrix.numpy())[::-1].copy())


def check_exact(found: Spectrum, matrix: Tensor) -> None:
    wanted = dense_eigenvalues(matrix)
    top = float(wanted.abs().max())
    assert found.exact
    assert found.size == len(wanted)
    assert found.eigenvalues is not None
    assert float((found.eigenvalues - wanted).abs().max()) <= 1e-12 * top
    assert found.largest == pytest.approx(float(wanted[0]), abs=1e-12 * top)
    assert found.smallest == pytest.approx(float(wanted[-1]), abs=1e-12 * top)
    assert found.trace == pytest.approx(float(matrix.trace()), rel=1e-12, abs=1e-12 * top)
    assert found.trace_error == found.largest_error == found.smallest_error == 0.0
    assert found.support == (found.smallest, found.largest)


# The structures of the Fisher matrix, each against the dense matrix of the same structure.


@pytest.fixture
def mlp() -> Problem:
    return problem("mlp", "categorical")


@pytest.mark.parametrize("structure", [ng.Dense(), ng.Gram(), ng.MatrixFree()], ids=lambda s: s.name)
def test_whole_matrix_has_the_eigenvalues_of_the_dense_fisher(mlp: Problem, structure) -> None:
    check_exact(spectrum(mlp.fisher("exact", structure)), mlp.exact)


@pytest.mark.parametrize(
    "structure", [ng.Diagonal(), ng.BlockDiagonal(), ng.Kronecker(), ng.EigenKronecker()], ids=lambda s: s.name
)
def test_approximations_have_the_eigenvalues_of_their_dense_matrix(mlp: Problem, structure) -> None:
    operator = mlp.fisher("exact", structure)
    check_exact(spectrum(operator), operator.to_dense())


def test_gram_of_a_wide_model_adds_zeros_without_a_dense_matrix() -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 3)).double()
    x = torch.randn(4, 200, dtype=DOUBLE)
    operator = ng.fisher(model, ng.Categorical(), x, structure=ng.Gram())
    size = operator.shape[0]
    assert size > 20_000
    found = spectrum(operator)
    jacobian = torch.cat(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(model(x)[n, c], list(model.parameters()))])[None]
            for n in range(4)
            for c in range(3)
        ]
    )
    p = model(x).softmax(-1).detach()
    blocks = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p))
    wanted = np.sort(scipy.linalg.eigvals((jacobian @ jacobian.mT @ blocks / 4).numpy()).real)[::-1]
    assert found.exact and found.eigenvalues is not None
    assert found.size == size == len(found.eigenvalues)
    assert np.allclose(found.eigenvalues[:8].numpy(), wanted[:8], rtol=1e-9)
    assert float(found.eigenvalues[12:].abs().max()) <= 1e-15
    assert found.effective_dimension(0.0) == 8  # four predictions, two degrees of freedom each
    assert found.condition() == math.inf


def test_hessian_shows_its_negative_eigenvalues(mlp: Problem) -> None:
    operator = ng.hessian(mlp.model, mlp.likelihood, mlp.x, mlp.y)
    values = dense_eigenvalues(operator.to_dense())
    found = spectrum(operator)
    check_exact(found, operator.to_dense())
    negative = values[values < -1e-10]
    assert len(negative) > 0
    assert found.negative_count == len(negative)
    assert found.negative_mass == pytest.approx(float(-negative.sum() / values.abs().sum()), rel=1e-9)
    assert found.condition(0.5 * abs(found.smallest)) == math.inf
    with pytest.raises(ArgumentError, match="smallest eigenvalue"):
        found.effective_dimension(0.5 * abs(found.smallest))
    damping = 2 * abs(found.smallest)
    wanted = float((values / (values + damping)).sum())
    assert found.effective_dimension(damping) == pytest.approx(wanted, rel=1e-9)


# Matrices of the algebra.

OPERATORS = {
    "identity": linalg.IdentityMatrix(7, DOUBLE),
    "diagonal": linalg.DiagonalMatrix(tensor(3.0, -1.0, 0.0, 2.0)),
    "scaled": -2.0 * linalg.FunctionOperator(lambda v: v * tensor(1.0, 2.0, -3.0), (3, 3), DOUBLE),
    "low rank": linalg.LowRankMatrix(torch.arange(15, dtype=DOUBLE).reshape(5, 3) % 4),
    "wide root": linalg.LowRankMatrix(torch.arange(15, dtype=DOUBLE).reshape(3, 5) % 4),
    "diagonal factor": linalg.KroneckerProduct(
        linalg.DiagonalMatrix(tensor(1.0, 0.5)), with_eigenvalues(tensor(0.1, 2.0, 3.0))
    ),
    "inverse": linalg.DenseMatrix(with_eigenvalues(tensor(0.5, 1.0, 4.0)), symmetric=True).inverse(damping=0.5),
    "sum": linalg.LowRankMatrix(torch.ones(4, 1, dtype=DOUBLE)) + linalg.DiagonalMatrix(tensor(1.0, 2.0, 3.0, 4.0)),
    "blocks": linalg.BlockDiagonalMatrix(
        {
            "a": linalg.DenseMatrix(with_eigenvalues(tensor(-1.0, 1.0, 4.0)), symmetric=True),
            "b": linalg.DiagonalMatrix(tensor(9.0, 0.0)),
        }
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_kind_of_operator(name: str) -> None:
    operator = OPERATORS[name]
    check_exact(spectrum(operator), operator.to_dense())


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
def test_figures_of_merit(damping: float) -> None:
    matrix = with_eigenvalues(torch.logspace(-4, 1, 30, dtype=DOUBLE))
    found = spectrum(linalg.DenseMatrix(matrix, symmetric=True))
    damped = matrix + damping * torch.eye(30, dtype=DOUBLE)
    assert found.effective_dimension(damping) == pytest.approx(
        float(torch.linalg.solve(damped, matrix).trace()), rel=1e-9
    )
    assert found.condition(damping) == pytest.approx(float(torch.linalg.cond(damped)), rel=1e-6)
    assert found.anisotropy == pytest.approx(10.0 / float(matrix.trace() / 30), rel=1e-10)
    assert found.negative_count == 0 and found.negative_mass == 0.0
    logdet, error = found.sum_of(lambda x: (x + damping).log())
    assert logdet == pytest.approx(float(torch.linalg.slogdet(damped)[1]), rel=1e-9)
    assert error == 0.0


def test_rounding_is_not_taken_for_negative_curvature() -> None:
    root = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    found = spectrum(linalg.DenseMatrix(root @ root.mT, symmetric=True))
    assert found.eigenvalues is not None and float(found.eigenvalues.min()) < 0
    assert found.negative_count == 0
    assert found.effective_dimension(0.0) == 5


def test_density_integrates_to_one_and_peaks_at_the_eigenvalues() -> None:
    found = spectrum(linalg.DiagonalMatrix(tensor(0.0, 0.0, 0.0, 5.0)))
    grid = torch.linspace(-5, 10, 3001, dtype=DOUBLE)
    density = found.density(grid, 0.1)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-9)
    upper = grid > 2.5
    assert float(torch.trapezoid(density[upper], grid[upper])) == pytest.approx(0.25, abs=1e-9)
    with pytest.raises(ArgumentError, match="width"):
        found.density(grid, 0.0)


# Lanczos.


def large(n: int = 400, seed: int = 3) -> tuple[linalg.FunctionOperator, Tensor]:
    values = torch.cat([torch.logspace(-3, 0, n - 3, dtype=DOUBLE), tensor(5.0, 8.0, 20.0)])
    matrix = with_eigenvalues(values, seed)
    return linalg.FunctionOperator(lambda v: v @ matrix, (n, n), DOUBLE), values


def test_lanczos_finds_the_extremes_and_sums_within_their_errors() -> None:
    operator, values = large()
    found = spectrum(operator, largest_exact=100, steps=60, samples=12)
    assert not found.exact and found.eigenvalues is None
    assert found.size == 400
    assert abs(found.largest - 20.0) <= found.largest_error + 1e-10
    assert found.largest_error < 1e-8
    nearest = float((values - found.smallest).abs().min())
    assert nearest <= found.smallest_error + 1e-12
    assert found.smallest >= float(values.min()) - 1e-12
    matrix = operator.to_dense()
    off = float(matrix.square().sum() - matrix.diagonal().square().sum())
    assert 0.5 < found.trace_error / math.sqrt(2 * off / 12) < 1.8  # Hutchinson's variance, 2 Σ_{i≠j} A_ij²
    assert abs(found.trace - float(values.sum())) < 5 * found.trace_error
    for damping in (0.01, 0.1, 1.0):
        wanted = float((values / (values + damping)).sum())
        estimate, error = found.sum_of(lambda x, damping=damping: x / (x + damping))
        assert found.effective_dimension(damping) == estimate
        assert 0 < error < 0.05 * wanted
        assert abs(estimate - wanted) < 5 * error
    assert found.negative_count == 0


def test_errors_are_honest_over_repetitions() -> None:
    """Standardised errors of the trace scatter like a Student variable: neither all tiny nor large."""
    operator, values = large(150)
    scores = []
    for seed in range(20):
        found = spectrum(operator, largest_exact=10, steps=12, generator=torch.Generator().manual_seed(seed))
        scores.append((found.trace - float(values.sum())) / found.trace_error)
    spread = float(np.mean(np.square(scores)) ** 0.5)
    assert 0.5 < spread < 2.2


def test_lanczos_sees_negative_curvature() -> None:
    values = torch.cat([torch.linspace(0.5, 1, 280, dtype=DOUBLE), torch.linspace(-2, -1, 20, dtype=DOUBLE)])
    matrix = with_eigenvalues(values)
    operator = linalg.FunctionOperator(lambda v: v @ matrix, (300, 300), DOUBLE)
    found = spectrum(operator, largest_exact=10, steps=60, samples=20)
    assert found.smallest == pytest.approx(-2.0, abs=1e-6)
    assert found.negative_count == pytest.approx(20, rel=0.2)
    share = float(values.clamp(max=0).sum() / -values.abs().sum())
    assert found.negative_mass == pytest.approx(share, rel=0.2)


def test_an_invariant_subspace_ends_the_iteration_without_spurious_zeros() -> None:
    """A multiple of the identity ends Lanczos after one step; what is left must not look like zero eigenvalues."""
    found = spectrum(linalg.FunctionOperator(lambda v: 3.0 * v, (50, 50), DOUBLE), largest_exact=10)
    assert found.smallest == pytest.approx(3.0) and found.largest == pytest.approx(3.0)
    assert found.trace == pytest.approx(150.0)
    assert found.anisotropy == pytest.approx(1.0)
    assert found.effective_dimension(0.0) == pytest.approx(50.0)


def test_large_gram_matrix_is_iterated_in_the_small_space() -> None:
    root = torch.randn(500, 60, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    found = spectrum(linalg.LowRankMatrix(root), largest_exact=20, steps=60, samples=4)
    wanted = dense_eigenvalues(root.mT @ root)
    assert not found.exact and found.size == 500
    assert found.largest == pytest.approx(float(wanted[0]), rel=1e-9)
    assert found.smallest == 0.0
    # With as many steps as dimensions the quadrature sees every eigenvalue.
    assert abs(found.trace - float(wanted.sum())) < 5 * found.trace_error
    assert float(found.counts.sum()) == 440


def test_blocks_are_estimated_one_by_one() -> None:
    operator, values = large()
    blocks = linalg.BlockDiagonalMatrix({"big": operator, "small": linalg.DiagonalMatrix(tensor(100.0, 0.0, 1.0))})
    found = spectrum(blocks, largest_exact=100, steps=40)
    assert found.size == 403
    assert found.largest == 100.0 and found.largest_error == 0.0
    assert found.smallest == 0.0 and found.smallest_error == 0.0
    assert abs(found.trace - float(values.sum()) - 101.0) < 5 * found.trace_error
    grid = torch.linspace(-20, 120, 4001, dtype=DOUBLE)
    assert float(torch.trapezoid(found.density(grid, 0.5), grid)) == pytest.approx(1.0, abs=1e-9)


def test_estimates_repeat_and_leave_the_global_stream_alone() -> None:
    operator, _ = large(120)
    before = torch.get_rng_state()
    one, two = (spectrum(operator, largest_exact=10, steps=10) for _ in range(2))
    other = spectrum(operator, largest_exact=10, steps=10, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.trace == two.trace != other.trace


def test_matrix_free_fisher_by_lanczos(mlp: Problem) -> None:
    found = spectrum(mlp.fisher("exact", ng.MatrixFree()), largest_exact=5, steps=40, samples=6)
    wanted = dense_eigenvalues(mlp.exact)
    assert found.largest == pytest.approx(float(wanted[0]), rel=1e-8)
    assert abs(found.trace - float(wanted.sum())) < 5 * found.trace_error + 1e-12


def test_single_precision_is_kept_on_its_feet() -> None:
    values = torch.logspace(-3, 0, 40)
    matrix = with_eigenvalues(values.double()).float()
    found = spectrum(linalg.DenseMatrix(matrix, symmetric=True))
    assert found.trace == pytest.approx(float(values.sum()), rel=1e-5)
    half = spectrum(linalg.DiagonalMatrix(torch.ones(4, dtype=torch.bfloat16)))
    assert half.trace == 4.0


# What a user reads, and what a user gets wrong.


def test_table_shows_the_figures() -> None:
    text = str(spectrum(linalg.DiagonalMatrix(tensor(4.0, 1.0, 1.0))))
    assert "spectrum of 3 eigenvalues (exact)" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    assert rows["largest"] == ["4"] and rows["smallest"] == ["1"] and rows["trace"] == ["6"]
    assert rows["anisotropy"] == ["2"]
    assert [float(v) for v in rows["0.4"]] == pytest.approx([4 / 4.4 + 2 / 1.4, 4.4 / 1.4], rel=1e-3)
    operator, _ = large(120)
    text = str(spectrum(operator, largest_exact=10, steps=10))
    assert "±" in text and "8 probes" in text
    assert "effective dimension" not in str(spectrum(linalg.DiagonalMatrix(tensor(-4.0, 1.0))))
    str(spectrum(linalg.DiagonalMatrix(tensor(0.0, 0.0))))


def test_bad_arguments_are_named() -> None:
    lopsided = linalg.DenseMatrix(torch.ones(2, 3, dtype=DOUBLE))
    with pytest.raises(ShapeError, match=r"\(2, 3\)"):
        spectrum(lopsided)
    with pytest.raises(ArgumentError, match="symmetric"):
        spectrum(linalg.DenseMatrix(tensor(1.0, 2.0, 3.0, 4.0).reshape(2, 2)))
    good = linalg.IdentityMatrix(3, DOUBLE)
    for name, value in (("steps", 1), ("samples", 1), ("largest_exact", -1)):
        with pytest.raises(ArgumentError, match=name):
            spectrum(good, **{name: value})
    for damping in (-1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="damping"):
            spectrum(good).effective_dimension(damping)
        with pytest.raises(ArgumentError, match="damping"):
            spectrum(good).condition(damping)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_matrices_that_are_not_finite_are_refused(value: float) -> None:
    bad = torch.eye(30, dtype=DOUBLE)
    bad[3, 3] = value
    operators = [
        linalg.DenseMatrix(bad, symmetric=True),
        linalg.DiagonalMatrix(bad.diagonal()),
        linalg.LowRankMatrix(bad[:, :5].clone()),
        linalg.KroneckerProduct(bad, torch.eye(2, dtype=DOUBLE)),
        linalg.FunctionOperator(lambda v: v @ bad, (30, 30), DOUBLE),
    ]
    for operator in operators:
        with pytest.raises(NonFiniteError):
            spectrum(operator)
    with pytest.raises(NonFiniteError):
        spectrum(operators[-1], largest_exact=5)
