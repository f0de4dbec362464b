"""No update of TrustRegionNGD moves the model further than max_kl, as measured here and not by natgrad."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from optim_problems import batch, exact_fisher, flat, gradient, make, mean_kl
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import StaleTapeError
from support import assert_close

STRUCTURES = {"free": ng.MatrixFree(), "dense": ng.Dense(), "gram": ng.Gram(), "kfac": ng.Kronecker()}


def measured(model: nn.Module, x: Tensor, y: Tensor, max_kl: float, factor: float, **options) -> tuple[float, object]:
    """KL(old ‖ new) of one step whose gradient is multiplied by ``factor``."""
    optimizer = ng.TrustRegionNGD(model, ng.Categorical(), max_kl=max_kl, **options)
    optimizer.zero_grad()
    old = model(x)
    (factor * F.cross_entropy(old, y)).backward()
    optimizer.step()
    return mean_kl(old, model(x)), optimizer.last


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e3, 1e12])
@pytest.mark.parametrize("max_kl", [1e-6, 0.01, 1.0])
def test_the_bound_holds_whatever_the_gradient(max_kl, scale, sign, structure):
    x, y = batch(0, 16)
    kl, last = measured(make(), x, y, max_kl, sign * scale, structure=STRUCTURES[structure])
    assert last.accepted and kl <= max_kl
    assert kl == pytest.approx(last.kl_measured, rel=1e-6, abs=1e-14)
    # The step goes to the boundary, up to the backtracks it took: a bound that holds because nothing moves is no bound.
    assert kl > 0.05 * max_kl * 0.25**last.backtracks


def test_the_step_does_not_depend_on_the_scale_of_the_loss():
    x, y = batch(0, 16)
    moves = []
    for scale in (1e-12, 1.0, 1e12):
        model = make()
        start = flat(model)
        measured(model, x, y, 0.01, scale)
        moves.append(flat(model) - start)
    assert_close(moves[0], moves[1], 1e-8)
    assert_close(moves[2], moves[1], 1e-8)


@pytest.mark.parametrize("lr", [1e-3, 1.0, math.inf])
def test_the_bound_holds_over_a_run_with_momentum_decay_and_dropout(lr):
    x, y = batch(0, 16)
    model = make(dropout=0.3, norm=True)
    options = {"lr": lr, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = ng.TrustRegionNGD(model, ng.Categorical(), max_kl=0.02, **options)
    moved = 0
    for seed in range(8):
        optimizer.zero_grad()
        torch.manual_seed(seed)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        old = model(x)
        after = {n: b.clone() for n, b in model.named_buffers()}
        F.cross_entropy(old, y).backward()
        start = flat(model)
        optimizer.step()
        moved += not torch.equal(start, flat(model))
        for state in (buffers, after):
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
            if state is buffers:
                torch.manual_seed(seed)
                with torch.no_grad():
                    new = model(x)
        kl = mean_kl(old, new)
        assert kl <= 0.02
        assert kl == pytest.approx(float(optimizer.last.kl_measured), rel=1e-6, abs=1e-12)
    assert moved >= 6


def test_several_passes_are_bounded_together():
    model, (x, y) = make(), batch(0, 16)
    optimizer = ng.TrustRegionNGD(model, ng.Categorical(), max_kl=0.01)
    old = torch.cat([model(part) for part in x.split([4, 12])])
    F.cross_entropy(old, y).backward()
    optimizer.step()
    assert optimizer.last.kl_measured == pytest.approx(mean_kl(old, model(x)), rel=1e-9)
    assert 0.002 < optimizer.last.kl_measured <= 0.01


def test_the_direction_is_the_natural_gradient():
    model, (x, y) = make(), batch(0, 16)
    start = flat(model)
    expected = torch.linalg.solve(exact_fisher(model, x) + 0.1 * torch.eye(31).double(), gradient(model, x, y))
    _, last = measured(model, x, y, 0.01, 1.0, damping=0.1, solver=ng.linalg.CG(tolerance=1e-13))
    move = flat(model) - start
    assert_close(move / move.norm(), -expected / expected.norm(), 1e-9)
    quadratic = 0.5 * move @ exact_fisher(make(), x) @ move
    assert last.kl_predicted == pytest.approx(float(quadratic), rel=1e-9)


def test_a_direction_without_curvature_is_not_followed_to_infinity():
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = ng.TrustRegionNGD(model, ng.Categorical(), max_kl=0.01, structure=ng.Dense())
    start = flat(model)
    model(torch.eye(3).double()).sum().backward()  # adds the same to all logits, which changes no probability
    optimizer.step()
    # The metric is zero along it up to rounding; the damping 0.1 bounds the step: ½ λ ‖Δ‖² ≤ max_kl.
    move = flat(model) - start
    assert 0 < 0.5 * 0.1 * float(move @ move) <= 0.01


@pytest.mark.parametrize("mixed", [False, True])
def test_mixed_precision_is_measured_in_mixed_precision(mixed):
    """In full precision the replay would differ from the observed output by more than this radius."""
    model, (x, y) = make().float(), batch(0, 16)
    optimizer = ng.TrustRegionNGD(model, ng.Categorical(), max_kl=1e-5, structure=ng.Dense())
    x = x.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        old = model(x)
        loss = F.cross_entropy(old, y)
    loss.backward()
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert mean_kl(old.double(), model(x).double()) <= 1e-5 * 1.01


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_a_closure_under_autocast_is_measured_at_every_trial(inside):
    """torch keeps low-precision copies of the weights until the outermost region ends: trials must not see old ones."""
    (x, y), tried, accepted = batch(0, 16), 0, 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    search = ng.TrustRegion(1e-2, shrink=0.7, require_improvement=False)
    optimizer = ng.KFAC(model, ng.Categorical(), search=search, lr=math.inf, damping=1e-8, average=0.0)
    x = x.float()

    def region(enabled: bool) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    def evaluate():
        with region(True) if inside else contextlib.nullcontext():
            output = model(x)
        return F.cross_entropy(output.float(), y), output

    def outputs() -> Tensor:
        with region(True), torch.no_grad():
            return model(x).double()

    for _ in range(10):
        old = outputs()
        with region(not inside):
            optimizer.step(evaluate)
        last = optimizer.last
        tried += last.backtracks > 0
        accepted += last.accepted
        kl = mean_kl(old, outputs())
        assert kl <= 1e-2 * 1.001
        assert kl == pytest.approx(last.kl_measured if last.accepted else 0.0, rel=1e-2, abs=1e-6)
    assert tried >= 3 and accepted >= 4, "hardly damped, in bfloat16: a step may find no length"


def test_an_input_that_is_reused_is_noticed():
    model, (x, y) = make(), batch(0, 16)
    optimizer = ng.TrustRegionNGD(model, ng.Categorical(), max_kl=0.01)
    start = flat(model)
    F.cross_entropy(model(x), y).backward()
    x.copy_(batch(1, 16)[0])
    with pytest.raises(StaleTapeError, match="changed in place"):
        optimizer.step()
    assert torch.equal(flat(model), start)


def test_weight_decay_is_part_of_what_is_measured():
    """Gauss–Newton with weight decay converges to the ridge solution, which raises the loss without the penalty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(20, 1, dtype=torch.float64, generator=generator)
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = ng.GaussNewton(model, ng.Gaussian(), weight_decay=0.5, damping=ng.LevenbergMarquardt(1.0))

    def evaluate():
        f = model(x)
        return 0.5 * (f - y).square().sum(-1).mean(), f, y

    for _ in range(200):
        optimizer.step(evaluate)
    ridge = torch.linalg.solve(x.T @ x / 20 + 0.5 * torch.eye(3).double(), x.T @ y / 20).T
    assert_close(model.weight.detach(), ridge, 1e-6)


def test_levenberg_marquardt_follows_the_ratio():
    """A model that is quadratic: every prediction is exact, and damping falls; a step that fails raises it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(20, 1, dtype=torch.float64, generator=generator)
    model = nn.Linear(3, 1).double()
    damping = ng.LevenbergMarquardt(1.0, factor=2.0)
    optimizer = ng.NaturalGradient(
        model, ng.Gaussian(), metric=ng.Fisher(ng.Exact(), ng.Dense()), damping=damping, refresh=ng.Refresh(1, 1)
    )
    for expected in (0.5, 0.25, 0.125):
        optimizer.zero_grad()
        f = model(x)
        optimizer.observe(f, y)
        (0.5 * (f - y).square().sum(-1).mean()).backward()
        optimizer.step()
        assert float(optimizer.last.ratio) == pytest.approx(1.0, rel=1e-9)
        assert optimizer.damping.value == expected
    optimizer.param_groups[0]["lr"] = 50.0  # far beyond the minimum: the loss rises
    optimizer.zero_grad()
    f = model(x)
    optimizer.observe(f, y)
    (0.5 * (f - y).square().sum(-1).mean()).backward()
    optimizer.step()
    assert optimizer.damping.value == 0.25
