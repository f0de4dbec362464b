from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_models import SIZES, Normal, QuadraticProbe, Softmax, join, local_model, network, normal, psd, split

from natgrad.errors import ArgumentError
from natgrad.step import Trial, TrustRegion

DOUBLE = torch.float64


def measured_kl(probe, delta: torch.Tensor) -> float:
    """mean KL(old ‖ new) written out from the densities, not through torch.distributions."""
    old, new = probe.forward(probe.theta), probe.forward(probe.theta + delta)
    if isinstance(probe.family, Softmax):
        p, q = old.log_softmax(-1), new.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean().item()
    (m, s), (n, t) = (old[:, 0], old[:, 1]), (new[:, 0], new[:, 1])
    return (t - s + (torch.exp(2 * s) + (m - n) ** 2) / (2 * torch.exp(2 * t)) - 0.5).mean().item()


def setting(family, seed: int, damping: float = 1e-3):
    """(probe, local model without loss, natural-gradient direction) of a small network."""
    probe = network(family, seed)
    g, f = probe.gradient(), probe.fisher()
    direction = torch.linalg.solve(f + damping * torch.eye(len(g), dtype=DOUBLE), g)
    return probe, g, f, direction


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from([Softmax, Normal]),
    seed=st.integers(0, 5),
    exponent=st.floats(-20, 12),
    sign=st.sampled_from([-1.0, 1.0]),
    lr=st.sampled_from([1e-3, 1.0, 1e3, math.inf]),
    log_radius=st.floats(-8, 0.5),
    random=st.booleans(),
)
def test_no_step_beyond_the_measured_radius(family, seed, exponent, sign, lr, log_radius, random):
    probe, g, f, direction = setting(family, seed)
    d = sign * 10.0**exponent * (normal(len(g), seed + 7) if random else direction)
    max_kl = 10.0**log_radius
    step = TrustRegion(max_kl)(local_model(g, f, probe.sizes), split(d, probe.sizes), lr, probe)
    if step.delta is None:
        assert step.accepted is False and step.lr == 0 and step.reason
        return
    kl = measured_kl(probe, join(step.delta))
    assert kl <= max_kl * (1 + 1e-9) + 1e-15
    assert step.kl_measured <= max_kl and step.kl_measured == pytest.approx(kl, rel=1e-6, abs=1e-14)
    assert 0 < step.lr <= lr * (1 + 1e-12)
    torch.testing.assert_close(join(step.delta), -step.lr * d, rtol=1e-12, atol=0)


@settings(max_examples=25, deadline=None)
@given(exponent=st.floats(-20, 12), sign=st.sampled_from([-1.0, 1.0]), seed=st.integers(0, 3))
def test_no_step_beyond_the_measured_radius_in_float32(exponent, sign, seed):
    probe = network(Softmax, seed, dtype=torch.float32)
    exact = network(Softmax, seed)
    d = (sign * 10.0**exponent * normal(len(exact.theta), seed)).float()
    local = local_model(exact.gradient().float(), exact.fisher().float(), probe.sizes)
    step = TrustRegion(0.01)(local, split(d, probe.sizes), math.inf, probe)
    assert step.delta is not None and step.kl_measured <= 0.01
    assert 1e-3 < measured_kl(exact, join(step.delta).double()) <= 0.01 * (1 + 1e-3)


@pytest.mark.parametrize("family", [Softmax, Normal])
@pytest.mark.parametrize("exponent", [-20, 0, 12])
def test_infinite_lr_goes_to_the_boundary_whatever_the_gradient_scale(family, exponent):
    probe, g, _, _ = setting(family, 0)
    f = torch.block_diag(*(b.to_dense() for b in local_model(g, probe.fisher(), probe.sizes).metric.values()))
    whole = QuadraticProbe(f)
    d = 10.0**exponent * normal(len(g), 3)
    local = local_model(g, f, probe.sizes)
    exact = TrustRegion(0.05)(local, split(d, probe.sizes), math.inf, whole)
    assert exact.kl_measured == pytest.approx(0.05, rel=1e-10) and exact.backtracks == 0
    # in one block the block-diagonal metric is the exact Fisher matrix, so for a small radius prediction ≈ measurement
    d[: probe.sizes["hidden"]] = 0
    step = TrustRegion(1e-8)(local, split(d, probe.sizes), math.inf, probe)
    assert step.kl_predicted in (pytest.approx(1e-8), pytest.approx(0.25e-8))
    assert step.kl_measured == pytest.approx(step.kl_predicted, rel=1e-2)


def test_a_smaller_lr_is_taken_as_it_is():
    f, d = psd(5, 0), normal(5, 1)
    f = torch.block_diag(f[:3, :3], f[3:, 3:])
    lr = 0.5 * math.sqrt(2 * 0.01 / (d @ f @ d).item())
    step = TrustRegion(0.01)(local_model(normal(5, 2), f, SIZES, damping=0.3), split(d, SIZES), lr, QuadraticProbe(f))
    assert step.lr == pytest.approx(lr, rel=1e-15) and step.backtracks == 0 and step.damping == 0.3
    assert step.kl_measured == pytest.approx(0.01 / 4, rel=1e-12)


@pytest.mark.parametrize(
    "factor, backtracks", [(1 + 1e-9, 1), (1.5, 1), (3.9, 1), (4.1, 2), (15.9, 2), (1000.0, 5), (1e6, 10)]
)
def test_backtracks_as_often_as_the_true_curvature_asks(factor, backtracks):
    f, d = psd(5, 0), normal(5, 1)
    f = torch.block_diag(f[:3, :3], f[3:, 3:])
    g = normal(5, 2)
    probe = QuadraticProbe(factor * f)  # the true KL is `factor` times the predicted one
    step = TrustRegion(0.01)(local_model(g, f, SIZES), split(d, SIZES), math.inf, probe)
    assert step.backtracks == backtracks and step.accepted and len(probe.deltas) == backtracks + 1
    assert step.kl_measured == pytest.approx(factor * 0.01 / 4**backtracks, rel=1e-12) and step.kl_measured <= 0.01
    delta = join(step.delta)
    assert step.kl_predicted == pytest.approx((0.5 * delta @ f @ delta).item(), rel=1e-12)
    expected = (g @ delta + 0.5 * delta @ f @ delta).item()  # recomputed for the final length, not compounded
    assert step.loss_change_predicted == pytest.approx(expected, rel=1e-10)


def test_rejects_when_the_last_backtrack_is_still_outside():
    f = torch.eye(5, dtype=DOUBLE)
    probe = QuadraticProbe(1e7 * f)
    step = TrustRegion(0.01)(local_model(normal(5, 2), f, SIZES), split(normal(5, 1), SIZES), math.inf, probe)
    assert step.delta is None and step.accepted is False and len(probe.deltas) == 11 and step.backtracks == 10
    assert step.lr == 0 and step.kl_measured == 0 and step.kl_predicted == 0 and "exceeds max_kl" in step.reason


def losing(f: torch.Tensor, g: torch.Tensor) -> QuadraticProbe:
    return QuadraticProbe(f, g, f, loss0=2.0)


def test_where_there_is_a_loss_it_must_fall_strictly():
    f, g = torch.eye(5, dtype=DOUBLE), normal(5, 2)
    loss = torch.tensor(2.0, dtype=DOUBLE)
    local, up = local_model(g, f, SIZES, loss=loss), split(-g, SIZES)
    rejected = TrustRegion(0.01)(local, up, math.inf, losing(f, g))
    assert rejected.delta is None and "loss does not fall" in rejected.reason
    assert TrustRegion(0.01, require_improvement=False)(local, up, math.inf, losing(f, g)).accepted
    assert TrustRegion(0.01)(local_model(g, f, SIZES), up, math.inf, losing(f, g)).accepted, "no loss to compare with"
    accepted = TrustRegion(0.01)(local, split(g, SIZES), math.inf, losing(f, g))
    assert accepted.accepted and accepted.loss_change_measured < 0
    assert accepted.ratio == pytest.approx(1.0, rel=1e-9)
    constant = QuadraticProbe(f, torch.zeros(5, dtype=DOUBLE), torch.zeros(5, 5, dtype=DOUBLE), loss0=2.0)
    assert TrustRegion(0.01)(local, split(g, SIZES), math.inf, constant).delta is None


def test_backtracks_into_improvement():
    """The boundary overshoots the minimum along the ray; a shorter step improves."""
    f, h, g = torch.eye(5, dtype=DOUBLE), 40 * torch.eye(5, dtype=DOUBLE), 0.1 * normal(5, 2)
    probe = QuadraticProbe(f, g, h, loss0=2.0)
    local = local_model(g, f, SIZES, loss=torch.tensor(2.0, dtype=DOUBLE))
    step = TrustRegion(0.01)(local, split(g, SIZES), math.inf, probe)
    boundary, limit = math.sqrt(0.02 / (g @ g).item()), 2 / 40  # the loss falls for s < 2 gᵀg / gᵀHg
    expected = math.ceil(math.log2(boundary / limit))
    assert expected >= 1 and step.backtracks == expected
    assert step.loss_change_measured < 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["direction", "gradient", "metric"])
def test_anything_non_finite_is_rejected_without_a_trial(bad, where):
    g, f, d = normal(5, 0), psd(5, 1), normal(5, 2)
    {"direction": d, "gradient": g, "metric": f[0]}[where][0] = bad
    probe = QuadraticProbe(torch.eye(5, dtype=DOUBLE))
    step = TrustRegion(0.01)(local_model(g, f, SIZES), split(d, SIZES), math.inf, probe)
    assert step.delta is None and step.accepted is False and not probe.deltas and math.isnan(step.kl_predicted)


@pytest.mark.parametrize(
    "trial",
    [Trial(torch.tensor(math.nan)), Trial(torch.tensor(-math.inf)), Trial(torch.tensor(0.0), torch.tensor(math.nan)),
     Trial(torch.tensor(0.0), torch.tensor(-math.inf))],
)  # fmt: skip
def test_a_non_finite_measurement_is_never_accepted(trial):
    f = torch.eye(5, dtype=DOUBLE)
    local = local_model(normal(5, 0), f, SIZES, loss=torch.tensor(1.0))
    search = TrustRegion(0.01, require_improvement=False, backtracks=2)
    step = search(local, split(normal(5, 2), SIZES), 1.0, lambda delta: trial)
    assert step.delta is None and step.backtracks == 2


def test_without_curvature_an_infinite_lr_is_rejected_and_a_finite_one_is_measured():
    flat = torch.zeros(5, 5, dtype=DOUBLE)
    local, d = local_model(normal(5, 0), flat, SIZES), normal(5, 2)
    probe = QuadraticProbe(torch.eye(5, dtype=DOUBLE))
    none = TrustRegion(0.01)(local, split(d, SIZES), math.inf, probe)
    assert none.delta is None and not probe.deltas and "curvature" in none.reason
    step = TrustRegion(0.01, backtracks=20)(local, split(d, SIZES), 8.0, probe)
    assert step.accepted and step.kl_measured <= 0.01 and step.lr == 8.0 / 2**step.backtracks


@pytest.mark.parametrize("lr", [0.0, 1.0, math.inf])
def test_zero_direction_or_zero_lr_changes_nothing(lr):
    d = torch.zeros(5, dtype=DOUBLE) if lr else normal(5, 2)
    probe = QuadraticProbe(torch.eye(5, dtype=DOUBLE))
    step = TrustRegion(0.01)(local_model(normal(5, 0), psd(5, 1), SIZES), split(d, SIZES), lr, probe)
    assert step.delta is None and not probe.deltas and step.kl_measured is None


def test_a_tensor_lr():
    f = torch.eye(5, dtype=DOUBLE)
    local, direction = local_model(normal(5, 0), f, SIZES), split(1e-3 * normal(5, 2), SIZES)
    step = TrustRegion(0.01)(local, direction, torch.tensor(0.5), QuadraticProbe(f))
    assert step.lr == 0.5
    assert TrustRegion(0.01)(local, direction, torch.tensor(math.nan), QuadraticProbe(f)).delta is None


@pytest.mark.parametrize(
    "arguments",
    [{"max_kl": 0.0}, {"max_kl": math.inf}, {"max_kl": math.nan}, {"shrink": 1.0}, {"shrink": 0.0}, {"backtracks": -1}],
)
def test_checks_its_arguments(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        TrustRegion(**{"max_kl": 0.01, **arguments})


def test_needs_a_probe_and_a_sensible_lr():
    local, direction = local_model(normal(5, 0), psd(5, 1), SIZES), split(normal(5, 2), SIZES)
    with pytest.raises(ArgumentError, match="probe"):
        TrustRegion(0.01)(local, direction, 1.0, None)
    with pytest.raises(ArgumentError, match="lr is"):
        TrustRegion(0.01)(local, direction, math.nan, QuadraticProbe(psd(5, 1)))
