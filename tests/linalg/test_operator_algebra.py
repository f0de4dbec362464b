"""Laws of the algebra over random operators, and block-diagonal matrices with named blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import close, eye, randn, spd
from torch import Tensor

import natgrad.linalg as la
from natgrad.errors import ArgumentError, ShapeError

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 4)
dampings = st.floats(-6, 4).map(lambda e: 10.0**e)


@st.composite
def positive_operators(draw: st.DrawFn, n: int | None = None) -> la.LinearOperator:
    """A random positive semidefinite operator, n x n where n is given, in one of the structured forms."""
    seed = draw(seeds)
    if n is None:
        n = draw(st.integers(1, 12))
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    form = draw(
        st.sampled_from(["dense", "diagonal", "low", "kron", "identity", "blocks", "sum", "scaled", "function"])
    )
    if form == "dense":
        return la.DenseMatrix(spd(n, seed), True)
    if form == "diagonal":
        return la.DiagonalMatrix(randn(n, seed=seed).square())
    if form == "low":
        return la.LowRankMatrix(randn(n, draw(st.integers(1, n + 1)), seed=seed))
    if form == "kron":
        p = draw(st.sampled_from(divisors))
        return la.KroneckerProduct(spd(p, seed), spd(n // p, seed + 1))
    if form == "identity":
        return la.IdentityMatrix(n, torch.float64)
    if form == "blocks":
        cut = draw(st.integers(1, n))
        parts: dict[str, la.LinearOperator] = {"a": la.DenseMatrix(spd(cut, seed), True)}
        if cut < n:
            parts["b"] = la.LowRankMatrix(randn(n - cut, 2, seed=seed))
        return la.BlockDiagonalMatrix(parts)
    if form == "function":
        matrix = spd(n, seed)
        return la.FunctionOperator(lambda v: v @ matrix, (n, n), torch.float64)
    if form == "sum":
        return draw(positive_operators(n=n)) + draw(positive_operators(n=n))
    return draw(st.floats(0.1, 10.0)) * draw(positive_operators(n=n))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[la.LinearOperator, la.LinearOperator]:
    n = draw(st.integers(1, 8))
    return draw(positive_operators(n=n)), draw(positive_operators(n=n))


def dense_of(operator: la.LinearOperator) -> Tensor:
    """The matrix as its action tells it, whatever ``to_dense`` says."""
    return operator.matvec(eye(operator.shape[1])).mT


@SETTINGS
@given(positive_operators(), dampings, seeds)
def test_solve_undoes_the_damped_matrix(a: la.LinearOperator, damping: float, seed: int) -> None:
    v = randn(a.shape[0], seed=seed)
    condition = 1.0 + float(torch.linalg.matrix_norm(dense_of(a), 2)) / damping
    b = a @ v + damping * v
    close(a.solve(b, damping=damping), v, 1e-13 * condition + 1e-9)


@SETTINGS
@given(positive_operators(), dampings)
def test_logdet_is_that_of_the_dense_matrix(a: la.LinearOperator, damping: float) -> None:
    n = a.shape[0]
    solver = la.Cholesky() if isinstance(a.default_solver(), la.CG) or isinstance(a, la.BlockDiagonalMatrix) else None
    expected = torch.linalg.slogdet(dense_of(a) + damping * eye(n)).logabsdet
    error = abs(float(a.logdet(damping=damping, solver=solver) - expected))
    condition = 1.0 + float(torch.linalg.matrix_norm(dense_of(a), 2)) / damping
    assert error <= 1e-12 * n * condition + 1e-10 * abs(float(expected))


@SETTINGS
@given(positive_operators(), seeds)
def test_trace_diagonal_and_quad(a: la.LinearOperator, seed: int) -> None:
    dense = dense_of(a)
    close(a.to_dense(), dense, 1e-12)
    close(a.diagonal(), dense.diagonal(), 1e-12)
    close(a.trace(), a.diagonal().sum(), 1e-12)
    v = randn(a.shape[0], seed=seed)
    close(a.quad(v), v @ dense @ v, 1e-11)
    close(a.gram(), dense.mT @ dense, 1e-12)


@SETTINGS
@given(pairs(), st.floats(-3, 3), seeds)
def test_vector_space_and_transpose(pair: tuple[la.LinearOperator, la.LinearOperator], c: float, seed: int) -> None:
    a, b = pair
    da, db = dense_of(a), dense_of(b)
    scale = float(da.abs().max() + db.abs().max()) * 4
    for actual, expected in [
        (a + b, da + db),
        (b + a, da + db),
        (a - b, da - db),
        (c * a + b, c * da + db),
        (a @ b, da @ db),
        ((a @ b).T, db @ da),
        ((a + b).T, da + db),
        ((a @ b + b).T, (da @ db + db).mT),
        (c * (a @ b), c * da @ db),
        ((a + b) @ (a - b), (da + db) @ (da - db)),
    ]:
        assert float((dense_of(actual) - expected).abs().max()) <= 1e-12 * scale * max(scale, 1.0)
        assert float((actual.to_dense() - expected).abs().max()) <= 1e-12 * scale * max(scale, 1.0)
    x = randn(a.shape[0], 3, seed=seed)
    close((a @ b) @ x, da @ (db @ x), 1e-11)


@SETTINGS
@given(sizes, sizes, seeds, dampings)
def test_kronecker_identities(p: int, q: int, seed: int, damping: float) -> None:
    left, right = spd(p, seed), spd(q, seed + 1)
    product = la.KroneckerProduct(left, right)
    close(product.trace(), left.trace() * right.trace(), 1e-12)
    close(product.to_dense(), torch.kron(left, right), 1e-14)
    logdet = q * torch.logdet(left) + p * torch.logdet(right)
    assert abs(float(product.logdet() - logdet)) < 1e-10 * (1 + abs(float(logdet)))
    inverse = la.KroneckerProduct(torch.linalg.inv(left), torch.linalg.inv(right))
    close(product.inverse().to_dense(), inverse.to_dense(), 1e-11)
    # Factored damping overestimates: (L + aI) ⊗ (R + bI) >= L ⊗ R + ab I with ab = λ.
    gap = product.damped_factors(damping).to_dense() - torch.kron(left, right) - damping * eye(p * q)
    assert float(torch.linalg.eigvalsh(gap)[0]) >= -1e-12 * (1 + damping)
    # Swapping the factors permutes the entries.
    x = randn(p, q, seed=seed)
    swapped = la.KroneckerProduct(right, left).solve(x.mT.reshape(-1), damping=damping).reshape(q, p).mT
    close(product.solve(x.reshape(-1), damping=damping).reshape(p, q), swapped, 1e-9)


@SETTINGS
@given(st.integers(1, 12), st.integers(1, 12), seeds, dampings)
def test_woodbury_is_cholesky_is_cg(n: int, r: int, seed: int, damping: float) -> None:
    root, b = randn(n, r, seed=seed), randn(n, seed=seed + 1)
    operator = la.LowRankMatrix(root)
    condition = 1.0 + float(torch.linalg.matrix_norm(root, 2)) ** 2 / damping
    woodbury = operator.solve(b, damping=damping, solver=la.Woodbury())
    cholesky = la.DenseMatrix(root @ root.mT, True).solve(b, damping=damping, solver=la.Cholesky())
    close(woodbury, cholesky, 1e-14 * condition + 1e-12)
    cg = operator.solve(b, damping=damping, solver=la.CG(tolerance=0.0))
    close(cg, cholesky, 1e-13 * condition + 1e-12)


def example_blocks() -> la.BlockDiagonalMatrix:
    return la.BlockDiagonalMatrix(
        {
            "first": la.DenseMatrix(spd(3), True),
            "second": la.KroneckerProduct(spd(2, 1), spd(2, 2)),
            "third": la.LowRankMatrix(randn(4, 2)),
        }
    )


def test_blocks_split_and_join() -> None:
    operator = example_blocks()
    assert list(operator.blocks) == ["first", "second", "third"]
    v = randn(2, 11)
    parts = operator.split(v)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "first": (2, 3),
        "second": (2, 4),
        "third": (2, 4),
    }
    assert parts["second"].data_ptr() == v[:, 3:].data_ptr()
    assert torch.equal(operator.join(parts), v)
    assert torch.equal(operator.join(dict(reversed(parts.items()))), v)


def test_blocks_take_one_damping_each() -> None:
    operator = example_blocks()
    damping = {"third": 0.3, "first": torch.tensor(0.1, dtype=torch.float64), "second": 2.0}
    shift = torch.tensor([0.1] * 3 + [2.0] * 4 + [0.3] * 4, dtype=torch.float64)
    damped = operator.to_dense() + torch.diag(shift)
    b = randn(11, 2)
    close(operator.solve(b, damping=damping), torch.linalg.solve(damped, b), 1e-11)
    close(operator.inverse(damping=damping).to_dense(), torch.linalg.inv(damped), 1e-11)
    close(operator.logdet(damping=damping), torch.logdet(damped), 1e-11)
    inverse = operator.inverse(damping=damping)
    assert isinstance(inverse.operator, la.BlockDiagonalMatrix)
    assert list(inverse.operator.blocks) == list(operator.blocks)
    assert inverse.report.method == "cholesky+eigh+woodbury"


def test_damping_must_name_every_block() -> None:
    operator = example_blocks()
    for call in (operator.inverse, operator.logdet):
        with pytest.raises(ArgumentError, match=r"missing: \['second', 'third'\], unknown: \['other'\]"):
            call(damping={"first": 0.1, "other": 0.1})
        with pytest.raises(ArgumentError, match="negative"):
            call(damping={"first": 0.1, "second": -0.1, "third": 0.1})
    with pytest.raises(ArgumentError, match="join"):
        operator.join({"first": randn(3)})
    with pytest.raises(ShapeError, match="11"):
        operator.split(randn(10))
    with pytest.raises(ArgumentError, match="at least one"):
        la.BlockDiagonalMatrix({})


def test_blocks_keep_their_structure_under_the_algebra() -> None:
    operator = example_blocks()
    total = operator + 2.0 * operator
    assert isinstance(total, la.BlockDiagonalMatrix) and list(total.blocks) == list(operator.blocks)
    close(total.to_dense(), 3.0 * operator.to_dense(), 1e-13)
    other = la.BlockDiagonalMatrix({"all": la.DiagonalMatrix(torch.ones(11, dtype=torch.float64))})
    close((operator + other).to_dense(), operator.to_dense() + eye(11), 1e-13)


def test_the_report_of_blocks_is_that_of_the_worst() -> None:
    nearly = torch.diag(torch.tensor([-1e-15, 1.0], dtype=torch.float64))
    operator = la.BlockDiagonalMatrix({"good": la.DenseMatrix(spd(2), True), "bad": la.DenseMatrix(nearly, True)})
    assert 0.0 < float(operator.inverse().report.jitter) < 1e-10
    cg = la.BlockDiagonalMatrix({"a": la.DenseMatrix(spd(3), True)}).inverse(solver=la.CG())
    assert cg.report.method == "cg" and cg.report.iterations == 0
    cg.matvec(randn(3))
    assert cg.report.iterations == 3 and cg.report.residual is not None  # of the latest solve


def test_operators_accept_python_and_tensor_scalars() -> None:
    operator = la.DenseMatrix(spd(3), True)
    assert isinstance(torch.tensor(2.0) * operator, la.LinearOperator)
    close((torch.tensor(2.0) * operator).to_dense(), 2 * spd(3), 1e-14)
    close((operator / torch.tensor(4.0, dtype=torch.float64)).to_dense(), spd(3) / 4, 1e-14)
    close((operator * 3).to_dense(), 3 * spd(3), 1e-14)
    assert math.isclose(float((2 * operator - operator).trace()), float(operator.trace()))
