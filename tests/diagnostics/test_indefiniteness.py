"""The report against dense matrices made of torch.func's derivatives in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad as ng
from natgrad import linalg
from natgrad.diagnostics import BlockIndefiniteness, IndefinitenessReport, indefiniteness, spectrum
from natgrad.diagnostics.subspace import krylov_space, whole_space
from natgrad.errors import ArgumentError, NonFiniteError

DOUBLE = torch.float64


def batch(n: int = 30, features: int = 3, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, dtype=DOUBLE, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


def mlp(width: int = 5, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def outputs_of(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """θ ↦ f_θ(x) for a flat θ in the order of model.parameters(), and the present θ."""
    shapes = {n: p.shape for n, p in model.named_parameters()}

    def function(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes.values()])
        named = {n: v.reshape(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(model, named, (x,))

    return function, torch.cat([p.detach().flatten() for p in model.parameters()])


@dataclasses.dataclass(frozen=True)
class Oracle:
    gradient: np.ndarray
    hessian: np.ndarray
    fisher: np.ndarray

    def block(self, part: slice) -> Oracle:
        return Oracle(self.gradient[part], self.hessian[part, part], self.fisher[part, part])


def oracle(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], fisher: Callable[[Tensor], Tensor]) -> Oracle:
    """``loss`` maps outputs to the mean loss, ``fisher`` outputs [N, C] to [N, C, C] weighted so that the sum is F."""
    function, theta = outputs_of(model, x)
    jacobian = torch.func.jacrev(function)(theta)
    information = torch.einsum("ncp,ncd,ndq->pq", jacobian, fisher(function(theta)), jacobian)
    return Oracle(
        torch.func.grad(lambda t: loss(function(t)))(theta).numpy(),
        torch.func.hessian(lambda t: loss(function(t)))(theta).numpy(),
        information.numpy(),
    )


def categorical_fisher(f: Tensor) -> Tensor:
    p = f.softmax(-1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(f)


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return math.degrees(math.acos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


def check(found: BlockIndefiniteness, wanted: Oracle, damping: float) -> None:
    """Every number of an exact report."""
    g, h, f = wanted.gradient, wanted.hessian, wanted.fisher
    values, vectors = np.linalg.eigh(h)
    information = np.linalg.eigvalsh(f)
    top = np.abs(values).max()
    assert found.size == len(g) and found.hessian.exact and found.fisher.exact
    assert found.hessian.smallest == pytest.approx(values[0], abs=1e-10 * top)
    assert found.hessian.largest == pytest.approx(values[-1], abs=1e-10 * top)
    assert found.fisher.smallest == pytest.approx(information[0], abs=1e-10 * top)
    assert found.fisher.largest == pytest.approx(information[-1], abs=1e-10 * top)
    negative = values < -1e-10 * top
    assert found.negative_count == negative.sum()
    assert found.negative_count_bounds == (found.negative_count, found.negative_count)
    assert found.negative_share == pytest.approx(negative.mean())
    assert found.indefinite == bool(negative.any())
    assert found.fisher.negative_count == 0
    assert found.residual == pytest.approx(np.linalg.norm(h - f) / np.linalg.norm(h), abs=1e-9)
    assert found.residual_error == 0.0
    share = ((vectors[:, negative].T @ g) ** 2).sum() / (g @ g)
    assert found.gradient_share == pytest.approx(share, abs=1e-9)
    assert found.gradient_share_bounds == (found.gradient_share, found.gradient_share)
    eye = np.eye(len(g))
    newton = np.linalg.solve(h + damping * eye, g)
    natural = np.linalg.solve(f + damping * eye, g)
    saddle_free = vectors @ ((vectors.T @ g) / (np.abs(values) + damping))
    directions = found.directions
    assert directions.newton_cosine == pytest.approx(newton @ g / np.linalg.norm(newton) / np.linalg.norm(g), abs=1e-8)
    assert directions.newton_angle == pytest.approx(angle(newton, natural), abs=1e-4)
    assert directions.saddle_free_angle == pytest.approx(angle(saddle_free, natural), abs=1e-4)
    assert directions.error < 1e-9


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_a_network_whose_hessian_is_indefinite_and_whose_fisher_is_not(damping: float) -> None:
    (x, y), model = batch(), mlp()
    wanted = oracle(model, x, lambda f: F.cross_entropy(f, y), categorical_fisher)
    assert np.linalg.eigvalsh(wanted.hessian).min() < -1e-3
    report = indefiniteness(model, ng.Categorical(), x, y, damping=damping)
    check(report.whole, wanted, damping)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    for layer, part in zip(report.layers, (slice(0, 20), slice(20, 38)), strict=True):
        check(layer, wanted.block(part), damping)
    assert not report.layers[1].indefinite  # the last layer's block is that of a convex problem
    assert report.damping == damping and report.whole.name == "all"


def test_weights() -> None:
    (x, y), model = batch(), mlp()
    y = y.clone()
    y[::4] = -100
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=DOUBLE)
    w = torch.where(y < 0, 0.0, weights[y.clamp(min=0)])
    wanted = oracle(
        model, x, lambda f: F.cross_entropy(f, y, weight=weights, ignore_index=-100),
        lambda f: categorical_fisher(f) * (len(f) * w / w.sum())[:, None, None],
    )  # fmt: skip
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100, class_weights=weights)
    check(indefiniteness(model, likelihood, x, y, damping=0.1).whole, wanted, 0.1)


def test_the_residual_of_a_learned_scale_holds_what_the_labels_add() -> None:
    """In (mean, log σ) the observed information depends on y: H differs from F even for a linear model."""
    x, _ = batch()
    torch.manual_seed(1)
    model = nn.Linear(3, 2).double()
    y = torch.randn(30, 1, dtype=DOUBLE)

    def loss(f: Tensor) -> Tensor:
        return (0.5 * ((y[:, 0] - f[:, 0]) / f[:, 1].exp()).square() + f[:, 1]).mean()

    def information(f: Tensor) -> Tensor:
        return torch.diag_embed(torch.stack([(-2 * f[:, 1]).exp(), torch.full_like(f[:, 1], 2.0)], -1)) / len(f)

    wanted = oracle(model, x, loss, information)
    report = indefiniteness(model, ng.Gaussian.learned(), x, y, damping=0.1)
    check(report.whole, wanted, 0.1)
    assert report.whole.residual > 0.1


def test_a_convex_problem_has_no_residual() -> None:
    (x, y), model = batch(), nn.Linear(3, 3).double()
    report = indefiniteness(model, ng.Categorical(), x, y)
    whole = report.whole
    assert whole.residual < 1e-12 and not whole.indefinite and whole.gradient_share == 0.0
    assert whole.directions.newton_angle == pytest.approx(0.0, abs=1e-6)
    assert whole.directions.saddle_free_angle == pytest.approx(0.0, abs=1e-6)
    assert whole.directions.newton_cosine > 0
    assert report.messages == ()


class Saddle(nn.Module):
    """f = a·b: with Gaussian() and target 1, H = [[b², 2ab − 1], [2ab − 1, a²]] and F = [[b², ab], [ab, a²]]."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=DOUBLE))
        self.b = nn.Parameter(torch.tensor(b, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * self.b * x


def test_a_saddle_by_hand() -> None:
    one = torch.ones(1, 1, dtype=DOUBLE)
    a, b = 0.1, 0.05
    report = indefiniteness(Saddle(a, b), ng.Gaussian(), one, one, damping=1e-6)
    off = 2 * a * b - 1
    root = math.hypot((a * a - b * b) / 2, off)
    middle = (a * a + b * b) / 2
    whole = report.whole
    assert whole.hessian.smallest == pytest.approx(middle - root, rel=1e-12)
    assert whole.hessian.largest == pytest.approx(middle + root, rel=1e-12)
    assert whole.fisher.smallest == pytest.approx(0.0, abs=1e-15)
    assert whole.fisher.largest == pytest.approx(a * a + b * b, rel=1e-12)
    assert (whole.negative_count, whole.negative_share) == (1, 0.5)
    # Both entries of g = (ab − 1)(b, a) push away from the origin, along (1, 1) of negative curvature.
    assert whole.gradient_share == pytest.approx(0.9, abs=0.01)
    assert whole.directions.newton_cosine < -0.5
    assert any("climbs" in message for message in report.messages)
    assert any(f"a damping above {root - middle:.3g}, and 1e-06 is not enough" in m for m in report.messages)
    enough = indefiniteness(Saddle(a, b), ng.Gaussian(), one, one, damping=2.0)
    assert enough.whole.directions.newton_cosine > 0
    assert any("2 is enough here" in m for m in enough.messages)


# Estimates.


@pytest.fixture(scope="module")
def pair() -> tuple[IndefinitenessReport, IndefinitenessReport]:
    (x, y), model = batch(), mlp(16)  # 115 parameters
    wanted = indefiniteness(model, ng.Categorical(), x, y, damping=0.6)
    return wanted, indefiniteness(model, ng.Categorical(), x, y, damping=0.6, largest_exact=0, steps=30, samples=24)


def test_lanczos_finds_the_extremes_within_its_errors(pair: tuple[IndefinitenessReport, IndefinitenessReport]) -> None:
    wanted, found = pair
    for exact, block in zip((wanted.whole, *wanted.layers), (found.whole, *found.layers), strict=True):
        assert exact.hessian.exact and not block.hessian.exact and not block.fisher.exact
        top = exact.hessian.largest
        for matrix in ("hessian", "fisher"):
            true, ritz = getattr(exact, matrix), getattr(block, matrix)
            assert true.eigenvalues is not None
            for end in ("smallest", "largest"):
                nearest = (true.eigenvalues - getattr(ritz, end)).abs().min()
                assert float(nearest) <= getattr(ritz, f"{end}_error") + 1e-12 * top
            assert ritz.smallest >= true.smallest - 1e-12 * top and ritz.largest <= true.largest + 1e-12 * top
        assert block.hessian.smallest == pytest.approx(exact.hessian.smallest, abs=1e-3 * top)
        assert block.indefinite == exact.indefinite


def test_counts_and_residuals_within_their_errors(pair: tuple[IndefinitenessReport, IndefinitenessReport]) -> None:
    wanted, found = pair
    whole, exact = found.whole, wanted.whole
    for block, true in zip((whole, *found.layers), (exact, *wanted.layers), strict=True):
        low, high = block.negative_count_bounds
        assert low <= true.negative_count <= high and low <= block.negative_count <= high
    low, high = whole.negative_count_bounds
    assert 0 < high - low < 0.5 * whole.size
    assert 0 < whole.residual_error < 0.1 * exact.residual
    assert abs(whole.residual - exact.residual) <= 4 * whole.residual_error
    low, high = whole.gradient_share_bounds
    assert low - 1e-9 <= exact.gradient_share <= high + 1e-9 and high - low < 0.05


def test_directions_in_the_krylov_space(pair: tuple[IndefinitenessReport, IndefinitenessReport]) -> None:
    wanted, found = pair[0].whole.directions, pair[1].whole.directions
    assert 0 < found.error < 0.05
    assert found.newton_angle == pytest.approx(wanted.newton_angle, abs=2.0)
    assert found.saddle_free_angle == pytest.approx(wanted.saddle_free_angle, abs=2.0)
    assert found.newton_cosine == pytest.approx(wanted.newton_cosine, abs=0.02)


def test_enough_steps_are_exact() -> None:
    (x, y), model = batch(), mlp(2)
    exact = indefiniteness(model, ng.Categorical(), x, y, damping=0.1).whole
    found = indefiniteness(model, ng.Categorical(), x, y, damping=0.1, largest_exact=0, steps=100).whole
    assert found.gradient_share == pytest.approx(exact.gradient_share, abs=1e-8)
    assert found.gradient_share_bounds[0] == found.gradient_share_bounds[1]
    for name in ("newton_angle", "saddle_free_angle", "newton_cosine"):
        assert getattr(found.directions, name) == pytest.approx(getattr(exact.directions, name), abs=1e-4)
    assert found.directions.error < 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_the_interval_holds_the_share_of_the_negative_eigenspace(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(60, 60, dtype=DOUBLE, generator=generator)
    matrix = linalg.DenseMatrix(a + a.mT, symmetric=True)
    g = torch.randn(60, dtype=DOUBLE, generator=generator)
    share, bounds = whole_space(matrix, g).negative_share(0.0)
    assert bounds == (share, share)
    widths = []
    for steps in (1, 2, 4, 8, 16, 32):
        middle, (low, high) = krylov_space(matrix, g, steps).negative_share(0.0)
        assert low <= share <= high and low <= middle <= high, steps
        widths.append(high - low)
    assert widths[-1] < 0.5 * widths[1]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_interval_holds_the_count_where_lanczos_cannot_tell_eigenvalues_apart(sign: float) -> None:
    """Three nodes for four clusters: the middle one stands for eigenvalues of both signs."""
    clusters = {-1.0: 10, -0.01: 20, 0.02: 30, 1.0: 10}
    values = sign * torch.cat([torch.full((n,), v, dtype=DOUBLE) for v, n in clusters.items()])
    basis = torch.linalg.qr(torch.randn(70, 70, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))).Q
    matrix = basis @ torch.diag(values) @ basis.mT
    operator = linalg.FunctionOperator(lambda v: v @ matrix, (70, 70), DOUBLE)
    (x, y), model = batch(), nn.Linear(3, 3).double()
    whole = indefiniteness(model, ng.Categorical(), x, y).whole
    found = dataclasses.replace(whole, size=70, hessian=spectrum(operator, steps=3, samples=8, largest_exact=0))
    count = int((values < 0).sum())
    low, high = found.negative_count_bounds
    assert abs(found.negative_count - count) > 10
    assert low <= count <= high


def test_the_error_of_the_residual_is_a_standard_error() -> None:
    (x, y), model = batch(), mlp(2)
    wanted = indefiniteness(model, ng.Categorical(), x, y).whole.residual
    scores = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        found = indefiniteness(
            model, ng.Categorical(), x, y, largest_exact=0, steps=2, samples=16, generator=generator
        ).whole
        scores.append((found.residual - wanted) / found.residual_error)
    assert 0.6 < float(np.sqrt(np.mean(np.square(scores)))) < 1.5


# What a user sees, and what is left alone.


def test_it_prints_as_a_table() -> None:
    (x, y), model = batch(), mlp()
    report = indefiniteness(model, ng.Categorical(), x, y)
    text = str(report)
    assert text.startswith("Hessian and Fisher of 38 parameters (exact)\n")
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    assert rows["largest"][1] == f"{report.whole.hessian.largest:.4g}"
    assert rows["smallest"][1] == f"{report.whole.hessian.smallest:.4g}"
    assert rows["0"][1] == "20" and rows["2"][1] == "18"
    assert "! The Hessian is indefinite" in text
    assert all(len(line) < 140 for line in text.splitlines() if not line.startswith("!"))
    estimated = str(indefiniteness(model, ng.Categorical(), x, y, largest_exact=0, steps=8))
    assert "(Lanczos, 8 probes)" in estimated and "±" in estimated and " to " in estimated
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.damping = 1.0  # type: ignore[misc]


def test_absence_is_not_proven_by_lanczos() -> None:
    (x, y), model = batch(), nn.Linear(3, 3).double()
    report = indefiniteness(model, ng.Categorical(), x, y, largest_exact=0, steps=4)
    assert not report.whole.indefinite
    assert any("does not prove" in message for message in report.messages)


def test_a_gradient_of_zero() -> None:
    one = torch.ones(1, 1, dtype=DOUBLE)
    for largest_exact in (10, 0):
        report = indefiniteness(Saddle(0.0, 0.0), ng.Gaussian(), one, one, largest_exact=largest_exact, steps=2)
        assert report.whole.indefinite and report.whole.hessian.smallest == pytest.approx(-1.0)
        assert math.isnan(report.whole.gradient_share) and math.isnan(report.whole.directions.newton_angle)
        assert "nan" in str(report)


def test_float32() -> None:
    (x, y), model = batch(), mlp()
    exact = indefiniteness(model, ng.Categorical(), x, y, damping=0.1).whole
    found = indefiniteness(model.float(), ng.Categorical(), x.float(), y, damping=0.1).whole
    assert found.hessian.smallest == pytest.approx(exact.hessian.smallest, rel=1e-4)
    assert found.residual == pytest.approx(exact.residual, rel=1e-4)
    assert found.fisher.negative_count == 0
    assert found.directions.newton_angle == pytest.approx(exact.directions.newton_angle, abs=0.1)


def test_the_model_is_left_as_it_is() -> None:
    x, y = batch()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3)).double()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    first = indefiniteness(model, ng.Categorical(), x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert str(indefiniteness(model, ng.Categorical(), x, y)) == str(first)


def test_bad_arguments() -> None:
    (x, y), model = batch(), mlp()
    for name, value in {"damping": 0.0, "steps": 1, "samples": 1, "largest_exact": -1}.items():
        with pytest.raises(ArgumentError, match=f"{name}={value}"):
            indefiniteness(model, ng.Categorical(), x, y, **{name: value})
    with pytest.raises(ArgumentError, match="damping=nan"):
        indefiniteness(model, ng.Categorical(), x, y, damping=math.nan)
    with pytest.raises(NonFiniteError):
        indefiniteness(model, ng.Categorical(), x * math.nan, y)
