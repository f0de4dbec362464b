"""Every operator class against an independently built dense matrix, through the public conformance check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from matrices import close, eye, orthogonal, randn, spd, spd_stack
from torch import Tensor

import natgrad.linalg as la
from natgrad.errors import ArgumentError, NotPositiveDefiniteError, ShapeError, UnsupportedError
from natgrad.testing.operators import check_operator

Case = tuple[la.LinearOperator, Tensor]


def kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(np.kron(a.numpy(), b.numpy()))


def blocks(*parts: Tensor) -> Tensor:
    return torch.from_numpy(scipy.linalg.block_diag(*[part.numpy() for part in parts]))


def stacked_kronecker() -> Case:
    left, right = spd_stack(6, 2).reshape(2, 3, 2, 2), spd_stack(6, 3, seed=9).reshape(2, 3, 3, 3)
    dense = blocks(*[kron(left[i, j], right[i, j]) for i in range(2) for j in range(3)])
    return la.KroneckerProduct(left, right), dense


def kronecker_eigen(left: bool, right: bool) -> Case:
    u, w = orthogonal(3), orthogonal(4, seed=1)
    values = randn(3, 4).square() + 0.1
    basis = kron(u if left else eye(3), w if right else eye(4))
    operator = la.KroneckerEigen(u if left else None, w if right else None, values)
    return operator, basis @ torch.diag(values.reshape(-1)) @ basis.mT


def stacked_eigen() -> Case:
    u, values = torch.stack([orthogonal(2), orthogonal(2, 1)]), randn(2, 2, 3).square() + 0.1
    parts = []
    for i in range(2):
        basis = kron(u[i], eye(3))
        parts.append(basis @ torch.diag(values[i].reshape(-1)) @ basis.mT)
    return la.KroneckerEigen(u, None, values), blocks(*parts)


STACKS = la.BlockStacks((spd_stack(2, 2), spd_stack(1, 3, seed=3)))


def kronecker_of_blocks() -> Case:
    right = la.BlockStacks((spd_stack(2, 1, seed=5) * 2,))
    return la.KroneckerProduct(STACKS, right), kron(
        blocks(*STACKS.stacks[0], *STACKS.stacks[1]), torch.diag(right.diagonal())
    )


def eigen_of_blocks() -> Case:
    basis = la.BlockStacks((torch.stack([orthogonal(2), orthogonal(2, 1)]), orthogonal(1, 2)[None]))
    values = randn(5, 3).square() + 0.1
    dense = kron(blocks(*basis.stacks[0], *basis.stacks[1]), eye(3))
    return la.KroneckerEigen(basis, None, values), dense @ torch.diag(values.reshape(-1)) @ dense.mT


def low_rank_of_operator() -> Case:
    root = randn(12, 3)
    product = la.ProductOperator(la.DiagonalMatrix(randn(12).abs() + 1), la.DenseMatrix(root))
    dense = product.factors[0].diag[:, None] * root  # type: ignore[attr-defined]
    return la.LowRankMatrix(product), dense @ dense.mT


def block_diagonal() -> Case:
    a, left, right, u = spd(3), spd(2, 1), spd(2, 2), randn(5, 2)
    operator = la.BlockDiagonalMatrix(
        {"dense": la.DenseMatrix(a, True), "kron": la.KroneckerProduct(left, right), "low": la.LowRankMatrix(u)}
    )
    return operator, blocks(a, kron(left, right), u @ u.mT)


def lower_precision() -> Case:
    a = spd(5).float()
    return la.DenseMatrix(a, True), a.double()


A, D, U = spd(6), randn(6, seed=4).abs() + 0.2, randn(6, 2, seed=5)
K_LEFT, K_RIGHT = spd(2, 6), spd(3, 7)
K = kron(K_LEFT, K_RIGHT)
I6 = la.IdentityMatrix(6, torch.float64)

CASES: dict[str, Callable[[], Case]] = {
    "identity": lambda: (I6, eye(6)),
    "diagonal": lambda: (la.DiagonalMatrix(D), torch.diag(D)),
    "dense": lambda: (la.DenseMatrix(A, True), A),
    "dense float32": lower_precision,
    "dense 1 x 1": lambda: (la.DenseMatrix(A[:1, :1], True), A[:1, :1]),
    "function": lambda: (la.FunctionOperator(lambda v: v @ A, (6, 6), torch.float64), A),
    "low rank": lambda: (la.LowRankMatrix(U), U @ U.mT),
    "low rank, full": lambda: (la.LowRankMatrix(randn(6, 8)), randn(6, 8) @ randn(6, 8).mT),
    "low rank of an operator": low_rank_of_operator,
    "diagonal plus low rank": lambda: (la.DiagonalPlusLowRank(D, U), torch.diag(D) + U @ U.mT),
    "kronecker of blocks": kronecker_of_blocks,
    "kronecker of blocks and a diagonal": lambda: (
        la.KroneckerProduct(la.DiagonalMatrix(D), STACKS),
        kron(torch.diag(D), STACKS.to_dense()),
    ),
    "kronecker in a basis of blocks": eigen_of_blocks,
    "kronecker": lambda: (la.KroneckerProduct(K_LEFT, K_RIGHT), K),
    "kronecker, left diagonal": lambda: (
        la.KroneckerProduct(la.DiagonalMatrix(D[:2]), K_RIGHT),
        kron(torch.diag(D[:2]), K_RIGHT),
    ),
    "kronecker, right diagonal": lambda: (
        la.KroneckerProduct(K_LEFT, la.DiagonalMatrix(D[:3])),
        kron(K_LEFT, torch.diag(D[:3])),
    ),
    "kronecker, both diagonal": lambda: (
        la.KroneckerProduct(la.DiagonalMatrix(D[:2]), la.DiagonalMatrix(D[:3])),
        torch.diag(kron(D[:2], D[:3])),
    ),
    "kronecker, stacked": stacked_kronecker,
    "kronecker eigen": lambda: kronecker_eigen(True, True),
    "kronecker eigen, no left": lambda: kronecker_eigen(False, True),
    "kronecker eigen, no right": lambda: kronecker_eigen(True, False),
    "kronecker eigen, no bases": lambda: kronecker_eigen(False, False),
    "kronecker eigen, stacked": stacked_eigen,
    "eigen": lambda: (
        la.EigenMatrix(orthogonal(6), D),
        orthogonal(6) @ torch.diag(D) @ orthogonal(6).mT,
    ),
    "cholesky inverse": lambda: (la.CholeskyInverse(torch.linalg.cholesky(A)), torch.linalg.inv(A)),
    "woodbury inverse": lambda: (
        la.LowRankMatrix(U).inverse(damping=0.5).operator,
        torch.linalg.inv(U @ U.mT + 0.5 * eye(6)),
    ),
    "inverse": lambda: (la.DenseMatrix(A, True).inverse(damping=0.2), torch.linalg.inv(A + 0.2 * eye(6))),
    "sum": lambda: (la.KroneckerProduct(K_LEFT, K_RIGHT) + la.LowRankMatrix(U), K + U @ U.mT),
    "sum with identity": lambda: (la.KroneckerProduct(K_LEFT, K_RIGHT) + 0.5 * I6, K + 0.5 * eye(6)),
    "identity first": lambda: (0.5 * I6 + la.LowRankMatrix(U), U @ U.mT + 0.5 * eye(6)),
    "scaled kronecker": lambda: (2.5 * la.KroneckerProduct(K_LEFT, K_RIGHT), 2.5 * K),
    "scaled low rank by a tensor": lambda: (
        torch.tensor(2.5, dtype=torch.float64) * la.LowRankMatrix(U),
        2.5 * U @ U.mT,
    ),
    "scaled low rank": lambda: (2.5 * la.LowRankMatrix(U), 2.5 * U @ U.mT),
    "scaled diagonal plus low rank": lambda: (
        2.5 * la.DiagonalPlusLowRank(D, U),
        2.5 * (torch.diag(D) + U @ U.mT),
    ),
    "negative multiple of a negative": lambda: (-(-1.5 * la.KroneckerProduct(K_LEFT, K_RIGHT)), 1.5 * K),
    "congruence": lambda: (
        la.ProductOperator(
            la.DiagonalMatrix(D), la.KroneckerProduct(K_LEFT, K_RIGHT), la.DiagonalMatrix(D), symmetric=True
        ),
        D[:, None] * K * D,
    ),
    "block diagonal": block_diagonal,
}


@pytest.mark.parametrize("name", CASES)
def test_positive_operators(name: str) -> None:
    operator, dense = CASES[name]()
    # CG serves a matrix known by its action, and gives no log-determinant.
    check_operator(
        operator, dense, damping=0.3, logdet=name != "function", rtol=1e-9 if operator.dtype == torch.float64 else None
    )


@pytest.mark.parametrize(
    "solver", [la.Cholesky(), la.Eigh(), la.CG(tolerance=1e-13), la.NewtonSchulz(), la.LU()], ids=repr
)
@pytest.mark.parametrize("name", CASES)
def test_every_solver_on_every_operator(name: str, solver: la.Solver) -> None:
    operator, dense = CASES[name]()
    b = randn(dense.shape[0], 2, seed=11).to(operator.dtype)
    expected = torch.linalg.solve(dense + 0.3 * eye(dense.shape[0]), b.double())
    inverse = operator.inverse(damping=0.3, solver=solver)
    close(inverse @ b, expected, 1e-8 if operator.dtype == torch.float64 else 1e-4)
    close(
        operator.solve(b[:, 0], damping=0.3, solver=solver),
        expected[:, 0],
        1e-8 if operator.dtype == torch.float64 else 1e-4,
    )


NONSYMMETRIC = randn(5, 5, seed=3) + 3 * eye(5)
RECTANGULAR = randn(4, 7, seed=8)

GENERAL: dict[str, Callable[[], Case]] = {
    "dense": lambda: (la.DenseMatrix(NONSYMMETRIC), NONSYMMETRIC),
    "transposed": lambda: (la.TransposedOperator(la.DenseMatrix(NONSYMMETRIC)), NONSYMMETRIC.mT),
    "function, derived transpose": lambda: (
        la.FunctionOperator(lambda v: v @ NONSYMMETRIC.mT, (5, 5), torch.float64, symmetric=False),
        NONSYMMETRIC,
    ),
    "function, given transpose": lambda: (
        la.FunctionOperator(
            lambda v: v @ NONSYMMETRIC.mT, (5, 5), torch.float64, symmetric=False, rmatvec=lambda v: v @ NONSYMMETRIC
        ),
        NONSYMMETRIC,
    ),
    "product": lambda: (la.DenseMatrix(NONSYMMETRIC) @ la.LowRankMatrix(U[:5]), NONSYMMETRIC @ U[:5] @ U[:5].mT),
    "rectangular": lambda: (la.DenseMatrix(RECTANGULAR), RECTANGULAR),
    "rectangular, derived transpose": lambda: (
        la.FunctionOperator(lambda v: v @ RECTANGULAR.mT, (4, 7), torch.float64, symmetric=False),
        RECTANGULAR,
    ),
    "rectangular product": lambda: (
        la.ProductOperator(la.DenseMatrix(RECTANGULAR), la.DiagonalMatrix(randn(7)), la.DenseMatrix(RECTANGULAR.mT)),
        RECTANGULAR @ torch.diag(randn(7)) @ RECTANGULAR.mT,
    ),
    "rectangular blocks": lambda: (
        la.BlockDiagonalMatrix({"a": la.DenseMatrix(RECTANGULAR), "b": la.DenseMatrix(RECTANGULAR.mT[:2])}),
        blocks(RECTANGULAR, RECTANGULAR.mT[:2]),
    ),
    "negative": lambda: (-la.DenseMatrix(A, True), -A),
    "sum": lambda: (
        la.SumOperator(
            la.DenseMatrix(RECTANGULAR),
            la.FunctionOperator(lambda v: v @ RECTANGULAR.mT, (4, 7), torch.float64, symmetric=False),
        ),
        2 * RECTANGULAR,
    ),
}


@pytest.mark.parametrize("name", GENERAL)
def test_general_operators(name: str) -> None:
    operator, dense = GENERAL[name]()
    check_operator(operator, dense, rtol=1e-9, invertible=name not in {"rectangular product", "negative"}, logdet=False)


def test_the_check_finds_a_wrong_operator() -> None:
    class Wrong(la.DenseMatrix):
        def trace(self) -> Tensor:
            return 1.001 * super().trace()

    with pytest.raises(AssertionError, match="trace"):
        check_operator(Wrong(A, True), A)
    with pytest.raises(AssertionError, match="matvec"):
        check_operator(la.DenseMatrix(A + 1e-5, True), A)
    with pytest.raises(AssertionError, match="symmetric"):
        check_operator(la.DenseMatrix(NONSYMMETRIC, True), NONSYMMETRIC)


@pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf, torch.tensor(-1.0), torch.ones(2), "much"])
@pytest.mark.parametrize(
    "name", ["diagonal", "dense", "low rank", "kronecker", "block diagonal", "sum", "scaled kronecker"]
)
def test_bad_damping(name: str, damping: Any) -> None:
    operator, _ = CASES[name]()
    for call in (operator.inverse, operator.logdet):
        with pytest.raises(ArgumentError, match="damping"):
            call(damping=damping)


@pytest.mark.parametrize(
    "name", ["diagonal", "dense", "low rank", "kronecker", "kronecker eigen", "sum", "block diagonal"]
)
def test_damping_as_a_tensor(name: str) -> None:
    operator, dense = CASES[name]()
    n = dense.shape[0]
    damping = torch.tensor(0.4, dtype=torch.float64)
    b = randn(n)
    close(operator.solve(b, damping=damping), torch.linalg.solve(dense + 0.4 * eye(n), b))
    close(operator.logdet(damping=damping), torch.logdet(dense + 0.4 * eye(n)))


@pytest.mark.parametrize("name", CASES)
def test_wrong_vector_length(name: str) -> None:
    operator, dense = CASES[name]()
    n = dense.shape[0]
    with pytest.raises(ShapeError, match=str(n)):
        operator.matvec(torch.zeros(n + 1, dtype=torch.float64))
    with pytest.raises(ShapeError):
        operator @ torch.zeros(n + 1, dtype=torch.float64)
    with pytest.raises(ShapeError, match="matvec"):
        operator @ torch.zeros(n, 2, 2, dtype=torch.float64)


def test_shapes_must_agree() -> None:
    small, large = la.DenseMatrix(spd(2), True), la.DenseMatrix(spd(3), True)
    for action in (lambda: small + large, lambda: small @ large, lambda: la.SumOperator(small, large)):
        with pytest.raises(ShapeError):
            action()
    with pytest.raises(ShapeError, match="square"):
        la.DenseMatrix(RECTANGULAR).inverse()
    with pytest.raises(TypeError):
        small * "two"  # type: ignore[operator]
    with pytest.raises(TypeError):
        small + 1.0  # type: ignore[operator]


def test_operators_cast_vectors_to_their_dtype() -> None:
    for name, make in CASES.items():
        operator, dense = make()
        v = torch.ones(dense.shape[0], dtype=torch.float32)
        assert operator.matvec(v).dtype == operator.dtype, name


SAVED = [
    "identity",
    "diagonal",
    "dense",
    "low rank",
    "diagonal plus low rank",
    "kronecker",
    "kronecker, left diagonal",
    "kronecker, stacked",
    "kronecker eigen",
    "kronecker eigen, no left",
    "eigen",
    "cholesky inverse",
]


@pytest.mark.parametrize("name", SAVED)
def test_matrices_survive_saving(name: str, tmp_path: Any) -> None:
    operator, dense = CASES[name]()
    path = tmp_path / "matrix.pt"
    torch.save({"kind": operator.kind, "tensors": operator.tensors()}, path)  # type: ignore[attr-defined]
    saved = torch.load(path, weights_only=True)
    restored = la.MATRICES[saved["kind"]].from_tensors(saved["tensors"])
    assert type(restored) is type(operator)
    assert restored.symmetric == operator.symmetric
    v = randn(dense.shape[0])
    assert torch.equal(restored.matvec(v), operator.matvec(v))


def test_every_saved_kind_is_tested() -> None:
    assert {CASES[name]()[0].kind for name in SAVED} == set(la.MATRICES)  # type: ignore[attr-defined]


def test_a_low_rank_operator_cannot_be_saved() -> None:
    with pytest.raises(UnsupportedError, match="to_dense"):
        low_rank_of_operator()[0].tensors()  # type: ignore[attr-defined]


@pytest.mark.parametrize("diag", [[1.0, 0.0], [1.0, -2.0], [1.0, math.nan], [math.inf, 1.0]])
def test_a_diagonal_must_be_positive_to_be_inverted(diag: list[float]) -> None:
    operator = la.DiagonalMatrix(torch.tensor(diag))
    for call in (operator.inverse, operator.logdet):
        with pytest.raises(NotPositiveDefiniteError, match="diagonal"):
            call(damping=0.0)


def test_algebra_simplifies() -> None:
    dense, diagonal, low = la.DenseMatrix(A, True), la.DiagonalMatrix(D), la.LowRankMatrix(U)
    kronecker = la.KroneckerProduct(K_LEFT, K_RIGHT)
    assert isinstance(dense + dense, la.DenseMatrix) and (dense + dense).symmetric
    assert isinstance(dense + diagonal, la.DenseMatrix)
    assert isinstance(dense + 2 * I6, la.DenseMatrix)
    assert isinstance(diagonal + diagonal, la.DiagonalMatrix)
    assert isinstance(diagonal + I6, la.DiagonalMatrix)
    assert isinstance(3 * dense, la.DenseMatrix)
    assert isinstance(low + diagonal, la.DiagonalPlusLowRank)
    assert isinstance(low + low, la.LowRankMatrix)
    assert isinstance(diagonal + (low + diagonal), la.DiagonalPlusLowRank)
    assert isinstance(diagonal @ diagonal, la.DiagonalMatrix)
    assert kronecker @ I6 is kronecker and I6 @ kronecker is kronecker
    assert kronecker.T is kronecker
    merged = (kronecker + diagonal) + (diagonal + kronecker)
    assert isinstance(merged, la.SumOperator) and len(merged.terms) == 3
    assert low.inverse(damping=0.1).report.method == "woodbury"
    assert (low + diagonal).inverse(damping=0.1).report.method == "woodbury"
    assert (kronecker + I6).inverse().report.method == "eigh"


def test_diagonal_is_read_off_in_chunks() -> None:
    matrix = randn(600, 600)
    operator = la.FunctionOperator(lambda v: v @ matrix.mT, (600, 600), torch.float64, symmetric=False)
    assert torch.allclose(operator.diagonal(), matrix.diagonal())
