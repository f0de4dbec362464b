"""Natural gradient does not depend on the coordinates; gradient descent does.

The same network is trained in two coordinate systems. Exact natural gradient: θ = Aφ + b for any invertible A gives the
same trajectory to rounding; a smooth nonlinear θ = ψ(φ) gives the same *flow*, so that discrete trajectories differ by
O(step). K-FAC: the same network with affinely transformed activations and pre-activations of each layer (Martens &
Grosse 2015, theorem 1), to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import natgrad as ng
from support import slope

LIKELIHOODS = {"gaussian": ng.Gaussian(), "bernoulli": ng.Bernoulli(), "poisson": ng.Poisson()}


TEACHER = {
    "0.weight": [[1.5, -1.0], [0.5, 1.2]],
    "0.bias": [0.3, -0.4],
    "2.weight": [[1.0, -1.2]],
    "2.bias": [0.1],
}


def network(distance: float = 0.2) -> nn.Sequential:
    """A network near the one that made the data, where the Fisher matrix is regular: undamped steps stay sensible."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            shift = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            p.copy_(torch.tensor(TEACHER[name], dtype=torch.float64) + distance * shift)
    return model


def batch(likelihood: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 1.5 * torch.randn(64, 2, dtype=torch.float64, generator=generator)
    target = network(0.0)(x).detach()
    if likelihood == "gaussian":
        target = target + 0.3 * torch.randn(64, 1, dtype=torch.float64, generator=generator)
    if likelihood == "bernoulli":
        target = (torch.rand(64, 1, dtype=torch.float64, generator=generator) < target.sigmoid()).double()
    if likelihood == "poisson":
        target = torch.poisson(target.exp(), generator=generator)
    return x, target


class Reparametrised(nn.Module):
    """The network with coordinates φ, where θ = chart(φ)."""

    def __init__(self, base: nn.Module, chart: Callable[[Tensor], Tensor], start: Tensor) -> None:
        super().__init__()
        self.coordinates = nn.Parameter(start.clone())
        self._base, self._chart = [base], chart  # in a list: not a submodule

    def theta(self) -> Tensor:
        return self._chart(self.coordinates)

    def forward(self, x: Tensor) -> Tensor:
        base, theta = self._base[0], self.theta()
        pieces = theta.split([p.numel() for p in base.parameters()])
        state = {n: t.view(p.shape) for (n, p), t in zip(base.named_parameters(), pieces, strict=True)}
        return functional_call(base, state, (x,))


def plain(start: Tensor) -> Reparametrised:
    return Reparametrised(network(), lambda phi: phi, start)


def start_theta() -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in network().parameters()])


def mixing(size: int, condition: float) -> Tensor:
    """An invertible matrix with singular values from 1 to `condition`."""
    generator = torch.Generator().manual_seed(2)
    left = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    return left @ torch.diag(torch.logspace(0, 1, size, base=condition, dtype=torch.float64)) @ right


def train(model: Reparametrised, likelihood: str, lr: float, steps: int, natural: bool = True) -> Tensor:
    """The trajectory of θ, shape [steps, P]."""
    law, (x, y) = LIKELIHOODS[likelihood], batch(likelihood)
    path = []
    for _ in range(steps):
        loss = law.nll(model(x), y).mean()
        (direction,) = torch.autograd.grad(loss, model.coordinates)
        if natural:
            direction = ng.fisher(model, law, x).solve(direction)
        with torch.no_grad():
            model.coordinates -= lr * direction
        path.append(model.theta().detach().clone())
    return torch.stack(path)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest distance of two trajectories relative to the way that the first went."""
    return float((a - b).norm(dim=1).max() / (a - start_theta()).norm(dim=1).max())


CHARTS = ["scaled", "mixed", "affine"]


def affine_chart(kind: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(chart, φ at the common start)."""
    theta, size = start_theta(), len(start_theta())
    if kind == "scaled":
        scales = torch.logspace(-1, 1, size, dtype=torch.float64)
        return lambda phi: scales * phi, theta / scales
    A = mixing(size, 30.0)
    b = torch.linspace(-1, 1, size, dtype=torch.float64) if kind == "affine" else torch.zeros(size, dtype=torch.float64)
    return lambda phi: A @ phi + b, torch.linalg.solve(A, theta - b)


@pytest.mark.parametrize("kind", CHARTS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_natural_gradient_is_invariant_to_affine_coordinates(likelihood, kind):
    chart, start = affine_chart(kind)
    here = train(plain(start_theta()), likelihood, 0.1, 8)
    there = train(Reparametrised(network(), chart, start), likelihood, 0.1, 8)
    assert gap(here, there) < 1e-8


@pytest.mark.parametrize("kind", CHARTS)
def test_gradient_descent_is_not(kind):
    chart, start = affine_chart(kind)
    here = train(plain(start_theta()), "gaussian", 1e-3, 8, natural=False)
    there = train(Reparametrised(network(), chart, start), "gaussian", 1e-3, 8, natural=False)
    assert gap(here, there) > 0.3


def wavy(phi: Tensor) -> Tensor:
    """A smooth, invertible map that is not affine: derivative between 0.4 and 1.6 and coupled coordinates."""
    return phi + 0.3 * torch.sin(2 * phi) + 0.1 * torch.tanh(phi.roll(1))


def wavy_start() -> Tensor:
    phi = start_theta().clone()
    for _ in range(100):
        J = torch.func.jacrev(wavy)(phi)
        phi = phi - torch.linalg.solve(J, wavy(phi) - start_theta())
    assert (wavy(phi) - start_theta()).abs().max() < 1e-12
    return phi


def flow_gap(likelihood: str, steps: int, natural: bool) -> float:
    """Gap at the same flow time 0.2, reached with the given number of steps."""
    here = train(plain(start_theta()), likelihood, 0.2 / steps, steps, natural)[-1:]
    there = train(Reparametrised(network(), wavy, wavy_start()), likelihood, 0.2 / steps, steps, natural)[-1:]
    return gap(here, there)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_natural_gradient_flow_is_invariant_to_nonlinear_coordinates(likelihood):
    """Euler's method is of first order: halving the step halves what depends on the coordinates."""
    gaps = {n: flow_gap(likelihood, n, natural=True) for n in (8, 16, 32, 64)}
    assert slope(gaps) == pytest.approx(-1.0, abs=0.15), gaps
    assert gaps[64] < 0.02


def test_gradient_flow_is_not():
    gaps = [flow_gap("gaussian", n, natural=False) for n in (16, 64)]
    assert min(gaps) > 0.2
    assert gaps[1] > 0.9 * gaps[0]


class Affine(nn.Module):
    """A fixed affine map of the last axis."""

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T + self.offset


def transformed(model: nn.Sequential) -> nn.Sequential:
    """The same function, with each Linear between an affine map of its input and one of its output."""
    generator = torch.Generator().manual_seed(4)
    parts: list[nn.Module] = []
    for module in model:
        if not isinstance(module, nn.Linear):
            parts.append(module)
            continue
        n_in, n_out = module.in_features, module.out_features
        omega = torch.eye(n_in, dtype=torch.float64) + 0.4 * torch.randn(
            n_in, n_in, dtype=torch.float64, generator=generator
        )
        phi = torch.eye(n_out, dtype=torch.float64) + 0.4 * torch.randn(
            n_out, n_out, dtype=torch.float64, generator=generator
        )
        shift_in = torch.randn(n_in, dtype=torch.float64, generator=generator)
        shift_out = torch.randn(n_out, dtype=torch.float64, generator=generator)
        inner = nn.Linear(n_in, n_out).double()
        with torch.no_grad():  # phi (W' (omega x + shift_in) + b') + shift_out = W x + b
            inner.weight.copy_(torch.linalg.solve(phi, module.weight) @ torch.linalg.inv(omega))
            inner.bias.copy_(torch.linalg.solve(phi, module.bias - shift_out) - inner.weight @ shift_in)
        parts += [Affine(omega, shift_in), inner, Affine(phi, shift_out)]
    return nn.Sequential(*parts)


def outputs_along(
    model: nn.Module, likelihood: str, lr: float, steps: int, structure: object, damping: float
) -> Tensor:
    """Outputs on the batch after each step: [steps, N, C]; structure None is gradient descent."""
    law, (x, y) = LIKELIHOODS[likelihood], batch(likelihood)
    path, trainable = [], list(model.parameters())
    for _ in range(steps):
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(law.nll(model(x), y).mean(), trainable)])
        if structure is not None:
            gradient = ng.fisher(model, law, x, structure=structure).solve(gradient, damping=damping)
        with torch.no_grad():
            for p, d in zip(trainable, gradient.split([p.numel() for p in trainable]), strict=True):
                p -= lr * d.view(p.shape)
            path.append(model(x).clone())
    return torch.stack(path)


def output_gap(likelihood: str, lr: float, structure: object, damping: float = 0.0) -> float:
    base = network()
    first, second = base, transformed(network())
    x, _ = batch(likelihood)
    start = base(x).detach()
    torch.testing.assert_close(second(x), start, rtol=1e-10, atol=1e-10)
    a = outputs_along(first, likelihood, lr, 5, structure, damping)
    b = outputs_along(second, likelihood, lr, 5, structure, damping)
    return float((a - b).flatten(1).norm(dim=1).max() / (a - start).flatten(1).norm(dim=1).max())


INVARIANT = {"kfac": ng.Kronecker(), "dense": ng.Dense(), "blocks": ng.BlockDiagonal()}


@pytest.mark.parametrize("structure", INVARIANT)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_layerwise_affine_maps_of_activations_change_nothing(likelihood, structure):
    assert output_gap(likelihood, 0.1, INVARIANT[structure]) < 1e-7


@pytest.mark.parametrize("structure", [None, ng.Diagonal()], ids=["gradient_descent", "diagonal"])
def test_gradient_descent_and_diagonal_scaling_are_not_invariant(structure):
    assert output_gap("gaussian", 0.01, structure) > 0.1


def test_damping_breaks_the_invariance_in_proportion():
    """λI is not covariant: the documented limit of the theorem."""
    gaps = {k: output_gap("gaussian", 0.1, ng.Kronecker(), damping=10.0**-k) for k in (1, 8)}
    assert gaps[1] > 1e-2
    assert gaps[8] < 1e-3


@pytest.mark.parametrize("kind", CHARTS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_optimizer_is_invariant_to_affine_coordinates(likelihood, kind):
    """The same law for ng.NGD, momentum included: a velocity in φ maps to one in θ."""
    x, y = batch(likelihood)
    chart, start = affine_chart(kind)
    paths = []
    for model in (plain(start_theta()), Reparametrised(network(), chart, start)):
        optimizer = ng.NGD(model, LIKELIHOODS[likelihood], lr=0.1, damping=0.0, momentum=0.3)
        path = []
        for _ in range(5):
            optimizer.zero_grad()
            LIKELIHOODS[likelihood].nll(model(x), y).mean().backward()
            optimizer.step()
            path.append(model.theta().detach().clone())
        paths.append(torch.stack(path))
    assert gap(*paths) < 1e-8


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_kfac_optimizer_is_invariant_to_layerwise_affine_maps(likelihood):
    x, y = batch(likelihood)
    start, ends = network()(x).detach(), []
    metric = ng.Fisher(ng.Exact(), ng.Kronecker())
    for model in (network(), transformed(network())):
        options = {"lr": 0.1, "damping": 0.0, "metric": metric, "refresh": ng.Refresh(1, 1)}
        optimizer = ng.NaturalGradient(model, LIKELIHOODS[likelihood], **options)
        for _ in range(5):
            optimizer.zero_grad()
            LIKELIHOODS[likelihood].nll(model(x), y).mean().backward()
            optimizer.step()
        ends.append(model(x).detach())
    assert float((ends[0] - ends[1]).norm() / (ends[0] - start).norm()) < 1e-7
