from __future__ import annotations

import math

import pytest
import torch
from step_models import ForbidWaiting, normal, psd

from natgrad.errors import ArgumentError
from natgrad.linalg import Cholesky, DenseMatrix, DiagonalMatrix, Eigh, KroneckerProduct
from natgrad.step import Constant, FactoredTikhonov, LevenbergMarquardt, Proportional, Step, as_damping
from natgrad.step.local import rejected

DOUBLE = torch.float64


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=DOUBLE)


def kronecker() -> tuple[torch.Tensor, torch.Tensor, KroneckerProduct]:
    g, a = psd(2, 0), 50 * psd(3, 1)
    return g, a, KroneckerProduct(g, a)


@pytest.mark.parametrize("solver", [None, Cholesky(), Eigh()])
def test_constant_inverts_the_block_plus_lambda(solver):
    f, g, a, v = psd(6, 0, rank=3), *kronecker()[:2], normal(6, 2)
    for operator, dense in ((DenseMatrix(f, symmetric=True), f), (KroneckerProduct(g, a), torch.kron(g, a))):
        inverse = Constant(0.1).inverse(operator, solver)
        torch.testing.assert_close(inverse @ v, torch.linalg.solve(dense + 0.1 * eye(6), v))
    assert Constant(0.1).amount(DenseMatrix(f, symmetric=True)) == 0.1


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_proportional_follows_the_mean_eigenvalue_of_the_block(scale):
    f, v = scale * psd(6, 0, rank=3), normal(6, 2)
    shift = 0.1 * torch.linalg.eigvalsh(f).mean()
    inverse = Proportional(0.1).inverse(DenseMatrix(f, symmetric=True), None)
    torch.testing.assert_close(inverse @ v, torch.linalg.solve(f + shift * eye(6), v))


def test_proportional_of_a_block_without_curvature_is_finite():
    operator = DenseMatrix(torch.zeros(3, 3, dtype=DOUBLE), symmetric=True)
    torch.testing.assert_close(Proportional(0.1).inverse(operator, None) @ normal(3, 0), 10 * normal(3, 0))
    with ForbidWaiting():
        amount = Proportional(0.1).amount(operator)
    assert amount.item() == 0.1


@pytest.mark.parametrize("solver", [None, Cholesky()])
def test_factored_tikhonov_damps_the_factors_by_their_traces(solver):
    g, a, operator = kronecker()
    pi = math.sqrt((a.trace() / 3) / (g.trace() / 2))
    dense = torch.kron(g + math.sqrt(0.1) / pi * eye(2), a + math.sqrt(0.1) * pi * eye(3))
    inverse = FactoredTikhonov(0.1).inverse(operator, solver)
    torch.testing.assert_close(inverse @ normal(6, 2), torch.linalg.solve(dense, normal(6, 2)))
    assert FactoredTikhonov(0.1).amount(operator) == 0.1
    torch.testing.assert_close(operator.to_dense(), torch.kron(g, a)), "the factors themselves stay undamped"


def test_factored_tikhonov_of_another_block_adds_lambda():
    inverse = FactoredTikhonov(0.1).inverse(DiagonalMatrix(torch.tensor([1.0, 2.0], dtype=DOUBLE)), None)
    torch.testing.assert_close(inverse @ torch.ones(2, dtype=DOUBLE), torch.tensor([1 / 1.1, 1 / 2.1], dtype=DOUBLE))


@pytest.mark.parametrize("rule", [Constant, Proportional, FactoredTikhonov])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, "1", True])
def test_an_impossible_lambda_is_named(rule, value):
    with pytest.raises(ArgumentError, match=rf"{rule.__name__}: value is"):
        rule(value)


@pytest.mark.parametrize("rule", [Constant(0.1), Proportional(0.1), FactoredTikhonov(0.1)])
def test_fixed_rules_stay(rule):
    assert rule.update(step(-5.0, 1.0)) is rule and not rule.needs_loss
    assert rule.restored(rule.state()) == rule and rule.value == 0.1


def test_a_number_is_constant_damping():
    assert as_damping(0.5) == Constant(0.5) and as_damping(2) == Constant(2)
    rule = Proportional(0.1)
    assert as_damping(rule) is rule


# ---------------------------------------------------------------- LevenbergMarquardt


def step(predicted: float | None, measured: float | None, accepted: bool = True) -> Step:
    return Step({}, accepted, 1.0, 0.1, loss_change_predicted=predicted, loss_change_measured=measured)


SHRINKS, STAYS, GROWS = 0.5, 1.0, 2.0


@pytest.mark.parametrize(
    "predicted, measured, effect",
    [
        (-1.0, -1.0, SHRINKS), (-1.0, -0.76, SHRINKS), (-1.0, -3.0, SHRINKS),
        (-1.0, -0.75, STAYS), (-1.0, -0.5, STAYS), (-1.0, -0.25, STAYS),
        (-1.0, -0.24, GROWS), (-1.0, 0.0, GROWS), (-1.0, 1.0, GROWS),
        (1.0, 1.0, GROWS), (1.0, -1.0, GROWS), (0.0, 1.0, GROWS),
        (-1.0, math.nan, GROWS), (-1.0, math.inf, GROWS), (-1.0, -math.inf, GROWS), (math.nan, -1.0, GROWS),
        (0.0, 0.0, STAYS), (-1.0, None, STAYS), (None, -1.0, STAYS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tensors", [False, True])
def test_the_rule(predicted, measured, effect, tensors):
    if tensors:
        predicted, measured = (None if v is None else torch.tensor(v) for v in (predicted, measured))
    rule = LevenbergMarquardt(0.1, factor=2.0).update(step(predicted, measured))
    assert rule.value == pytest.approx(0.1 * effect, rel=1e-15)


def test_a_failed_search_grows_it_and_one_that_never_tried_does_not():
    rule = LevenbergMarquardt(0.1, factor=2.0, every=5)
    assert rule.update(rejected(0.1, "", tried=True, backtracks=3)).value == 0.2
    assert rule.update(rejected(0.1, "", tried=False, predicted=math.nan)).value == 0.2
    assert rule.update(rejected(0.1, "zero direction", tried=False)) is rule
    unmeasured = Step({}, torch.tensor(False), torch.tensor(0.0), torch.tensor(math.nan))
    assert rule.update(unmeasured).value == 0.2


def test_judges_every_nth_step_by_the_last():
    rule = LevenbergMarquardt(0.1, factor=2.0, every=3)
    seen = []
    for measured in (-1.0, -1.0, -0.1, -0.1, -0.1, -1.0, None, -1.0, 1.0):
        seen.append(rule.due)
        rule = rule.update(step(-1.0, measured))
        seen.append(round(rule.value, 12))
    assert seen == [False, 0.1, False, 0.1, True, 0.2, False, 0.2, False, 0.2, True, 0.1,
                    False, 0.1, False, 0.1, True, 0.2]  # fmt: skip
    assert rule.count == 0


def test_stays_within_its_bounds():
    rule = LevenbergMarquardt(0.1, factor=10.0, minimum=0.01, maximum=0.5)
    assert rule.update(step(-1.0, 1.0)).value == 0.5
    assert rule.update(step(-1.0, -1.0)).update(step(-1.0, -1.0)).value == 0.01


@pytest.mark.parametrize("inner", [Constant(0.1), FactoredTikhonov(0.1), Proportional(0.1)])
def test_adapts_the_rule_it_wraps(inner):
    _, _, operator = kronecker()
    rule = LevenbergMarquardt(inner, factor=2.0).update(step(-1.0, -0.1))
    expected = type(inner)(0.2)
    assert rule.rule == expected and rule.needs_loss
    torch.testing.assert_close(rule.inverse(operator, None) @ normal(6, 0), expected.inverse(operator) @ normal(6, 0))
    assert float(rule.amount(operator)) == pytest.approx(float(expected.amount(operator)))


def test_resumes_from_its_numbers():
    rule = LevenbergMarquardt(FactoredTikhonov(0.1), factor=2.0, every=2)
    for measured in (-1.0, -1.0, -1.0):
        rule = rule.update(step(-1.0, measured))
    fresh = LevenbergMarquardt(FactoredTikhonov(0.1), factor=2.0, every=2)
    assert fresh != rule and fresh.restored(rule.state()) == rule


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"damping": 0.0}, "damping"), ({"damping": -1.0}, "value"), ({"damping": math.nan}, "value"),
        ({"damping": 1e20}, "damping"), ({"damping": LevenbergMarquardt()}, "damping"),
        ({"lower": 0.8}, "lower"), ({"factor": 1.0}, "factor"), ({"factor": math.inf}, "factor"),
        ({"every": 0}, "every"), ({"every": 1.5}, "every"), ({"minimum": 0.0}, "minimum"), ({"count": -1}, "count"),
    ],
)  # fmt: skip
def test_checks_its_arguments(arguments, word):
    with pytest.raises(ArgumentError, match=word):
        LevenbergMarquardt(**arguments)


def test_finds_a_damping_that_a_wrong_metric_needs():
    """Newton steps with a metric 30 times too flat diverge; the rule raises λ until the steps descend."""
    h = torch.diag(torch.tensor([30.0, 60.0], dtype=DOUBLE))
    f, theta, rule = h / 30, torch.ones(2, dtype=DOUBLE), LevenbergMarquardt(1e-3)
    for _ in range(60):
        g = h @ theta
        delta = -(rule.inverse(DenseMatrix(f, symmetric=True), None) @ g)
        loss, after = 0.5 * theta @ h @ theta, 0.5 * (theta + delta) @ h @ (theta + delta)
        done = step((g @ delta + 0.5 * delta @ f @ delta).item(), (after - loss).item())
        rule, theta = rule.update(done), theta + delta if after < loss else theta
    assert rule.value > 5 and theta.norm() < 1e-6
