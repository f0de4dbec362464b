"""Bases that follow a matrix: as near as Householder's QR brings them, orthonormal, or none at all."""

from __future__ import annotations

import pytest
import torch
from matrices import close, eye, orthogonal, randn, with_spectrum
from torch import Tensor

from natgrad.linalg.orthogonal import cholesky_qr, followed

DTYPES = [torch.float64, torch.float32]


def moved(n: int, spread: float, distance: float) -> tuple[Tensor, Tensor]:
    """A matrix whose spectrum spans ``spread`` decades, and the eigenvectors of one at a ``distance`` from it."""
    old = with_spectrum(torch.logspace(-spread, 0, n, dtype=torch.float64), seed=1)
    vectors = torch.randn(n, 4 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sample = torch.linalg.cholesky(old) @ vectors
    return (1 - distance) * old + distance * (sample @ sample.mT) / (4 * n), torch.linalg.eigh(old)[1]


def off_diagonal(matrix: Tensor, basis: Tensor) -> float:
    turned = basis.double().mT @ matrix.double() @ basis.double()
    return float((turned - turned.diagonal().diag()).norm())


def householder(matrix: Tensor, basis: Tensor) -> Tensor:
    y = matrix @ basis
    return torch.linalg.qr(y[:, (basis * y).sum(0).argsort(descending=True)]).Q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("spread", [0.3, 2.0, 3.5])
@pytest.mark.parametrize("n", [1, 2, 60])
def test_it_is_as_near_as_the_qr_of_householder(n: int, spread: float, distance: float, dtype: torch.dtype) -> None:
    matrix, basis = (t.to(dtype) for t in moved(n, spread, distance))
    found = followed(matrix, basis, 0.0)
    assert found is not None and found.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert float((found.double().mT @ found.double() - eye(n)).norm()) <= 8 * n * eps
    reference = off_diagonal(matrix, householder(matrix, basis))
    assert off_diagonal(matrix, found) <= 1.05 * reference + 8 * n * eps * float(matrix.norm())
    if n > 2:  # one step brings it nearer, with every column where it was
        assert reference < off_diagonal(matrix, basis)
        assert bool(((found * basis).sum(0) > 0).all())


def test_steps_converge_to_the_eigenvectors() -> None:
    matrix, basis = moved(12, 3.0, 0.4)
    for _ in range(60):
        new = followed(matrix, basis, 0.0)
        assert new is not None
        basis = new
    close(basis.mT @ matrix @ basis, torch.linalg.eigvalsh(matrix).diag(), 1e-8)


def test_a_basis_that_still_diagonalises_is_kept() -> None:
    matrix, basis = moved(30, 2.0, 0.4)
    part = off_diagonal(matrix, basis) / float(matrix.norm())
    assert followed(matrix, basis, 1.01 * part) is basis
    assert followed(1e-20 * matrix, basis, 1.01 * part) is basis
    assert followed(matrix, basis, 0.99 * part) is not basis


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_pass_restores_what_the_first_one_loses(dtype: torch.dtype) -> None:
    # Unit columns at small angles: the condition of their Gram matrix is about 1e5.
    y = (torch.ones(20, 20, dtype=torch.float64) + 3e-2 * randn(20, 20)).to(dtype)
    q = cholesky_qr(y)
    assert q is not None
    assert float((q.double().mT @ q.double() - eye(20)).norm()) <= 100 * torch.finfo(dtype).eps
    reference = torch.linalg.qr(y.double())
    close(q.double(), reference.Q * reference.R.diagonal().sign(), 3e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_has_no_basis_in_this_precision_breaks_down(dtype: torch.dtype) -> None:
    zero = randn(6, 6).to(dtype)
    zero[:, 2] = 0
    parallel = randn(6, 6).to(dtype)
    parallel[:, 4] = -2 * parallel[:, 1]
    poisoned = randn(6, 6).to(dtype)
    poisoned[3, 3] = float("nan")
    for y in (zero, parallel, poisoned, torch.zeros(6, 6, dtype=dtype)):
        assert cholesky_qr(y) is None


def test_what_is_no_basis_is_not_followed() -> None:
    matrix, basis = moved(10, 1.0, 0.2)
    for wrong in (torch.zeros_like(basis), 2 * basis, basis[:, [0] * 10], basis * float("nan")):
        assert followed(matrix, wrong, 0.9) is None
    uneven = torch.tensor([1.2, 0.75], dtype=torch.float64).sqrt()  # as long as a basis as a whole
    assert followed(eye(2), (uneven * (2 / uneven.square().sum()).sqrt()).diag(), 0.9) is None
    assert followed(matrix * float("inf"), basis, 0.9) is None
    assert followed(torch.zeros_like(matrix), orthogonal(10), 0.0) is not None
