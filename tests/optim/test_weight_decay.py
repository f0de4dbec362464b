"""Weight decay where it is part of the loss: steps lead to the minimum of loss + ½ w ‖θ‖², which L-BFGS finds too."""

from __future__ import annotations

import pytest
import torch
from optim_problems import batch, flat
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.linalg import CG, Cholesky
from support import assert_close

PRESETS = {
    "KFAC": (ng.KFAC, {}),
    "EKFAC": (ng.EKFAC, {}),
    "BlockNGD": (ng.BlockNGD, {}),
    "GramNGD": (ng.GramNGD, {}),
    "HessianFree": (ng.HessianFree, {}),
    "GaussNewton": (ng.GaussNewton, {}),
    "Newton": (ng.Newton, {}),
    "TrustRegionNGD": (ng.TrustRegionNGD, {"lr": 1.0, "damping": 1e-3}),
}
X, Y = batch(0, 32)


def network(hidden: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)] if hidden else [nn.Linear(3, 3)]
    return nn.Sequential(*layers).double()


def decays(model: nn.Module, w: float, biases: bool) -> list[tuple[Tensor, float]]:
    return [(p, w if biases or p.dim() > 1 else 0.0) for p in model.parameters()]


def objective(model: nn.Module, w: float, biases: bool) -> Tensor:
    penalty = sum(0.5 * d * p.square().sum() for p, d in decays(model, w, biases))
    return F.cross_entropy(model(X), Y) + penalty


def minimised(model: nn.Module, w: float, biases: bool) -> nn.Module:
    options = {"lr": 1.0, "max_iter": 2000, "tolerance_grad": 1e-12, "tolerance_change": 0.0}
    lbfgs = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **options)

    def closure():
        lbfgs.zero_grad()
        value = objective(model, w, biases)
        value.backward()
        return value

    lbfgs.step(closure)
    return model


def probabilities(model: nn.Module) -> Tensor:
    """What the minimum determines: one number added to all biases changes nothing where they do not decay."""
    return model(X).detach().softmax(-1)


def optimizer_for(name: str, model: nn.Module, w: float, biases: bool, **options):
    kind, defaults = PRESETS[name]
    groups = [{"params": [p], "weight_decay": d} for p, d in decays(model, w, biases)]
    return kind(groups, ng.Categorical(), **{**defaults, **options}).attach(model)


def evaluated(model: nn.Module):
    f = model(X)
    return F.cross_entropy(f, Y), f, Y


@pytest.mark.parametrize("biases", [True, False], ids=["uniform", "biases without"])
@pytest.mark.parametrize("w", [0.03, 1.0])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_reach_the_minimum_of_loss_and_penalty(name, w, biases):
    """A convex problem: logistic regression."""
    expected = minimised(network(False), w, biases)
    model = network(False)
    optimizer = optimizer_for(name, model, w, biases)
    for _ in range(60):
        optimizer.step(lambda: evaluated(model))
    assert_close(probabilities(model), probabilities(expected), 1e-6)
    assert float(objective(model, w, biases).detach()) <= float(objective(expected, w, biases).detach()) + 1e-9


LONG = {"KFAC": {"lr": 0.5}, "EKFAC": {"lr": 0.5}, "HessianFree": {}, "GaussNewton": {}}


@pytest.mark.parametrize("name", LONG)
def test_a_network_reaches_a_stationary_point_of_the_sum(name):
    """Along a rescaling of one layer against the next the penalty curves by 2 w, where its tangent has w.

    Full steps of a search that does not measure the loss may therefore swing about the minimum.
    """
    model = network(True)
    optimizer = optimizer_for(name, model, 0.05, False, **LONG[name])
    for _ in range(80):
        optimizer.step(lambda: evaluated(model))
    value = objective(model, 0.05, False)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
    assert float(value.detach()) < 0.974  # 0.9729 is the best that L-BFGS finds from here
    assert slope.norm() < 1e-3


def ridge(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return torch.linalg.solve(x.T @ x / len(x) + torch.diag(w), x.T @ y / len(x)).T


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("metric", "solver"),
    [
        (ng.Fisher(ng.Exact(), ng.Dense()), None),
        (ng.Fisher(ng.Exact(), ng.Dense()), Cholesky()),
        (ng.Fisher(ng.Exact(), ng.Gram()), None),
        (ng.Fisher(ng.Exact(), ng.MatrixFree()), CG(tolerance=1e-14)),
        (ng.Fisher(ng.Exact(), ng.Kronecker()), None),
        (ng.Fisher(ng.Exact(), ng.EigenKronecker()), None),
        (ng.Hessian(ng.Dense()), ng.SaddleFree()),
    ],
    ids=["dense", "cholesky", "gram", "free", "kfac", "ekfac", "newton"],
)
@pytest.mark.parametrize(
    "search", [ng.QuadraticFit(), ng.TrustRegion(1e6), ng.Armijo()], ids=lambda s: type(s).__name__
)
def test_one_step_solves_a_quadratic_problem(search, metric, solver, maximize):
    """Linear least squares with a penalty: the local model is the loss itself, and so is what it predicts."""
    if maximize and isinstance(metric, ng.Hessian):
        pytest.skip("ascent in −H + W is approximated")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(20, 1, dtype=torch.float64, generator=generator)
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = ng.NaturalGradient(
        model, ng.Gaussian(), metric=metric, solver=solver, damping=1e-12, weight_decay=0.5, search=search, average=0.0,
        maximize=maximize,
    )  # fmt: skip
    sign = -1.0 if maximize else 1.0

    def evaluate():
        f = model(x)
        return sign * 0.5 * (f - y).square().sum(-1).mean(), f, y

    def total() -> float:
        return float((sign * evaluate()[0] + 0.25 * model.weight.square().sum()).detach())

    before = total()
    optimizer.step(evaluate)
    assert_close(model.weight.detach(), ridge(x, y, torch.full((3,), 0.5).double()), 1e-6)
    change = total() - before
    assert optimizer.last.loss_change_predicted == pytest.approx(change, rel=1e-6)
    if optimizer.last.loss_change_measured is not None:
        assert optimizer.last.loss_change_measured == pytest.approx(change, rel=1e-9)
    # The KL is that of the likelihood alone.
    assert optimizer.last.kl_predicted > 0


@pytest.mark.parametrize("structure", [ng.Dense(), ng.Gram()], ids=str)
def test_a_block_whose_parameters_decay_differently_is_inverted_exactly(structure):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(20, 1, dtype=torch.float64, generator=generator)
    model = nn.Linear(3, 1).double()
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias]}]
    metric = ng.Fisher(ng.Exact(), structure)
    options = {"damping": 1e-10, "search": ng.TrustRegion(1e6), "average": 0.0}
    optimizer = ng.NaturalGradient(groups, ng.Gaussian(), metric=metric, **options).attach(model)

    def evaluate():
        f = model(x)
        return 0.5 * (f - y).square().sum(-1).mean(), f, y

    optimizer.step(evaluate)
    whole = torch.cat([x, torch.ones(20, 1).double()], 1)
    expected = ridge(whole, y, torch.tensor([0.5, 0.5, 0.5, 0.0]).double())
    assert_close(torch.cat([model.weight[0], model.bias]).detach(), expected[0], 1e-6)


SEARCHES = [ng.LearningRate(), ng.KLClip(0.01), ng.QuadraticFit(0.1), ng.TrustRegion(0.01), ng.Armijo()]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("w", [0.0, 0.1])
@pytest.mark.parametrize("metric", [ng.Fisher(), ng.Fisher(ng.Exact(), ng.Dense()), ng.Euclidean()], ids=str)
def test_a_parameter_without_gradient_stays(metric, w, search):
    """Neither its weight decay nor the momentum of its last step moves it, and its state is as it was."""
    model = network(True)
    momentum = 0.0 if isinstance(search, ng.QuadraticFit) else 0.9
    options = {"lr": 0.1, "weight_decay": w, "momentum": momentum, "search": search}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=metric, **options)
    still = model[0].weight

    def gradients():
        optimizer.zero_grad()
        f = model(X)
        optimizer.observe(f, Y)
        F.cross_entropy(f, Y).backward()

    for _ in range(2):
        gradients()
        optimizer.step()
    before, others = still.detach().clone(), model[0].bias.detach().clone()
    state = {k: optimizer.state[still][k].clone() for k in ("momentum", "previous") if k in optimizer.state[still]}
    gradients()
    still.grad = None
    optimizer.step()
    assert optimizer.last.accepted
    assert torch.equal(still, before) and not torch.equal(model[0].bias, others)
    assert all(torch.equal(optimizer.state[still][k], v) for k, v in state.items())


def test_a_rule_of_the_users_own_inverts_the_sum():
    class Own:
        needs_loss, value = False, 1e-12

        def amount(self, operator):
            return self.value

        def inverse(self, operator, solver=None):
            return operator.inverse(damping=self.value, solver=solver)

        def update(self, step):
            return self

        def state(self):
            return {}

        def restored(self, state):
            return self

    model = network(False)
    expected = flat(minimised(network(False), 0.1, True))
    search = ng.TrustRegion(1.0)
    optimizer = ng.NGD(model, ng.Categorical(), damping=Own(), weight_decay=0.1, search=search)
    for _ in range(15):
        optimizer.step(lambda: evaluated(model))
    assert_close(flat(model), expected, 1e-6)
