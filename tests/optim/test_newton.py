"""Newton's method against Newton steps made of torch.func's gradient and Hessian, in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad as ng
from natgrad.errors import NotPositiveDefiniteError
from natgrad.linalg import Cholesky

DOUBLE = torch.float64


def data(n: int = 40, features: int = 3, classes: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, dtype=DOUBLE, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


def logistic() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, 1).double()


def mlp(outputs: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loss_function(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """θ ↦ loss(f_θ(x)) for a flat θ in the order of model.parameters()."""
    shapes = {n: p.shape for n, p in model.named_parameters()}

    def function(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes.values()])
        named = {n: v.reshape(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        return loss(torch.func.functional_call(model, named, (x,)))

    return function


def derivatives(function: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.grad(function)(theta), torch.func.hessian(function)(theta)


def step(opt: ng.Newton, model: nn.Module, x: Tensor, y: object, loss: Callable[[Tensor], Tensor]) -> None:
    opt.zero_grad()
    output = model(x)
    opt.observe(output, y)  # type: ignore[arg-type]
    loss(output).backward()
    opt.step()


@pytest.mark.parametrize("solver", [ng.SaddleFree(), None, Cholesky()], ids=str)
@pytest.mark.parametrize("structure", [ng.Dense(), ng.MatrixFree()], ids=str)
def test_logistic_regression_converges_quadratically_along_newtons_iterates(solver, structure):
    (x, labels), model = data(), logistic()
    y = labels.to(DOUBLE)[:, None]

    def loss(output: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, y)

    function = loss_function(model, x, loss)
    opt = ng.Newton(model, ng.Bernoulli(), damping=0.0, solver=solver, structure=structure, search=ng.LearningRate())
    theta, norms = flat(model), []
    for _ in range(6):
        g, h = derivatives(function, theta)
        norms.append(float(g.norm()))
        theta = theta - torch.linalg.solve(h, g)
        step(opt, model, x, y, loss)
        assert float((flat(model) - theta).norm()) <= 1e-10 * (1 + float(theta.norm()))
    # ‖g_{k+1}‖ ≤ C ‖g_k‖²: each step doubles the digits until rounding.
    assert norms[-1] < 1e-13
    assert all(after <= 10 * before**2 + 1e-14 for before, after in pairwise(norms[1:]))


def test_the_default_takes_newtons_steps_near_a_minimum():
    (x, labels), model = data(), logistic()
    y = labels.to(DOUBLE)[:, None]

    def loss(output: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, y)

    function = loss_function(model, x, loss)
    theta = flat(model)
    for _ in range(20):
        g, h = derivatives(function, theta)
        theta = theta - torch.linalg.solve(h, g)
    minimum = theta
    start = minimum + 0.3 * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=DOUBLE)
    nn.utils.vector_to_parameters(start, model.parameters())
    opt, theta = ng.Newton(model, ng.Bernoulli(), damping=0.0), start
    for _ in range(3):
        g, h = derivatives(function, theta)
        theta = theta - torch.linalg.solve(h, g)
        step(opt, model, x, y, loss)
        assert opt.last is not None and float(opt.last.lr) == 1.0 and opt.last.backtracks == 0
        assert float((flat(model) - theta).norm()) <= 1e-10
    assert float((theta - minimum).norm()) < 1e-6


def saddle_free_step(g: Tensor, h: Tensor, damping: float, blocks: list[int] | None = None) -> Tensor:
    out, start = [], 0
    for size in blocks or [len(g)]:
        part = slice(start, start + size)
        values, vectors = torch.linalg.eigh(h[part, part])
        out.append(vectors @ ((vectors.mT @ g[part]) / (values.abs() + damping)))
        start += size
    return -torch.cat(out)


@pytest.mark.parametrize(
    ("structure", "blocks"),
    [(ng.Dense(), None), (ng.BlockDiagonal(), [16, 10]), (ng.Diagonal(), [1] * 26), (ng.MatrixFree(), None)],
    ids=lambda v: str(v) if not isinstance(v, list) else "",
)
def test_the_step_where_the_hessian_is_indefinite(structure, blocks):
    (x, y), model = data(), mlp()

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, y)

    before = flat(model)
    g, h = derivatives(loss_function(model, x, loss), before)
    assert float(torch.linalg.eigvalsh(h).min()) < -1e-3
    opt = ng.Newton(model, ng.Categorical(), damping=1e-2, structure=structure, search=ng.LearningRate(), lr=0.1)
    step(opt, model, x, y, loss)
    # The blocks of natgrad hold weight and bias of a layer, as model.parameters() lists them here.
    wanted = 0.1 * saddle_free_step(g, h, 1e-2, blocks)
    assert float((flat(model) - before - wanted).norm()) <= 1e-8 * float(wanted.norm())
    assert float(g @ wanted) < 0


@pytest.mark.parametrize("structure", [ng.Dense(), ng.BlockDiagonal(), ng.Diagonal(), ng.MatrixFree()], ids=str)
def test_training_a_network_whose_hessian_is_indefinite(structure):
    (x, y), model = data(), mlp()
    opt = ng.Newton(model, ng.Categorical(), structure=structure)
    losses, most = [], 0.0
    for _ in range(15):
        output = model(x)
        opt.zero_grad()
        opt.observe(output, y)
        loss = F.cross_entropy(output, y)
        losses.append(float(loss.detach()))
        loss.backward()
        opt.step()
        assert opt.last is not None
        most = max(most, float(opt.last.kl_measured or 0.0))
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert 0 < most <= 0.1


@pytest.mark.parametrize("solver", [None, Cholesky()], ids=str)
def test_plain_damping_is_an_error_where_it_does_not_suffice(solver):
    (x, y), model = data(), mlp()

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, y)

    before = flat(model)
    g, h = derivatives(loss_function(model, x, loss), before)
    lowest = float(torch.linalg.eigvalsh(h).min())
    opt = ng.Newton(model, ng.Categorical(), damping=-0.5 * lowest, solver=solver)
    with pytest.raises(NotPositiveDefiniteError, match="indefinite"):
        step(opt, model, x, y, loss)
    assert torch.equal(flat(model), before)
    damping = -2 * lowest
    opt = ng.Newton(model, ng.Categorical(), damping=damping, solver=solver, lr=0.1, search=ng.LearningRate())
    step(opt, model, x, y, loss)
    wanted = -0.1 * torch.linalg.solve(h + damping * torch.eye(len(g), dtype=DOUBLE), g)
    assert float((flat(model) - before - wanted).norm()) <= 1e-9 * float(wanted.norm())


class Saddle(nn.Module):
    """f = a·b: with Gaussian() and target 1 the loss ½(ab − 1)² has a saddle at the origin, H = [[0, −1], [−1, 0]]."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=DOUBLE))
        self.b = nn.Parameter(torch.tensor(b, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * self.b * x


def test_a_saddle_point_is_left():
    x, y = torch.ones(1, 1, dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE)

    def run(solver, search) -> Saddle:
        model = Saddle(0.1, 0.05)
        opt = ng.Newton(model, ng.Gaussian(), damping=0.0, solver=solver, search=search)
        for _ in range(20):
            step(opt, model, x, y, lambda output: 0.5 * (output - y).square().mean())
        return model

    for search in (ng.LearningRate(), ng.TrustRegion(0.1)):
        left = run(ng.SaddleFree(), search)
        assert float((left.a * left.b).detach()) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(NotPositiveDefiniteError):
        run(None, ng.LearningRate())
    # What that error spares the user: Newton's own iterates end in the saddle.
    theta = torch.tensor([0.1, 0.05], dtype=DOUBLE)
    for _ in range(20):
        g, h = derivatives(lambda t: 0.5 * (t[0] * t[1] - 1).square(), theta)
        theta = theta - torch.linalg.solve(h, g)
    assert float(theta.norm()) < 1e-10


def test_weights_count_in_the_hessian():
    (x, y), model = data(classes=3), mlp(3)
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=DOUBLE)
    y = y.clone()
    y[::5] = -100

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, y, weight=weights, ignore_index=-100, label_smoothing=0.1)

    before = flat(model)
    g, h = derivatives(loss_function(model, x, loss), before)
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100, class_weights=weights, label_smoothing=0.1)
    opt = ng.Newton(model, likelihood, damping=1e-2, lr=0.1, search=ng.LearningRate())
    step(opt, model, x, y, loss)
    wanted = 0.1 * saddle_free_step(g, h, 1e-2)
    assert float((flat(model) - before - wanted).norm()) <= 1e-9 * float(wanted.norm())


def test_maximizing_is_ascent_in_the_same_metric():
    """Of the loss by |−H| = |H|, and of the log-likelihood as minimising its negative."""
    (x, y), up, down, log = data(), mlp(), mlp(), mlp()
    sign = {up: (1.0, True), down: (1.0, False), log: (-1.0, True)}
    moved = {}
    for model, (factor, maximize) in sign.items():
        opt = ng.Newton(model, ng.Categorical(), damping=1e-2, lr=0.1, search=ng.LearningRate())
        opt.param_groups[0]["maximize"] = maximize
        before = flat(model)
        step(opt, model, x, y, lambda output, factor=factor: factor * F.cross_entropy(output, y))
        moved[model] = flat(model) - before
    assert float((moved[up] + moved[down]).norm()) <= 1e-12
    assert float((moved[log] - moved[down]).norm()) <= 1e-12
    assert float(moved[down].norm()) > 1e-3
