"""Attention, tied weights, transposed weights and convolutions, experts, recurrence: rows and factors in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rows_oracle import checked_rows, normal, parameter_names, prepared
from torch import Tensor, nn

import natgrad as ng
from natgrad.network import cells, misaligned_parameters, record, register_layer, uncovered_parameters
from natgrad.network.layers import NAMED_RULES, RULES, LinearRule, RootMeanSquareRule, registry
from natgrad.network.tied import TiedRows
from natgrad.testing import oracles, zoo
from support import assert_close, distance, problem

STRUCTURES = {"expand": ng.Kronecker(), "reduce": ng.Kronecker.reduce()}
K = 2


# Attention


class Attends(nn.Module):
    """Three ways to call nn.MultiheadAttention, and a mask over keys."""

    def __init__(self, kind: str, **options) -> None:
        super().__init__()
        self.kind = kind
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        first = not self.attention.batch_first
        x, memory = (x.transpose(0, 1), memory.transpose(0, 1)) if first else (x, memory)
        key, value = {"self": (x, x), "memory": (memory, memory), "three": (memory, memory.tanh())}[self.kind]
        out = self.attention(x, key, value, key_padding_mask=None, need_weights=self.kind == "three")[0]
        return out.transpose(0, 1) if first else out


@pytest.mark.parametrize("kind", ["self", "memory", "three"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_attention(kind, batch_first, bias):
    model = prepared(Attends(kind, batch_first=batch_first, bias=bias))
    checked_rows(model, (normal(3, 2, 4), normal(3, 5, 4, seed=4)), parameter_names(model))


def test_rows_of_attention_with_separate_projections_and_keys_of_its_own():
    case = zoo.case("cross_attention")
    raw = {"attention.bias_k", "attention.bias_v"}
    checked_rows(case.model, case.x, parameter_names(case.model) - raw)
    reasons = {n: c.reason for c in cells(case.model) for n in c.parameters if c.module is None}
    assert reasons.keys() == raw and "does not know bias_k" in reasons["attention.bias_k"]


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_rows_of_attention_where_a_part_is_frozen(frozen):
    model = prepared(Attends("memory"))
    model.attention.get_parameter(frozen).requires_grad_(False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    checked_rows(model, (normal(3, 2, 4), normal(3, 5, 4, seed=4)), trained)


class ByHand(nn.Module):
    """The same attention with its projections as Linear layers that are called."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inputs, self.out = nn.Linear(4, 12).double(), nn.Linear(4, 4).double()
        with torch.no_grad():
            self.inputs.weight.copy_(attention.in_proj_weight)
            self.inputs.bias.copy_(attention.in_proj_bias)
            self.out.weight.copy_(attention.out_proj.weight)
            self.out.bias.copy_(attention.out_proj.bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if memory is x:
            q, k, v = self.inputs(x).chunk(3, -1)
        else:
            q, (k, v) = self.inputs(x)[..., :4], self.inputs(memory)[..., 4:].chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v))
        return self.out((torch.softmax(q @ k.mT / 2**0.5, -1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("kind", ["self", "memory"])
def test_factors_of_attention_are_those_of_its_projections(kind, sharing):
    model = prepared(Attends(kind, batch_first=True))
    x = normal(3, 2, 4)
    memory = x if kind == "self" else normal(3, 5, 4, seed=4)
    twin = ByHand(model.attention)
    assert_close(model(x, memory).detach(), twin(x, memory).detach(), 1e-12)
    likelihood = ng.Gaussian()
    got = ng.fisher(model, likelihood, (x, memory), structure=STRUCTURES[sharing])
    assert {row.name for row in got.partition.blocks} == {"attention", "attention.out_proj"}
    records = oracles.record_layers(twin, (x, memory), ["inputs", "out"])
    f = twin(x, memory)
    columns = oracles.exact_columns(torch.eye(4, dtype=torch.float64).expand(*f.shape, 4))
    parts = []
    for name in ("inputs", "out"):
        A, G = oracles.kronecker_factors(
            oracles.join_uses(records[name]), columns, 6, bias=True, reduce=sharing == "reduce"
        )
        parts.append(oracles.to_parameter_order(torch.kron(G, A), len(G), 4, True))
    assert_close(got.to_dense(), torch.block_diag(*parts), 1e-12)


def test_attention_is_what_it_was_and_hooks_go():
    model = prepared(Attends("self", dropout=0.5))
    x = normal(3, 2, 4)
    torch.manual_seed(0)
    before = model(x, x)
    torch.manual_seed(0)
    tape = record(model, (x, x))
    assert_close(tape.output.detach(), before.detach(), 1e-12)
    assert not model.attention._forward_hooks and not model.attention._forward_pre_hooks
    with pytest.raises(AssertionError, match="embedding dimension"):
        record(model, (normal(3, 2, 3), normal(3, 2, 3)))
    assert not torch.overrides._get_current_function_mode_stack()


# Tied weights


class Model(nn.Module):
    """An output head on the table of the embedding, with its own bias; padding; two tables that are one."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embedding, self.other = nn.Embedding(6, 3, padding_idx=padding), nn.Embedding(6, 3)
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 6)
        self.other.weight = self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.other(tokens.flip(1)).tanh()
        return self.head(torch.tanh(self.mix(h - h.mean(1, keepdim=True).square())))


TOKENS = torch.tensor([[1, 2, 0, 2], [3, 3, 5, 0], [0, 0, 4, 1]])


@pytest.mark.parametrize("padding", [None, 0])
def test_rows_of_a_table_that_is_also_a_head(padding):
    model = prepared(Model(padding))
    tape = checked_rows(model, TOKENS, parameter_names(model))
    (cell,) = [c for c in cells(model) if "embedding.weight" in c.parameters]
    assert [site.module for site in cell.sites] == ["embedding", "other", "head"] and cell.name == "embedding"
    rows = tape.rows([cell], normal(K, 3, 4, 6))["embedding"]
    assert isinstance(rows, TiedRows) and len(rows.parts) == 2
    dense = rows.dense()
    assert_close(rows.stacked(rows.scaled(2.0)).dense(), torch.cat([dense, 2 * dense], 1), 1e-12)
    assert_close(rows.joined(rows.scaled(2.0)).dense(), 3 * dense, 1e-12)


def pairs(model: Model, columns: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides of every use of the table: [K, N, S, vocabulary] and [K, N, S, width] for each of three uses.

    By probes on a forward pass that is written out, and one-hot vectors in full.
    """
    hot = F.one_hot(TOKENS, 6).double()
    first, second = hot @ model.embedding.weight, hot.flip(1) @ model.embedding.weight
    probes = [torch.zeros_like(first, requires_grad=True), torch.zeros_like(first, requires_grad=True)]
    h = first + probes[0] + (second + probes[1]).tanh()
    a = torch.tanh(model.mix(h - h.mean(1, keepdim=True).square()))
    f = model.head(a)
    grads = [torch.autograd.grad(f, probes, c, retain_graph=True) for c in columns]
    g = [torch.stack(t) for t in zip(*grads, strict=True)]
    left = [hot.expand(len(columns), *hot.shape), hot.flip(1).expand(len(columns), *hot.shape), columns]
    return left, [*g, a.detach().expand(len(columns), *a.shape)]


@pytest.mark.parametrize("sharing", STRUCTURES)
def test_factors_of_a_tied_head_have_the_partial_traces_of_all_uses(sharing):
    model = prepared(Model())
    f = model(TOKENS).detach()
    p = f.softmax(-1)
    columns = oracles.exact_columns(torch.diag_embed(p) - p[..., None] * p[..., None, :])
    left, right = pairs(model, columns)
    if sharing == "reduce":
        # One-hot vectors and the head's inputs are averaged over positions, gradients added up.
        means = [True, True, False]
        left = [
            t.mean(2, keepdim=True) if mean else t.sum(2, keepdim=True) for t, mean in zip(left, means, strict=True)
        ]
        right = [
            t.sum(2, keepdim=True) if mean else t.mean(2, keepdim=True) for t, mean in zip(right, means, strict=True)
        ]
        # The two tables' positions are one longer list of positions, as those of a layer that is used twice.
        left = [(left[0] + left[1]) / 2, left[2]]
        right = [right[0] + right[1], right[2]]
    block = (
        sum(
            torch.einsum("kns,knt,knu,knv->stuv", a, a, b, b)
            for a, b in zip(
                [t.flatten(1, 2) for t in left],
                [t.flatten(1, 2) for t in right],
                strict=True,
            )
        )
        / f.shape[:2].numel()
    )  # [V, V, width, width]
    vocabulary, width = torch.einsum("stuu->st", block).diagonal(), torch.einsum("ssuv->uv", block)
    expected = torch.kron(torch.diag(vocabulary), width) / vocabulary.sum()
    got = ng.fisher(model, ng.Categorical(), TOKENS, structure=STRUCTURES[sharing])
    assert_close(got.to_dense()[:18, :18], expected, 1e-12)


@pytest.mark.parametrize("structure", [ng.EigenKronecker(), ng.EigenKronecker.reduce()], ids=["expand", "reduce"])
def test_the_corrected_eigenvalues_of_a_tied_head_are_those_of_the_sum(structure):
    p = problem("tied_embedding", "categorical")
    got = p.fisher("exact", structure)
    assert_close(got.trace(), p.exact.trace(), 1e-10)
    table = slice(0, 12)
    basis = torch.linalg.eigh(got.to_dense()[table, table])[1]
    exact = p.exact[table, table]
    assert_close(
        (basis.mT @ exact @ basis).diagonal(), (basis.mT @ got.to_dense()[table, table] @ basis).diagonal(), 1e-8
    )


def test_padding_that_is_masked_leaves_the_factors_of_a_tied_head_alone():
    """Ignored labels and padding tokens that no other token sees: the sums are those without them."""

    class Local(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mix(self.embedding(tokens))))

    model = prepared(Local(padding=0))
    tokens = torch.tensor([[1, 2, 3], [4, 5, 1]])
    labels = torch.tensor([[2, 3, 1], [5, 1, 4]])
    padded = torch.cat([tokens, torch.zeros(2, 2, dtype=torch.long)], 1)
    ignored = torch.cat([labels, torch.full((2, 2), -100)], 1)
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    for structure in (*STRUCTURES.values(), ng.EigenKronecker()):
        long = ng.fisher(model, likelihood, padded, ignored, structure=structure).to_dense()
        short = ng.fisher(model, likelihood, tokens, labels, structure=structure).to_dense()
        assert_close(long, short, 1e-10)
        assert distance(ng.fisher(model, ng.Categorical(), padded, structure=structure).to_dense(), short) > 1e-2


@pytest.mark.parametrize("sharing", STRUCTURES)
def test_factors_of_layers_that_share_a_weight_are_over_the_positions_of_both(sharing):
    """`reused` calls one layer twice, `shared_parameter` two layers once with one weight: the same treatment."""
    p = problem("shared_parameter", "categorical")
    got = p.fisher("exact", STRUCTURES[sharing])
    assert [b.name for b in got.partition.blocks] == ["first.weight", "first.bias", "second.bias", "head"]
    records = oracles.record_layers(p.model, p.x, ["first", "second"])
    joined = oracles.join_uses([records["first"][0], records["second"][0]])
    A, G = oracles.kronecker_factors(joined, p.exact_columns, p.total, bias=False, reduce=sharing == "reduce")
    assert_close(got.to_dense()[:9, :9], torch.kron(G, A), 1e-12)
    one = oracles.kronecker_factors(records["second"][0], p.exact_columns, p.total, bias=False)[1]
    assert_close(got.to_dense()[12:15, 12:15], one, 1e-12)  # the second bias: G of its own use


def test_weights_of_different_layouts_are_not_shared():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 3), nn.Conv1d(3, 3, 1)
            self.down.weight = nn.Parameter(torch.zeros(3, 3, 1))
            self.embedding, self.norm = nn.Embedding(3, 1), nn.LayerNorm((3, 1), bias=False)
            self.norm.weight = self.embedding.weight

    reasons = {c.name: c.reason for c in cells(Both()) if c.module is None}
    assert reasons == {"embedding.weight": "shared by embedding and norm"}


# Transposed convolutions


TRANSPOSED = {
    "stride": nn.ConvTranspose1d(2, 3, 3, stride=2),
    "padding": nn.ConvTranspose1d(2, 3, 4, stride=3, padding=2, output_padding=1),
    "dilation": nn.ConvTranspose1d(4, 2, 3, stride=2, dilation=3, output_padding=2, groups=2, bias=False),
    "cropped": nn.ConvTranspose1d(2, 3, 2, padding=1),
    "two": nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), output_padding=(0, 1), groups=2),
    "depthwise": nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3),
    "three": nn.ConvTranspose3d(2, 2, (1, 2, 2), stride=(2, 1, 2), padding=(0, 1, 0), dilation=(1, 2, 1)),
}


def image(layer: nn.Module, n: int = 3) -> Tensor:
    return normal(n, layer.in_channels, *(4, 3, 2)[: len(layer.kernel_size)])


@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_rows_of_transposed_convolutions(name, frozen):
    layer = prepared(TRANSPOSED[name]).requires_grad_(True)
    if frozen is not None and layer.get_parameter("weight") is not None and layer.bias is not None:
        layer.get_parameter(frozen).requires_grad_(False)
    model = nn.Sequential(layer)
    checked_rows(model, image(layer), {n for n, p in model.named_parameters() if p.requires_grad})


def test_rows_of_a_transposed_convolution_told_its_output_size():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=(13, 10))

    model = prepared(Sized())
    checked_rows(model, normal(3, 2, 4, 3), parameter_names(model))


@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("name", ["padding", "two", "dilation"])
def test_factors_of_transposed_convolutions(name, sharing):
    """Inputs are ∂y[o, j]/∂W[:, o], by automatic differentiation, for each output position j."""
    layer = prepared(TRANSPOSED[name]).requires_grad_(True)
    x, groups = image(layer), layer.groups
    per_group = layer.out_channels // groups

    def output(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).flatten(2)

    J = torch.autograd.functional.jacobian(output, layer.weight.detach())  # [N, out, S, in, out/groups, *kernel]
    f = layer(x)
    g = torch.eye(f[0].numel(), dtype=torch.float64).reshape(-1, *f[0].shape).flatten(2)  # Gaussian, of every example
    size = layer.in_channels // groups
    total = ng.fisher(nn.Sequential(layer), ng.Gaussian(), x, structure=STRUCTURES[sharing])
    (block,) = total.partition.blocks
    dense, bias = total.to_dense(), layer.bias is not None
    # The operator is in parameter order; cells are canonical.
    order = torch.cat(
        [v for v in block.pack(total.partition.unpack(total.partition.split(torch.arange(len(dense))))).split(1)]
    )
    dense = dense[order][:, order]
    parts = []
    for i in range(groups):
        # All outputs of a group see the same patches.
        a = J[:, i * per_group, :, i * size : (i + 1) * size, 0].flatten(2)  # [N, S, in/groups · kernel]
        a = oracles.homogeneous(a, bias)
        own = g[:, i * per_group : (i + 1) * per_group]
        if sharing == "reduce":
            a, own = a.mean(1, keepdim=True), own.sum(2, keepdim=True)
        A = a.flatten(0, 1).T @ a.flatten(0, 1) / a.shape[:2].numel()
        # M counts predictions: here every position of the output beside the last axis is one.
        G = torch.einsum("kos,kps->op", own, own) * len(x) / (f.numel() / f.shape[-1])
        parts.append(torch.kron(G, A))
    assert_close(dense, torch.block_diag(*parts), 1e-12)


# Experts


def test_experts_have_factors_of_the_tokens_that_they_were_given():
    case = zoo.case("experts")
    p = problem("experts", "gaussian")
    got = p.fisher("exact", ng.Kronecker())
    tokens = p.x.flatten(0, 1)
    chosen = (tokens[:, 0] > 0).long()
    assert 0 < int(chosen.sum()) < len(tokens) and case.model is not p.model
    dense, slices = got.to_dense(), oracles.parameter_slices(p.model)
    for i in range(2):
        a = tokens[chosen == i]
        z = p.model.experts[i](a).detach()
        # y = W_h (x + tanh z): every output of the token is a column of its own.
        g = p.model.head.weight.detach()[None] * (1 - z.tanh().square())[:, None] / 0.7  # [tokens, C, 3]
        a = oracles.homogeneous(a, True)
        A, G = a.T @ a / len(a), torch.einsum("tco,tcp->op", g, g) / len(tokens)
        part = slice(slices[f"experts.{i}.weight"].start, slices[f"experts.{i}.bias"].stop)
        assert_close(dense[part, part], oracles.to_parameter_order(torch.kron(G, A), 3, 3, True), 1e-12)
        # Which of the tokens counts how much does not matter: the trace is that of a sum over the tokens given to it.
    empty = slice(slices["experts.2.weight"].start, slices["experts.2.bias"].stop)
    assert dense[empty].abs().max() == 0


APART = {
    "ekfac": (ng.EigenKronecker(), ng.Categorical()),
    "reduce": (ng.Kronecker.reduce(), ng.Categorical()),
    "gram": (ng.Gram(), ng.Categorical()),
    "weights": (ng.Kronecker(), ng.Weighted(ng.Categorical(), ignore_index=-100)),
}


@pytest.mark.parametrize("name", APART)
def test_experts_say_why_their_examples_cannot_be_told_apart(name):
    case, (structure, likelihood) = zoo.case("experts"), APART[name]
    opt = ng.NaturalGradient(case.model, likelihood, metric=ng.Fisher(ng.Exact(), structure))
    y = torch.randint(3, (4, 3), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        opt.zero_grad()
        output = case()
        opt.observe(output, y)
        F.cross_entropy(output.flatten(0, 1), y.flatten()).backward()
        opt.step()
    reasons = {row.parameter: row.reason for row in opt.coverage()}
    for i in range(2):
        assert "tokens routed to an expert" in reasons[f"experts.{i}.weight"], reasons


def test_an_expert_is_examined_when_it_gets_its_first_tokens():
    case = zoo.case("experts")
    opt = ng.EKFAC(case.model, ng.Categorical())
    x = case.x.clone()
    x[..., 0] = x[..., 0].abs()  # all to the second
    y = torch.randint(3, (4, 3), generator=torch.Generator().manual_seed(0))
    for batch in (x, case.x, x):
        opt.zero_grad()
        F.cross_entropy(case.model(batch).flatten(0, 1), y.flatten()).backward()
        opt.step()
    reasons = {row.parameter: row.reason for row in opt.coverage()}
    assert "tokens routed" in reasons["experts.0.weight"] and reasons["experts.2.weight"] == ""
    assert all(bool(torch.isfinite(p).all()) for p in case.model.parameters())


class PickedTokens(nn.Module):
    """A head that sees the masked tokens alone, as in pretraining of encoders, on the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        return self.head((h + h.mean(1, keepdim=True)).tanh()[tokens < 3])


def test_a_tied_head_on_picked_tokens_has_factors_and_no_rows():
    model = prepared(PickedTokens())
    tape = record(model, TOKENS)
    assert uncovered_parameters(tape) == {} and len(tape.output) == 8
    assert "saw 11 rows where the output has 8" in misaligned_parameters(tape)["embedding.weight"]
    kept = ng.fisher(model, ng.Categorical(), TOKENS, structure=ng.Kronecker())
    exact = ng.fisher(model, ng.Categorical(), TOKENS, structure=ng.Dense()).to_dense()
    jacobian = oracles.jacobian(model, TOKENS)
    p = tape.output.detach().softmax(-1)
    assert_close(exact, oracles.exact_fisher(jacobian, torch.diag_embed(p) - p[..., None] * p[..., None, :]), 1e-10)
    assert 0.3 < float(kept.trace() / exact.trace()) < 3


class AllAndPicked(nn.Module):
    """A layer and a table that see all tokens, and once more the picked ones alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(6, 3), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h, picked = torch.tanh(self.mix(self.embedding(tokens))), tokens < 3
        return self.mix((h + h.mean(1, keepdim=True))[picked] * self.embedding(tokens[picked]))


def test_uses_with_different_examples_add_up_in_factors():
    model = prepared(AllAndPicked())
    tape = record(model, TOKENS)
    assert uncovered_parameters(tape) == {} and len(misaligned_parameters(tape)) == 3
    got = ng.fisher(model, ng.Gaussian(), TOKENS, structure=ng.Kronecker()).to_dense()
    hot, picked = F.one_hot(TOKENS, 6).double(), TOKENS < 3
    table, (weight, bias) = model.embedding.weight.detach(), (p.detach() for p in model.mix.parameters())
    e, f = (hot @ table).requires_grad_(), (hot[picked] @ table).requires_grad_()
    z = e @ weight.T + bias
    h = z.tanh()
    second = (h + h.mean(1, keepdim=True))[picked] * f
    output = second @ weight.T + bias
    columns = torch.eye(3, dtype=torch.float64)[:, None].expand(3, *output.shape)
    grads = [torch.autograd.grad(output, (z, e, f), c, retain_graph=True) for c in columns]
    first, embedded, again = (torch.stack(t) for t in zip(*grads, strict=True))
    a = oracles.homogeneous(torch.cat([e.detach().flatten(0, 1), second.detach()]), True)
    g = torch.cat([first.flatten(1, 2), columns], 1).flatten(0, 1)
    # K-FAC with columns that are sums over examples, as they reach a layer that mixes them.
    expected = torch.kron(g.T @ g / len(output), a.T @ a / len(a))
    assert_close(got[18:, 18:], oracles.to_parameter_order(expected, 3, 3, True), 1e-12)
    g = torch.cat([embedded.flatten(1, 2), again], 1).flatten(0, 1)
    frequencies = (hot.sum((0, 1)) + hot[picked].sum(0)) / 20
    assert_close(got[:18, :18], torch.kron(torch.diag(frequencies), g.T @ g / len(output)), 1e-12)


# Recurrence, and what is known by name


class Recurs(nn.Module):
    """A recurrent layer of which the output, a final state or both are used, from a state that is given or none."""

    def __init__(self, layer: nn.Module, used: str, start: bool) -> None:
        super().__init__()
        self.layer, self.used, self.start = layer, used, start

    def forward(self, x: Tensor) -> Tensor:
        layer, hx = self.layer, None
        if self.start:
            h = normal(layer.num_layers * (2 if layer.bidirectional else 1), len(x), layer.hidden_size)
            hx = (h, h.flip(0) / 2) if isinstance(layer, nn.LSTM) else h
        out, state = layer(x if layer.batch_first else x.transpose(0, 1), hx)
        out = out if layer.batch_first else out.transpose(0, 1)
        final = state if isinstance(state, Tensor) else state[0] * state[1]
        final = final.transpose(0, 1)
        return {"output": out, "state": final, "both": out.flatten(1) + final.sum((1, 2))[:, None]}[self.used]


RECURRENT = {
    "lstm": lambda: nn.LSTM(2, 3, batch_first=True),
    "lstm_deep": lambda: nn.LSTM(2, 2, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(2, 3, bidirectional=True, batch_first=True),
    "gru_deep": lambda: nn.GRU(2, 3, num_layers=2, bias=False),
    "rnn": lambda: nn.RNN(2, 3, num_layers=2),
    "rnn_relu": lambda: nn.RNN(2, 3, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("used", ["output", "state", "both"])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_rows_of_recurrent_layers(name, start, used):
    model = prepared(Recurs(RECURRENT[name](), used, start))
    checked_rows(model, normal(3, 4, 2), parameter_names(model))


class StepByStep(nn.Module):
    """The LSTM with its two products as Linear layers that are called at every step."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.ih, self.hh = nn.Linear(2, 12).double(), nn.Linear(3, 12).double()
        with torch.no_grad():
            for layer, side in ((self.ih, "ih"), (self.hh, "hh")):
                layer.weight.copy_(getattr(lstm, f"weight_{side}_l0"))
                layer.bias.copy_(getattr(lstm, f"bias_{side}_l0"))

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 3)
        outputs = []
        for t in range(x.shape[1]):
            i, f, g, o = (self.ih(x[:, t]) + self.hh(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("sharing", STRUCTURES)
def test_factors_of_an_lstm_are_those_of_its_products(sharing):
    model, x = prepared(Recurs(nn.LSTM(2, 3, batch_first=True), "output", False)), normal(3, 4, 2)
    twin = StepByStep(model.layer)
    f = twin(x).detach()
    assert_close(model(x).detach(), f, 1e-12)
    got = ng.fisher(model, ng.Gaussian(), x, structure=STRUCTURES[sharing])
    slices, dense = oracles.parameter_slices(model), got.to_dense()
    columns = oracles.exact_columns(torch.eye(3, dtype=torch.float64).expand(*f.shape, 3))
    for name, record_ in oracles.record_layers(twin, x, ["ih", "hh"]).items():
        A, G = oracles.kronecker_factors(oracles.join_uses(record_), columns, 12, bias=True, reduce=sharing == "reduce")
        keys = [slices[f"layer.{kind}_{name}_l0"] for kind in ("weight", "bias")]
        index = torch.cat([torch.arange(k.start, k.stop) for k in keys])
        expected = oracles.to_parameter_order(torch.kron(G, A), 12, A.shape[0] - 1, True)
        assert_close(dense[index][:, index], expected, 1e-12)


def test_ignored_steps_have_no_part_in_the_inputs_of_either_direction():
    model = prepared(Recurs(nn.GRU(2, 3, bidirectional=True, bias=False, batch_first=True), "output", False))
    x = normal(3, 4, 2)
    labels = torch.tensor([[1, 0, -100, -100], [2, 5, 3, -100], [4, -100, -100, -100]])
    got = ng.fisher(model, ng.Weighted(ng.Categorical(), ignore_index=-100), x, labels, structure=ng.Kronecker())
    real = x[labels != -100]
    expected = real.T @ real / len(real)
    dense, slices = got.to_dense(), oracles.parameter_slices(model)
    for suffix in ("_l0", "_l0_reverse"):
        part = slices[f"layer.weight_ih{suffix}"]
        A = torch.einsum("oioj->ij", dense[part, part].reshape(9, 2, 9, 2))
        assert_close(A / A.trace(), expected / expected.trace(), 1e-12)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LSTM(2, 3, 2, dropout=0.1), "no layer rule for LSTM with proj_size or with dropout between layers"),
        (nn.LSTM(2, 3, proj_size=2), "one LSTM per layer has one"),
        (nn.LSTMCell(2, 3), "no layer rule for LSTMCell; nn.LSTM has one"),
    ],
)
def test_recurrent_layers_without_a_rule_say_what_has_one(layer, reason):
    found = cells(nn.Sequential(layer))
    assert all(c.module is None and reason in c.reason for c in found)


def test_fused_experts_say_what_would_be_covered():
    class SomeExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))

    (cell,) = cells(SomeExperts())
    assert "its experts are fused in one tensor" in cell.reason


class Elsewhere(nn.Linear):
    """Known by its name alone."""


class Gained(nn.Module):
    """A norm of the published kind, whose input has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(3)), 0.1

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True) + 0.1).sqrt()


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Gained()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(hidden_states=x)


def test_inputs_may_be_given_by_keyword():
    try:
        register_layer(Gained, RootMeanSquareRule())
        checked_rows(prepared(Calls()), normal(3, 4, 3), {"norm.weight"})
    finally:
        RULES.pop(Gained, None)


def test_layers_are_registered_by_name():
    model = nn.Sequential(Elsewhere(2, 3))
    assert [c.module for c in cells(model)] == [None, None]
    name = f"{Elsewhere.__module__}.Else*"
    try:
        register_layer(name, LinearRule())
        assert [c.module for c in cells(model)] == ["0"]
        register_layer(f"{Elsewhere.__module__}.Elsewhere", RootMeanSquareRule())  # the latest word counts
        assert [c.module for c in cells(model)] == [None, None]
    finally:
        for added in (name, f"{Elsewhere.__module__}.Elsewhere"):
            NAMED_RULES.pop(added, None)
        registry._named.cache_clear()
    assert [c.module for c in cells(model)] == [None, None]
