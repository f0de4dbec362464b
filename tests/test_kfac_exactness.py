"""K-FAC and EKFAC: where they are exact, and layer by layer against recorded activations and gradients elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.testing import oracles, zoo
from support import PAIRS, Problem, assert_close, distance, problem

EXACT_AND_EMPIRICAL = ["exact", "empirical"]
SHARING = {"expand": ng.Kronecker(), "reduce": ng.Kronecker.reduce()}
EIGEN = {"expand": ng.EigenKronecker(), "reduce": ng.EigenKronecker.reduce()}


def blocks_of(p: Problem, matrix: Tensor) -> Tensor:
    """The layer blocks of a matrix over all parameters."""
    slices = oracles.parameter_slices(p.model)
    return oracles.restrict(matrix, [[slices[n] for n in g] for g in oracles.module_groups(p.model).values()])


def repeated(p: Problem, copies: int) -> Problem:
    """The first row of the problem, some number of times."""
    x = p.x[:1].expand(copies, *p.x.shape[1:]).clone()
    return Problem(zoo.Case(p.case.name, p.model, x, p.case.select, p.case.tags), p.pair)


@pytest.mark.parametrize("structure", [ng.Kronecker(), ng.Kronecker.reduce(), ng.EigenKronecker()], ids=str)
@pytest.mark.parametrize("copies", [1, 7])
@pytest.mark.parametrize("estimate", EXACT_AND_EMPIRICAL)
@pytest.mark.parametrize("likelihood", PAIRS)
def test_exact_for_copies_of_one_datum(likelihood, estimate, copies, structure):
    p = problem("mlp", likelihood)
    one = repeated(p, copies)
    y = p.y[:1].expand(copies, *p.y.shape[1:]).clone()
    chosen = ng.Exact() if estimate == "exact" else ng.Empirical()
    operator = ng.fisher(one.model, one.likelihood, one.x, y, estimate=chosen, structure=structure)
    columns = one.exact_columns if estimate == "exact" else oracles.score_columns(p.pair.family.score(one.f, y)[None])
    assert_close(operator.to_dense(), blocks_of(p, oracles.dense_fisher(one.jacobian, columns, copies)), 1e-12)


def test_not_exact_for_different_data():
    """The control: without it the tests above could compare a thing with itself."""
    p = problem("mlp", "categorical")
    operator = p.fisher("exact", ng.Kronecker())
    assert distance(operator.to_dense(), blocks_of(p, p.exact)) > 1e-2


def test_exact_for_a_deep_linear_network_with_gaussian_likelihood():
    p = problem("deep_linear", "gaussian")
    assert_close(p.fisher("exact", ng.Kronecker()).to_dense(), blocks_of(p, p.exact), 1e-12)
    assert_close(p.fisher("exact", ng.EigenKronecker()).to_dense(), blocks_of(p, p.exact), 1e-12)
    # The categorical Λ varies over the data, the Gaussian one does not.
    c = problem("deep_linear", "categorical")
    assert distance(c.fisher("exact", ng.Kronecker()).to_dense(), blocks_of(c, c.exact)) > 1e-3


class PerPosition(nn.Module):
    """A deep linear network applied to each position: the setting in which expand is exact."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 3), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def test_expand_is_exact_where_positions_are_examples_and_reduce_where_they_are_pooled():
    with torch.random.fork_rng(devices=[]):
        case = zoo.Case("per_position", PerPosition(2).double(), torch.randn(4, 3, 2, dtype=torch.float64))
    tokens = Problem(case, PAIRS["gaussian"])
    assert_close(tokens.fisher("exact", SHARING["expand"]).to_dense(), blocks_of(tokens, tokens.exact), 1e-12)
    assert distance(tokens.fisher("exact", SHARING["reduce"]).to_dense(), blocks_of(tokens, tokens.exact)) > 1e-2
    pooled = problem("mean_pooled_linear", "gaussian")
    assert_close(pooled.fisher("exact", SHARING["reduce"]).to_dense(), blocks_of(pooled, pooled.exact), 1e-12)
    assert distance(pooled.fisher("exact", SHARING["expand"]).to_dense(), blocks_of(pooled, pooled.exact)) > 1e-2


def layer_records(p: Problem) -> dict[str, oracles.LayerRecord]:
    """Recorded uses of every trainable Linear and Conv layer of the problem."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [n for n, m in p.model.named_modules() if isinstance(m, kinds) and m.weight.requires_grad]
    records = oracles.record_layers(p.model, p.x, names, p.case.select)
    return {n: oracles.join_uses(uses) for n, uses in records.items() if uses}


def layer_matrix(
    p: Problem, name: str, record: oracles.LayerRecord, estimate: str, sharing: str, eigen: bool
) -> Tensor:
    """The oracle's K-FAC or EKFAC block of one layer in parameter order, group by group."""
    layer = p.model.get_submodule(name)
    bias = layer.bias is not None and layer.bias.requires_grad
    groups = getattr(layer, "groups", 1)
    columns, out, fan_in = p.columns(estimate), layer.weight.shape[0] // groups, layer.weight[0].numel()
    parts = []
    for g in range(groups):
        # Patches are channel-major, so that each group reads one contiguous range of them.
        inputs = record.inputs[..., g * fan_in : (g + 1) * fan_in]
        part = oracles.LayerRecord(inputs, record.jacobian[..., g * out : (g + 1) * out])
        A, G = oracles.kronecker_factors(part, columns, p.total, bias=bias, reduce=sharing == "reduce")
        if eigen:
            gradients = oracles.layer_gradients(part, columns, bias=bias)
            parts.append(oracles.eigen_corrected(A, G, gradients, p.total))
        else:
            parts.append(torch.kron(G, A))
    return oracles.to_parameter_order(torch.block_diag(*parts), out * groups, fan_in, bias)


LAYERED = [
    "mlp", "deep_linear", "bias_free", "frozen_bias", "inplace", "residual", "unused", "raw_parameter",
    "conv1d", "conv1d_circular", "conv2d", "conv2d_same", "conv2d_reflect", "conv2d_groups", "conv2d_depthwise",
    "conv3d", "mean_pooled_linear", "mixer", "attention", "heads", "layer_norm", "batch_norm_eval", "reused",
    "two_inputs", "structured", "embedding_bag", "embedding_padding", "flattened",
]  # fmt: skip


@pytest.mark.parametrize("eigen", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("estimate", EXACT_AND_EMPIRICAL)
@pytest.mark.parametrize("model", LAYERED)
def test_layer_blocks_against_recorded_activations_and_gradients(model, estimate, sharing, eigen):
    p = problem(model, "categorical")
    matrix = p.fisher(estimate, (EIGEN if eigen else SHARING)[sharing]).to_dense()
    slices = oracles.parameter_slices(p.model)
    for name, record in layer_records(p).items():
        layer = p.model.get_submodule(name)
        if eigen and sharing == "reduce" and degenerate(p, layer, record, estimate):
            continue
        keys = [f"{name}.{k}" if name else k for k in ("weight", "bias")]
        part = slice(slices[keys[0]].start, slices[keys[1]].stop if keys[1] in slices else slices[keys[0]].stop)
        expected = layer_matrix(p, name, record, estimate, sharing, eigen)
        assert_close(matrix[part, part], expected, 1e-8 if eigen else 1e-10)
        outside = matrix[part].clone()
        outside[:, part] = 0
        assert outside.abs().max() == 0, "K-FAC keeps no curvature across layers"


def degenerate(p: Problem, layer: nn.Module, record: oracles.LayerRecord, estimate: str) -> bool:
    """Whether reduce's factors have a null space that the exact gradients do not share: its basis is then arbitrary."""
    bias = layer.bias is not None and layer.bias.requires_grad  # type: ignore[union-attr]
    A, G = oracles.kronecker_factors(record, p.columns(estimate), p.total, bias=bias, reduce=True)
    return any(int(torch.linalg.matrix_rank(F, rtol=1e-10, hermitian=True)) < len(F) for F in (A, G))


def test_embedding_is_a_linear_layer_on_one_hot_inputs():
    p = problem("embedding_bag", "categorical")
    tokens, table = p.x, p.model.get_submodule("embedding").weight
    one_hot = torch.nn.functional.one_hot(tokens, table.shape[0]).double()
    jacobian = p.jacobian.reshape(4, 3, -1)[..., : table.numel()].reshape(4, 3, *table.shape)  # ∂f/∂table
    # Each token occurs at most twice in a row, and every use of it has the same gradient.
    uses = one_hot.sum(1).clamp(min=1)
    per_use = (jacobian / uses[:, None, :, None]).gather(
        2, tokens[:, None, :, None].expand(4, 3, tokens.shape[1], table.shape[1])
    )
    g = torch.einsum("rnc,ncsd->rnsd", p.exact_columns, per_use).reshape(-1, table.shape[1])
    real = tokens != 0  # the padding row has no gradient, and its tokens are no examples
    A = torch.diag(one_hot[real].mean(0))
    matrix = p.fisher("exact", ng.Kronecker()).to_dense()[: table.numel(), : table.numel()]
    assert_close(matrix, torch.kron(A, g.T @ g / p.total), 1e-10)
    assert matrix[: table.shape[1]].abs().max() > 0 or bool(table.grad is None)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("model", ["mlp", "conv2d", "conv2d_groups", "mixer", "attention", "reused", "embedding_bag"])
def test_eigenvalue_correction_is_closer_and_has_the_exact_trace(model, sharing):
    p = problem(model, "categorical")
    target = blocks_of(p, p.exact)
    groups = getattr(p.model[0], "groups", 1) if isinstance(p.model, nn.Sequential) else 1
    corrected, plain = (p.fisher("exact", s[sharing]).to_dense() for s in (EIGEN, SHARING))
    if groups > 1:  # blocks between groups are dropped by both
        kept = (plain != 0) | (corrected != 0)
        target = target * kept
    assert torch.linalg.matrix_norm(corrected - target) < torch.linalg.matrix_norm(plain - target)
    assert_close(corrected.trace(), p.exact.trace(), 1e-10)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("estimate", [ng.MonteCarlo, ng.Signed])
def test_random_factors_are_unbiased(estimate, sharing):
    p = problem("mixer", "categorical")
    seeds = torch.Generator().manual_seed(0)
    options = {"estimate": estimate(100), "structure": SHARING[sharing], "generator": seeds}
    draws = torch.stack([ng.fisher(p.model, p.likelihood, p.x, **options).to_dense() for _ in range(20)])
    expected = p.fisher("exact", SHARING[sharing]).to_dense()
    single = float((draws - expected).flatten(1).norm(dim=1).square().mean().sqrt() / expected.norm())
    assert distance(draws.mean(0), expected) < 2.5 * single / math.sqrt(20)
    assert 0 < single < 0.2


def test_parameters_outside_layers_get_an_unbiased_diagonal():
    """A raw parameter's diagonal is estimated with random signs: exact in expectation, never zero."""
    p = problem("raw_parameter", "categorical")
    slices = oracles.parameter_slices(p.model)
    part = slice(slices["gain"].start, slices["temperature"].stop)
    seeds = torch.Generator().manual_seed(0)
    options = {"structure": ng.Kronecker(), "generator": seeds}
    draws = torch.stack([ng.fisher(p.model, p.likelihood, p.x, **options).diagonal()[part] for _ in range(400)])
    expected = p.exact.diagonal()[part]
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() < 4 * error).all()
    assert (draws.mean(0) > 0.5 * expected).all()


@pytest.mark.parametrize("structure", [ng.Kronecker(), ng.EigenKronecker()], ids=str)
@pytest.mark.parametrize("model", ["layer_norm", "rms_norm", "group_norm", "batch_norm_eval"])
def test_norm_layers_get_their_exact_diagonal(model, structure):
    p = problem(model, "categorical")
    norm = next(n for n, m in p.model.named_modules() if type(m).__name__.endswith(("Norm", "Norm1d")))
    slices = oracles.parameter_slices(p.model)
    names = [n for n in slices if n.rpartition(".")[0] == norm]
    part = slice(slices[names[0]].start, slices[names[-1]].stop)
    matrix = p.fisher("exact", structure).to_dense()
    assert_close(matrix[part, part], torch.diag(p.exact.diagonal()[part]), 1e-10)


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
def test_damped_inverse_of_a_kronecker_block_is_exact(damping, generator):
    """(G ⊗ A + λI)⁻¹, not the inverse of separately damped factors."""
    p = problem("mlp", "categorical")
    operator = p.fisher("exact", ng.Kronecker())
    v = torch.randn(p.size, dtype=torch.float64, generator=generator)
    assert_close(operator.solve(v, damping=damping), oracles.damped_inverse(operator.to_dense(), damping) @ v, 1e-8)


class _Positions(nn.Module):
    """Tokens and a table of positions that is looked up once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(5, 4), nn.Embedding(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(x) + self.positions(torch.arange(3)[None])))


@pytest.mark.parametrize("structure", [ng.Kronecker(), ng.EigenKronecker(), ng.BlockDiagonal(), ng.Diagonal()], ids=str)
@pytest.mark.parametrize("estimate", [ng.Exact(), ng.Empirical()], ids=str)
def test_a_layer_called_once_for_the_whole_batch_gets_no_terms_between_examples(estimate, structure):
    """Its block's trace is exact for every structure: a layer rule would see the sum over examples as one."""
    torch.manual_seed(0)
    model = _Positions().double()
    x, y = torch.randint(5, (6, 3)), torch.randint(3, (6, 3))
    exact = ng.fisher(model, ng.Categorical(), x, y, estimate=estimate, structure=ng.Dense()).diagonal()
    draws = torch.Generator().manual_seed(0)
    options = {"estimate": estimate, "structure": structure, "generator": draws}
    mean = sum(ng.fisher(model, ng.Categorical(), x, y, **options).diagonal() for _ in range(300)) / 300
    table = slice(20, 32)  # of the positions, after the 5 × 4 tokens
    assert float(mean[table].sum()) == pytest.approx(float(exact[table].sum()), rel=0.1)
