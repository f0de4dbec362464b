from __future__ import annotations

import math

import pytest
import torch
from step_models import SIZES, ForbidWaiting, join, local_model, normal, psd, split

from natgrad.errors import ArgumentError
from natgrad.linalg import DenseMatrix, FunctionOperator, KroneckerProduct
from natgrad.step import KLClip, LocalModel, Step, Trial
from natgrad.step.local import rejected


def block_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(matrix[:3, :3], matrix[3:, 3:])


def test_kl_and_change_are_the_quadratic_forms_of_the_block_diagonal_metric():
    g, f, d = normal(5, 0), block_diagonal(psd(5, 1)), normal(5, 2)
    local = local_model(g, f, SIZES)
    assert local.kl(split(d, SIZES)).item() == pytest.approx((0.5 * d @ f @ d).item(), rel=1e-13)
    assert local.change(split(d, SIZES)).item() == pytest.approx((g @ d + 0.5 * d @ f @ d).item(), rel=1e-13)


@pytest.mark.parametrize("exponent", [-40, -30, -20, -3, 0, 3, 12, 30, 37])
def test_ray_keeps_its_precision_at_any_scale_of_a_float32_direction(exponent):
    d32 = (normal(5, 3) * 10.0**exponent).float()
    d, f, g = d32.double(), block_diagonal(psd(5, 4)), normal(5, 5)
    metric = {n: DenseMatrix(m.to_dense().float(), symmetric=True) for n, m in local_model(g, f, SIZES).metric.items()}
    local = LocalModel(split(g.float(), SIZES), metric, {}, 0.0)
    ray = local.ray(split(d32, SIZES))
    scale = ray.scale.double().item()
    assert math.frexp(scale)[0] == 0.5, "the scale is a power of two, so that dividing by it is exact"
    u = d / scale
    assert torch.equal(join(ray.unit).double(), u)
    assert (ray.curvature.item(), ray.slope.item()) == pytest.approx(((u @ f @ u).item(), (g @ u).item()), rel=1e-5)
    assert ray.finite.item()


def test_ray_of_zero_and_of_non_finite_directions():
    local = local_model(normal(5, 0), psd(5, 1), SIZES)
    zero = local.ray(split(torch.zeros(5, dtype=torch.float64), SIZES))
    assert zero.finite.item() and zero.curvature.item() == 0 and zero.scale.item() == 1
    for bad in (math.nan, math.inf, -math.inf):
        d = normal(5, 2)
        d[4] = bad
        assert not local.ray(split(d, SIZES)).finite.item()


def test_a_non_finite_gradient_makes_the_ray_non_finite():
    for bad in (math.nan, math.inf):
        gradient = normal(5, 0)
        gradient[1] = bad
        assert not local_model(gradient, psd(5, 1), SIZES).ray(split(normal(5, 2), SIZES)).finite.item()


def test_a_low_precision_direction_is_judged_in_the_precision_of_the_metric():
    d = normal(5, 2).bfloat16()
    f = block_diagonal(psd(5, 1)).float()
    local = local_model(normal(5, 0).bfloat16(), f, SIZES)
    step = KLClip(1e-3)(local, split(d, SIZES), 1.0)
    assert step.delta["a"].dtype == torch.bfloat16
    assert step.kl_predicted.item() == pytest.approx(1e-3, rel=1e-5)
    expected = math.sqrt(1e-3 / (0.5 * d.double() @ f.double() @ d.double()).item())
    assert step.lr.item() == pytest.approx(expected, rel=1e-5)


def test_ray_costs_one_product_and_no_wait():
    products = []

    def counted(v):
        products.append(v)
        return 2 * v

    options = {"dtype": torch.float64, "device": torch.device("cpu")}
    metric = {n: FunctionOperator(counted, shape=(k, k), **options) for n, k in SIZES.items()}
    local = LocalModel(split(normal(5, 0), SIZES), metric, {}, 0.0)
    direction = split(normal(5, 1), SIZES)
    with ForbidWaiting():
        ray = local.ray(direction)
        ray.kl(2.0), ray.change(torch.tensor(3.0)), ray.delta(0.5)
    assert len(products) == len(SIZES)


def test_kronecker_blocks_give_the_same_ray_without_a_wait():
    left, right, d, g = psd(2, 0), psd(3, 1), normal(6, 2), normal(6, 3)
    local = LocalModel({"w": g}, {"w": KroneckerProduct(left, right)}, {}, 0.0)
    with ForbidWaiting():
        step = KLClip(1e-3)(local, {"w": d}, 1.0)
    delta = step.delta["w"]
    assert (0.5 * delta @ torch.kron(left, right) @ delta).item() == pytest.approx(1e-3, rel=1e-12)


def test_the_forbidding_mode_does_forbid():
    with ForbidWaiting(), pytest.raises(AssertionError, match="waits"):
        bool(torch.ones(()) > 0)


def test_a_block_without_metric_or_gradient_is_named():
    local = local_model(normal(5, 0), psd(5, 1), SIZES)
    direction = {**split(normal(5, 2), SIZES), "head": normal(2, 3)}
    with pytest.raises(ArgumentError, match=r"gradient has no block for .*head"):
        local.ray(direction)
    with pytest.raises(ArgumentError, match=r"metric has no block for .*head"):
        local.kl(direction)


def test_damping_gram_uses_each_blocks_lambda():
    vectors = [normal(5, 0), normal(5, 1)]
    stacked = torch.stack(vectors)
    weights = {"a": 0.5, "b": torch.tensor(3.0, dtype=torch.float64)}
    plain = local_model(normal(5, 2), psd(5, 3), SIZES, damping=0.25)
    by_block = local_model(normal(5, 2), psd(5, 3), SIZES, damping=9.0, block_damping=weights)
    blocks = [split(v, SIZES) for v in vectors]
    torch.testing.assert_close(plain.damping_gram(blocks), 0.25 * stacked @ stacked.T)
    diagonal = torch.tensor([0.5] * 3 + [3.0] * 2, dtype=torch.float64)
    torch.testing.assert_close(by_block.damping_gram(blocks), stacked * diagonal @ stacked.T)


def test_ratio():
    step = Step({}, True, 1.0, 0.1, loss_change_predicted=-2.0, loss_change_measured=-1.0)
    assert step.ratio == 0.5
    assert Step({}, True, 1.0, 0.1, loss_change_predicted=-2.0).ratio is None
    assert math.isnan(Step({}, True, 1.0, 0.1, loss_change_predicted=0.0, loss_change_measured=0.0).ratio)
    assert math.isnan(rejected(0.1, "", tried=True).ratio)


def test_a_step_measured_afterwards():
    delta = split(normal(5, 0), SIZES)
    step = Step(delta, torch.tensor(True), 1.0, torch.tensor(0.2), loss_change_predicted=torch.tensor(-1.0))
    done = step.measured(Trial(torch.tensor(0.25), torch.tensor(2.5)), torch.tensor(3.0))
    assert (done.kl_measured, done.loss_change_measured, done.ratio) == (0.25, -0.5, 0.5)
    assert done.delta is delta and bool(done.accepted)
    without_loss = step.measured(Trial(torch.tensor(0.25)), torch.tensor(3.0))
    assert without_loss.kl_measured == 0.25 and without_loss.loss_change_measured is None
    for trial in (Trial(torch.tensor(math.nan)), Trial(torch.tensor(0.1), torch.tensor(math.inf))):
        bad = step.measured(trial, torch.tensor(3.0))
        assert bad.delta is None and bad.accepted is False and bad.kl_measured == 0


def test_a_negative_curvature_predicts_its_size_as_kl_and_its_sign_in_the_change_of_the_loss():
    metric = {"a": DenseMatrix(torch.diag(torch.tensor([1.0, -3.0], dtype=torch.float64)))}
    vector = {"a": torch.tensor([0.5, 1.0], dtype=torch.float64)}
    ray = LocalModel(vector, metric, {}, 0.0).ray(vector)
    t = float(ray.scale)
    assert float(ray.kl(t)) == pytest.approx(0.5 * abs(0.25 - 3.0))
    assert float(ray.change(t)) == pytest.approx(0.5 * (0.25 - 3.0) - 1.25)
