"""Closures of natgrad's kind and of torch's, and precondition_: the same trajectory as an ordinary loop."""

from __future__ import annotations

import math

import pytest
import torch
from optim_problems import batch, exact_fisher, flat, gradient, make
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError
from natgrad.linalg import CG
from natgrad.testing import oracles
from support import assert_close

PRESETS = {
    "NGD": (ng.NGD, {"lr": 0.1}),
    "DiagonalNGD": (ng.DiagonalNGD, {}),
    "BlockNGD": (ng.BlockNGD, {}),
    "KFAC": (ng.KFAC, {}),
    "EKFAC": (ng.EKFAC, {}),
    "GramNGD": (ng.GramNGD, {}),
    "HessianFree": (ng.HessianFree, {}),
    "GaussNewton": (ng.GaussNewton, {}),
    "Newton": (ng.Newton, {"damping": 100.0}),
    "TrustRegionNGD": (ng.TrustRegionNGD, {}),
}
MEASURES_LOSS = {"HessianFree", "GaussNewton"}
NEEDS_LABELS = {"HessianFree", "GaussNewton", "Newton"}


def train(name: str, form: str, dropout: float = 0.0, norm: bool = False) -> tuple[torch.Tensor, list]:
    model = make(dropout=dropout, norm=norm)
    kind, options = PRESETS[name]
    optimizer = kind(model, ng.Categorical(), **options)
    losses = []
    for seed in range(4):
        x, y = batch(seed)
        torch.manual_seed(seed)

        def evaluate(x=x, y=y):
            output = model(x)
            return F.cross_entropy(output, y), output, y

        def torch_kind(x=x, y=y):
            optimizer.zero_grad()
            output = model(x)
            if name in NEEDS_LABELS:
                optimizer.observe(output, y)
            loss = F.cross_entropy(output, y)
            loss.backward()
            return loss

        if form == "closure":
            losses.append(optimizer.step(evaluate))
        elif form == "pair":
            losses.append(optimizer.step(lambda f=evaluate: f()[:2]))
        elif form == "torch closure":
            losses.append(optimizer.step(torch_kind))
        else:
            losses.append(torch_kind())
            assert optimizer.step() is None
    return flat(model), [float(loss.detach()) for loss in losses]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "dropout and batch norm"])
@pytest.mark.parametrize("name", PRESETS)
def test_all_forms_give_the_same_trajectory(name, norm):
    if name == "TrustRegionNGD":  # a closure adds the loss to what is judged; labels do as well
        NEEDS_LABELS.add(name)
    try:
        options = {"dropout": 0.3, "norm": True} if norm else {}
        expected, losses = train(name, "loop", **options)
        assert torch.isfinite(expected).all() and not torch.equal(expected, flat(make(norm=norm)))
        forms = ["closure", "torch closure"] + ([] if name in ("Newton",) else ["pair"])
        for form in forms:
            got, got_losses = train(name, form, **options)
            assert_close(got, expected, 1e-9)
            assert got_losses == pytest.approx(losses, rel=1e-9)
    finally:
        NEEDS_LABELS.discard("TrustRegionNGD")


def test_presets_lower_the_loss_of_a_fixed_batch():
    x, y = batch(0, 24)
    for name, (kind, options) in PRESETS.items():
        model = make()
        if name == "GramNGD":
            # A gradient averaged over steps has parts outside the rows of this batch, which only damping then bounds.
            options = {"momentum": 0.0}
        optimizer = kind(model, ng.Categorical(), **options)

        def evaluate(model=model):
            output = model(x)
            return F.cross_entropy(output, y), output, y

        first = float(evaluate()[0].detach())
        for _ in range(15):
            optimizer.step(evaluate)
        last = float(evaluate()[0].detach())
        assert last < (first - 1e-3 if name == "Newton" else 0.9 * first), (name, first, last)


def test_program_three_runs_the_policy_twice():
    """opt.step(lambda: (surrogate(policy), policy(observations))): only the returned output is the observation."""
    model, (x, y) = make(), batch()
    reference = make()
    twice = ng.TrustRegionNGD(model, ng.Categorical(), max_kl=0.01, damping=0.1)
    once = ng.TrustRegionNGD(reference, ng.Categorical(), max_kl=0.01, damping=0.1)
    for _ in range(3):
        twice.step(lambda: (F.cross_entropy(model(x), y), model(x)))

        def evaluate():
            output = reference(x)
            return F.cross_entropy(output, y), output

        once.step(evaluate)
        assert twice.last.accepted and twice.last.kl_measured <= 0.01
        assert_close(flat(model), flat(reference), 1e-9)


def test_a_closure_observes_in_eval_mode_too():
    model, (x, y) = make(dropout=0.5).eval(), batch()
    optimizer = ng.NGD(model, ng.Categorical(), lr=0.1, damping=1e-2)
    start = flat(model)
    expected = -0.1 * oracles.damped_inverse(exact_fisher(model, x), 1e-2) @ gradient(model, x, y)
    optimizer.step(lambda: (lambda f: (F.cross_entropy(f, y), f))(model(x)))
    assert_close(flat(model) - start, expected)


def test_gradients_from_before_do_not_leak_into_a_closure():
    model, (x, y) = make(), batch()
    optimizer = ng.NGD(model, ng.Categorical(), lr=0.1, damping=1e-2)
    F.cross_entropy(model(batch(5)[0]), batch(5)[1]).backward()
    start = flat(model)
    expected = -0.1 * oracles.damped_inverse(exact_fisher(model, x), 1e-2) @ gradient(model, x, y)

    def evaluate():
        output = model(x)
        return F.cross_entropy(output, y), output

    optimizer.step(evaluate)
    assert_close(flat(model) - start, expected)


def test_trials_leave_no_trace():
    """Backtracking evaluates the closure again: buffers, streams, gradients and parameters are as after the first."""
    model, (x, y) = make(dropout=0.4, norm=True), batch()
    plain = make(dropout=0.4, norm=True)
    calls = []

    def evaluate():
        calls.append(1)
        output = model(x)
        return F.cross_entropy(output, y), output

    search = ng.Armijo(c=0.999999, backtracks=3)  # more than any finite step achieves
    optimizer = ng.NaturalGradient(model, ng.Categorical(), search=search)
    torch.manual_seed(3)
    optimizer.step(evaluate)
    stream = torch.get_rng_state()
    assert len(calls) == 5 and not optimizer.last.accepted and optimizer.last.backtracks == 3
    torch.manual_seed(3)
    F.cross_entropy(plain(x), y).backward()
    assert torch.equal(stream, torch.get_rng_state())
    for (n, a), (_, b) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(a, b), n
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, 1e-12)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda f, loss: (loss, None), "NoneType"),
        (lambda f, loss: (loss, f, None, None), "must return"),
        (lambda f, loss: (f, f), "one number"),
        (lambda f, loss: (loss.detach(), f), "no graph"),
        (lambda f, loss: (float(loss.detach()), f), "float"),
    ],
)
def test_closures_that_return_something_else_are_clear_errors(result, message):
    model, (x, y) = make(), batch()
    optimizer = ng.KFAC(model, ng.Categorical())
    start = flat(model)

    def evaluate():
        output = model(x)
        return result(output, F.cross_entropy(output, y))

    with pytest.raises(ArgumentError, match=message):
        optimizer.step(evaluate)
    assert torch.equal(flat(model), start)


@pytest.mark.parametrize("kind", [ng.KFAC, ng.TrustRegionNGD, ng.NGD])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "result",
    [lambda loss, f: loss, lambda loss, f: [loss, f], lambda loss, f: {"loss": loss, "output": f}],
    ids=["loss", "list", "dict"],
)
def test_a_closure_that_forgets_the_backward_pass_is_an_error(result, set_to_none, kind):
    model, (x, y) = make(), batch()
    optimizer = kind(model, ng.Categorical())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    start = flat(model)

    def closure():
        optimizer.zero_grad(set_to_none)
        output = model(x)
        return result(F.cross_entropy(output, y), output)

    for _ in range(2):
        with pytest.raises(ArgumentError, match="no backward pass has reached the model"):
            optimizer.step(closure)
    assert torch.equal(flat(model), start)


def test_a_closure_may_skip_its_batch_or_have_zero_gradients():
    model, (x, y) = make(), batch()
    optimizer = ng.KFAC(model, ng.Categorical())
    start = flat(model)
    assert optimizer.step(lambda: None) is None
    assert optimizer.step(lambda: model(x).sum().detach()) is not None

    def closure():
        loss = 0.0 * F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(lambda: [closure()])
    assert torch.equal(flat(model), start)


def test_a_torch_closure_may_return_anything():
    model, (x, y) = make(), batch()
    optimizer = ng.KFAC(model, ng.Categorical())
    for value in (None, 1, 2.5):

        def closure(value=value):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            return value

        assert optimizer.step(closure) == value


# precondition_


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("Newton", "HessianFree")])
def test_precondition_feeds_another_optimizer(name):
    kind, options = PRESETS[name]
    options = {**options, "damping": 1e-2}
    if "momentum" in kind.__init__.__kwdefaults__:
        options["momentum"] = 0.0
    if name not in ("GaussNewton", "TrustRegionNGD"):
        options["search"] = ng.LearningRate()
    models = [make(), make()]
    natural = kind(models[0], ng.Categorical(), **options)
    direct = ng.NaturalGradient(
        models[1],
        ng.Categorical(),
        lr=0.1,
        damping=1e-2,
        metric=natural._metric,
        solver=natural._solver,
        average=natural._decay,
        refresh=natural._refresh,
    )
    sgd = torch.optim.SGD(models[0].parameters(), lr=0.1)
    for seed in range(4):
        x, y = batch(seed)
        for model, zero in ((models[0], sgd), (models[1], direct)):
            zero.zero_grad()
            F.cross_entropy(model(x), y).backward()
        natural.precondition_()
        sgd.step()
        direct.step()
        # Few iterations of conjugate gradients amplify the rounding of the updates.
        assert_close(flat(models[0]), flat(models[1]), 1e-6 if name == "TrustRegionNGD" else 1e-9)


def test_precondition_is_the_damped_inverse_times_the_gradient():
    model, (x, y) = make(), batch()
    optimizer = ng.NGD(model, ng.Categorical(), damping=1e-2)
    expected = oracles.damped_inverse(exact_fisher(model, x), 1e-2) @ gradient(model, x, y)
    F.cross_entropy(model(x), y).backward()
    optimizer.precondition_()
    assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)


@pytest.mark.parametrize("solver", [None, CG()])
def test_precondition_of_a_gradient_that_is_not_finite_is_zero(solver):
    model, (x, y) = make(), batch()
    optimizer = ng.NGD(model, ng.Categorical(), damping=1e-2, solver=solver)
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad[0, 0] = math.nan
    optimizer.precondition_()
    assert not any(p.grad.any() for p in model.parameters())
