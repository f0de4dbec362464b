"""Woodbury: accuracy over 30 orders of magnitude of damping, determinant lemma, operator roots."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import close, eye, orthogonal, randn, spd
from torch import Tensor

import natgrad.linalg as la
from natgrad.errors import ArgumentError, NotPositiveDefiniteError, ShapeError, UnsupportedError

DAMPINGS = [1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12]


def root_with(singular: Tensor, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """U [n, r] with the given singular values, and its left singular vectors [n, r]."""
    r = singular.shape[0]
    basis = orthogonal(n, seed)[:, :r]
    return (basis * singular) @ orthogonal(r, seed + 1).mT, basis


def exact_solve(basis: Tensor, singular: Tensor, damping: float, b: Tensor) -> Tensor:
    inside = basis.mT @ b
    return basis @ (inside / (singular.square() + damping)) + (b - basis @ inside) / damping


@pytest.mark.parametrize("damping", DAMPINGS)
def test_solve_of_a_general_vector(damping: float) -> None:
    singular = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    root, basis = root_with(singular, 20)
    b = randn(20, seed=3)
    close(la.LowRankMatrix(root).solve(b, damping=damping), exact_solve(basis, singular, damping, b), 1e-11)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_solve_in_the_range_survives_tiny_damping(damping: float) -> None:
    # b = U c, as the gradient of the observed batch: the textbook formula (b − U y)/λ cancels to nothing here.
    singular = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    root, basis = root_with(singular, 20)
    b = root @ randn(3, seed=4)
    x = la.LowRankMatrix(root).solve(b, damping=damping)
    inside = basis.mT @ b / (singular.square() + damping)
    close(basis.mT @ x, inside, 1e-9)
    # What is left outside the range is the rounding of b itself, magnified by 1/λ, and no more.
    outside = x - basis @ (basis.mT @ x)
    assert float(outside.norm()) <= 50 * 2.3e-16 * float(b.norm()) * max(1.0 / damping, 1.0)


def test_float32_with_small_damping_is_as_good_in_the_range() -> None:
    singular = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    root, basis = root_with(singular, 200)
    b = root @ randn(3, seed=4)
    x = la.LowRankMatrix(root.float()).solve(b.float(), damping=1e-5).double()
    close(basis.mT @ x, basis.mT @ b / (singular.square() + 1e-5), 1e-4)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_complement_is_divided_by_the_damping(damping: float) -> None:
    root, basis = root_with(torch.tensor([1.0, 2.0], dtype=torch.float64), 10)
    b = randn(10)
    b = b - basis @ (basis.mT @ b)
    b = b - basis @ (basis.mT @ b)
    close(la.LowRankMatrix(root).solve(b, damping=damping), b / damping, 1e-12)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_logdet_trace_and_diagonal(damping: float) -> None:
    singular = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    root, basis = root_with(singular, 12)
    operator = la.LowRankMatrix(root)
    logdet = (singular.square() + damping).log().sum() + 9 * math.log(damping)
    close(operator.logdet(damping=damping), logdet, 1e-12)
    inverse = operator.inverse(damping=damping)
    close(inverse.trace(), (1 / (singular.square() + damping)).sum() + 9 / damping, 1e-12)
    weights = 1 / (singular.square() + damping) - 1 / damping
    close(inverse.diagonal(), basis.square() @ weights + 1 / damping, 1e-11)


def test_rank_deficient_root() -> None:
    column = randn(8, 1)
    root = torch.cat([column, 2 * column, torch.zeros(8, 1, dtype=torch.float64)], dim=1)
    dense = root @ root.mT
    b = randn(8, 2, seed=1)
    for damping in (1e-8, 1e-2, 10.0):
        expected = torch.linalg.solve(dense + damping * eye(8), b)
        close(la.LowRankMatrix(root).solve(b, damping=damping), expected, max(1e-13, 1e-15 * 50 / damping))


def test_without_damping() -> None:
    with pytest.raises(ArgumentError, match="damping > 0"):
        la.LowRankMatrix(randn(5, 2)).inverse()
    with pytest.raises(ArgumentError, match="damping > 0"):
        la.LowRankMatrix(randn(5, 2)).logdet()
    root = randn(4, 9)
    close(la.LowRankMatrix(root).inverse().to_dense(), torch.linalg.inv(root @ root.mT), 1e-10)
    assert la.LowRankMatrix(root).inverse().report.method == "cholesky"


def test_zero_root() -> None:
    b = randn(5)
    close(la.LowRankMatrix(torch.zeros(5, 2, dtype=torch.float64)).solve(b, damping=0.5), 2 * b, 1e-14)
    close(la.LowRankMatrix(torch.zeros(5, 0, dtype=torch.float64)).solve(b, damping=0.5), 2 * b, 1e-14)


class CountingRoot(la.LinearOperator):
    """A root that knows its gram matrix and refuses to be made dense."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self.matrix = matrix
        self.grams = 0

    def matvec(self, v: Tensor) -> Tensor:
        return v @ self.matrix.mT

    def rmatvec(self, v: Tensor) -> Tensor:
        return v @ self.matrix

    def gram(self) -> Tensor:
        self.grams += 1
        return self.matrix.mT @ self.matrix

    def to_dense(self) -> Tensor:
        raise AssertionError("the root was made dense")


def test_a_root_with_a_gram_is_never_made_dense() -> None:
    matrix = randn(9, 3)
    root = CountingRoot(matrix)
    operator = la.LowRankMatrix(root)
    dense = matrix @ matrix.mT
    damped = dense + 0.2 * eye(9)
    b = randn(9, 2)
    close(operator @ b, dense @ b, 1e-13)
    close(operator.trace(), dense.trace(), 1e-13)
    close(operator.diagonal(), dense.diagonal(), 1e-13)
    close(operator.quad(b.mT), torch.einsum("ik,ij,jk->k", b, dense, b), 1e-12)
    close(operator.solve(b, damping=0.2), torch.linalg.solve(damped, b), 1e-12)
    close(operator.logdet(damping=0.2), torch.logdet(damped), 1e-12)
    close(operator.inverse(damping=0.2).trace(), torch.linalg.inv(damped).trace(), 1e-12)
    close((3.0 * operator).solve(b, damping=0.2), torch.linalg.solve(3 * dense + 0.2 * eye(9), b), 1e-12)
    close((operator + la.IdentityMatrix(9, torch.float64)).solve(b), torch.linalg.solve(dense + eye(9), b), 1e-12)
    assert root.grams == 1


def test_woodbury_solver_names_what_it_needs() -> None:
    root = randn(6, 2)
    b = randn(6)
    expected = torch.linalg.solve(2 * root @ root.mT + 0.1 * eye(6), b)
    scaled = torch.tensor(2.0, dtype=torch.float64) * la.LowRankMatrix(root)
    close(scaled.solve(b, damping=0.1, solver=la.Woodbury()), expected, 1e-12)
    with pytest.raises(UnsupportedError, match="LowRankMatrix"):
        la.DenseMatrix(spd(3), True).inverse(solver=la.Woodbury())


@pytest.mark.parametrize("span", [1.0, 1e4, 1e8])
def test_diagonal_plus_low_rank_with_an_uneven_diagonal(span: float) -> None:
    diag = torch.logspace(0, math.log10(span), 8, dtype=torch.float64)
    root = randn(8, 3)
    dense = torch.diag(diag) + root @ root.mT
    operator = la.DiagonalMatrix(diag) + la.LowRankMatrix(root)
    b = randn(8)
    x = operator.solve(b)
    assert float((dense @ x - b).norm()) <= 1e-11 * float(b.norm())
    close(operator.logdet(), torch.logdet(dense), 1e-12)
    close(operator.logdet(solver=la.Cholesky()), torch.logdet(dense), 1e-12)


def test_diagonal_plus_low_rank_needs_a_positive_diagonal() -> None:
    operator = la.DiagonalPlusLowRank(torch.tensor([1.0, -0.5], dtype=torch.float64), randn(2, 1))
    with pytest.raises(NotPositiveDefiniteError, match="smallest entry"):
        operator.inverse()
    assert bool(torch.isfinite(operator.solve(randn(2), damping=1.0)).all())
    with pytest.raises(ShapeError):
        la.DiagonalPlusLowRank(torch.ones(3), torch.ones(2, 1))
    with pytest.raises(ShapeError, match=r"\[n, r\]"):
        la.LowRankMatrix(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_roots_are_inverted_in_float32(dtype: torch.dtype) -> None:
    root = randn(20, 3).to(dtype)
    inverse = la.LowRankMatrix(root).inverse(damping=0.1)
    assert inverse.dtype == torch.float32
    dense = root.double() @ root.double().mT + 0.1 * eye(20)
    close(inverse.to_dense(), torch.linalg.inv(dense), 1e-4)
    close(la.LowRankMatrix(root).logdet(damping=0.1), torch.logdet(dense), 1e-4)


SWEEP = [10.0**k for k in range(-8, 3)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("damping", SWEEP)
def test_float32_is_nearly_as_good_as_with_a_correction_of_every_vector(damping: float, share: float) -> None:
    # ``share`` of the vector's norm lies in the range of U, where the textbook formula cancels.
    singular = torch.logspace(-1, 0.5, 20, dtype=torch.float64)
    root, basis = root_with(singular, 300)
    root, inside = root.float(), basis @ randn(20, seed=4)
    outside = randn(300, seed=5)
    outside -= basis @ (basis.mT @ outside)
    b = (share * inside / inside.norm() + (1 - share**2) ** 0.5 * outside / outside.norm()).float()
    exact, large = root.double(), b.double()  # the oracle solves for the very numbers that float32 was given
    x = torch.linalg.solve(exact @ exact.mT + damping * eye(300), large)
    inverse = la.LowRankMatrix(root).inverse(damping=damping).operator
    assert isinstance(inverse, la.WoodburyInverse)
    always = la.WoodburyInverse(root, inverse.factor, damping, inverse.corrections)

    def errors(found: Tensor) -> tuple[Tensor, Tensor]:
        off = found.double() - x
        return off.norm() / x.norm(), (exact.mT @ off).norm() / (exact.mT @ x).norm().clamp_min(1e-30)

    (error, seen), (corrected, corrected_seen) = errors(inverse.matvec(b)), errors(always.matvec(b))
    assert error <= 2 * corrected + 2e-6
    assert share == 0.0 or seen <= 2 * corrected_seen + 1e-4


class Counting(la.LinearOperator):
    """A root that counts its products with vectors."""

    def __init__(self, root: Tensor) -> None:
        super().__init__((root.shape[0], root.shape[1]), root.dtype, root.device)
        self.root, self.products = root, 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return v @ self.root.mT

    def rmatvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return v @ self.root

    def gram(self) -> Tensor:
        return self.root.mT @ self.root


def test_only_what_cancels_is_corrected() -> None:
    singular = torch.logspace(-1, 0.5, 20, dtype=torch.float64)
    root, _ = root_with(singular, 300)
    counting = Counting(root.float())
    matrix = la.LowRankMatrix(counting)

    def products(b: Tensor, damping: float) -> int:
        before = counting.products
        matrix.solve(b.float(), damping=damping)
        return counting.products - before

    general, inside = randn(300, seed=5), root @ randn(20, seed=4)
    assert products(general, 1e-2) == 2
    assert products(inside, 1e-2) == 4
    assert products(torch.stack([general, inside], 1), 1e-2) == 4
    assert products(general, 1e-5) == 4  # too much damage in the range for a look at the norm to tell
    assert products(inside, 1e2) == 2


def test_a_transform_that_cannot_ask_corrects_all() -> None:
    root, _ = root_with(torch.logspace(-1, 0.5, 20, dtype=torch.float64), 300)
    inverse = la.LowRankMatrix(root.float()).inverse(damping=1e-2)
    rows = randn(3, 300, seed=6).float()
    close(torch.vmap(inverse.matvec)(rows).double(), torch.stack([inverse.matvec(r) for r in rows]).double(), 1e-5)
