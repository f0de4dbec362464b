"""The shared elementwise formulas against arbitrary precision and their limits."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch

from natgrad.likelihood._math import diagonal_columns, expm1_minus, promote, relative_entropy

getcontext().prec = 60
INF = math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expm1_minus_keeps_its_digits(dtype: torch.dtype) -> None:
    x = torch.tensor([s * 10.0**e for e in range(-7, 3) for s in (1.0, -1.0, 0.999, -3.0)], dtype=dtype)
    x = x[x < 80]
    exact = [float(Decimal(v).exp() - 1 - Decimal(v)) for v in x.tolist()]
    error = (expm1_minus(x).double() / torch.tensor(exact, dtype=torch.float64) - 1).abs().max()
    # at |x| = 0.1, where the direct formula takes over, it loses a factor 2/|x|
    assert error < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("x", [-5.0, -0.1, -1e-3, 0.0, 1e-9, 0.09999, 0.1, 2.0])
def test_expm1_minus_has_two_derivatives(x: float) -> None:
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(expm1_minus(t), t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    assert first.item() == pytest.approx(math.expm1(x), rel=1e-12, abs=1e-16)
    assert second.item() == pytest.approx(math.exp(x), rel=1e-11)


@pytest.mark.parametrize("x", [-INF, -1e30, 1e30])
def test_expm1_minus_at_the_ends(x: float) -> None:
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = expm1_minus(t)
    assert value.item() == (INF if x == -INF or x > 0 else -x)
    (gradient,) = torch.autograd.grad(value, t)
    assert not gradient.isnan()


@pytest.mark.parametrize(
    ("log_p", "log_q", "expected"),
    [
        (0.0, 0.0, 0.0),
        (-INF, -INF, 0.0),
        (-INF, -2.0, math.exp(-2.0)),
        (-2.0, -INF, INF),
        (-1e4, 1.0, math.exp(1.0)),
        (1.0, -1e4, -math.e + math.e * 10001.0),
        (-1e4, -1e4 + 1, 0.0),
        (-3.0, -1.0, math.exp(-1) - math.exp(-3) - 2 * math.exp(-3)),
        (-3.0, -2.0 + 1e-9, math.exp(-2) - 2 * math.exp(-3)),
    ],
)
def test_relative_entropy(log_p: float, log_q: float, expected: float) -> None:
    p = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    q = torch.tensor(log_q, dtype=torch.float64, requires_grad=True)
    value = relative_entropy(p, q)
    assert value.item() == pytest.approx(expected, rel=1e-8)
    if value.isfinite():
        gradients = torch.autograd.grad(value, (p, q))
        assert not any(g.isnan() for g in gradients)


def test_relative_entropy_of_tiny_differences_is_accurate_in_float32() -> None:
    log_p = torch.linspace(-5, 0, 101)
    log_q = log_p + 2.0**-14 * torch.linspace(-1, 1, 101)
    p, q = log_p.double(), log_q.double()
    exact = p.exp() * expm1_minus(q - p)
    assert torch.allclose(relative_entropy(log_p, log_q).double(), exact, rtol=1e-5, atol=0.0)


def test_diagonal_columns() -> None:
    d = torch.randn(2, 3, 4, dtype=torch.float64)
    columns = diagonal_columns(d)
    assert columns.shape == (4, 2, 3, 4)
    assert torch.equal(columns[2, 1, 0], torch.tensor([0.0, 0.0, d[1, 0, 2].item(), 0.0], dtype=torch.float64))


def test_promote() -> None:
    for dtype, wanted in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert promote(torch.zeros(2, dtype=dtype)).dtype == wanted
