"""Solvers: agreement, reports, limits, and the arguments they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matrices import close, eye, randn, spd, with_spectrum

import natgrad.linalg as la
from natgrad.errors import (
    ArgumentError,
    ConvergenceError,
    NonFiniteError,
    NotPositiveDefiniteError,
    UnsupportedError,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e4])
def test_woodbury_cholesky_eigh_cg_and_newton_schulz_agree(n: int, damping: float) -> None:
    root = randn(n, max(n // 3, 1))
    operator = la.LowRankMatrix(root)
    b = randn(n, 3, seed=1)
    expected = torch.linalg.solve(root @ root.mT + damping * eye(n), b)
    for solver in (la.Woodbury(), la.Cholesky(), la.Eigh(), la.CG(tolerance=1e-14), la.NewtonSchulz()):
        close(operator.solve(b, damping=damping, solver=solver), expected, 1e-8)


def test_solvers_are_values() -> None:
    assert la.CG(tolerance=1e-3) == la.CG(tolerance=1e-3) and hash(la.Cholesky()) == hash(la.Cholesky())
    for solver in (la.Cholesky(), la.Eigh(), la.CG(), la.Woodbury(), la.NewtonSchulz(), la.LU()):
        assert isinstance(solver, la.Solver)
        with pytest.raises(AttributeError):
            solver.tolerance = 1.0  # type: ignore[misc, union-attr]


def test_defaults() -> None:
    matrix = spd(4)
    assert la.DenseMatrix(matrix, True).default_solver() == la.Cholesky()
    assert la.DenseMatrix(matrix).default_solver() == la.LU()
    assert la.DenseMatrix(torch.zeros(1, 1).expand(9000, 9000), True).default_solver() == la.Cholesky()
    function = la.FunctionOperator(lambda v: v @ matrix, (4, 4), torch.float64)
    assert function.default_solver() == la.CG()
    assert (function + la.LowRankMatrix(randn(4, 1))).default_solver() == la.CG()
    assert (2.0 * function).default_solver() == la.CG()
    assert la.FunctionOperator(lambda v: v, (9000, 9000), torch.float32).T.default_solver() == la.CG()


def test_a_user_defined_solver_works_everywhere() -> None:
    def jacobi(operator: la.LinearOperator, damping: Any = 0.0) -> la.Inverse:
        return la.Inverse(la.DiagonalMatrix(1 / (operator.diagonal() + damping)), la.SolveReport("jacobi"))

    matrix = spd(3)
    blocks = la.BlockDiagonalMatrix({"a": la.DenseMatrix(matrix, True), "b": 2.0 * la.DenseMatrix(matrix, True)})
    inverse = blocks.inverse(damping=0.1, solver=jacobi)
    close(inverse.to_dense(), torch.diag(1 / (torch.cat([matrix.diagonal(), 2 * matrix.diagonal()]) + 0.1)), 1e-14)
    assert inverse.report.method == "jacobi"


def test_dense_methods_refuse_large_operators() -> None:
    huge = la.FunctionOperator(lambda v: v, (50_000, 50_000), torch.float32)
    for solver in (la.Cholesky(), la.Eigh(), la.NewtonSchulz(), la.LU()):
        with pytest.raises(ArgumentError, match="CG"):
            huge.inverse(damping=1.0, solver=solver)
    # Structures have factored inverses at any size.
    assert la.DiagonalMatrix(torch.ones(50_000)).inverse(solver=la.Cholesky()).shape == (50_000, 50_000)


def test_symmetric_methods_refuse_general_matrices() -> None:
    general = la.DenseMatrix(randn(3, 3))
    for solver in (la.Cholesky(), la.Eigh(), la.CG(), la.NewtonSchulz()):
        with pytest.raises(ArgumentError, match="symmetric"):
            general.inverse(solver=solver)


def test_eigh_floor() -> None:
    matrix = with_spectrum(tensor(-1.0, 1e-9, 1.0, 4.0))
    basis = torch.linalg.eigh(matrix).eigenvectors
    inverse = la.DenseMatrix(matrix, True).inverse(solver=la.Eigh(floor=0.1))
    close(inverse.to_dense(), (basis * (1 / tensor(0.4, 0.4, 1.0, 4.0))) @ basis.mT, 1e-12)
    assert float(inverse.report.jitter) == pytest.approx(1.4)
    with pytest.raises(NotPositiveDefiniteError, match="Use damping above 1"):
        la.DenseMatrix(matrix, True).inverse(solver=la.Eigh())
    for floor in (0.0, -1.0, 1.0, math.nan):
        with pytest.raises(ArgumentError, match="floor"):
            la.Eigh(floor=floor)
    with pytest.raises(NotPositiveDefiniteError, match="zero or negative"):
        la.DenseMatrix(-matrix @ matrix, True).inverse(solver=la.Eigh(floor=0.1))


def test_eigh_of_a_singular_matrix_reports_what_it_raised() -> None:
    matrix = with_spectrum(tensor(0.0, 1.0, 2.0))
    inverse = la.DenseMatrix(matrix, True).inverse(solver=la.Eigh())
    assert bool(torch.isfinite(inverse.to_dense()).all()) and float(inverse.report.jitter) > 0.0


def test_cholesky_reports_its_jitter() -> None:
    matrix = with_spectrum(tensor(-1e-15, 1.0, 2.0))
    inverse = la.DenseMatrix(matrix, True).inverse()
    assert inverse.report.method == "cholesky" and 0 < float(inverse.report.jitter) < 1e-10


def test_lu() -> None:
    matrix = randn(5, 5)
    operator = la.DenseMatrix(matrix)
    damped = matrix + 0.3 * eye(5)
    inverse = operator.inverse(damping=0.3)
    assert inverse.report.method == "lu" and not inverse.symmetric
    close(inverse.T.to_dense(), torch.linalg.inv(damped).mT, 1e-11)
    with pytest.raises(NotPositiveDefiniteError, match="singular"):
        la.DenseMatrix(torch.ones(3, 3)).inverse()


@pytest.mark.parametrize("seed", range(4))
def test_logdet_of_a_general_matrix(seed: int) -> None:
    matrix = randn(5, 5, seed=seed)
    expected = torch.linalg.slogdet(matrix)
    actual = la.DenseMatrix(matrix).logdet()
    if expected.sign > 0:
        close(actual, expected.logabsdet, 1e-10)
    else:
        assert math.isnan(actual)


# --- conjugate gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale_a", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("scale_b", [1e-12, 1.0, 1e12])
def test_cg_iterates_do_not_depend_on_scale(scale_a: float, scale_b: float, dtype: torch.dtype) -> None:
    matrix, b = spd(12).to(dtype), randn(12).to(dtype)
    for steps in (1, 3, 6):
        solver = la.CG(tolerance=0.0, max_iterations=steps)
        base = la.DenseMatrix(matrix, True).solve(b, solver=solver)
        scaled = la.DenseMatrix(matrix * scale_a, True).solve(b * scale_b, solver=solver)
        close(scaled.double() * (scale_a / scale_b), base.double(), 1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_cg_stops_at_the_relative_tolerance(scale: float) -> None:
    matrix, b = spd(40), randn(40) * scale
    inverse = la.DenseMatrix(matrix, True).inverse(solver=la.CG(tolerance=1e-4))
    x = inverse.matvec(b)
    assert inverse.report.residual is not None and inverse.report.residual <= 1e-4
    assert float((matrix @ x - b).norm()) <= 1.01e-4 * float(b.norm())
    one_fewer = la.CG(tolerance=1e-4, max_iterations=inverse.report.iterations - 1)
    early = la.DenseMatrix(matrix, True).inverse(solver=one_fewer)
    assert float((matrix @ early.matvec(b) - b).norm()) > 1e-4 * float(b.norm())
    assert "iteration limit" in early.report.note


def test_cg_takes_as_many_steps_as_there_are_eigenvalues() -> None:
    matrix = with_spectrum(tensor(1.0, 1.0, 1.0, 5.0, 5.0, 9.0))
    inverse = la.DenseMatrix(matrix, True).inverse(solver=la.CG(tolerance=1e-12))
    close(inverse.matvec(randn(6)), torch.linalg.solve(matrix, randn(6)), 1e-11)
    assert inverse.report.iterations == 3


def test_cg_treats_each_vector_of_a_batch_on_its_own() -> None:
    matrix = spd(10)
    batch = torch.stack([randn(10), 1e9 * randn(10, seed=1), torch.zeros(10, dtype=torch.float64)])
    batch = torch.cat([batch, torch.linalg.eigh(matrix).eigenvectors[:, 3][None]])
    x = la.DenseMatrix(matrix, True).inverse(solver=la.CG()).matvec(batch)
    for row, solution in zip(batch, x, strict=True):
        close(solution, torch.linalg.solve(matrix, row), 1e-9)
    assert torch.equal(x[2], torch.zeros(10, dtype=torch.float64))


def test_cg_with_a_zero_right_hand_side_does_no_work() -> None:
    inverse = la.DenseMatrix(spd(4), True).inverse(solver=la.CG())
    assert torch.equal(inverse.matvec(torch.zeros(4)), torch.zeros(4, dtype=torch.float64))
    assert inverse.report.iterations == 0 and inverse.report.residual == 0.0


def test_preconditioning_with_the_inverse_converges_at_once() -> None:
    matrix, b = with_spectrum(torch.logspace(-4, 4, 30, dtype=torch.float64)), randn(30)
    exact = la.DenseMatrix(matrix, True).inverse()
    inverse = la.DenseMatrix(matrix, True).inverse(solver=la.CG(tolerance=1e-6, preconditioner=1e-7 * exact))
    close(inverse.matvec(b), torch.linalg.solve(matrix, b), 1e-5)
    assert inverse.report.iterations <= 3


def test_jacobi_preconditioning_helps_a_badly_scaled_matrix() -> None:
    scale = torch.logspace(0, 4, 30, dtype=torch.float64)
    matrix, b = scale[:, None] * spd(30) * scale, randn(30)
    plain = la.DenseMatrix(matrix, True).inverse(solver=la.CG(tolerance=1e-8))
    jacobi = la.CG(tolerance=1e-8, preconditioner=la.DiagonalMatrix(1 / matrix.diagonal()))
    better = la.DenseMatrix(matrix, True).inverse(solver=jacobi)
    plain.matvec(b)
    close(better.matvec(b), torch.linalg.solve(matrix, b), 1e-5)
    assert better.report.iterations < plain.report.iterations


@pytest.mark.parametrize("spectrum", [(-1.0, 1.0, 2.0), (-1.0, -2.0, -3.0), (0.0, 0.0, 0.0)])
def test_cg_stops_at_bad_curvature_with_the_last_iterate(spectrum: tuple[float, ...]) -> None:
    matrix = with_spectrum(tensor(*spectrum))
    inverse = la.DenseMatrix(matrix, True).inverse(solver=la.CG())
    x = inverse.matvec(randn(3))
    assert bool(torch.isfinite(x).all())
    assert "curvature" in inverse.report.note
    if max(spectrum) <= 0.0:
        assert torch.equal(x, torch.zeros(3, dtype=torch.float64))


def test_cg_on_a_singular_but_consistent_system() -> None:
    matrix = with_spectrum(tensor(0.0, 1.0, 2.0, 5.0))
    b = matrix @ randn(4)
    x = la.DenseMatrix(matrix, True).inverse(solver=la.CG(tolerance=1e-10)).matvec(b)
    close(matrix @ x, b, 1e-9)


def test_bad_curvature_in_one_vector_does_not_stop_the_others() -> None:
    matrix = torch.diag(tensor(-1.0, 1.0, 2.0, 3.0))
    batch = torch.stack([tensor(1.0, 0.0, 0.0, 0.0), tensor(0.0, 1.0, 1.0, 1.0)])
    inverse = la.DenseMatrix(matrix, True).inverse(solver=la.CG())
    x = inverse.matvec(batch)
    close(x[1], tensor(0.0, 1.0, 1 / 2, 1 / 3), 1e-12)
    assert "1 of 2" in inverse.report.note


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_cg_with_non_finite_numbers(value: float) -> None:
    matrix = spd(3)
    with pytest.raises(ConvergenceError, match="non-finite"):
        la.DenseMatrix(matrix, True).solve(tensor(1.0, value, 1.0), solver=la.CG())
    matrix[0, 0] = value
    with pytest.raises(ConvergenceError, match="non-finite"):
        la.DenseMatrix(matrix, True).solve(tensor(1.0, 1.0, 1.0), solver=la.CG())


def test_strict_cg() -> None:
    operator = la.DenseMatrix(with_spectrum(torch.logspace(-6, 0, 20, dtype=torch.float64)), True)
    assert bool(torch.isfinite(operator.solve(randn(20), solver=la.CG(max_iterations=2))).all())
    with pytest.raises(ConvergenceError, match="2 iterations"):
        operator.solve(randn(20), solver=la.CG(max_iterations=2, strict=True))


def test_cg_arguments() -> None:
    for bad in ({"tolerance": -1.0}, {"tolerance": 1.0}, {"tolerance": math.nan}, {"max_iterations": 0}):
        with pytest.raises(ArgumentError):
            la.CG(**bad)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="tolerance"):
        la.conjugate_gradient(lambda v: v, randn(3), tolerance=2.0)
    with pytest.raises(UnsupportedError, match="slq_logdet"):
        la.DenseMatrix(spd(3), True).logdet(solver=la.CG())


def test_cg_matches_scipy() -> None:
    import scipy.sparse.linalg

    matrix, b = spd(25), randn(25)
    for steps in (1, 4, 9):
        ours, _ = la.conjugate_gradient(lambda v: v @ matrix, b, tolerance=0.0, max_iterations=steps)
        theirs, _ = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=0.0, maxiter=steps)
        close(ours, torch.from_numpy(theirs), 1e-9)


# --- Newton–Schulz ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_newton_schulz_converges(condition: float, scale: float) -> None:
    matrix = with_spectrum(torch.logspace(-math.log10(condition), 0, 20, dtype=torch.float64)) * scale
    inverse, report = la.newton_schulz_inverse(matrix)
    close(inverse, torch.linalg.inv(matrix), 1e-15 * condition * 1e3)
    assert report.iterations <= math.log2(condition * 20) + 10
    assert torch.equal(inverse, inverse.mT)


def test_newton_schulz_batched_and_float32() -> None:
    stack = torch.stack([spd(5), 100 * spd(5, 1)])
    inverse, _ = la.newton_schulz_inverse(stack)
    close(inverse[0], torch.linalg.inv(stack[0]), 1e-12)
    close(inverse[1], torch.linalg.inv(stack[1]), 1e-12)
    close(la.newton_schulz_inverse(spd(5).float())[0], torch.linalg.inv(spd(5)), 1e-4)
    assert la.newton_schulz_inverse(spd(5).bfloat16())[0].dtype == torch.float32


def test_newton_schulz_says_when_it_cannot() -> None:
    for spectrum in (tensor(-1.0, 1.0, 2.0), tensor(0.0, 1.0, 2.0), tensor(1e-14, 1.0, 1.0)):
        with pytest.raises(ConvergenceError, match="Cholesky"):
            la.newton_schulz_inverse(with_spectrum(spectrum))
    with pytest.raises(ConvergenceError, match="1 iterations"):
        la.newton_schulz_inverse(spd(5), max_iterations=1)
    bad = spd(3)
    bad[0, 0] = math.nan
    with pytest.raises(ConvergenceError):
        la.newton_schulz_inverse(bad)


# --- eigenvalue iterations ----------------------------------------------------------------------------------------


def test_power_iteration() -> None:
    matrix = torch.stack([with_spectrum(tensor(0.5, 1.0, 4.0)), with_spectrum(tensor(-5.0, 1.0, 2.0), 1)])
    value, vector = la.power_iteration(lambda v: (matrix @ v[..., None])[..., 0], randn(2, 3), tolerance=1e-9)
    close(value, tensor(4.0, -5.0), 1e-12)
    close((matrix @ vector[..., None])[..., 0], value[:, None] * vector, 1e-7)
    zero, _ = la.power_iteration(lambda v: 0.0 * v, randn(3))
    assert float(zero) == 0.0
    with pytest.raises(NonFiniteError):
        la.power_iteration(lambda v: v, torch.zeros(3))


@pytest.mark.parametrize("steps", [1, 5, 30, 99])
def test_lanczos(steps: int) -> None:
    matrix = with_spectrum(torch.logspace(-3, 3, 30, dtype=torch.float64))
    start = randn(2, 30)
    alphas, betas, basis = la.lanczos(lambda v: v @ matrix, start, steps)
    k = min(steps, 30)
    assert alphas.shape == (2, k) and betas.shape == (2, k - 1) and basis.shape == (2, k, 30)
    identity = eye(k).expand(2, k, k)
    assert float((basis @ basis.mT - identity).abs().max()) < 1e-13
    close(basis @ matrix @ basis.mT, la.tridiagonal(alphas, betas), 1e-12)
    close(basis[:, 0], start / start.norm(dim=-1, keepdim=True), 1e-14)
    if k == 30:
        close(torch.linalg.eigvalsh(la.tridiagonal(alphas, betas))[0], torch.linalg.eigvalsh(matrix), 1e-12)


def test_lanczos_in_an_invariant_subspace() -> None:
    matrix = with_spectrum(tensor(1.0, 1.0, 1.0, 4.0, 4.0))
    alphas, betas, basis = la.lanczos(lambda v: v @ matrix, randn(5), 5)
    assert torch.equal(betas[1:], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(basis[2:], torch.zeros(3, 5, dtype=torch.float64))
    close(torch.linalg.eigvalsh(la.tridiagonal(alphas[:2], betas[:1])), tensor(1.0, 4.0), 1e-12)


def test_lanczos_arguments() -> None:
    with pytest.raises(ArgumentError, match="steps"):
        la.lanczos(lambda v: v, randn(3), 0)
    with pytest.raises(NonFiniteError, match="start"):
        la.lanczos(lambda v: v, torch.zeros(3), 2)
