from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_models import (
    SIZES,
    ForbidWaiting,
    QuadraticProbe,
    Softmax,
    join,
    local_model,
    network,
    normal,
    psd,
    split,
)

from natgrad.errors import ArgumentError
from natgrad.linalg import IdentityMatrix
from natgrad.step import Armijo, KLClip, LearningRate, LocalModel, Trial

DOUBLE = torch.float64


def block_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(matrix[:3, :3], matrix[3:, 3:])


def euclidean(gradient: dict[str, torch.Tensor]) -> LocalModel:
    metric = {name: IdentityMatrix(g.numel(), dtype=g.dtype, device=g.device) for name, g in gradient.items()}
    return LocalModel(gradient, metric, {}, 0.0)


def with_entry(value: float, index: int = 4) -> torch.Tensor:
    vector = normal(5, 2)
    vector[index] = value
    return vector


# ---------------------------------------------------------------- LearningRate


@pytest.mark.parametrize("predict", [True, False])
@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_is_minus_lr_times_direction_to_the_last_bit(predict, scale, dtype):
    d = (scale * normal(5, 0)).to(dtype)
    step = LearningRate(predict=predict)(euclidean(split(d, SIZES)), split(d, SIZES), 0.3)
    assert torch.equal(join(step.delta), -0.3 * d)
    assert bool(step.accepted) and float(step.lr) == pytest.approx(0.3, rel=1e-7)


def test_learning_rate_predicts_with_the_dense_metric():
    g, f, d = normal(5, 0), block_diagonal(psd(5, 1)), normal(5, 2)
    step = LearningRate()(local_model(g, f, SIZES, damping=0.5), split(d, SIZES), 0.3)
    delta = -0.3 * d
    assert step.kl_predicted.item() == pytest.approx((0.5 * delta @ f @ delta).item(), rel=1e-13)
    assert step.loss_change_predicted.item() == pytest.approx((g @ delta + 0.5 * delta @ f @ delta).item(), rel=1e-13)
    assert step.kl_measured is None and step.ratio is None and step.backtracks == 0 and step.damping == 0.5
    silent = LearningRate(predict=False)(local_model(g, f, SIZES), split(d, SIZES), 0.3)
    assert silent.kl_predicted is None and silent.loss_change_predicted is None


@pytest.mark.parametrize("search", [LearningRate(), LearningRate(predict=False), KLClip(0.1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_direction_gives_zeros_without_waiting(search, bad):
    local = local_model(normal(5, 0), psd(5, 1), SIZES)
    direction = split(with_entry(bad), SIZES)
    with ForbidWaiting():
        step = search(local, direction, 0.3)
    assert not bool(step.accepted)
    assert torch.equal(join(step.delta), torch.zeros(5, dtype=DOUBLE)) and float(step.lr) == 0
    assert step.kl_predicted is None or math.isnan(step.kl_predicted.item())


@pytest.mark.parametrize("search", [LearningRate(), KLClip(0.1)])
@pytest.mark.parametrize("where", ["gradient", "metric"])
def test_a_non_finite_gradient_or_metric_gives_zeros(search, where):
    f = psd(5, 1)
    if where == "metric":
        f[1, 1] = math.nan
    gradient = with_entry(math.inf) if where == "gradient" else normal(5, 0)
    step = search(local_model(gradient, f, SIZES), split(normal(5, 2), SIZES), 0.3)
    assert not bool(step.accepted) and not join(step.delta).any()


@pytest.mark.parametrize("search", [LearningRate(), LearningRate(predict=False), KLClip(0.1)])
def test_a_tensor_lr_needs_no_wait_and_a_non_finite_one_gives_zeros(search):
    f, d = block_diagonal(psd(5, 1)), 1e-2 * normal(5, 2)
    local, direction = local_model(normal(5, 0), f, SIZES), split(d, SIZES)
    lr, bad = torch.tensor(0.25, dtype=DOUBLE), torch.tensor(math.nan, dtype=DOUBLE)
    with ForbidWaiting():
        step, none = search(local, direction, lr), search(local, direction, bad)
    assert torch.equal(join(step.delta), -0.25 * d)
    assert not bool(none.accepted) and not join(none.delta).any()


@pytest.mark.parametrize("search", [LearningRate(), KLClip(0.1)])
@pytest.mark.parametrize("lr", [0.0, 0.3])
def test_zero_direction_or_zero_lr_changes_nothing(search, lr):
    d = torch.zeros(5, dtype=DOUBLE) if lr else normal(5, 2)
    step = search(local_model(normal(5, 0), psd(5, 1), SIZES), split(d, SIZES), lr)
    assert not join(step.delta).any() and bool(step.accepted)
    assert step.kl_predicted.item() == 0 and step.loss_change_predicted.item() == 0


@pytest.mark.parametrize("lr", [-0.1, math.nan, "0.1", True])
@pytest.mark.parametrize("search", [LearningRate(), KLClip(0.1)])
def test_an_impossible_lr_is_named(search, lr):
    with pytest.raises(ArgumentError, match="lr is"):
        search(local_model(normal(5, 0), psd(5, 1), SIZES), split(normal(5, 2), SIZES), lr)


def test_an_infinite_lr_needs_a_radius():
    with pytest.raises(ArgumentError, match="KL radius"):
        LearningRate()(local_model(normal(5, 0), psd(5, 1), SIZES), split(normal(5, 2), SIZES), math.inf)


# ---------------------------------------------------------------- KLClip


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.floats(-20, 12),
    lr=st.one_of(st.floats(1e-6, 1e6), st.just(math.inf)),
    log_radius=st.floats(-8, 2),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_kl_clip_keeps_the_radius_and_leaves_smaller_steps_untouched(seed, exponent, lr, log_radius, sign):
    f, max_kl = block_diagonal(psd(5, seed)), 10.0**log_radius
    d = sign * 10.0**exponent * normal(5, seed + 1)
    step = KLClip(max_kl)(local_model(normal(5, seed + 2), f, SIZES), split(d, SIZES), lr)
    delta = join(step.delta)
    kl = (0.5 * delta @ f @ delta).item()
    assert kl <= max_kl * (1 + 1e-13)
    assert step.kl_predicted.item() <= max_kl
    assert step.kl_predicted.item() == pytest.approx(kl, rel=1e-12)
    full = 0.5 * lr * lr * (d @ f @ d).item()
    if full <= max_kl * (1 - 1e-12):
        assert torch.equal(delta, -lr * d)
    elif full > max_kl * (1 + 1e-12):
        assert kl == pytest.approx(max_kl, rel=1e-12)
        torch.testing.assert_close(delta / delta.norm(), -d / d.norm(), rtol=1e-12, atol=0)
        assert step.lr.item() == pytest.approx(math.sqrt(max_kl / (0.5 * (d @ f @ d).item())), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1.0, 1e12, 1e20])
def test_kl_clip_in_float32_at_scales_where_the_square_leaves_the_range(scale):
    f, d = block_diagonal(psd(5, 1)).float(), (scale * normal(5, 2)).float()
    step = KLClip(0.01)(local_model(normal(5, 0).float(), f, SIZES), split(d, SIZES), math.inf)
    delta = join(step.delta).double()
    assert (0.5 * delta @ f.double() @ delta).item() == pytest.approx(0.01, rel=1e-5)


def test_kl_clip_waits_for_nothing_when_it_clips():
    local = local_model(normal(5, 0), psd(5, 1), SIZES)
    direction = split(normal(5, 2), SIZES)
    with ForbidWaiting():
        step = KLClip(1e-6)(local, direction, 1.0)
    assert step.lr.item() < 1


def test_kl_clip_without_curvature_takes_a_finite_lr_and_refuses_an_infinite_one():
    flat, direction = local_model(normal(5, 0), torch.zeros(5, 5, dtype=DOUBLE), SIZES), split(normal(5, 2), SIZES)
    assert torch.equal(join(KLClip(0.1)(flat, direction, 0.5).delta), -0.5 * normal(5, 2))
    step = KLClip(0.1)(flat, direction, math.inf)
    assert not bool(step.accepted) and not join(step.delta).any()


def test_kl_clip_counts_negative_curvature_by_its_size():
    f, d = -block_diagonal(psd(5, 1)), normal(5, 2)
    step = KLClip(0.01)(local_model(normal(5, 0), f, SIZES), split(d, SIZES), 100.0)
    delta = join(step.delta)
    assert (0.5 * delta @ f @ delta).item() == pytest.approx(-0.01, rel=1e-12)


@pytest.mark.parametrize("max_kl", [0.0, -1.0, math.nan, math.inf, "1", None])
def test_kl_clip_checks_its_radius(max_kl):
    with pytest.raises(ArgumentError, match="max_kl"):
        KLClip(max_kl)


# ---------------------------------------------------------------- Armijo


def quadratic(seed: int = 0) -> tuple[LocalModel, torch.Tensor, torch.Tensor, QuadraticProbe]:
    g, h = normal(5, seed), block_diagonal(psd(5, seed + 1))
    local = local_model(g, h, SIZES, loss=torch.tensor(7.0, dtype=DOUBLE))
    return local, g, h, QuadraticProbe(h, g, h, loss0=7.0)


@pytest.mark.parametrize("c", [1e-4, 0.1, 0.5])
@pytest.mark.parametrize("lr", [0.1, 1.0, 10.0, 1e4])
def test_armijo_takes_the_first_power_of_shrink_that_closed_form_allows(c, lr):
    local, g, h, probe = quadratic()
    step = Armijo(c=c, shrink=0.7, backtracks=60)(local, split(g, SIZES), lr, probe)
    # on the ray −s g the loss falls by s gᵀg − ½ s² gᵀHg ≥ c s gᵀg, that is s ≤ 2 (1 − c) gᵀg / gᵀHg
    bound = (2 * (1 - c) * (g @ g) / (g @ h @ g)).item()
    expected = 0
    while lr * 0.7**expected > bound:
        expected += 1
    assert step.accepted and step.backtracks == expected
    assert step.lr == pytest.approx(lr * 0.7**expected, rel=1e-12)
    torch.testing.assert_close(join(step.delta), -step.lr * g)
    assert step.loss_change_measured <= -c * step.lr * (g @ g).item()
    assert step.ratio == pytest.approx(1.0, rel=1e-9), "the quadratic model is exact here"
    assert step.kl_measured == pytest.approx(step.kl_predicted, rel=1e-12)


def test_armijo_rejects_ascent_without_a_trial():
    local, g, _, probe = quadratic()
    step = Armijo()(local, split(-g, SIZES), 1.0, probe)
    assert step.delta is None and step.accepted is False and not probe.deltas
    assert step.kl_measured is None and "descent" in step.reason


def test_armijo_gives_up_after_its_backtracks():
    local, g, _, _ = quadratic()
    worse = QuadraticProbe(torch.eye(5, dtype=DOUBLE), -g, torch.zeros(5, 5, dtype=DOUBLE), loss0=7.0)
    step = Armijo(backtracks=3)(local, split(g, SIZES), 1.0, worse)
    assert step.delta is None and step.backtracks == 3 and len(worse.deltas) == 4
    assert step.kl_measured == 0 and step.loss_change_measured == 0 and step.lr == 0


def test_armijo_goes_on_past_a_non_finite_loss():
    local, g, _, inner = quadratic()

    def probe(delta):
        trial = inner(delta)
        return Trial(trial.kl, trial.loss if len(inner.deltas) > 3 else torch.tensor(math.nan, dtype=DOUBLE))

    step = Armijo()(local, split(g, SIZES), 1e-3, probe)
    assert step.accepted and step.backtracks == 3


def test_armijo_descends_on_a_real_network_until_the_gradient_is_small():
    probe = network(Softmax)
    first = probe.loss(probe.theta).item()
    for _ in range(15):
        g, f = probe.gradient(), probe.fisher()
        local = local_model(g, f, probe.sizes, loss=probe.loss(probe.theta))
        direction = split(torch.linalg.solve(f + 0.05 * torch.eye(len(g), dtype=DOUBLE), g), probe.sizes)
        step = Armijo()(local, direction, 1.0, probe)
        before = probe.loss(probe.theta).item()
        probe.theta = probe.theta + join(step.delta)
        after = probe.loss(probe.theta).item()
        assert after < before and after - before == pytest.approx(step.loss_change_measured, abs=1e-12)
    assert after < 0.5 * first


def test_armijo_without_a_loss_or_a_probe_says_what_to_do():
    local, g, h, probe = quadratic()
    direction = split(g, SIZES)
    with pytest.raises(ArgumentError, match="closure"):
        Armijo()(local_model(g, h, SIZES), direction, 1.0, probe)
    with pytest.raises(ArgumentError, match="closure"):
        Armijo()(local, direction, 1.0, QuadraticProbe(h))
    with pytest.raises(ArgumentError, match="probe"):
        Armijo()(local, direction, 1.0, None)
    with pytest.raises(ArgumentError, match="infinite"):
        Armijo()(local, direction, math.inf, probe)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_armijo_rejects_a_non_finite_direction_without_a_trial(bad):
    local, _, _, probe = quadratic()
    step = Armijo()(local, split(with_entry(bad), SIZES), 1.0, probe)
    assert step.delta is None and not probe.deltas and math.isnan(step.kl_predicted)


@pytest.mark.parametrize(
    "arguments", [{"c": 0.0}, {"c": 1.0}, {"shrink": 1.0}, {"shrink": 0}, {"backtracks": -1}, {"backtracks": 2.5}]
)
def test_armijo_checks_its_arguments(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        Armijo(**arguments)
