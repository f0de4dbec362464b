from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_models import SIZES, Normal, QuadraticProbe, Softmax, join, local_model, network, normal, psd, split

from natgrad.errors import ArgumentError, ShapeError
from natgrad.step import QuadraticFit
from natgrad.step.quadratic_fit import minimise_quadratic

DOUBLE = torch.float64


def dense_solution(g, f, damping, vectors) -> torch.Tensor:
    """Δ of least cost in the span of ``vectors``, by an orthonormal basis and a dense solve."""
    q, r = torch.linalg.qr(torch.stack(vectors, 1))
    keep = r.abs().amax(1) > 1e-9 * r.abs().max()
    q = q[:, keep]
    a = f + damping * torch.eye(len(g), dtype=g.dtype)
    return -q @ torch.linalg.solve(q.T @ a @ q, q.T @ g)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    damping=st.sampled_from([0.0, 1e-3, 1.0]),
    direction_exponent=st.floats(-20, 12),
    previous_exponent=st.floats(-12, 12),
)
def test_alpha_and_mu_are_the_dense_solve_at_any_scale(seed, damping, direction_exponent, previous_exponent):
    g, f = normal(5, seed), psd(5, seed + 1)
    d, previous = 10.0**direction_exponent * normal(5, seed + 2), 10.0**previous_exponent * normal(5, seed + 3)
    local = local_model(g, f, SIZES, damping=damping, previous=split(previous, SIZES))
    step = QuadraticFit()(local, split(d, SIZES), 1.0, QuadraticProbe(f))
    expected = dense_solution(g, f, damping, [d / d.norm(), previous / previous.norm()])
    delta = join(step.delta)
    torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item())
    # Δ = −α d + μ Δ_prev: what is left after taking α d away is parallel to the previous step
    rest = delta + step.lr * d
    mu = (rest @ previous / (previous @ previous)).item()
    assert (rest - mu * previous).norm() <= 1e-9 * (delta.norm() + (step.lr * d).norm())
    assert step.kl_predicted == pytest.approx((0.5 * delta @ f @ delta).item(), rel=1e-9)
    assert step.loss_change_predicted == pytest.approx((g @ delta + 0.5 * delta @ f @ delta).item(), rel=1e-9)
    assert step.kl_measured is None and step.accepted and step.damping == damping


def test_uses_the_exact_curvature_across_blocks_and_not_the_metric():
    g, f, d = normal(5, 0), psd(5, 1), normal(5, 2)
    local = local_model(g, 1e6 * psd(5, 9), SIZES)
    step = QuadraticFit()(local, split(d, SIZES), 1.0, QuadraticProbe(f))
    assert step.lr == pytest.approx((g @ d / (d @ f @ d)).item(), rel=1e-12)
    torch.testing.assert_close(join(step.delta), -step.lr * d)


def test_the_damping_of_each_block():
    g, f, d, previous = normal(5, 0), psd(5, 1), normal(5, 2), normal(5, 3)
    weights = torch.tensor([0.5] * 3 + [2.0] * 2, dtype=DOUBLE)
    local = local_model(g, f, SIZES, damping=77.0, block_damping={"a": 0.5, "b": 2.0}, previous=split(previous, SIZES))
    step = QuadraticFit()(local, split(d, SIZES), 1.0, QuadraticProbe(f))
    expected = dense_solution(g, f + torch.diag(weights), 0.0, [d, previous])
    torch.testing.assert_close(join(step.delta), expected)


@pytest.mark.parametrize("factor", [1.0, -3.0, 1e8, -1e-8])
@pytest.mark.parametrize("noise", [0.0, 1e-17])
def test_a_previous_step_parallel_to_the_direction_gives_the_step_along_it(factor, noise):
    g, f, d = normal(5, 0), psd(5, 1), normal(5, 2)
    previous = factor * (d + noise * normal(5, 3))
    local = local_model(g, f, SIZES, damping=0.1, previous=split(previous, SIZES))
    step = QuadraticFit()(local, split(d, SIZES), 1.0, QuadraticProbe(f))
    expected = -d * (g @ d / (d @ f @ d + 0.1 * d @ d))
    torch.testing.assert_close(join(step.delta), expected, rtol=1e-7, atol=1e-9)
    assert abs(step.lr) <= 2 * (g @ d / (d @ f @ d + 0.1 * d @ d)).abs().item(), "the minimiser of least norm"


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-10, 1e-3, 0.5, 1.0, 1.5, 2 - 1e-10, 2 - 1e-15, 2.0])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-100, 1e120)])
def test_two_unknowns_against_the_pseudo_inverse(gap, scales):
    """K = D K̂ D with K̂ = [[1, r], [r, 1]]: x = −D⁻¹ pinv(K̂) D⁻¹ b."""
    r, (d1, d2) = 1 - gap, scales
    b = (0.7, -0.4)
    matrix = [[d1 * d1, r * d1 * d2], [r * d1 * d2, d2 * d2]]
    x = minimise_quadratic(matrix, (d1 * b[0], d2 * b[1]), rank_tolerance=1e-14)
    inverse = numpy.linalg.pinv(numpy.array([[1, r], [r, 1]]), rcond=1e-13, hermitian=True)
    expected = -inverse @ numpy.array(b) / numpy.array(scales)
    tolerance = max(1e-12, 1e-15 / max(min(gap, 2 - gap), 1e-12))
    numpy.testing.assert_allclose(x, expected, rtol=tolerance)


@pytest.mark.parametrize("previous", [None, torch.zeros(5, dtype=DOUBLE)])
def test_without_a_previous_step_only_the_length_is_fitted(previous):
    g, f, d = normal(5, 0), psd(5, 1), normal(5, 2)
    local = local_model(g, f, SIZES, damping=0.1, previous=None if previous is None else split(previous, SIZES))
    step = QuadraticFit()(local, split(d, SIZES), 1.0, QuadraticProbe(f))
    assert step.lr == pytest.approx((g @ d / (d @ f @ d + 0.1 * d @ d)).item(), rel=1e-12)


def test_a_zero_direction_still_uses_the_previous_step_and_two_zeros_do_nothing():
    g, f, previous = normal(5, 0), psd(5, 1), normal(5, 2)
    zero = split(torch.zeros(5, dtype=DOUBLE), SIZES)
    moving = QuadraticFit()(local_model(g, f, SIZES, previous=split(previous, SIZES)), zero, 1.0, QuadraticProbe(f))
    torch.testing.assert_close(join(moving.delta), -previous * (g @ previous / (previous @ f @ previous)))
    still = QuadraticFit()(local_model(g, f, SIZES, previous=zero), zero, 1.0, QuadraticProbe(f))
    assert not join(still.delta).any() and still.kl_predicted == 0 and still.loss_change_predicted == 0


def test_lr_multiplies_the_fitted_step():
    g, f, d, previous = normal(5, 0), psd(5, 1), normal(5, 2), normal(5, 3)
    local = local_model(g, f, SIZES, previous=split(previous, SIZES))
    full, half = (QuadraticFit()(local, split(d, SIZES), lr, QuadraticProbe(f)) for lr in (1.0, torch.tensor(0.5)))
    torch.testing.assert_close(2 * join(half.delta), join(full.delta))
    delta = join(half.delta)
    assert half.loss_change_predicted == pytest.approx((g @ delta + 0.5 * delta @ f @ delta).item(), rel=1e-12)


@pytest.mark.parametrize("max_kl", [1e-6, 1e-2, 1e6])
@pytest.mark.parametrize("lr", [1.0, math.inf])
def test_the_cap_and_the_boundary(max_kl, lr):
    g, f, d, previous = normal(5, 0), psd(5, 1), normal(5, 2), normal(5, 3)
    local = local_model(g, f, SIZES, damping=0.1, previous=split(previous, SIZES))
    free = join(QuadraticFit()(local, split(d, SIZES), 1.0, QuadraticProbe(f)).delta)
    step = QuadraticFit(max_kl=max_kl)(local, split(d, SIZES), lr, QuadraticProbe(f))
    delta = join(step.delta)
    kl = (0.5 * delta @ f @ delta).item()
    expected = max_kl if lr == math.inf else min(max_kl, (0.5 * free @ f @ free).item())
    assert kl == pytest.approx(expected, rel=1e-9) and step.kl_predicted == pytest.approx(kl, rel=1e-9)
    assert torch.cosine_similarity(delta, free, dim=0).item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("family", [Softmax, Normal])
def test_minimises_the_damped_model_of_a_real_network(family):
    probe = network(family, 1)
    g, f = probe.gradient(), probe.fisher()
    torch.testing.assert_close(probe.curvature([split(normal(len(g), s), probe.sizes) for s in (1, 2)]),
                               torch.stack([normal(len(g), s) for s in (1, 2)]) @ f
                               @ torch.stack([normal(len(g), s) for s in (1, 2)]).T)  # fmt: skip
    d = torch.linalg.solve(f + 0.1 * torch.eye(len(g), dtype=DOUBLE), g)
    noisy, previous = d + 0.1 * normal(len(g), 3), normal(len(g), 4)
    local = local_model(g, f, probe.sizes, damping=0.01, previous=split(previous, probe.sizes))
    step = QuadraticFit()(local, split(noisy, probe.sizes), 1.0, probe)
    torch.testing.assert_close(join(step.delta), dense_solution(g, f, 0.01, [noisy, previous]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("where", ["direction", "gradient", "previous", "curvature"])
def test_anything_non_finite_is_rejected(where):
    g, f, d, previous = normal(5, 0), psd(5, 1), normal(5, 2), normal(5, 3)
    {"direction": d, "gradient": g, "previous": previous, "curvature": f[0]}[where][0] = math.nan
    local = local_model(g, psd(5, 4), SIZES, previous=split(previous, SIZES))
    step = QuadraticFit()(local, split(d, SIZES), 1.0, QuadraticProbe(f))
    assert step.delta is None and step.accepted is False and math.isnan(step.kl_predicted)


def test_no_curvature_gives_no_step():
    flat, d = torch.zeros(5, 5, dtype=DOUBLE), normal(5, 2)
    local = local_model(normal(5, 0), flat, SIZES)
    assert not join(QuadraticFit()(local, split(d, SIZES), 1.0, QuadraticProbe(flat)).delta).any()
    assert QuadraticFit(max_kl=0.1)(local, split(d, SIZES), math.inf, QuadraticProbe(flat)).delta is None


def test_says_what_is_wrong():
    local, direction = local_model(normal(5, 0), psd(5, 1), SIZES), split(normal(5, 2), SIZES)
    with pytest.raises(ArgumentError, match="probe"):
        QuadraticFit()(local, direction, 1.0, None)
    with pytest.raises(ArgumentError, match="infinite"):
        QuadraticFit()(local, direction, math.inf, QuadraticProbe(psd(5, 1)))
    with pytest.raises(ArgumentError, match="max_kl"):
        QuadraticFit(max_kl=-1.0)
    wrong = QuadraticProbe(psd(5, 1))
    wrong.curvature = lambda deltas: torch.zeros(3, 3)
    with pytest.raises(ShapeError, match=r"\[1, 1\]"):
        QuadraticFit()(local, direction, 1.0, wrong)
    half = local_model(normal(5, 0), psd(5, 1), SIZES, previous={"a": normal(3, 0)})
    with pytest.raises(ArgumentError, match=r"previous step has no block for .*b"):
        QuadraticFit()(half, direction, 1.0, QuadraticProbe(psd(5, 1)))
