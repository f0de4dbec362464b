"""Kronecker matrices beyond the common operator tests: damping, stacks, guards, conventions."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import close, eye, orthogonal, randn, spd, spd_stack, with_spectrum
from torch import Tensor

import natgrad.linalg as la
from natgrad.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError

REAL_CHOLESKY = torch.linalg.cholesky_ex


def test_row_major_convention() -> None:
    left, right, x = spd(2), spd(3, 1), randn(2, 3)
    close(la.KroneckerProduct(left, right).matvec(x.reshape(-1)), (left @ x @ right.mT).reshape(-1), 1e-14)


def test_damped_factors_match_martens_and_grosse() -> None:
    left, right, damping = 5.0 * spd(2), spd(3, 1), 0.07
    pi = math.sqrt((float(right.trace()) / 3) / (float(left.trace()) / 2))
    damped = la.KroneckerProduct(left, right).damped_factors(damping)
    assert isinstance(damped.left, Tensor) and isinstance(damped.right, Tensor)
    close(damped.left, left + math.sqrt(damping) / pi * eye(2), 1e-14)
    close(damped.right, right + math.sqrt(damping) * pi * eye(3), 1e-14)


def test_pi_makes_the_damping_independent_of_how_the_scale_is_shared() -> None:
    left, right = spd(2), spd(3, 1)
    one = la.KroneckerProduct(left, right).damped_factors(0.1).to_dense()
    other = la.KroneckerProduct(1e4 * left, 1e-4 * right).damped_factors(0.1).to_dense()
    close(other, one, 1e-12)


def test_damped_factors_of_a_stack_are_those_of_its_elements() -> None:
    left, right = spd_stack(3, 2) * torch.tensor([1.0, 9.0, 0.1])[:, None, None], spd_stack(3, 4, seed=5)
    damped = la.KroneckerProduct(left, right).damped_factors(torch.tensor(0.2, dtype=torch.float64))
    for i in range(3):
        single = la.KroneckerProduct(left[i], right[i]).damped_factors(0.2)
        close(damped.left[i], single.left, 1e-14)  # type: ignore[index, arg-type]
        close(damped.right[i], single.right, 1e-14)  # type: ignore[index, arg-type]


def test_damped_diagonal_factors() -> None:
    diag, right = torch.tensor([1.0, 3.0], dtype=torch.float64), spd(3)
    damped = la.KroneckerProduct(la.DiagonalMatrix(diag), right).damped_factors(0.1)
    full = la.KroneckerProduct(torch.diag(diag), right).damped_factors(0.1)
    close(damped.to_dense(), full.to_dense(), 1e-14)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_pi_is_one_where_a_trace_is_unusable(value: float) -> None:
    bad, good = torch.full((2, 2), value, dtype=torch.float64), spd(3)
    for product in (la.KroneckerProduct(bad, good), la.KroneckerProduct(good, bad)):
        damped = product.damped_factors(0.25)
        factor = damped.right if product.left is bad else damped.left
        close(factor, good + 0.5 * eye(3), 1e-14)  # type: ignore[arg-type]
    both = la.KroneckerProduct(torch.zeros(2, 2), torch.zeros(3, 3)).damped_factors(0.25)
    close(both.to_dense(), 0.25 * eye(6).float(), 1e-6)


def test_one_dead_element_of_a_stack_leaves_the_others_alone() -> None:
    left = torch.stack([torch.zeros(2, 2, dtype=torch.float64), spd(2)])
    right = spd_stack(2, 3)
    inverse = la.KroneckerProduct(left, right).damped_factors(0.1).cholesky_inverse()
    assert bool(torch.isfinite(inverse.to_dense()).all())
    single = la.KroneckerProduct(left[1], right[1]).damped_factors(0.1).cholesky_inverse()
    close(inverse.to_dense()[6:, 6:], single.to_dense(), 1e-12)


@pytest.mark.parametrize("stack", [(), (2,), (2, 2)])
def test_cholesky_inverse(stack: tuple[int, ...]) -> None:
    count = math.prod(stack)
    left, right = spd_stack(count, 3).reshape(*stack, 3, 3), spd_stack(count, 4, seed=7).reshape(*stack, 4, 4)
    product = la.KroneckerProduct(left, right)
    inverse = product.cholesky_inverse()
    assert isinstance(inverse, la.KroneckerProduct) and inverse.stack == stack
    close(inverse.to_dense(), torch.linalg.inv(product.to_dense()), 1e-11)


def test_cholesky_inverse_uses_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    def mock(matrix: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
        factor, info = REAL_CHOLESKY(matrix, **kwargs)  # type: ignore[arg-type]
        return factor, info + int(matrix.dtype == torch.float32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", mock)
    left, right = spd(3).float(), spd(2).float()
    inverse = la.KroneckerProduct(left, right).cholesky_inverse()
    assert inverse.dtype == torch.float32
    close(inverse.to_dense(), torch.linalg.inv(torch.kron(left.double(), right.double())), 1e-5)


def test_a_non_finite_factor_is_refused() -> None:
    bad = spd(3)
    bad[1, 1] = math.nan
    for action in ("cholesky_inverse", "inverse", "logdet", "eigen"):
        with pytest.raises(NonFiniteError):
            getattr(la.KroneckerProduct(spd(2), bad), action)()
    with pytest.raises(NonFiniteError):
        la.KroneckerProduct(bad, spd(2)).inverse(damping=0.1)


def test_two_indefinite_factors_do_not_make_a_positive_matrix() -> None:
    # The product of two negative eigenvalues is positive: the factors themselves must be checked.
    bad = with_spectrum(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError):
        la.KroneckerProduct(bad, bad).inverse(damping=10.0)
    with pytest.raises(NotPositiveDefiniteError):
        la.KroneckerProduct(bad, bad).inverse()


@pytest.mark.parametrize("damping", [1e-12, 1e-6, 1.0, 1e6])
def test_exact_inverse_of_rank_deficient_factors(damping: float) -> None:
    zeros = torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    left, right = with_spectrum(zeros), with_spectrum(zeros + 0.5, 1)
    u, w = torch.linalg.eigh(left).eigenvectors, torch.linalg.eigh(right).eigenvectors
    exact = 1.0 / (torch.outer(zeros, zeros + 0.5) + damping)
    b = randn(16)
    expected = (u @ ((u.mT @ b.reshape(4, 4) @ w) * exact) @ w.mT).reshape(-1)
    condition = (float(exact.max()) / float(exact.min())) if damping < 1 else 1.0
    for solver in (None, la.Cholesky(), la.Eigh()):
        x = la.KroneckerProduct(left, right).solve(b, damping=damping, solver=solver)
        close(x, expected, max(1e-12, 2e-16 * condition))


def test_eigen_reproduces_the_product() -> None:
    product = la.KroneckerProduct(spd_stack(2, 3), spd_stack(2, 2, seed=4))
    eigen, left, right = product.eigen()
    close(eigen.to_dense(), product.to_dense(), 1e-13)
    close(left[:, :, None] * right[:, None, :], eigen.eigenvalues, 1e-14)


def test_eigen_coordinates_round_trip() -> None:
    eigen = la.KroneckerEigen(orthogonal(3), orthogonal(4, 1), torch.ones(3, 4, dtype=torch.float64))
    x = randn(3, 4)
    close(eigen.to_basis(x), orthogonal(3).mT @ x @ orthogonal(4, 1), 1e-14)
    close(eigen.from_basis(eigen.to_basis(x)), x, 1e-14)


def test_shapes_and_dtypes_are_checked() -> None:
    with pytest.raises(ShapeError, match="left"):
        la.KroneckerProduct(torch.zeros(2, 3), spd(3))
    with pytest.raises(ShapeError, match="right"):
        la.KroneckerProduct(spd(3), torch.zeros(3))
    with pytest.raises(ShapeError, match="stack"):
        la.KroneckerProduct(spd_stack(2, 3), spd(3))
    with pytest.raises(ShapeError, match="stack"):
        la.KroneckerProduct(spd_stack(2, 3), la.DiagonalMatrix(torch.ones(3)))
    with pytest.raises(ArgumentError, match="float32"):
        la.KroneckerProduct(spd(3), spd(2).float())
    with pytest.raises(ShapeError, match="right_basis"):
        la.KroneckerEigen(None, orthogonal(3), torch.ones(2, 2))
    with pytest.raises(ShapeError, match="eigenvalues"):
        la.KroneckerEigen(None, None, torch.ones(2))


def test_matvec_never_builds_the_big_matrix() -> None:
    # 2¹⁴ squared float32 numbers would be a gigabyte; the two factors are 128 KB.
    left, right = spd(128).float(), spd(128, 1).float()
    x = randn(128, 128).float()
    close(la.KroneckerProduct(left, right).matvec(x.reshape(-1)), (left @ x @ right).reshape(-1), 1e-5)


def test_matvec_does_not_copy_a_transposed_batch_result_wrongly() -> None:
    left, right = spd_stack(2, 3), spd_stack(2, 4, seed=3)
    product = la.KroneckerProduct(left, right)
    batch = randn(5, 24)
    rows = torch.stack([product.matvec(row) for row in batch])
    close(product.matvec(batch), rows, 1e-14)
    close(product.matvec(batch.reshape(1, 5, 24)), rows[None], 1e-14)


def test_matvec_is_differentiable() -> None:
    left, right = spd(2).requires_grad_(), spd(3).requires_grad_()
    v = randn(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, u: la.KroneckerProduct(a, b).matvec(u), (left, right, v))
