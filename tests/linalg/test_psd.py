"""Factorisations of positive matrices: the failure ladder, rung by rung, with injected failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrices import close, eye, randn, spd, spd_stack, with_spectrum
from torch import Tensor

import natgrad.linalg as la
from natgrad.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError
from natgrad.linalg import psd

REAL_CHOLESKY = torch.linalg.cholesky_ex
REAL_EIGH = torch.linalg.eigh


def failing_cholesky(fails: Callable[[Tensor], bool], calls: list[torch.dtype]) -> Callable[..., Any]:
    """cholesky_ex that reports failure where ``fails`` says so, and records the dtype of each call."""

    def mock(matrix: Tensor, **kwargs: Any) -> Any:
        calls.append(matrix.dtype)
        factor, info = REAL_CHOLESKY(matrix, **kwargs)
        return (torch.full_like(factor, math.nan), info + 1) if fails(matrix) else (factor, info)

    return mock


@pytest.mark.parametrize("damping", [0.0, 0.3, torch.tensor(0.3)])
def test_cholesky_of_a_healthy_matrix(damping: float | Tensor) -> None:
    matrix = spd(7)
    factor, jitter = la.safe_cholesky(matrix, damping)
    close(
        factor, torch.linalg.cholesky(matrix + float(damping) * eye(7)), 1e-7 if isinstance(damping, Tensor) else 1e-14
    )
    assert jitter.shape == () and float(jitter) == 0.0


def test_inputs_are_left_alone() -> None:
    matrix = spd(4)
    copy = matrix.clone()
    la.safe_cholesky(matrix, 0.5)
    la.safe_eigh(matrix)
    assert torch.equal(matrix, copy)


def test_cholesky_takes_one_damping_per_matrix() -> None:
    stack, damping = spd_stack(3, 4), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    factor, jitter = la.safe_cholesky(stack, damping)
    assert jitter.shape == (3,)
    for i in range(3):
        close(factor[i] @ factor[i].mT, stack[i] + damping[i] * eye(4), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype: torch.dtype) -> None:
    matrix = spd(5).to(dtype)
    factor, _ = la.safe_cholesky(matrix, 0.1)
    assert factor.dtype == torch.float32
    # The only error left is that of float32: the half-precision matrix itself is exact.
    close(factor.double() @ factor.double().mT, matrix.double() + 0.1 * eye(5), 1e-6)
    values, vectors = la.safe_eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    close((vectors * values).double() @ vectors.double().mT, matrix.double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda a: la.DenseMatrix(a, True), lambda a: la.KroneckerProduct(a, a)], ids=["dense", "kron"]
)
def test_half_precision_operators_are_inverted_in_float32(
    make: Callable[[Tensor], la.LinearOperator], dtype: torch.dtype
) -> None:
    a = spd(4).to(dtype)
    operator = make(a)
    assert operator.dtype == dtype
    inverse = operator.inverse(damping=0.1)
    assert inverse.dtype == torch.float32
    dense = a.double() if operator.shape[0] == 4 else torch.kron(a.double(), a.double())
    close(inverse.to_dense(), torch.linalg.inv(dense + 0.1 * eye(dense.shape[0])), 1e-4)
    assert operator.logdet(damping=0.1).dtype == torch.float32


def test_singular_matrix_gets_the_smallest_jitter_that_works() -> None:
    root = randn(6, 2)
    matrix = root @ root.mT
    matrix = matrix - 1e-15 * float(matrix.diagonal().max()) * eye(6)  # rounding has made it slightly indefinite
    factor, jitter = la.safe_cholesky(matrix)
    assert 0.0 < float(jitter) <= 1e3 * float(la.damping_floor(matrix))
    close(factor @ factor.mT, matrix + float(jitter) * eye(6), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pivot_of_rounding_error_is_not_trusted(dtype: torch.dtype) -> None:
    # Cholesky itself "succeeds" on some of these rank-two matrices, with an inverse of about 1/eps squared.
    for seed in range(20):
        root = randn(6, 2, seed=seed).to(dtype)
        matrix = root @ root.mT
        factor, jitter = la.safe_cholesky(matrix)
        floor = float(la.damping_floor(matrix))
        assert float(jitter) >= 0.99 * floor
        largest = 1.0 / float(torch.linalg.eigvalsh(matrix.double() + float(jitter) * eye(6))[0].clamp(min=floor / 10))
        assert float(torch.cholesky_inverse(factor.double()).abs().max()) <= 20 * largest


def test_a_graded_matrix_is_left_alone() -> None:
    # Nothing is lost to rounding here, however small the entries.
    scale = torch.logspace(0, -12, 6, dtype=torch.float64)
    matrix = scale[:, None] * spd(6) * scale
    factor, jitter = la.safe_cholesky(matrix)
    assert float(jitter) == 0.0
    close(factor / scale[:, None], torch.linalg.cholesky(spd(6)), 1e-12)


def test_only_the_failed_matrix_of_a_stack_is_jittered() -> None:
    good, bad = spd(4), with_spectrum(torch.tensor([-1e-14, 0.0, 1.0, 2.0], dtype=torch.float64))
    factor, jitter = la.safe_cholesky(torch.stack([good, bad]))
    assert float(jitter[0]) == 0.0 and float(jitter[1]) > 0.0
    assert torch.equal(factor[0], torch.linalg.cholesky(good))
    close(factor[1] @ factor[1].mT, bad, 1e-10)


def test_float32_failure_is_rescued_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing_cholesky(lambda m: m.dtype == torch.float32, calls))
    matrix = spd(5).float()
    factor, jitter = la.safe_cholesky(matrix, 0.1)
    assert factor.dtype == torch.float32 and float(jitter) == 0.0
    close(factor.double() @ factor.double().mT, matrix.double() + 0.1 * eye(5), 1e-6)
    assert calls[0] == torch.float32 and calls[-1] == torch.float64


def test_the_good_case_is_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing_cholesky(lambda m: False, calls))
    la.safe_cholesky(spd_stack(3, 4))
    assert len(calls) == 1


def test_jitter_grows_by_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing_cholesky(lambda m: len(calls) <= 3, calls))
    matrix = spd(4)
    _, jitter = la.safe_cholesky(matrix)
    assert len(calls) == 4  # as given, then floor x 1, 10, 100
    assert float(jitter) == pytest.approx(100 * float(la.damping_floor(matrix)))


@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError("no"), RuntimeError("cusolver error: 7")], ids=["linalg", "cusolver"]
)
def test_a_failing_back_end_is_retried(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def mock(matrix: Tensor, **kwargs: Any) -> Any:
        if matrix.dtype == torch.float32:
            raise error
        return REAL_CHOLESKY(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", mock)
    factor, _ = la.safe_cholesky(spd(3).float())
    close(factor @ factor.mT, spd(3).float(), 1e-6)


def test_other_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def mock(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", mock)
    monkeypatch.setattr(torch.linalg, "eigh", mock)
    for action in (la.safe_cholesky, la.safe_eigh):
        with pytest.raises(torch.OutOfMemoryError):
            action(spd(3))


def test_indefinite_matrix_is_refused_with_its_eigenvalue() -> None:
    matrix = with_spectrum(torch.tensor([-0.5, 1.0, 2.0], dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError, match=r"-0\.5.*damping"):
        la.safe_cholesky(matrix)
    factor, _ = la.safe_cholesky(matrix, 0.6)
    close(factor @ factor.mT, matrix + 0.6 * eye(3), 1e-12)


def test_everything_failing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing_cholesky(lambda m: True, calls))
    with pytest.raises(NotPositiveDefiniteError):
        la.safe_cholesky(spd(3).float())
    assert torch.float64 in calls and len(calls) < 15

    def no_eigh(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", no_eigh)
    with pytest.raises(NotPositiveDefiniteError, match="did not converge"):
        la.safe_eigh(spd(3).float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("action", [la.safe_cholesky, la.safe_eigh], ids=["cholesky", "eigh"])
def test_non_finite_input(action: Callable[[Tensor], Any], place: tuple[int, int], value: float) -> None:
    matrix = spd(3)
    matrix[place] = value
    matrix[place[::-1]] = value
    for batch in (matrix, torch.stack([spd(3), matrix])):
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            action(batch)


@pytest.mark.parametrize("action", [la.safe_cholesky, la.safe_eigh], ids=["cholesky", "eigh"])
def test_bad_input(action: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ShapeError, match="square"):
        action(torch.zeros(2, 3))
    with pytest.raises(ShapeError):
        action(torch.zeros(3))
    with pytest.raises(ArgumentError, match="int64"):
        action(torch.eye(3, dtype=torch.int64))


def test_eigh_batched() -> None:
    stack = spd_stack(3, 4)
    values, vectors = la.safe_eigh(stack)
    close((vectors * values[:, None, :]) @ vectors.mT, stack, 1e-13)


def test_eigh_is_rescued_in_float64_and_keeps_the_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    def mock(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return REAL_EIGH(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", mock)
    values, vectors = la.safe_eigh(spd(5).float())
    assert values.dtype == vectors.dtype == torch.float32
    close(values, torch.logspace(-1, 0.5, 5, dtype=torch.float64), 1e-6)


def test_eigh_takes_the_jitter_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def mock(matrix: Tensor) -> Any:
        seen.append(matrix)
        if len(seen) < 5:
            values, vectors = REAL_EIGH(matrix)
            return values * math.nan, vectors
        return REAL_EIGH(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", mock)
    matrix = spd(5)
    values, _ = la.safe_eigh(matrix)
    assert not torch.equal(seen[-1], matrix)
    close(values, torch.logspace(-1, 0.5, 5, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_damping_floor_bounds_the_largest_eigenvalue(scale: float) -> None:
    eps = torch.finfo(torch.float32).eps
    for seed in range(5):
        matrix = with_spectrum(randn(8, seed=seed).square(), seed) * scale
        top = float(torch.linalg.eigvalsh(matrix)[-1])
        floor = float(la.damping_floor(matrix.float(), c=2.0))
        assert 2 * eps * top * 0.999 <= floor <= 2 * eps * top * 8**0.5
    assert float(la.damping_floor(torch.zeros(3, 3))) == 0.0
    assert la.damping_floor(torch.zeros(2, 0, 0)).shape == (2,)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_ladder_does_not_depend_on_scale(scale: float) -> None:
    root = randn(40, 3).float()
    matrix = root @ root.mT * scale
    factor, jitter = la.safe_cholesky(matrix)
    assert float(jitter) <= 1e-3 * float(matrix.diagonal().max())
    close(factor @ factor.mT, matrix, 1e-3)


def test_symmetrise() -> None:
    a = randn(2, 3, 3)
    assert torch.equal(la.symmetrise(a), (a + a.transpose(1, 2)) / 2)


def test_damped_eigenvalues_raise_only_rounding() -> None:
    values = torch.tensor([-1e-17, 1e-3, 2.0], dtype=torch.float64)
    damped, raised = psd.damped_eigenvalues(values, 0.0)
    assert float(damped[0]) == pytest.approx(2 * torch.finfo(torch.float64).eps)
    assert torch.equal(damped[1:], values[1:]) and 0 < float(raised) < 1e-15
    with pytest.raises(NotPositiveDefiniteError, match=r"-0\.1"):
        psd.damped_eigenvalues(torch.tensor([-0.1, 1.0]), 0.0)
    with pytest.raises(NotPositiveDefiniteError):
        psd.damped_eigenvalues(torch.zeros(3), 0.0)
    with pytest.raises(NonFiniteError):
        psd.damped_eigenvalues(torch.tensor([1.0, math.nan]), 0.0)
