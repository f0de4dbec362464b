"""Mistakes that libraries of curvature have made, one test each: pitfalls 1 to 28 and 37, which concern the matrices.

Those of optimizers are in test_pitfalls_optimizer.py. Tests named `test_bug_of_…` are wrong results measured in
published libraries; each would fail there.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import natgrad as ng
from natgrad import errors
from natgrad.testing import families, oracles, zoo
from support import Problem, assert_close, distance, problem

STRUCTURES = {
    "dense": ng.Dense(),
    "diagonal": ng.Diagonal(),
    "blocks": ng.BlockDiagonal(),
    "kronecker": ng.Kronecker(),
    "reduce": ng.Kronecker.reduce(),
    "eigen": ng.EigenKronecker(),
    "gram": ng.Gram(),
    "free": ng.MatrixFree(),
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
EXACT_WHOLE = {k: STRUCTURES[k] for k in ("dense", "gram", "free")}
whole_structures = pytest.mark.parametrize("structure", EXACT_WHOLE.values(), ids=EXACT_WHOLE)


def matrix(model: nn.Module, likelihood: Any, x: Any, y: Any = None, **options: Any) -> Tensor:
    return ng.fisher(model, likelihood, x, y, **options).to_dense()


def mean_of(repeats: int, model: nn.Module, likelihood: Any, x: Any, y: Any = None, **options: Any) -> Tensor:
    """Mean over independent draws."""
    seeds = torch.Generator().manual_seed(11)
    return sum(matrix(model, likelihood, x, y, generator=seeds, **options) for _ in range(repeats)) / repeats  # type: ignore


def sequences(n: int = 4, time: int = 3, classes: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with interacting positions, inputs and labels."""
    p = problem("mixer", "categorical")
    return p.model, p.x[:n], p.y[:n]


# 5.1 Scaling


@every_structure
@pytest.mark.parametrize("copies", [8, 64])
def test_pitfall_01_mean_reduced_loss_does_not_shrink_the_matrix(structure, copies):
    p = problem("mlp", "categorical")
    once = matrix(p.model, p.likelihood, p.x, structure=structure)
    many = matrix(p.model, p.likelihood, p.x.repeat(copies, 1), structure=structure)
    assert_close(many, once, 1e-10)
    assert float(once.trace()) == pytest.approx(float(p.exact.trace()), rel=0.3)


def test_bug_of_kfac_pytorch_linear_factors_too_small_by_n_squared():
    p = problem("mlp", "categorical")
    for copies in (8, 64):
        x, y = p.x[:1].repeat(copies, 1), p.y[:1].repeat(copies)
        options = {"estimate": ng.Empirical(), "structure": ng.Kronecker()}
        ratio = matrix(p.model, p.likelihood, x, y, **options).trace() / p_trace(p)
        assert float(ratio) == pytest.approx(1.0, rel=1e-10)


def p_trace(p: Problem) -> Tensor:
    """Trace of the exact empirical matrix of the first row."""
    score = p.pair.family.score(p.f[:1], p.y[:1])
    return oracles.dense_fisher(p.jacobian[:1], oracles.score_columns(score[None]), 1.0).trace()


@every_structure
def test_pitfall_02_the_denominator_counts_loss_terms(structure):
    model, x, y = sequences()
    p = problem("mixer", "categorical")
    y = y.clone()
    y[0, 1:], y[1, 2] = -100, -100
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    keep = (y != -100).double()
    exact = oracles.exact_fisher(p.jacobian, p.pair.family.fisher(p.f), keep)
    got = ng.fisher(model, likelihood, x, y, structure=structure)
    if structure in EXACT_WHOLE.values():
        assert_close(got.to_dense(), exact)
    elif structure not in (STRUCTURES["kronecker"], STRUCTURES["reduce"]):
        assert_close(got.diagonal().sum(), exact.trace())
    else:
        assert float(got.trace() / exact.trace()) == pytest.approx(1.0, abs=0.5)


def test_pitfall_02_mse_loss_has_no_half_and_divides_by_outputs():
    p = problem("mlp", "gaussian")
    hessian = oracles.nll_hessian(p.model, families.gaussian(), p.x, p.f)  # ½ (f − y)² at a perfect fit
    assert_close(matrix(p.model, ng.Gaussian.of_mse_loss(), p.x), 2 * hessian)
    assert_close(matrix(p.model, ng.Gaussian(), p.x), hessian)


def test_pitfall_03_more_samples_do_not_mean_less_curvature():
    p = problem("mlp", "categorical")
    for samples in (1, 10, 100):
        estimate = ng.MonteCarlo(samples)
        mean = mean_of(max(600 // samples, 20), p.model, p.likelihood, p.x, estimate=estimate, structure=ng.Kronecker())
        assert float(mean.trace() / p.exact.trace()) == pytest.approx(1.0, abs=0.1)


def test_pitfall_04_columns_are_summed_not_averaged():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 10).double(), torch.randn(4, 3, dtype=torch.float64)
    f = model(x).detach()
    expected = oracles.exact_fisher(oracles.jacobian(model, x), families.categorical().fisher(f))
    for structure in (ng.Dense(), ng.Gram(), ng.MatrixFree()):
        assert_close(matrix(model, ng.Categorical(), x, structure=structure), expected)
    p = f.softmax(-1)  # trace = mean of (1 − Σ p²)(‖a‖² + 1), which no average over columns gives
    trace = ((1 - p.square().sum(-1)) * (x.square().sum(-1) + 1)).mean()
    assert_close(ng.fisher(model, ng.Categorical(), x, structure=ng.Diagonal()).trace(), trace)


@pytest.mark.parametrize("estimate", [ng.Exact(), ng.MonteCarlo(50)], ids=str)
def test_pitfall_05_gaussian_fisher_is_one_over_variance(estimate):
    p = problem("mlp", "gaussian")
    unit = matrix(p.model, ng.Gaussian(scale=1.0), p.x)
    for scale in (0.5, 2.0):
        got = mean_of(60, p.model, ng.Gaussian(scale=scale), p.x, estimate=estimate)
        assert_close(got, unit / scale**2, 1e-10 if estimate == ng.Exact() else 0.05)


def test_pitfall_05_learned_scale_has_fisher_two_in_log_scale():
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.3, 0.5]))
    got = matrix(model, ng.Gaussian.learned(), torch.zeros(3, 1, dtype=torch.float64))[2:, 2:]
    expected = torch.diag(torch.tensor([1 / torch.tensor(0.5).double().exp() ** 2, 2.0], dtype=torch.float64))
    assert_close(got, expected, 1e-12)


def test_bug_of_nngeometry_regression_samples_scaled_by_the_variance():
    p = problem("mlp", "gaussian")
    exact = matrix(p.model, ng.Gaussian(scale=2.0), p.x)
    sampled = mean_of(100, p.model, ng.Gaussian(scale=2.0), p.x, estimate=ng.MonteCarlo(20))
    assert float(sampled.trace() / exact.trace()) == pytest.approx(1.0, abs=0.05)


def test_pitfall_06_empirical_is_another_matrix_and_named_so():
    p = problem("mlp", "gaussian")
    at_fit = matrix(p.model, p.likelihood, p.x, p.f, estimate=ng.Empirical())
    assert at_fit.abs().max() < 1e-20
    assert p.exact.trace() > 1e-2
    far = matrix(p.model, p.likelihood, p.x, p.f + 3.0, estimate=ng.Empirical())
    assert float(far.trace() / p.exact.trace()) == pytest.approx(9 / 0.49, rel=0.5)
    assert_close(matrix(p.model, p.likelihood, p.x, p.f + 3.0), p.exact)
    with pytest.raises(errors.NotObservedError, match="Empirical"):
        ng.fisher(p.model, p.likelihood, p.x, estimate=ng.Empirical())


# 7 and 8 are in test_pitfalls_optimizer.py


@every_structure
def test_pitfall_09_damping_is_not_left_behind(structure):
    p = problem("mlp", "categorical")
    operator = ng.fisher(p.model, p.likelihood, p.x, structure=structure)
    before, v = operator.to_dense(), torch.ones(p.size, dtype=torch.float64)
    first = operator.solve(v, damping=0.1)
    for _ in range(3):
        assert torch.equal(operator.solve(v, damping=0.1), first)
        operator.inverse(damping=0.5)
    assert torch.equal(operator.to_dense(), before)


def test_pitfall_10_factored_damping_balances_the_traces_and_eigen_damping_is_exact():
    generator = torch.Generator().manual_seed(0)
    L, R = (torch.randn(n, 2 * n, dtype=torch.float64, generator=generator) for n in (3, 5))
    L, R, damping = L @ L.T, 100 * R @ R.T, 0.3
    one, two = torch.eye(3, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    product = ng.linalg.KroneckerProduct(L, R)
    pi = ((R.trace() / 5) / (L.trace() / 3)).sqrt()
    damped = torch.kron(L + damping**0.5 / pi * one, R + damping**0.5 * pi * two)
    assert_close(product.damped_factors(damping).to_dense(), damped, 1e-12)
    exact = torch.linalg.inv(torch.kron(L, R) + damping * torch.kron(one, two))
    assert_close(product.inverse(damping=damping).to_dense(), exact, 1e-10)
    # The cross terms √λ(π L ⊗ I + I ⊗ R/π) have their least trace at this π; λ on each factor is far from it.
    errors = [damped.trace() - torch.kron(L, R).trace() - damping * 15]
    for other in (0.5 * pi, 2 * pi):
        shifted = torch.kron(L + damping**0.5 / other * one, R + damping**0.5 * other * two)
        errors.append(shifted.trace() - torch.kron(L, R).trace() - damping * 15)
    assert min(errors) == errors[0]


@pytest.mark.parametrize("zero", ["left", "right"])
def test_pitfall_10_zero_trace_is_guarded(zero):
    L, R = torch.zeros(2, 2).double(), torch.eye(3).double()
    product = ng.linalg.KroneckerProduct(*((L, R) if zero == "left" else (R, L)))
    damped = product.damped_factors(0.04).to_dense()
    assert torch.isfinite(damped).all()
    assert torch.linalg.eigvalsh(damped)[0] > 0


def test_pitfall_11_bias_is_the_homogeneous_coordinate():
    """[A a; aᵀ 1] with the off-diagonal a: two separate blocks for weight and bias would lose it."""
    p = problem("mlp", "categorical")
    got = matrix(p.model, p.likelihood, p.x, structure=ng.Kronecker())
    a = torch.cat([p.x, torch.ones(5, 1, dtype=torch.float64)], 1)
    A = a.T @ a / 5
    G = got[12:16, 12:16]  # bias block is G · 1
    for o in range(4):
        assert_close(got[3 * o : 3 * o + 3, 3 * o : 3 * o + 3], G[o, o] * A[:3, :3], 1e-10)
        assert_close(got[3 * o : 3 * o + 3, 12 + o], G[o, o] * A[:3, 3], 1e-10)


@every_structure
@pytest.mark.parametrize("model", ["frozen_bias", "frozen_weight", "bias_free"])
def test_pitfall_11_frozen_and_missing_biases(model, structure):
    p = problem(model, "categorical")
    got = ng.fisher(p.model, p.likelihood, p.x, structure=structure)
    assert got.shape == (p.size, p.size)
    assert float(got.trace() / p.exact.trace()) == pytest.approx(1.0, abs=0.3)


# 5.2 Structure


def test_pitfall_12_shared_positions_are_counted_once():
    """One image of equal windows: A must be that of one window, and G·A exact up to the interactions of positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x = torch.ones(3, 1, 5, 5, dtype=torch.float64)
    exact = oracles.exact_fisher(oracles.jacobian(model, x), families.gaussian().fisher(model(x).detach()))
    options = {"likelihood": ng.Gaussian(), "x": x}
    assert_close(matrix(model, structure=ng.Kronecker.reduce(), **options), exact)
    # Expand treats the 16 positions as independent: each has 1/16² of the whole, so 1/16 in all.
    assert_close(matrix(model, structure=ng.Kronecker(), **options), exact / 16)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("model", ["conv1d", "conv2d", "conv2d_same", "conv3d", "conv2d_groups", "attention"])
def test_pitfall_12_eigenvalue_correction_repairs_the_trace(model, sharing):
    p = problem(model, "categorical")
    got = ng.fisher(p.model, p.likelihood, p.x, p.y, estimate=ng.Empirical(), structure=ng.EigenKronecker(sharing))
    assert_close(got.trace(), p.empirical.trace())


CONVOLUTIONS = {
    "stride": (lambda: nn.Conv2d(2, 3, 3, stride=2), (2, 6, 7)),
    "dilation": (lambda: nn.Conv2d(2, 3, 2, dilation=(1, 2)), (2, 4, 5)),
    "one_sided": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(2, 3, 2)), (2, 4, 4)),
    "same_string": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 4, 4)),
    "same_even": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 6)),
    "valid_string": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 4, 4)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect", dilation=2), (2, 8)),
    "replicate": (lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (1, 3, 3, 2)),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
    "depthwise": (lambda: nn.Conv1d(3, 6, 2, groups=3, bias=False), (3, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 2, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pitfall_13_convolutions_of_every_kind(name):
    builder, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    layer = builder().double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(x)[0].numel(), 2).double())
    exact = oracles.exact_fisher(oracles.jacobian(model, x), families.gaussian().fisher(model(x).detach()))
    for structure in (ng.Dense(), ng.Gram(), ng.MatrixFree()):
        assert_close(matrix(model, ng.Gaussian(), x, structure=structure), exact)
    eigen = ng.fisher(
        model, ng.Gaussian(), x, structure=ng.EigenKronecker(), generator=torch.Generator().manual_seed(0)
    )
    # A transposed convolution has no layer rule yet: its diagonal is estimated, the other traces are exact.
    tolerance = 0.5 if name == "transposed" else 1e-9
    assert float(eigen.trace() / exact.trace()) == pytest.approx(1.0, abs=tolerance)


def test_pitfall_13_groups_are_blocks_of_their_own():
    p = problem("conv2d_groups", "categorical")
    got = matrix(p.model, p.likelihood, p.x, structure=ng.Kronecker())[:48, :48].reshape(2, 24, 2, 24)
    assert got[0, :, 1].abs().max() == 0
    assert distance(got[0, :, 0], got[1, :, 1]) > 0.05  # and not the average of the groups


@pytest.mark.parametrize("pixels", [4, 8])
def test_bug_of_kfac_pytorch_convolution_factors_scale_with_batch_and_pixels(pixels):
    """There the trace ratio falls as 1/(N² S⁵); here it is of order one and does not depend on N."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * pixels**2, 3)).double()
    x = torch.randn(1, 1, pixels, pixels, dtype=torch.float64)
    y = torch.tensor([1])
    ratios = []
    for copies in (1, 8):
        batch, labels = x.repeat(copies, 1, 1, 1), y.repeat(copies)
        options = {"estimate": ng.Empirical(), "y": labels}
        plain = ng.fisher(model, ng.Categorical(), batch, structure=ng.Kronecker(), **options).diagonal()[:30].sum()
        exact = ng.fisher(model, ng.Categorical(), batch, structure=ng.Diagonal(), **options).diagonal()[:30].sum()
        ratios.append(float(plain / exact))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-9)
    assert 0.2 < ratios[0] < 5


@whole_structures
@pytest.mark.parametrize("model", ["reused", "shared_parameter", "tied_head"])
def test_pitfall_14_tied_weights_keep_their_cross_terms(model, structure):
    p = problem(model, "categorical")
    assert_close(matrix(p.model, p.likelihood, p.x, structure=structure), p.exact)


def test_pitfall_14_sum_of_uses_not_uses_apart():
    """K-FAC of a reused layer: EKFAC's trace is that of the summed gradient, which separate uses would miss."""
    p = problem("reused", "categorical")
    got = ng.fisher(p.model, p.likelihood, p.x, structure=ng.EigenKronecker())
    assert_close(got.trace(), p.exact.trace())
    uses = oracles.record_layers(p.model, p.x, ["shared"])["shared"]
    apart = sum(oracles.layer_block(u, p.exact_columns, p.total, bias=True).trace() for u in uses)
    together = oracles.layer_block(oracles.join_uses(uses), p.exact_columns, p.total, bias=True).trace()
    assert abs(float(apart / together) - 1) > 0.05


@every_structure
def test_pitfall_15_batch_norm_statistics_are_not_updated_by_curvature(structure):
    case = zoo.case("batch_norm_train")
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    ng.fisher(case.model, ng.Categorical(), case.x, structure=structure)
    ng.hessian(case.model, ng.Categorical(), case.x, torch.zeros(5, dtype=torch.long))
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())


def test_pitfall_15_matrix_free_sees_the_coupling_of_batch_norm_in_training():
    """J_n of a row includes what the row's output owes to the other rows; evaluation mode is another matrix."""
    p = problem("batch_norm_train", "categorical")
    assert_close(matrix(p.model, p.likelihood, p.x, structure=ng.MatrixFree()), p.exact)
    evaluated = zoo.case("batch_norm_train").model.eval()
    assert distance(matrix(evaluated, p.likelihood, p.x), p.exact) > 0.05


@pytest.mark.parametrize("name", ["dense", "gram", "diagonal", "blocks"])
def test_pitfall_15_exact_structures_are_exact_in_training_or_say_that_they_are_not(name):
    """Rows of layers before batch statistics mix the examples: shared columns then give another matrix (88 % off here,
    and twice the trace in expectation over sampled labels)."""
    p = problem("batch_norm_train", "categorical")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = ng.fisher(p.model, p.likelihood, p.x, structure=STRUCTURES[name])
        except errors.UnsupportedError as error:
            assert "BatchNorm" in str(error)
            return
    if any("BatchNorm" in str(w.message) for w in caught):
        return
    assert_close(got.diagonal(), p.exact.diagonal())
    if name in EXACT_WHOLE:
        assert_close(got.to_dense(), p.exact)


def test_pitfall_15_batch_norm_in_evaluation_is_exact():
    p = problem("batch_norm_eval", "categorical")
    for structure in EXACT_WHOLE.values():
        assert_close(matrix(p.model, p.likelihood, p.x, structure=structure), p.exact)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)], ids=lambda m: type(m).__name__)
def test_pitfall_16_zero_scale_of_a_norm_layer(norm):
    """x̂ from the input, not from the output over γ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)).double()
    with torch.no_grad():
        norm.weight.zero_()
    x = torch.randn(5, 3, dtype=torch.float64)
    exact = oracles.exact_fisher(oracles.jacobian(model, x), families.gaussian().fisher(model(x).detach()))
    assert exact[16:20, 16:20].abs().max() > 1e-3
    assert_close(matrix(model, ng.Gaussian(), x), exact)
    for structure in STRUCTURES.values():
        assert torch.isfinite(matrix(model, ng.Gaussian(), x, structure=structure)).all()


def test_pitfall_17_embedding_factor_is_the_token_frequencies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 2), nn.Flatten(), nn.Linear(4, 2)).double()
    tokens = torch.tensor([[1, 2], [1, 3], [2, 2]])
    block = next(iter(ng.fisher(model, ng.Categorical(), tokens, structure=ng.Kronecker()).blocks.blocks.values()))
    sizes = [t.numel() for t in block.tensors().values()]
    assert max(sizes) <= 1000, "a vocabulary × vocabulary factor"
    trace = block.diagonal().reshape(1000, 2).sum(1)
    assert_close(trace / trace.sum(), torch.bincount(tokens.flatten(), minlength=1000).double() / 6, 1e-10)


@every_structure
def test_pitfall_17_padding_row_has_no_curvature(structure):
    p = problem("embedding_bag", "categorical")
    got = matrix(p.model, p.likelihood, p.x, structure=structure)
    assert got[:3].abs().max() == 0
    assert p.x.eq(0).any()


@every_structure
def test_pitfall_17_longer_padding_changes_nothing(structure):
    """Padding tokens are no examples of the embedding: they must not thin out the frequencies of the real ones."""
    p = problem("embedding_bag", "categorical")
    longer = torch.cat([p.x, torch.zeros(4, 3, dtype=p.x.dtype)], 1)
    got = matrix(p.model, p.likelihood, longer, structure=structure)
    assert_close(got, matrix(p.model, p.likelihood, p.x, structure=structure))


def test_pitfall_17_sparse_embedding_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(4, 2)).double()
    dense = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 2)).double()
    dense.load_state_dict(model.state_dict())
    tokens = torch.tensor([[1, 2], [1, 3], [2, 2]])
    try:
        got = matrix(model, ng.Categorical(), tokens)
    except errors.UnsupportedError as error:
        assert "sparse" in str(error)
    else:
        assert_close(got, matrix(dense, ng.Categorical(), tokens))


class FunctionalHead(nn.Module):
    """The weight of one layer used through F.linear, beside its own module call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.body(x)), self.body.weight)))


class LoRA(nn.Module):
    """A frozen layer with a merged low-rank update: no module call sees the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(3, 1))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)))


BYPASSES = {
    "functional": FunctionalHead,
    "lora": LoRA,
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)),
    "bilinear": lambda: Bilinear(),
}


class Bilinear(nn.Module):
    """A layer type without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.form, self.head = nn.Bilinear(3, 3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.form(x, x)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", BYPASSES)
def test_pitfall_18_parameters_that_bypass_their_module(name):
    torch.manual_seed(0)
    model = BYPASSES[name]().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    exact = oracles.exact_fisher(oracles.jacobian(model, x), families.gaussian().fisher(model(x).detach()))
    for structure in EXACT_WHOLE.values():
        assert_close(matrix(model, ng.Gaussian(), x, structure=structure), exact)
    factored = ng.fisher(model, ng.Gaussian(), x, structure=ng.Kronecker())
    touched = exact.diagonal() > 1e-12
    assert (factored.diagonal()[touched] > 0).all(), "a parameter without curvature is silently not covered"


@pytest.mark.parametrize("model", ["multihead", "encoder_layer", "lstm", "tied_head"])
def test_pitfall_18_attention_and_recurrence_are_covered(model):
    p = problem(model, "categorical")
    diagonal = sum(
        p.fisher("exact", ng.Kronecker(), generator=torch.Generator().manual_seed(s)).diagonal() for s in range(8)
    )
    touched = p.exact.diagonal() > 1e-10
    assert (diagonal[touched] > 0).all()
    assert float(diagonal.sum() / 8 / p.exact.trace()) == pytest.approx(1.0, abs=0.5)


@every_structure
def test_pitfall_19_unused_modules_have_zero_curvature(structure):
    p = problem("unused", "categorical")
    operator = ng.fisher(p.model, p.likelihood, p.x, structure=structure)
    got, part = operator.to_dense(), oracles.parameter_slices(p.model)["expert.weight"]
    assert got[part].abs().max() == 0
    v = torch.ones(p.size, dtype=torch.float64)
    assert_close(operator.solve(v, damping=0.5)[part], v[part] / 0.5, 1e-6)


class Checkpointed(nn.Module):
    """Activation checkpointing around the first layers: their forward hooks run twice."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        h = torch.utils.checkpoint.checkpoint(self.inner[:2], x, use_reentrant=False)
        return self.inner[2:](h)


@every_structure
def test_pitfall_20_activation_checkpointing_does_not_count_twice(structure):

    p = problem("mlp", "categorical")
    got = matrix(Checkpointed(p.model), p.likelihood, p.x, structure=structure)  # type: ignore[arg-type]
    assert_close(got, matrix(p.model, p.likelihood, p.x, structure=structure))


@every_structure
def test_pitfall_21_in_place_activations(structure):
    case = zoo.case("inplace")
    out_of_place = nn.Sequential(*case.model)  # type: ignore[arg-type]
    out_of_place = nn.Sequential(*[type(m)() if isinstance(m, nn.ELU | nn.ReLU) else m for m in out_of_place])
    got = matrix(case.model, ng.Categorical(), case.x, structure=structure)
    assert_close(got, matrix(out_of_place, ng.Categorical(), case.x, structure=structure))


# 22 is in test_pitfalls_optimizer.py


# 5.3 Likelihood details


def masked_batch() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Per-position model [N, T, C], inputs padded with rubbish, labels with ignored padding, mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    y = torch.randint(0, 3, (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    x[~mask], y[~mask] = 1e3, -100
    return model, x, y, mask


@every_structure
def test_pitfall_23_padded_equals_unpadded(structure):
    """Padding changes neither Λ nor the count nor the input factor: tokens as rows of one flat batch give the same."""
    model, x, y, mask = masked_batch()
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    options = {"structure": structure}
    if structure == STRUCTURES["reduce"]:  # reduce aggregates the positions of a row: compare with the rows cut short
        cut = [matrix(model, ng.Categorical(), x[i : i + 1, : int(m.sum())]) for i, m in enumerate(mask)]
        assert all(torch.isfinite(c).all() for c in cut)
        got = matrix(model, likelihood, x, y, **options)
        x2 = x.clone()
        x2[~mask] = -5e2
        assert_close(matrix(model, likelihood, x2, y, **options), got)
        return
    flat = matrix(model, ng.Categorical(), x[mask], **options)
    assert_close(matrix(model, likelihood, x, y, **options), flat, 1e-8)


@pytest.mark.parametrize("structure", [ng.Dense(), ng.Kronecker(), ng.EigenKronecker(), ng.Gram()], ids=str)
@pytest.mark.parametrize("estimate", [ng.MonteCarlo, ng.Signed])
def test_pitfall_23_sampled_labels_are_ignored_at_the_same_positions(estimate, structure):
    model, x, y, mask = masked_batch()
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    got = mean_of(40, model, likelihood, x, y, estimate=estimate(60), structure=structure)
    assert_close(got, matrix(model, ng.Categorical(), x[mask], structure=structure), 0.05)


def test_pitfall_23_empirical_ignores_padding():
    model, x, y, mask = masked_batch()
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    got = matrix(model, likelihood, x, y, estimate=ng.Empirical())
    rows = [model(x[i][m]) for i, m in enumerate(mask)]  # the unit is the row: one gradient per sequence
    grads = [
        oracles.flat_gradient(model, F.cross_entropy(f, y[i][mask[i]], reduction="sum")) for i, f in enumerate(rows)
    ]
    assert_close(got, sum(torch.outer(g, g) for g in grads) / mask.sum())


def test_bug_of_curvlinops_ignored_labels_in_sampled_and_factored_matrices():
    """There half of the targets ignored gave 4.3× (sampled) and 4.6× (K-FAC) too much."""
    p = problem("mlp", "categorical")
    x, y = p.x.repeat(2, 1), torch.cat([p.y, torch.full_like(p.y, -100)])
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    for structure in (ng.Dense(), ng.Kronecker()):
        expected = matrix(p.model, p.likelihood, p.x, structure=structure)
        assert_close(matrix(p.model, likelihood, x, y, structure=structure), expected)
        sampled = mean_of(50, p.model, likelihood, x, y, structure=structure, estimate=ng.MonteCarlo(40))
        assert float(sampled.trace() / expected.trace()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("structure", [ng.Kronecker(), ng.EigenKronecker()], ids=str)
def test_pitfall_23_masks_reach_layers_with_several_positions_per_token(structure):
    """Input [N, T, 2, d]: the mask of token t covers the two heads of t, not the tokens of another order."""
    case = zoo.case("heads")
    y = torch.randint(0, 3, (4, 3))
    y[0, 1:], y[2, 2] = -100, -100
    likelihood, keep = ng.Weighted(ng.Categorical(), ignore_index=-100), y != -100
    got = matrix(case.model, likelihood, case.x, y, structure=structure)
    tokens = case.x[keep].unsqueeze(1)  # every remaining token a row of its own: heads of one token do not mix others
    assert_close(got, matrix(case.model, ng.Categorical(), tokens, structure=structure))


def weighted_cross_entropy_ggn(p: Problem, weights: Tensor) -> Tensor:
    return oracles.exact_fisher(p.jacobian, p.pair.family.fisher(p.f), weights)


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("estimate", [ng.Exact(), ng.MonteCarlo(60), ng.Signed(60)], ids=str)
def test_pitfall_24_class_weights_are_those_of_the_true_label(estimate):
    p = problem("mlp", "categorical")
    y = torch.tensor([0, 1, 2, 2, 0])
    likelihood = ng.Weighted(ng.Categorical(), class_weights=CLASS_WEIGHTS)
    expected = weighted_cross_entropy_ggn(p, CLASS_WEIGHTS[y])
    repeats = 1 if estimate == ng.Exact() else 60
    got = mean_of(repeats, p.model, likelihood, p.x, y, estimate=estimate)
    assert_close(got, expected, 1e-9 if repeats == 1 else 0.05)
    # … which is the GGN of torch's own weighted mean loss.
    loss = F.cross_entropy(p.f.requires_grad_(), y, weight=CLASS_WEIGHTS)
    score = torch.autograd.grad(loss, p.f)[0] * CLASS_WEIGHTS[y].sum()
    assert_close(likelihood.score(p.f.detach(), y), score)
    p.f.requires_grad_(False)


def test_bug_of_curvlinops_class_weights_in_sampled_and_factored_matrices():
    p = problem("mlp", "categorical")
    y, weights = torch.tensor([2, 2, 2, 2, 2]), torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)
    likelihood = ng.Weighted(ng.Categorical(), class_weights=weights)
    for estimate in (ng.Exact(), ng.MonteCarlo(100)):
        for structure in (ng.Dense(), ng.Kronecker()):
            got = mean_of(30, p.model, likelihood, p.x, y, estimate=estimate, structure=structure)
            expected = matrix(p.model, p.likelihood, p.x, structure=structure)
            assert float(got.trace() / expected.trace()) == pytest.approx(1.0, abs=0.05)


ESTIMATES = [ng.Exact(), ng.Empirical()]


@every_structure
@pytest.mark.parametrize("estimate", ESTIMATES, ids=str)
def test_pitfall_24_a_weight_of_two_is_two_copies(estimate, structure):
    p = problem("mlp", "categorical")
    counts = torch.tensor([2, 1, 3, 0, 1])
    likelihood = ng.Weighted(ng.Categorical())
    weighted = matrix(p.model, likelihood, p.x, (p.y, counts.double()), estimate=estimate, structure=structure)
    x, y = p.x.repeat_interleave(counts, 0), p.y.repeat_interleave(counts)
    assert_close(weighted, matrix(p.model, ng.Categorical(), x, y, estimate=estimate, structure=structure))


@every_structure
@pytest.mark.parametrize("estimate", ESTIMATES, ids=str)
def test_pitfall_24_the_unit_of_the_weights_means_nothing(estimate, structure):
    """The mean loss divides by Σw: weights times ten are the same loss, gradient and metric."""
    p = problem("mlp", "categorical")
    w = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.1], dtype=torch.float64)
    likelihood, options = ng.Weighted(ng.Categorical()), {"estimate": estimate, "structure": structure}
    once = matrix(p.model, likelihood, p.x, (p.y, w), **options)
    assert_close(matrix(p.model, likelihood, p.x, (p.y, 10 * w), **options), once)


@every_structure
def test_pitfall_24_a_vanishing_weight_is_no_weight(structure):
    p = problem("mlp", "categorical")
    likelihood = ng.Weighted(ng.Categorical())
    w = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    tiny = torch.where(w == 0, 1e-12, w)
    none = matrix(p.model, likelihood, p.x, (p.y, w), structure=structure)
    assert_close(matrix(p.model, likelihood, p.x, (p.y, tiny), structure=structure), none, 1e-6)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_pitfall_24_class_weights_act_on_the_inputs_of_soft_targets_too(soft):
    """Inputs of predictions without weight, however large, leave K-FAC's factors of a linear model alone."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3).double(), torch.randn(8, 3).double()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2])
    x[y == 2] *= 100
    target = F.one_hot(y, 3).double() if soft else y
    likelihood = ng.Weighted(ng.Categorical(), class_weights=torch.tensor([1.0, 2.0, 0.0]).double())
    options = {"estimate": ng.Exact(), "structure": ng.Kronecker()}
    kept = y != 2
    expected = matrix(model, likelihood, x[kept], target[kept], **options)
    found = matrix(model, likelihood, x, target, **options)
    scale = float(expected.trace() / found.trace())  # the mean of soft targets is over all predictions
    assert_close(found * scale, expected, 1e-12)


def test_pitfall_25_label_smoothing_changes_the_empirical_matrix_only():
    p = problem("mlp", "categorical")
    smooth = ng.Weighted(ng.Categorical(), label_smoothing=0.3)
    assert_close(matrix(p.model, smooth, p.x, p.y), p.exact)
    sampled = [
        matrix(p.model, law, p.x, p.y, estimate=ng.MonteCarlo(3), generator=torch.Generator().manual_seed(1))
        for law in (smooth, ng.Categorical())
    ]
    assert torch.equal(*sampled)
    target = 0.7 * F.one_hot(p.y, 3).double() + 0.1
    columns = oracles.score_columns((p.f.softmax(-1) - target)[None])
    got = matrix(p.model, smooth, p.x, p.y, estimate=ng.Empirical())
    assert_close(got, oracles.dense_fisher(p.jacobian, columns, 5.0))
    assert distance(got, p.empirical) > 0.1


def test_pitfall_26_soft_targets_leave_the_fisher_alone():
    p = problem("mlp", "categorical")
    soft = torch.softmax(torch.randn(5, 3, dtype=torch.float64), -1)
    assert_close(matrix(p.model, p.likelihood, p.x, soft), p.exact)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    options = {"estimate": ng.MonteCarlo(2)}
    first = matrix(p.model, p.likelihood, p.x, soft, generator=generators[0], **options)
    assert torch.equal(first, matrix(p.model, p.likelihood, p.x, generator=generators[1], **options))
    columns = oracles.score_columns((p.f.softmax(-1) - soft)[None])
    empirical = matrix(p.model, p.likelihood, p.x, soft, estimate=ng.Empirical())
    assert_close(empirical, oracles.dense_fisher(p.jacobian, columns, 5.0))


def test_pitfall_27_multi_label_outputs_are_independent():
    torch.manual_seed(0)
    model, x = nn.Linear(2, 3).double(), torch.randn(6, 2, dtype=torch.float64)
    got = mean_of(200, model, ng.Bernoulli(), x, estimate=ng.MonteCarlo(50), structure=ng.Dense())
    p = torch.sigmoid(model(x)).detach()
    expected = torch.diag((p * (1 - p)).mean(0))
    assert_close(got[6:, 6:], expected, 0.03)  # no covariance between labels, which one shared draw would give


def test_pitfall_28_the_metric_knows_no_regulariser():
    """F depends on the likelihood alone, whatever else the loss contains; the optimizer's side is tested there."""
    p = problem("mlp", "categorical")
    operator = ng.fisher(p.model, p.likelihood, p.x)
    penalised = p.exact + 0.1 * torch.eye(p.size, dtype=torch.float64)
    assert_close(operator.to_dense(), p.exact)
    assert_close(
        (operator + 0.1 * ng.linalg.IdentityMatrix(p.size, torch.float64, torch.device("cpu"))).to_dense(), penalised
    )


def test_pitfall_30_dropout_does_not_touch_the_global_stream():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    for structure in (ng.Dense(), ng.MatrixFree(), ng.Kronecker()):
        state = torch.get_rng_state()
        ng.fisher(model, ng.Categorical(), x, structure=structure) @ torch.ones(59, dtype=torch.float64)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(q.grad is None for q in model.parameters())


def test_pitfall_37_low_rank_inverse_keeps_the_orthogonal_complement():
    p = problem("attention", "categorical")  # rank at most 18 of 89
    operator = p.fisher("exact", ng.Gram())
    values, vectors = torch.linalg.eigh(p.exact)
    null = vectors[:, values < 1e-12 * values[-1]]
    assert null.shape[1] >= 60
    v = null @ torch.ones(null.shape[1], dtype=torch.float64)
    assert_close(operator.solve(v, damping=0.25), 4 * v, 1e-8)
    v = torch.ones(p.size, dtype=torch.float64)
    assert_close(operator.solve(v, damping=0.25), oracles.damped_inverse(p.exact, 0.25) @ v)
