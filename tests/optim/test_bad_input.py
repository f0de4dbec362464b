"""Each kind of bad input gives one clear error, or a documented skip; parameters and averages keep their values."""

from __future__ import annotations

import math

import pytest
import torch
from optim_problems import batch, flat, make
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError, NatgradError, NonFiniteError, NotObservedError, ShapeError, UnsupportedError

MODEL = make()

CONSTRUCTIONS = {
    "negative damping": (lambda: ng.KFAC(make(), ng.Categorical(), damping=-1.0), "damping|value.*-1"),
    "infinite damping": (lambda: ng.NGD(make(), ng.Categorical(), damping=math.inf), "inf"),
    "nan damping": (lambda: ng.NGD(make(), ng.Categorical(), damping=math.nan), "nan"),
    "negative lr": (lambda: ng.NGD(make(), ng.Categorical(), lr=-0.1), "lr=-0.1"),
    "nan lr": (lambda: ng.NGD(make(), ng.Categorical(), lr=math.nan), "lr=nan"),
    "infinite lr": (lambda: ng.NGD(make(), ng.Categorical(), lr=math.inf, search=ng.LearningRate()), "lr=inf"),
    "lr of two numbers": (lambda: ng.NGD(make(), ng.Categorical(), lr=torch.ones(2)), "one number"),
    "momentum of one": (lambda: ng.NGD(make(), ng.Categorical(), momentum=1.0), "momentum=1.0"),
    "negative decay": (lambda: ng.NGD(make(), ng.Categorical(), weight_decay=-1.0), "weight_decay=-1.0"),
    "average above one": (lambda: ng.KFAC(make(), ng.Categorical(), average=1.5), "average=1.5"),
    "negative seed": (lambda: ng.KFAC(make(), ng.Categorical(), seed=-1), "seed=-1"),
    "fractional seed": (lambda: ng.KFAC(make(), ng.Categorical(), seed=1.5), "seed=1.5"),
    "damping in words": (lambda: ng.NGD(make(), ng.Categorical(), damping="a"), "damping='a'"),
    "negative damping in a tensor": (
        lambda: ng.NGD(make(), ng.Categorical(), damping=torch.tensor(-1.0)),
        "is -1",
    ),
    "a search by name": (lambda: ng.KFAC(make(), ng.Categorical(), search="kl"), r"search='kl'.*ng\.KLClip\(\)"),
    "a search's class": (
        lambda: ng.KFAC(make(), ng.Categorical(), search=ng.LearningRate),
        "search=LearningRate, a cl",
    ),
    "a function as search": (lambda: ng.KFAC(make(), ng.Categorical(), search=max), "search=<built-in"),
    "refresh as a number": (lambda: ng.KFAC(make(), ng.Categorical(), refresh=10), r"refresh=10.*ng\.Refresh\("),
    "an estimate by name": (
        lambda: ng.KFAC(make(), ng.Categorical(), estimate="exact"),
        r"estimate='exact'.*Exact\(\)",
    ),
    "an estimate's class": (lambda: ng.KFAC(make(), ng.Categorical(), estimate=ng.Exact), "estimate=Exact, a class"),
    "a structure's class": (
        lambda: ng.KFAC(make(), ng.Categorical(), structure=ng.Kronecker),
        "structure=Kronecker, a",
    ),
    "a Hessian's structure by name": (
        lambda: ng.Newton(make(), ng.Categorical(), structure="dense"),
        "structure='dense'",
    ),
    "a structure as metric": (
        lambda: ng.NaturalGradient(make(), ng.Categorical(), metric=ng.Kronecker()),
        r"metric=Kronecker.*ng\.Fisher\(estimate, structure\)",
    ),
    "a metric's class": (
        lambda: ng.NaturalGradient(make(), ng.Categorical(), metric=ng.Fisher),
        "metric=Fisher, a class",
    ),
    "a solver's class": (lambda: ng.NGD(make(), ng.Categorical(), solver=ng.SaddleFree), "solver=SaddleFree, a class"),
    "a solver by name": (lambda: ng.NGD(make(), ng.Categorical(), solver="cg"), "solver='cg'"),
    "a damping's class": (lambda: ng.NGD(make(), ng.Categorical(), damping=ng.LevenbergMarquardt), "damping=<class"),
    "lr in words": (lambda: ng.KFAC(make(), ng.Categorical(), lr="a"), "lr='a'"),
    "no lr": (lambda: ng.KFAC(make(), ng.Categorical(), lr=None), "lr=None"),
    "momentum in words": (lambda: ng.NGD(make(), ng.Categorical(), momentum="a"), "momentum='a'"),
    "no average": (lambda: ng.NGD(make(), ng.Categorical(), average=None), "average=None"),
    "decay in words": (lambda: ng.NGD(make(), ng.Categorical(), weight_decay="a"), "weight_decay='a'"),
    "maximize in words": (lambda: ng.KFAC(make(), ng.Categorical(), maximize="no"), "maximize='no'"),
    "no momentum in a group": (
        lambda: ng.KFAC([{"params": make().parameters(), "momentum": None}], ng.Categorical(), search=ng.KLClip(0.1)),
        "momentum=None",
    ),
    "maximize in words in a group": (
        lambda: ng.KFAC([{"params": make().parameters(), "maximize": "no"}], ng.Categorical()),
        "maximize='no'",
    ),
    "a loss module": (lambda: ng.KFAC(make(), nn.CrossEntropyLoss()), r"ng.Categorical\(\)"),
    "a loss function": (lambda: ng.KFAC(make(), F.cross_entropy), r"ng.Categorical\(\)"),
    "nothing to train": (lambda: ng.KFAC(make().requires_grad_(False), ng.Categorical()), "requires a gradient"),
    "no refresh": (lambda: ng.Refresh(0, 10), "statistics=0"),
    "half a refresh": (lambda: ng.Refresh(1, 2.5), "inverse=2.5"),
    "no samples": (lambda: ng.MonteCarlo(0), "samples=0"),
    "unknown sharing": (lambda: ng.Kronecker("both"), "sharing='both'"),
    "momentum twice": (
        lambda: ng.NaturalGradient(make(), ng.Categorical(), momentum=0.9, search=ng.QuadraticFit()),
        "momentum=0.9",
    ),
    "kl of zero": (lambda: ng.TrustRegionNGD(make(), ng.Categorical(), max_kl=0.0), "max_kl"),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_arguments_out_of_range(name):
    construct, message = CONSTRUCTIONS[name]
    with pytest.raises(ArgumentError, match=message):
        construct()


@pytest.mark.parametrize(
    "change", [{"momentum": 1.5}, {"weight_decay": -1.0}, {"lr": math.nan}, {"max_kl": -1.0}], ids=str
)
def test_options_that_a_schedule_spoils_are_named_by_the_step(change):
    (name, value), model = next(iter(change.items())), make()
    optimizer = ng.KFAC(model, ng.Categorical(), search=ng.KLClip(0.1))
    for spoiled in (False, True):
        before, (x, y) = flat(model), batch()
        F.cross_entropy(model(x), y).backward()
        if not spoiled:
            optimizer.step()
            continue
        optimizer.param_groups[0].update(change)
        with pytest.raises(ArgumentError, match=f"{name}={value} was given in a parameter group"):
            optimizer.step()
        assert torch.equal(flat(model), before)


def test_a_hessian_without_a_sum_of_outer_products_is_refused():
    with pytest.raises(UnsupportedError, match="Kronecker"):
        ng.Hessian(ng.Kronecker())


def test_complex_parameters_are_refused_by_name():
    model = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(UnsupportedError, match="weight is complex"):
        ng.KFAC(model, ng.Categorical())


def test_a_model_too_large_for_a_dense_matrix_is_told_what_to_use():
    model = nn.Linear(200, 150)
    optimizer = ng.NGD(model, ng.Categorical())
    with pytest.raises(ArgumentError, match=r"30150.*Kronecker\(\), Gram\(\) or MatrixFree\(\)"):
        model(torch.ones(2, 200))
    del optimizer


METRICS = {
    "kfac": ng.Fisher(),
    "dense": ng.Fisher(ng.Exact(), ng.Dense()),
    "gram": ng.Fisher(ng.Exact(), ng.Gram()),
    "free": ng.Fisher(ng.Exact(), ng.MatrixFree()),
}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


def warmed_up(metric, likelihood=None, model=None):
    """After one good step."""
    model = make() if model is None else model
    likelihood = ng.Categorical() if likelihood is None else likelihood
    optimizer = ng.NaturalGradient(model, likelihood, metric=metric, lr=0.1, damping=1e-2)
    return model, optimizer


def averages(optimizer) -> list[torch.Tensor]:
    return [v.clone() for s in optimizer.state.values() for k, v in s.items() if k.startswith(("average", "weight"))]


@every_metric
@pytest.mark.parametrize("bad", ["nan input", "inf input", "nan gradient", "inf gradient"])
def test_numbers_that_are_not_finite_change_nothing(metric, bad):
    """A skip, documented in NaturalGradient; not an error, so that a loop survives an overflow."""
    model, optimizer = warmed_up(metric)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before, kept = flat(model), averages(optimizer)
    optimizer.zero_grad()
    value = math.nan if "nan" in bad else math.inf
    x = x.clone()
    if "input" in bad:
        x[0] = value
    F.cross_entropy(model(x), y).backward()
    if "gradient" in bad:
        model[3].bias.grad[0] = value
    optimizer.step()
    assert torch.equal(flat(model), before)
    assert all(torch.equal(a, b) for a, b in zip(kept, averages(optimizer), strict=True))
    assert not bool(optimizer.last.accepted)
    optimizer.zero_grad()
    F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    optimizer.step()
    assert torch.isfinite(flat(model)).all() and not torch.equal(flat(model), before)


@every_metric
def test_nan_targets_of_a_regression_change_nothing(metric):
    model, optimizer = warmed_up(metric, ng.Gaussian())
    x = batch()[0]
    for target in (torch.zeros(8, 3).double(), torch.full((8, 3), math.nan).double()):
        optimizer.zero_grad()
        before = flat(model)
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    assert torch.equal(flat(model), before) and torch.isfinite(before).all()


@every_metric
def test_an_empty_batch(metric):
    model, optimizer = warmed_up(metric)
    before = flat(model)
    with pytest.raises(ArgumentError, match=r"batch is empty.*\(0, 3\)"):
        model(torch.zeros(0, 3).double())
    assert torch.equal(flat(model), before) and not optimizer._observer.observations
    with pytest.raises(ArgumentError, match="batch is empty"):
        ng.fisher(make(), ng.Categorical(), torch.zeros(0, 3).double(), structure=metric.structure)


PRESETS = [ng.NGD, ng.DiagonalNGD, ng.BlockNGD, ng.KFAC, ng.EKFAC, ng.GramNGD, ng.TrustRegionNGD, ng.GaussNewton]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.__name__)
def test_a_batch_of_one(preset):
    model = make()
    optimizer = preset(model, ng.Categorical())
    for seed in range(3):
        x, y = batch(seed, 1)
        optimizer.zero_grad()
        before = flat(model)
        f = model(x)
        optimizer.observe(f, y)
        F.cross_entropy(f, y).backward()
        optimizer.step()
        assert torch.isfinite(flat(model)).all() and not torch.equal(flat(model), before)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "message"),
    [
        (ng.Gaussian.learned(), 3, "3"),
        (ng.Categorical(), 1, "two classes"),
    ],
)
@every_metric
def test_a_likelihood_that_does_not_fit_the_output(metric, likelihood, outputs, message):
    model = nn.Sequential(nn.Linear(3, outputs)).double()
    optimizer = ng.NaturalGradient(model, likelihood, metric=metric)
    before = flat(model)
    with pytest.raises(ShapeError, match=message):
        model(batch()[0]).sum().backward()
        optimizer.step()
    assert torch.equal(flat(model), before)


class Squeezed(nn.Module):
    """Outputs without an axis for the event: [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1).double()

    def forward(self, x):
        return self.net(x).squeeze(-1)


@every_metric
@pytest.mark.parametrize("reduce", [False, True])
def test_an_output_of_the_wrong_number_of_axes(metric, reduce):
    model = Squeezed()
    if reduce:  # a model that returns its loss
        model.forward = lambda x: model.net(x).mean()
    optimizer = ng.NaturalGradient(model, ng.Gaussian(), metric=metric)
    with pytest.raises(ShapeError):
        model(batch()[0]).sum().backward()
        optimizer.step()


@every_metric
def test_sparse_gradients_are_refused(metric):
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(4, 3))
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=metric)
    with pytest.raises(UnsupportedError, match="sparse"):
        F.cross_entropy(model(torch.tensor([[0], [1]])), torch.tensor([0, 1])).backward()
        optimizer.step()


@every_metric
def test_curvature_of_a_batch_that_is_not_finite_is_an_error(metric):
    x = batch()[0]
    x[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        ng.fisher(make(), ng.Categorical(), x, structure=metric.structure)


def test_errors_of_one_kind():
    """Whoever catches NatgradError catches all; argument errors are ValueErrors too."""
    assert issubclass(ArgumentError, NatgradError) and issubclass(ArgumentError, ValueError)


def test_what_needs_a_module_says_so():
    model, (x, y) = make(), batch()
    optimizer = ng.KFAC(model.parameters(), ng.Categorical())
    F.cross_entropy(model(x), y).backward()
    for use in (optimizer.precondition_, optimizer.step):
        with pytest.raises(NotObservedError, match=r"made from parameters.*attach\(model\)"):
            use()
    with pytest.raises(ArgumentError, match="model is of type int"):
        optimizer.attach(3)
    optimizer.attach(model).detach()
    for use in (optimizer.precondition_, optimizer.step, lambda: optimizer.observe(model(x))):
        with pytest.raises(NotObservedError, match=r"detach\(\) has been called.*attach\(model\)"):
            use()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_of_the_model_is_not_observed():
    model, (x, y) = make(), batch()
    optimizer = ng.KFAC(model, ng.Categorical())
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
