"""Mistakes that second-order optimizers have made, one test each: pitfalls 7, 8, 22, 29 to 36 and 38 to 41.

Expected steps are computed from the dense oracles: (F̄ + λI)⁻¹g with the averages, masks and momenta written out here.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import natgrad as ng
from natgrad import errors
from natgrad.testing import families, oracles, zoo
from support import assert_close, distance

CATEGORICAL = families.categorical()


def make(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 3)]
        return nn.Sequential(*layers).double()


def batch(seed: int = 0, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train_once(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """One ordinary step; returns the change of the parameters."""
    before = theta(model)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return theta(model) - before


def exact_fisher(model: nn.Module, x: Tensor) -> Tensor:
    return oracles.exact_fisher(oracles.jacobian(model, x), CATEGORICAL.fisher(oracles.network_output(model, x)))


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return oracles.flat_gradient(model, F.cross_entropy(model(x), y))


EXACT_DENSE = ng.Fisher(ng.Exact(), ng.Dense())
EXACT_KFAC = ng.Fisher(ng.Exact(), ng.Kronecker())
EXACT_EKFAC = ng.Fisher(ng.Exact(), ng.EigenKronecker())
METRICS = {
    "dense": EXACT_DENSE,
    "diagonal": ng.Fisher(ng.Exact(), ng.Diagonal()),
    "kfac": EXACT_KFAC,
    "ekfac": EXACT_EKFAC,
    "gram": ng.Fisher(ng.Exact(), ng.Gram()),
    "free": ng.Fisher(ng.Exact(), ng.MatrixFree()),
    "sampled": ng.Fisher(ng.MonteCarlo(), ng.Kronecker()),
}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


# 7: KL clipping


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("lr", [1e-3, 0.3, 50.0])
def test_pitfall_07_kl_clip_judges_the_whole_step(lr, momentum):
    """½ Δᵀ(F + λI)Δ of what was really added, scheduled learning rate and momentum included, is at most max_kl."""
    model, (x, y), max_kl = make(), batch(), 1e-3
    options = {"metric": EXACT_DENSE, "search": ng.KLClip(max_kl), "average": 0.0, "refresh": ng.Refresh(1, 1)}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=123.0, momentum=momentum, damping=1e-2, **options)
    optimizer.param_groups[0]["lr"] = lr  # as a scheduler does
    velocity = torch.zeros_like(theta(model))
    for _ in range(4):
        fisher, velocity = exact_fisher(model, x), momentum * velocity + gradient(model, x, y)
        full = -lr * oracles.damped_inverse(fisher, 1e-2) @ velocity
        bound = 0.5 * full @ fisher @ full + 0.5 * 1e-2 * full @ full
        expected = full * min(1.0, float((max_kl / bound).sqrt()))
        step = train_once(model, optimizer, x, y)
        assert_close(step, expected, 1e-7)
        assert float(0.5 * step @ fisher @ step) <= max_kl * (1 + 1e-9)
        assert float(optimizer.last.kl_predicted) == pytest.approx(float(0.5 * step @ fisher @ step), rel=1e-6)


def test_pitfall_07_predicted_kl_is_the_measured_one_for_small_steps():
    model, (x, y) = make(), batch()
    old = model(x).detach()
    optimizer = ng.NGD(model, ng.Categorical(), search=ng.KLClip(1e-9))
    train_once(model, optimizer, x, y)
    measured = CATEGORICAL.kl(old, model(x).detach()).mean()
    assert float(measured) == pytest.approx(float(optimizer.last.kl_predicted), rel=1e-2)
    assert 1e-12 < float(measured) <= 1e-9


FITTED = ["mlp", "inplace", "layer_norm", "batch_norm_train", "attention", "multihead", "lstm", "embedding_bag"]


@pytest.mark.parametrize("name", FITTED)
def test_pitfall_07_quadratic_fit_takes_the_minimum_along_the_direction_of_the_exact_metric(name):
    """Δ = −α d with α = gᵀd / dᵀ(F + λI)d, whatever approximation gave d; F is that of the whole batch."""
    case, damping = zoo.case(name), 0.1
    f = oracles.network_output(case.model, case.x)
    y = torch.randint(0, 3, f.shape[:-1], generator=torch.Generator().manual_seed(1))
    exact = oracles.exact_fisher(oracles.jacobian(case.model, case.x), CATEGORICAL.fisher(f))
    options = {"metric": ng.Fisher(ng.Exact(), ng.Diagonal()), "search": ng.QuadraticFit(), "average": 0.0}
    optimizer = ng.NaturalGradient(case.model, ng.Categorical(), lr=1.0, damping=damping, **options)
    before = oracles.flatten(oracles.trainable(case.model))
    F.cross_entropy(case().flatten(0, -2), y.flatten()).backward()
    g = oracles.flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in case.model.parameters()])
    optimizer.step()
    step = oracles.flatten(oracles.trainable(case.model)) - before
    d = -step / step.norm()
    alpha = (g @ d) / (d @ exact @ d + damping * d @ d)
    assert_close(step, -alpha * d, 1e-8)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "preset", [ng.KFAC, ng.EKFAC, ng.BlockNGD, ng.DiagonalNGD, ng.GramNGD], ids=lambda p: p.__name__
)
def test_pitfall_07_defaults_learn_on_small_batches(preset, seed):
    """A sampled metric of a small batch has almost no rank: a clip by ½ΔᵀFΔ alone does not see a step out of its span.

    Ten classes by a linear rule, 60 batches of 32: from ln 10 = 2.3, and never far above it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10))
    x = torch.randn(512, 20, generator=generator)
    y = (x @ torch.randn(20, 10, generator=generator)).argmax(-1)
    optimizer, losses = preset(model, ng.Categorical()), []
    for _ in range(60):
        rows = torch.randint(0, 512, (32,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        assert float(F.cross_entropy(model(x), y)) < 1.2
    assert max(losses) < 3.5


# 8: averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_pitfall_08_average_starts_at_the_data_and_decay_is_the_weight_of_the_past(decay):
    """Σ β^(T−t)(1 − β)F_t / (1 − β^T): no identity at the start, and not the reverse meaning of the weight."""
    model, (x, y) = make(), batch()
    options = {"metric": EXACT_DENSE, "average": decay, "refresh": ng.Refresh(1, 1)}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, damping=1e-2, **options)
    total, weight = torch.zeros(31, 31, dtype=torch.float64), 0.0
    for t in range(4):
        x, y = batch(t)
        total, weight = decay * total + (1 - decay) * exact_fisher(model, x), decay * weight + 1 - decay
        expected = -0.1 * oracles.damped_inverse(total / weight, 1e-2) @ gradient(model, x, y)
        assert_close(train_once(model, optimizer, x, y), expected, 1e-8)


@pytest.mark.parametrize("name", [n for n in METRICS if n != "free"])
def test_bug_of_kfac_pytorch_identity_start_of_the_average(name):
    """Tiny curvature must show at the first step: scaling all outputs' curvature down scales the step up."""
    model, (x, y) = make(), batch()
    with torch.no_grad():
        model[3].weight *= 1e-3
        model[3].bias.copy_(torch.tensor([12.0, 0.0, 0.0]))  # p(y | x) peaked: Λ of order e⁻¹²
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.0, metric=METRICS[name], damping=1e-12)
    train_once(model, optimizer, x, y)
    for operator in optimizer._curvature.operators.values():
        assert float(operator.trace()) < 1e-2


# 9: damping of cached factors


@every_metric
def test_pitfall_09_repeated_steps_do_not_accumulate_damping(metric):
    steps = []
    for warm in (0, 6):
        model, (x, y) = make(), batch()
        options = {"metric": metric, "refresh": ng.Refresh(1, 2)}
        if metric is METRICS["sampled"]:
            options["average"] = 0.0
        optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.0, damping=ng.FactoredTikhonov(0.1), **options)
        for _ in range(warm):
            train_once(model, optimizer, x, y)
        optimizer.param_groups[0]["lr"] = 1.0
        optimizer._steps = 0  # sampled labels depend on it
        steps.append(train_once(model, optimizer, x, y))
    tolerance = 1e-7 if metric is not METRICS["sampled"] else 1.0
    assert_close(steps[1], steps[0], tolerance)


# 15, 19, 20, 22: observation


def test_pitfall_15_running_statistics_see_each_batch_once():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()]
    models.append(copy.deepcopy(models[0]))
    x, y = batch()
    for search in (ng.LearningRate(), ng.TrustRegion(1e-3), ng.QuadraticFit()):
        first, second = (copy.deepcopy(m) for m in models)
        optimizer = ng.NaturalGradient(first, ng.Categorical(), lr=0.1, search=search)
        train_once(first, optimizer, x, y)
        second(x)
        assert torch.equal(first[1].running_mean, second[1].running_mean)
        assert torch.equal(first[1].running_var, second[1].running_var)
        assert int(first[1].num_batches_tracked) == 1


class Experts(nn.Module):
    """Two experts of which a batch uses one: the other has no gradient and no hook fires."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head, self.route = nn.ModuleList(nn.Linear(3, 4) for _ in range(2)), nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.experts[self.route](x)))


@every_metric
def test_pitfall_19_unused_and_late_experts(metric):
    torch.manual_seed(0)
    model, (x, y) = Experts().double(), batch()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=metric, refresh=ng.Refresh(1, 1))
    for route in (0, 0, 1, 0):
        model.route = route
        other = [p.clone() for p in model.experts[1 - route].parameters()]
        before = theta(model)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert torch.isfinite(theta(model)).all()
        assert distance(theta(model), before) > 1e-6
        assert all(torch.equal(p, q) for p, q in zip(model.experts[1 - route].parameters(), other, strict=True))


class FunctionalExperts(Experts):
    """The same through F.linear, so that no hook of an expert ever fires."""

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[self.route]
        return self.head(torch.tanh(F.linear(x, expert.weight, expert.bias)))  # pyright: ignore


def exact_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What one exact step of lr 0.1 and damping 0.1 must be, from a copy of the model."""
    model = copy.deepcopy(model)
    g = oracles.flat_gradient(model, F.cross_entropy(model(x).flatten(0, -2), y.flatten()))
    return -0.1 * oracles.damped_inverse(exact_fisher(model, x), 0.1) @ g


def test_pitfall_19_a_late_expert_that_bypasses_its_module():
    torch.manual_seed(0)
    model, (x, y) = FunctionalExperts().double(), batch()
    optimizer = ng.NGD(model, ng.Categorical(), lr=0.1, damping=0.1)
    for route in (0, 0, 1, 0):
        model.route = route
        expected = exact_step(model, x, y)
        assert_close(train_once(model, optimizer, x, y), expected)


@pytest.mark.parametrize("name", ["positional", "time_first", "flattened", "mixer"])
def test_pitfall_20_a_first_batch_of_one_row_hides_nothing(name):
    """With one row every axis looks like the batch: what is learnt of the layers then must not be final."""
    case = zoo.case(name)
    optimizer = ng.NGD(case.model, ng.Categorical(), lr=0.1, damping=0.1)
    for n in (1, 3, 2):
        x = case.x[:n]
        y = torch.randint(0, 3, (n, 3), generator=torch.Generator().manual_seed(n))
        expected, before = exact_step(case.model, x, y), theta(case.model)
        optimizer.zero_grad()
        F.cross_entropy(case.model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        assert_close(theta(case.model) - before, expected)


@pytest.mark.parametrize("between", ["no_grad", "eval", "copy", "func"])
@every_metric
def test_pitfall_20_other_passes_do_not_count(metric, between):
    """An evaluation between forward and backward must leave no trace in the step."""
    steps = []
    for disturbed in (False, True):
        model, (x, y) = make(), batch()
        optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=metric, damping=1e-2)
        loss, before = F.cross_entropy(model(x), y), theta(model)
        if disturbed:
            other = 100 * batch(9)[0]
            if between == "no_grad":
                with torch.no_grad():
                    model(other)
            elif between == "eval":
                model.eval()
                model(other)
                model.train()
            elif between == "copy":
                copy.deepcopy(model)(other).sum().backward()
            else:
                parameters = dict(model.named_parameters())
                torch.func.grad(lambda p: torch.func.functional_call(model, p, (other,)).sum())(parameters)  # noqa: B023
        loss.backward()
        optimizer.step()
        steps.append(theta(model) - before)
    assert torch.equal(*steps)


def test_pitfall_20_training_in_evaluation_mode_is_refused_unless_asked_for():
    model, (x, y) = make(), batch()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=EXACT_KFAC)
    model.eval()
    before = theta(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(errors.NotObservedError, match="training mode"):
        optimizer.step()
    assert torch.equal(theta(model), before)
    closure_step(model, optimizer, x, y)  # a closure says by itself that it trains
    assert distance(theta(model), before) > 1e-6


def test_pitfall_20_checkpointing_counts_once():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[2:](checkpoint(self.inner[:2], x, use_reentrant=False))

    x, y = batch()
    steps = []
    for wrap in (nn.Sequential, Checkpointed):
        model = wrap(make())
        optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=EXACT_KFAC)
        steps.append(train_once(model, optimizer, x, y))
        steps.append(train_once(model, optimizer, x, y))
    assert_close(steps[2], steps[0])
    assert_close(steps[3], steps[1])


@pytest.mark.filterwarnings("ignore")
def test_pitfall_22_a_model_compiled_afterwards_is_observed():
    x, y = batch()
    plain = make()
    expected = train_once(plain, ng.NaturalGradient(plain, ng.Categorical(), lr=0.1, metric=EXACT_KFAC), x, y)
    model = make()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=EXACT_KFAC)
    compiled = torch.compile(model, backend="eager")
    before = theta(model)
    F.cross_entropy(compiled(x), y).backward()
    optimizer.step()
    assert_close(theta(model) - before, expected)


# 28: what the loss contains beside the likelihood


def test_pitfall_28_auxiliary_terms_reach_the_gradient_only_and_weight_decay_is_decoupled():
    model, (x, y), lr, decay = make(), batch(), 0.1, 0.3
    options = {"metric": EXACT_DENSE, "damping": 1e-2, "lr": lr, "average": 0.0}
    start, fisher = theta(model), exact_fisher(model, x)
    penalised = gradient(model, x, y) + 0.5 * start
    optimizer = ng.NaturalGradient(model, ng.Categorical(), weight_decay=decay, **options)
    loss = F.cross_entropy(model(x), y) + 0.25 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    optimizer.step()
    expected = start - lr * decay * start - lr * oracles.damped_inverse(fisher, 1e-2) @ penalised
    assert_close(theta(model), expected)


# 29: mixed precision and overflow


@every_metric
def test_pitfall_29_scaled_losses_do_not_scale_the_metric(metric):
    steps = []
    for scale in (1.0, 2.0**12):
        model, (x, y) = make(), batch()
        optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=metric, damping=1e-2)
        before = theta(model)
        (scale * F.cross_entropy(model(x), y)).backward()
        for p in model.parameters():
            p.grad /= scale
        optimizer.step()
        steps.append(theta(model) - before)
    assert_close(steps[1], steps[0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pitfall_29_reduction_of_the_loss_does_not_change_the_metric(reduction):
    model, (x, y) = make(), batch()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=EXACT_DENSE, damping=1e-2)
    expected = -0.1 * oracles.damped_inverse(exact_fisher(model, x), 1e-2) @ gradient(model, x, y)
    before = theta(model)
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    optimizer.step()
    assert_close(theta(model) - before, expected * (len(x) if reduction == "sum" else 1))


@every_metric
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pitfall_29_a_gradient_that_overflowed_changes_nothing(metric, bad):
    """Not the parameters, not the momentum, not the averages: the next step is as if the bad one had not been."""
    steps = []
    for disturbed in (False, True):
        model, (x, y) = make(), batch()
        options = {"metric": metric, "momentum": 0.5, "damping": 1e-2, "refresh": ng.Refresh(1, 1)}
        optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, **options)
        train_once(model, optimizer, x, y)
        count = optimizer._steps  # sampled labels depend on it
        if disturbed:
            before = theta(model)
            optimizer.zero_grad()
            F.cross_entropy(model(100 * batch(4)[0]), y).backward()
            model[0].weight.grad[0, 0] = bad
            optimizer.step()
            assert torch.equal(theta(model), before)
        optimizer._steps = count
        steps.append(train_once(model, optimizer, *batch(2)))
    assert_close(steps[1], steps[0], 1e-9)


@pytest.mark.parametrize("metric", [EXACT_KFAC, METRICS["gram"]], ids=["kfac", "gram"])
def test_pitfall_29_a_step_that_the_grad_scaler_skips_leaves_nothing_behind(metric):
    """GradScaler does not call step() after an overflow: the skipped pass must not join the next batch's curvature."""
    steps = []
    for disturbed in (False, True):
        model, y = make(), batch()[1]
        options = {"metric": metric, "damping": 1e-2, "average": 0.0, "refresh": ng.Refresh(1, 1)}
        optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        overflowing = (100 * batch(4)[0], y)
        for inputs, labels in [overflowing, batch(2)] if disturbed else [batch(2)]:
            optimizer.zero_grad()
            before = theta(model)
            scaler.scale(F.cross_entropy(model(inputs), labels)).backward()
            if inputs is overflowing[0]:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        steps.append(theta(model) - before)
    assert_close(steps[1], steps[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_29_low_precision_models_sample_and_factor_in_float32(dtype):
    model, (x, y) = make().to(dtype), batch()
    optimizer = ng.KFAC(model, ng.Categorical(), lr=0.1, damping=ng.FactoredTikhonov(1e-2))
    F.cross_entropy(model(x.to(dtype)).float(), y).backward()
    optimizer.step()
    assert torch.isfinite(theta(model)).all()
    prefixes = ("average.", "inverse.", "weight.", "basis.")
    kept = [v for state in optimizer.state.values() for key, v in state.items() if key.startswith(prefixes)]
    assert len(kept) >= 8
    assert all(v.dtype is torch.float32 for v in kept)


# 30: random streams


@every_metric
def test_pitfall_30_the_users_stream_and_gradients_are_left_alone(metric):
    model, (x, y) = make(dropout=0.5), batch()
    twin = copy.deepcopy(model)
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=metric)
    torch.manual_seed(3)
    loss = F.cross_entropy(model(x), y)
    after_forward = torch.get_rng_state()
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), after_forward)
    torch.manual_seed(3)
    F.cross_entropy(twin(x), y).backward()
    assert torch.equal(torch.get_rng_state(), after_forward)
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, twin.parameters(), strict=True))
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))


@pytest.mark.parametrize("metric", [EXACT_DENSE, METRICS["free"]], ids=["dense", "free"])
def test_pitfall_30_curvature_sees_the_dropout_masks_of_the_loss(metric):
    model, (x, y) = make(dropout=0.5), batch()
    solver = ng.linalg.CG(tolerance=1e-13, max_iterations=500) if metric is METRICS["free"] else None
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=1.0, metric=metric, damping=1e-2, solver=solver)
    masks: list[Tensor] = []
    handle = model[2].register_forward_hook(lambda m, a, out: masks.append((out.detach() != 0) * 2.0))
    before, loss = theta(model), F.cross_entropy(model(x), y)
    handle.remove()
    loss.backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    optimizer.step()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[3](masks[0] * self.inner[1](self.inner[0](x)))

    reference = Masked()
    torch.nn.utils.vector_to_parameters(before, reference.parameters())
    expected = -oracles.damped_inverse(exact_fisher(reference, x), 1e-2) @ g
    assert_close(theta(model) - before, expected, 1e-7)


# 31: gradient accumulation


@pytest.mark.parametrize("sizes", [(6, 6), (3, 8, 1)])
@pytest.mark.parametrize(
    "metric", [m for n, m in METRICS.items() if n != "sampled"], ids=[n for n in METRICS if n != "sampled"]
)
def test_pitfall_31_micro_batches_are_the_big_batch(metric, sizes):
    """Uneven ones too: sums and counts are accumulated, not means."""
    x, y = batch()
    steps = []
    for parts in ((12,), sizes):
        model = make()
        solver = ng.linalg.CG(tolerance=1e-13, max_iterations=500) if metric is METRICS["free"] else None
        options = {"metric": metric, "damping": 1e-2, "solver": solver}
        optimizer, before = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, **options), theta(make())
        for a, b in zip(x.split(parts), y.split(parts), strict=True):
            (F.cross_entropy(model(a), b, reduction="sum") / len(x)).backward()
        optimizer.step()
        steps.append(theta(model) - before)
    assert_close(steps[1], steps[0], 1e-8)


def test_micro_batches_may_share_one_buffer():
    """EKFAC's rows wait for the joint basis; by then the input they were made of may have been written over."""
    x, y = batch()
    steps = []
    for parts in ((12,), (6, 6)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(x.shape[1], 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer, before = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, metric=EXACT_EKFAC), theta(model)
        buffer = torch.empty_like(x[: parts[0]])
        for a, b in zip(x.split(parts), y.split(parts), strict=True):
            buffer.copy_(a)
            (F.cross_entropy(model(buffer), b, reduction="sum") / len(x)).backward()
        if len(parts) > 1:
            buffer.zero_()
        optimizer.step()
        steps.append(theta(model) - before)
    assert_close(steps[1], steps[0], 1e-8)


def test_bug_of_singd_accumulation_scales_the_factors_apart():
    """There A grows and G shrinks with the number of micro-batches: the product is right, the damping split is not."""
    x, y = batch()
    traces = []
    for parts in ((12,), (3, 3, 3, 3)):
        model = make()
        optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.0, metric=EXACT_KFAC)
        for a, b in zip(x.split(parts), y.split(parts), strict=True):
            (F.cross_entropy(model(a), b, reduction="sum") / 12).backward()
        optimizer.step()
        operator = optimizer._curvature.operators["0"]
        traces.append([float(operator.left.trace()), float(operator.right.trace())])
    assert traces[0] == pytest.approx(traces[1], rel=1e-10)


# 32, 33: several processes


def test_pitfall_32_sums_and_counts_of_uneven_shards_add_up():
    """What an all-reduce of sums and counts gives; averaging the shards' means instead would be wrong."""
    from natgrad.metric import Moments
    from natgrad.network import record

    model, (x, _) = make(), batch()
    metric = EXACT_KFAC
    partition = metric.partition(model)

    def moments(rows: Tensor) -> Moments:
        return metric.statistics(record(model, rows), ng.Categorical(), None, partition)  # type: ignore[return-value]

    whole, first, second = moments(x).means(), moments(x[:9]), moments(x[9:])
    added = (first + second).means()
    for name, kinds in whole.items():
        for kind, mean in kinds.items():
            assert_close(added[name][kind], mean, 1e-12)
            averaged = (first.means()[name][kind] + second.means()[name][kind]) / 2
            assert distance(averaged, mean) > 1e-3


# 34: state


def optimizer_for(model: nn.Module, metric: Any) -> Any:
    options = {"momentum": 0.9, "refresh": ng.Refresh(1, 3), "damping": ng.LevenbergMarquardt(0.1)}
    if metric in (EXACT_KFAC, METRICS["sampled"]):
        options["damping"] = ng.FactoredTikhonov(1e-2)
    return ng.NaturalGradient(model, ng.Categorical(), lr=0.05, metric=metric, **options)


def closure_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    def closure() -> tuple[Tensor, Tensor, Tensor]:
        output = model(x)
        return F.cross_entropy(output, y), output, y

    optimizer.step(closure)


@every_metric
def test_pitfall_34_resumes_bit_for_bit_through_a_weights_only_file(metric):
    model = make()
    optimizer = optimizer_for(model, metric)
    for t in range(5):
        closure_step(model, optimizer, *batch(t))
    file = io.BytesIO()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    keys = {k: set(v) for k, v in loaded["optimizer"]["state"].items()}
    resumed = make(seed=1)
    again = optimizer_for(resumed, metric)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    assert {k: set(v) for k, v in loaded["optimizer"]["state"].items()} == keys, "the caller's dict was changed"
    for t in range(5, 10):
        closure_step(model, optimizer, *batch(t))
        closure_step(resumed, again, *batch(t))
    assert torch.equal(theta(model), theta(resumed))


@every_metric
def test_pitfall_34_a_state_from_before_the_first_step_loads(metric):
    model = make()
    optimizer = optimizer_for(model, metric)
    fresh = optimizer.state_dict()
    resumed = make()
    again = optimizer_for(resumed, metric)
    again.load_state_dict(fresh)
    closure_step(model, optimizer, *batch())
    closure_step(resumed, again, *batch())
    assert torch.equal(theta(model), theta(resumed))


def test_pitfall_34_state_is_plain_tensors_and_keeps_its_precision():
    model = make().to(torch.bfloat16)
    optimizer = ng.KFAC(model, ng.Categorical(), lr=0.1)
    x, y = batch()
    F.cross_entropy(model(x.bfloat16()).float(), y).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(isinstance(v, Tensor) for s in saved["state"].values() for v in s.values())
    again = ng.KFAC(make().to(torch.bfloat16), ng.Categorical(), lr=0.1)
    again.load_state_dict(saved)
    for key, state in again.state_dict()["state"].items():
        for name, value in state.items():
            assert value.dtype == saved["state"][key][name].dtype
            assert torch.equal(value, saved["state"][key][name])


def test_bug_of_asdl_state_dict_without_the_factors():
    model = make()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=EXACT_KFAC)
    train_once(model, optimizer, *batch())
    numbers = sum(
        v.numel() for s in optimizer.state_dict()["state"].values() for v in s.values() if isinstance(v, Tensor)
    )
    assert numbers >= 4 * 4 + 4 * 4 + 5 * 5 + 3 * 3  # A and G of both layers


# 35, 36: decompositions


@pytest.mark.parametrize("preset", [ng.KFAC, ng.EKFAC, ng.NGD, ng.BlockNGD], ids=lambda p: p.__name__)
def test_pitfall_35_degenerate_factors_never_crash(preset):
    """Dead units, constant and duplicate inputs, one row: factors of rank one and zero."""
    x = torch.ones(1, 3, dtype=torch.float64)
    model = make()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    optimizer = preset(model, ng.Categorical(), lr=0.1)
    for _ in range(4):
        train_once(model, optimizer, x, torch.tensor([1]))
    assert torch.isfinite(theta(model)).all()


def test_pitfall_35_failed_inverses_keep_the_last_good_one(monkeypatch):
    from natgrad.optim import curvature as module

    model, (x, y) = make(), batch()
    options = {"metric": EXACT_DENSE, "damping": 1e-2, "refresh": ng.Refresh(1, 1)}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, **options)
    train_once(model, optimizer, x, y)
    partition = optimizer._curvature.partition
    last = {name: inverse.to_dense() for name, inverse in optimizer._curvature.inverses.items()}

    def fail(self: Any, operator: Any, solver: Any = None) -> Any:
        raise errors.NotPositiveDefiniteError("made to fail")

    monkeypatch.setattr(ng.Constant, "inverse", fail)
    parts = partition.split(gradient(model, x, y))
    expected = -0.1 * partition.join({name: last[name] @ v for name, v in parts.items()})
    with pytest.warns(RuntimeWarning, match="last good inverse"):
        step = train_once(model, optimizer, x, y)
    assert_close(step, expected)
    with pytest.warns(RuntimeWarning), pytest.raises(errors.NotPositiveDefiniteError):
        for _ in range(module._TOLERATED_FAILURES + 1):
            train_once(model, optimizer, x, y)
    assert torch.isfinite(theta(model)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_pitfall_35_not_a_number_in_the_inputs_is_an_error_or_a_skip_never_a_hang():
    for preset in (ng.KFAC, ng.EKFAC, ng.NGD, ng.GramNGD):
        model, (x, y) = make(), batch()
        optimizer = preset(model, ng.Categorical(), lr=0.1)
        train_once(model, optimizer, x, y)
        before, bad = theta(model), x.clone()
        bad[0, 0] = float("nan")
        try:
            train_once(model, optimizer, bad, y)
        except errors.NatgradError as error:
            assert "NaN" in str(error) or "finite" in str(error)
        assert torch.equal(theta(model), before)
        assert distance(train_once(model, optimizer, x, y), torch.zeros_like(before)) > 1e-6
        assert torch.isfinite(theta(model)).all()


def test_pitfall_36_eigenvalues_follow_their_basis():
    """With a new basis at every step and the same data, the averaged EKFAC matrix must stay what one batch gives."""
    model, (x, y) = make(), batch()
    expected = ng.fisher(model, ng.Categorical(), x, structure=ng.EigenKronecker())
    options = {"metric": EXACT_EKFAC, "refresh": ng.Refresh(1, 1), "average": 0.9}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.0, **options)
    for _ in range(6):
        train_once(model, optimizer, x, y)
    for name, operator in optimizer._curvature.operators.items():
        assert_close(operator.to_dense(), expected.blocks.blocks[name].to_dense(), 1e-8)


def test_pitfall_36_renewed_basis_keeps_the_averaged_trace():
    model = make()
    options = {"metric": EXACT_EKFAC, "refresh": ng.Refresh(1, 1), "average": 0.5}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.0, **options)
    total, weight = 0.0, 0.0
    for t in range(3):
        x, y = batch(t)
        train_once(model, optimizer, x, y)
        trace = exact_fisher(model, x)[:16, :16].trace()
        total, weight = 0.5 * total + 0.5 * trace, 0.5 * weight + 0.5
        assert_close(optimizer._curvature.operators["0"].trace(), total / weight, 1e-9)


# 38: order


def test_pitfall_38_the_batch_of_the_gradient_is_in_the_metric_of_its_step():
    model = make()
    optimizer = ng.NGD(model, ng.Categorical(), lr=0.1, damping=1e-2)
    for t in range(3):
        x, y = batch(t)
        expected = -0.1 * oracles.damped_inverse(exact_fisher(model, x), 1e-2) @ gradient(model, x, y)
        assert_close(train_once(model, optimizer, x, y), expected, 1e-8)


# 39: the reduction ratio


def test_pitfall_39_ratio_is_measured_with_the_same_dropout_masks():
    """With other masks the loss at θ + Δ differs from the loss at θ by far more than a tiny step does."""
    model, (x, y) = make(dropout=0.5), batch()
    options = {"metric": EXACT_DENSE, "damping": ng.LevenbergMarquardt(1e-1)}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=1e-3, **options)
    for _ in range(3):
        closure_step(model, optimizer, x, y)
        assert float(optimizer.last.loss_change_measured) == pytest.approx(
            float(optimizer.last.loss_change_predicted), rel=0.05
        )
        assert float(optimizer.last.ratio) == pytest.approx(1.0, abs=0.05)


def test_pitfall_39_ratio_of_the_quadratic_model():
    model, (x, y) = make(), batch()
    optimizer = ng.GaussNewton(model, ng.Categorical(), damping=ng.LevenbergMarquardt(1.0))
    fisher, g, before = exact_fisher(model, x), gradient(model, x, y), theta(model)
    old = float(F.cross_entropy(model(x), y).detach())
    closure_step(model, optimizer, x, y)
    step = theta(model) - before
    assert float(optimizer.last.loss_change_predicted) == pytest.approx(
        float(g @ step + 0.5 * step @ fisher @ step), rel=1e-6
    )
    new = float(F.cross_entropy(model(x), y).detach())
    assert float(optimizer.last.loss_change_measured) == pytest.approx(new - old, rel=1e-6)


def test_pitfall_39_damping_follows_the_ratio_and_never_below_its_floor():
    model, (x, y) = make(), batch()
    optimizer = ng.GaussNewton(model, ng.Categorical(), damping=ng.LevenbergMarquardt(1e3))
    values = []
    for _ in range(30):
        closure_step(model, optimizer, x, y)
        values.append(optimizer.damping.value)
    assert values[-1] < 1e2, "a model that predicts well earns less damping"
    assert all(v > 0 and v < float("inf") for v in values)


# 40: rejected steps


@pytest.mark.parametrize("search", [ng.TrustRegion(0.1, backtracks=2), ng.Armijo(backtracks=2)], ids=str)
def test_pitfall_40_a_rejected_step_restores_everything(search):
    """Parameters, momentum, BatchNorm statistics and random streams are those of one ordinary forward pass.

    What was learned about the curvature at the present parameters is kept: it is right whatever became of the step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    twin, (x, y), calls = copy.deepcopy(model), batch(), []
    momentum = 0.0 if isinstance(search, ng.QuadraticFit) else 0.9
    options = {"metric": EXACT_DENSE, "search": search, "momentum": momentum}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=1.0, **options)
    before = theta(model)

    def closure() -> tuple[Tensor, Tensor]:
        output = model(x)
        calls.append(1)
        loss = F.cross_entropy(output, y)
        return (loss if len(calls) == 1 else loss + 1e6), output

    torch.manual_seed(5)
    optimizer.step(closure)
    stream = torch.get_rng_state()
    torch.manual_seed(5)
    twin(x)
    assert len(calls) >= 3
    assert not bool(optimizer.last.accepted)
    assert torch.equal(theta(model), before)
    assert not any("momentum" in state for state in optimizer.state.values())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("closure", [False, True])
def test_pitfall_40_measured_kl_is_within_the_radius(closure):
    model, (x, y), max_kl = make(), batch(), 0.02
    optimizer = ng.TrustRegionNGD(model, ng.Categorical(), max_kl=max_kl, damping=1e-3)
    for _ in range(5):
        old = model(x).detach()
        closure_step(model, optimizer, x, y) if closure else train_once(model, optimizer, x, y)
        measured = float(CATEGORICAL.kl(old, model(x).detach()).mean())
        assert measured <= max_kl * (1 + 1e-9)
        assert float(optimizer.last.kl_measured) == pytest.approx(measured, rel=1e-6)
        assert measured > 0.1 * max_kl


# 41: waiting for the device


class Syncs(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", [ng.LearningRate(), ng.KLClip(1e-3)], ids=str)
@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal", "dense", "sampled"])
def test_pitfall_41_a_step_between_refreshes_does_not_wait_for_the_device(metric, search):
    model, (x, y) = make(), batch()
    options = {"metric": METRICS[metric], "search": search, "momentum": 0.9, "refresh": ng.Refresh(1, 100)}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, **options)
    for _ in range(3):
        train_once(model, optimizer, x, y)
    optimizer.zero_grad()
    with Syncs() as syncs:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert syncs.count == 0


def test_pitfall_41_the_counter_counts():
    with Syncs() as syncs:
        torch.ones(3).sum().item()
        bool(torch.ones(()) > 0)
    assert syncs.count == 2


PRESETS = [ng.KFAC, ng.EKFAC, ng.DiagonalNGD, ng.GramNGD, ng.NGD, ng.BlockNGD, ng.TrustRegionNGD]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n != "batch_norm_eval"])
def test_every_model_of_the_zoo_trains(name, preset):
    """Two steps lower the loss on their batch, and move exactly the parameters that the loss depends on."""
    case = zoo.case(name)
    with torch.no_grad():
        f = case()
    y = torch.randint(0, 3, f.shape[:-1], generator=torch.Generator().manual_seed(1)).flatten()
    optimizer = preset(case.model, ng.Categorical(), damping=1.0)  # sampled metrics of three rows are noisy
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    losses, used, moving = [], set(), set()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(case().flatten(0, -2), y)
        losses.append(float(loss.detach()))
        if len(losses) < 3:
            loss.backward()
            grads = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
            used |= set(grads)
            moving |= {n for n, g in grads.items() if g.abs().max() > 1e-9}
            optimizer.step()
    assert losses[2] < losses[0]
    moved = {n for n, p in case.model.named_parameters() if not torch.equal(p, before[n])}
    assert moving <= moved <= used


def test_bug_of_singd_parameters_of_unknown_layers_are_never_trained():
    """Every trainable parameter moves, and coverage() says how."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU(4), nn.Linear(4, 3))
    model = model.double()
    x, y = batch()
    optimizer = ng.KFAC(model, ng.Categorical(), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_once(model, optimizer, x, y)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert set(rows) == set(before)
    assert "PReLU" in rows["2.weight"].reason
