"""(|A| + λI)⁻¹ against eigenvalues by LAPACK through numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import close, eye, orthogonal, randn, spd, with_spectrum

import natgrad as ng
import natgrad.linalg as la
from natgrad.errors import ArgumentError, NotPositiveDefiniteError, UnsupportedError


def expected_inverse(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    values, vectors = np.linalg.eigh(matrix.numpy())
    return torch.from_numpy((vectors / (np.abs(values) + damping)) @ vectors.T)


def indefinite(n: int, seed: int = 0) -> torch.Tensor:
    return with_spectrum(torch.linspace(-1.0, 2.0, n, dtype=torch.float64), seed)


def function_of(matrix: torch.Tensor) -> la.FunctionOperator:
    return la.FunctionOperator(lambda v: v @ matrix, tuple(matrix.shape), matrix.dtype)  # type: ignore[arg-type]


def eigen_matrix(n: int) -> la.EigenMatrix:
    return la.EigenMatrix(orthogonal(n), torch.linspace(-2.0, 1.0, n, dtype=torch.float64))


def kronecker_eigen() -> la.KroneckerEigen:
    return la.KroneckerEigen(orthogonal(3), orthogonal(4, 1), randn(3, 4))


OPERATORS = {
    "dense": lambda: la.DenseMatrix(indefinite(12), True),
    "one by one": lambda: la.DenseMatrix(-3.0 * eye(1), True),
    "diagonal": lambda: la.DiagonalMatrix(randn(12)),
    "identity": lambda: la.IdentityMatrix(5, torch.float64),
    "eigenbasis": lambda: eigen_matrix(7),
    "kronecker eigenbasis": kronecker_eigen,
    "kronecker stack": lambda: la.KroneckerEigen(None, None, randn(2, 3, 4)),
    "kronecker": lambda: la.KroneckerProduct(spd(3), spd(4)),
    "low rank": lambda: la.LowRankMatrix(randn(9, 2)),
    "blocks": lambda: la.BlockDiagonalMatrix(
        {"a": la.DenseMatrix(indefinite(5), True), "b": la.DiagonalMatrix(randn(3))}
    ),
    "negative multiple": lambda: la.ScaledOperator(la.DenseMatrix(indefinite(6), True), -3.0),
    "tensor multiple": lambda: la.ScaledOperator(eigen_matrix(6), torch.tensor(-0.5, dtype=torch.float64)),
    "zero multiple": lambda: la.ScaledOperator(la.DenseMatrix(indefinite(4), True), 0.0),
    "shifted": lambda: la.SumOperator(la.DenseMatrix(indefinite(6), True), la.IdentityMatrix(6, torch.float64) * 0.7),
    "inverse": lambda: la.DenseMatrix(spd(6), True).inverse(damping=0.1),
    "products": lambda: function_of(indefinite(12)),
    "mean of products": lambda: (function_of(indefinite(9)) + function_of(indefinite(9, 1))) / 3.0,
}


@pytest.mark.parametrize("damping", [1e-2, 1.0, torch.tensor(0.3, dtype=torch.float64)])
@pytest.mark.parametrize("name", OPERATORS)
def test_magnitudes_of_eigenvalues(name: str, damping: float) -> None:
    operator = OPERATORS[name]()
    wanted = expected_inverse(operator.to_dense(), float(damping))
    for inverse in (ng.SaddleFree()(operator, damping), operator.inverse(damping=damping, solver=la.SaddleFree())):
        close(inverse.to_dense(), wanted, 1e-9)
        v = randn(3, operator.shape[0], seed=5)
        close(inverse.matvec(v), v @ wanted, 1e-9)
        assert bool((inverse.quad(v) > 0).all())


def test_positive_definite_matrices_get_the_ordinary_inverse() -> None:
    matrix = spd(20)
    for operator in (la.DenseMatrix(matrix, True), function_of(matrix)):
        close(operator.solve(randn(20), damping=0.1, solver=la.SaddleFree()), _solve(matrix, 0.1, randn(20)), 1e-10)


def _solve(matrix: torch.Tensor, damping: float, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(matrix + damping * eye(len(matrix)), b)


def test_without_damping() -> None:
    matrix = indefinite(6)
    close(ng.SaddleFree()(la.DenseMatrix(matrix, True)).to_dense(), expected_inverse(matrix, 0.0), 1e-9)
    close(ng.SaddleFree()(function_of(matrix)).to_dense(), expected_inverse(matrix, 0.0), 1e-9)


def test_few_krylov_steps_are_as_many_conjugate_gradient_iterations_where_the_matrix_is_positive() -> None:
    matrix, b = spd(25), randn(25)
    for steps in (1, 4, 9):
        ours = function_of(matrix).solve(b, damping=0.2, solver=la.SaddleFree(steps=steps))
        cg, _ = la.conjugate_gradient(lambda v: v @ matrix + 0.2 * v, b, tolerance=0.0, max_iterations=steps)
        close(ours, cg, 1e-9)


def test_a_krylov_space_is_that_of_each_vector_and_its_direction_descends() -> None:
    """Against the projection on an orthonormal basis of span{b, Ab, …}, by QR of the powers."""
    matrix, b = indefinite(40), randn(2, 40)
    inverse = ng.SaddleFree(steps=5)(function_of(matrix), 0.1)
    found = inverse.matvec(b)
    for row, v in zip(found, b, strict=True):
        powers = [v]
        for _ in range(4):
            powers.append(matrix @ powers[-1])
        basis = torch.linalg.qr(torch.stack(powers, 1)).Q
        wanted = basis @ expected_inverse(basis.mT @ matrix @ basis, 0.1) @ basis.mT @ v
        close(row, wanted, 1e-8)
        assert float(row @ v) > 0
    assert inverse.report.iterations == 5
    assert "eigenvalues are negative" in inverse.report.note


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_krylov_vectors_of_any_size(size: float) -> None:
    matrix = indefinite(6)
    solve = ng.SaddleFree()(function_of(matrix), 0.1)
    b = torch.stack([randn(6), torch.zeros(6, dtype=torch.float64)])
    close(solve.matvec(b * size) / size, b @ expected_inverse(matrix, 0.1), 1e-10)
    assert torch.equal(solve.matvec(torch.zeros(6)), torch.zeros(6, dtype=torch.float64))


def test_krylov_space_exhausted_early() -> None:
    """Two distinct eigenvalues and an eigenvector as start: the space has one or two dimensions, not 64."""
    matrix = with_spectrum(torch.tensor([-2.0] * 5 + [3.0] * 5, dtype=torch.float64))
    for b in (randn(10), torch.linalg.eigh(matrix).eigenvectors[:, 0].contiguous()):
        for damping in (0.0, 0.5):
            found = ng.SaddleFree()(function_of(matrix), damping).matvec(b)
            close(found, expected_inverse(matrix, damping) @ b, 1e-9)


def test_half_precision_is_solved_in_float32() -> None:
    matrix = indefinite(5)
    found = ng.SaddleFree()(la.DenseMatrix(matrix.bfloat16(), True), 0.1)
    assert found.dtype == torch.float32
    close(found.to_dense(), expected_inverse(matrix.bfloat16().double(), 0.1), 1e-5)


def test_reports_say_how_many_eigenvalues_were_negative() -> None:
    report = ng.SaddleFree()(la.DiagonalMatrix(torch.tensor([-1.0, 2.0, -3.0])), 0.1).report
    assert (report.method, report.note) == ("saddle-free", "2 of 3 eigenvalues are negative")
    assert ng.SaddleFree()(la.DenseMatrix(spd(3), True)).report.note == ""


@pytest.mark.parametrize("name", ["dense", "diagonal", "eigenbasis", "kronecker eigenbasis", "identity"])
def test_a_checkpoint_holds_the_inverse(name: str) -> None:
    found = ng.SaddleFree()(OPERATORS[name](), 0.1).operator
    if isinstance(found, la.ScaledOperator):  # of the identity
        found = found.operator
    again = la.MATRICES[found.kind].from_tensors(found.tensors())  # type: ignore[attr-defined]
    v = randn(found.shape[0])
    assert torch.equal(again.matvec(v), found.matvec(v))


def test_operators_that_cannot_be_served() -> None:
    with pytest.raises(ArgumentError, match="real eigenvalues"):
        ng.SaddleFree()(la.DenseMatrix(randn(3, 3)), 0.1)
    with pytest.raises(ArgumentError, match="SaddleFree would make an operator of size 30000 dense"):
        ng.SaddleFree()(la.DenseMatrix(torch.zeros(1, 1).expand(30000, 30000), True), 0.1)
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        ng.SaddleFree()(la.DenseMatrix(torch.zeros(3, 3), True))
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        ng.SaddleFree()(la.DiagonalMatrix(torch.zeros(3)))
    with pytest.raises(UnsupportedError, match="slq_trace"):
        ng.SaddleFree()(function_of(spd(3)), 0.1).logdet()
    with pytest.raises(ArgumentError, match="steps"):
        ng.SaddleFree(steps=0)
    with pytest.raises(ArgumentError, match="damping"):
        ng.SaddleFree()(la.DenseMatrix(spd(3), True), -1.0)


def test_large_eigenbases_are_served_entry_by_entry() -> None:
    operator = la.KroneckerEigen(None, None, torch.ones(100, 100) * -2.0)
    report = ng.SaddleFree()(operator, 1.0).report
    assert report.method == "saddle-free"
    close(ng.SaddleFree()(operator, 1.0).matvec(torch.ones(10_000)), torch.full((10_000,), 1 / 3), 1e-6)
