"""Kronecker factors of every layer against products formed one by one from runs of single examples.

The oracle runs the model on each example alone, adds a zero to the output of every layer, and differentiates each
entry of the output with respect to these zeros by ordinary backward passes. It shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rows_oracle import normal, prepared
from test_published_models import LABELS, MASKED, MODELS, SINGLE, built
from torch import Tensor, nn

import natgrad as ng
from natgrad.linalg import DiagonalMatrix, KroneckerProduct
from natgrad.network import Cell
from natgrad.testing import oracles, zoo
from support import assert_close

SHARING: tuple[Any, ...] = ("expand", "reduce")


@dataclass(frozen=True)
class Use:
    """One call of a layer by one example: inputs ``[S, in]``, ``∂f/∂z [outputs, S, out]``; a table's are one-hot."""

    inputs: Tensor
    jacobian: Tensor
    table: bool


@dataclass(frozen=True)
class Seen:
    """What one example did: its output, its layers' uses, and ``∂f/∂θ [outputs, *shape]`` of every parameter."""

    output: Tensor
    uses: dict[str, list[Use]]
    gradients: dict[str, Tensor]


def own(x: Any, n: int) -> Any:
    """The input of example n alone."""
    if isinstance(x, Mapping):
        return {k: own(t, n) for k, t in x.items()}
    return tuple(own(t, n) for t in x) if isinstance(x, tuple) else x[n : n + 1]


def tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output.logits


def watched(layer: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
    return isinstance(layer, kinds) or type(layer).__name__ == "Conv1D"


def layer_input(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return F.one_hot(x.flatten(), layer.num_embeddings).double()
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return oracles.patches(layer, x)[0]
    return x.reshape(-1, x.shape[-1]).double()


def seen(model: nn.Module, x: Any) -> Seen:
    calls: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            calls.append((name, layer_input(layer, args[0].detach()), zero))
            return output + zero

        return record

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if watched(m)]
    f = tensor(model(**x) if isinstance(x, Mapping) else model(*(x if isinstance(x, tuple) else (x,))))
    for handle in handles:
        handle.remove()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wanted = [*(zero for _, _, zero in calls), *parameters.values()]
    found = [torch.autograd.grad(v, wanted, retain_graph=True, allow_unused=True) for v in f.flatten()]
    jacobians = [
        torch.stack([torch.zeros_like(t) if g is None else g for g in column]).detach().double()
        for t, column in zip(wanted, zip(*found, strict=True), strict=True)
    ]
    uses: dict[str, list[Use]] = {}
    for (name, inputs, _), d in zip(calls, jacobians, strict=False):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            d = d.flatten(3).transpose(-1, -2)
        d = d * getattr(layer, "embed_scale", 1)  # Gemma's table multiplies what it looks up
        d = d.reshape(len(d), len(inputs), d.shape[-1])
        uses.setdefault(name, []).append(Use(inputs, d, isinstance(layer, nn.Embedding)))
    return Seen(f.detach()[0], uses, dict(zip(parameters, jacobians[len(calls) :], strict=True)))


class Oracle:
    """Factors of one model, batch and labels."""

    def __init__(self, model: nn.Module, x: Any, count: int, ignored: Tensor | None) -> None:
        self.model, self.examples = model, [seen(model, own(x, n)) for n in range(count)]
        f = torch.stack([e.output for e in self.examples])
        self.weights = torch.ones(f.shape[:-1], dtype=torch.float64) if ignored is None else (~ignored).double()
        p = f.double().softmax(-1)
        fisher = torch.diag_embed(p) - p[..., None] * p[..., None, :]
        self.columns = oracles.exact_columns(fisher, self.weights).flatten(2)  # [R, N, outputs]
        self.total = float(self.weights.sum())

    def positions(self, cell: Cell, reduce: bool) -> list[tuple[float, Tensor, Tensor, bool]]:
        """Per use, position (or mean over them), column and example: weight, input, output gradient, whether a table.

        The weight is that of the input; it is returned with the first column alone, and as 0 with the others.
        """
        found = []
        for n, example in enumerate(self.examples):
            for tables in (True, False):
                parts = []
                for site in cell.sites:
                    layer = self.model.get_submodule(site.module)
                    for use in example.uses.get(site.module, ()):
                        if use.table != tables or not use.inputs.numel():
                            continue
                        w, a = self._input(layer, use, n, "bias" in site.names)
                        if "weight" not in site.names:
                            a = torch.ones(len(a), 1, dtype=a.dtype)
                        g = torch.einsum("ro,osi->rsi", self.columns[:, n], use.jacobian)
                        if tables and layer.padding_idx is not None:
                            g = g * (a.argmax(-1) != layer.padding_idx)[:, None]
                        parts.append((w, a, g))
                if not parts:
                    continue
                w, a = (torch.cat([p[i] for p in parts]) for i in (0, 1))
                g = torch.cat([p[2] for p in parts], 1)
                if reduce:
                    total = w.sum()
                    a = ((w / total)[:, None] * a).sum(0, keepdim=True) if total > 0 else a[:1] * 0
                    w, g = total[None], g.sum(1, keepdim=True)
                found += [(float(w[s]) if r == 0 else 0.0, a[s], g[r, s], tables)
                          for r in range(len(g)) for s in range(len(a))]  # fmt: skip
        return found

    def _input(self, layer: nn.Module, use: Use, n: int, bias: bool) -> tuple[Tensor, Tensor]:
        s, own_weights = len(use.inputs), self.weights[n].flatten()
        if s % len(own_weights) == 0:
            w = own_weights.repeat_interleave(s // len(own_weights))
        else:
            w = own_weights.mean().expand(s)
        if use.table and layer.padding_idx is not None:
            w = w * (use.inputs.argmax(-1) != layer.padding_idx)
        return w, oracles.homogeneous(use.inputs, bias)

    def factors(self, cell: Cell, reduce: bool) -> tuple[Tensor, Tensor]:
        """Left and right factor of the cell's Kronecker product."""
        found = self.positions(cell, reduce)
        if cell.layout.mixed:
            pairs = [(a, g) if table else (g, a) for _, a, g, table in found]
            left = sum(float(r @ r) * v.square() for v, r in pairs) / self.total
            right = sum(float(v @ v) * torch.outer(r, r) for v, r in pairs)
            return torch.diag(left), right / sum(float(v @ v) * float(r @ r) for v, r in pairs)
        g = torch.stack([g for _, _, g, _ in found])
        G = g.T @ g / self.total
        w, a = torch.tensor([w for w, *_ in found]).double(), torch.stack([a for _, a, _, _ in found])
        A = (w[:, None] * a).T @ a / w.sum()
        return (torch.diag(A.diagonal()), G) if cell.layout.table else (G, A)

    def diagonal(self, cell: Cell) -> Tensor:
        """``Σ r² / M`` over columns and examples."""
        rows = [
            torch.cat([torch.einsum("ro,o...->r...", self.columns[:, n], e.gradients[name]).flatten(1)
                       for name in cell.parameters], 1)
            for n, e in enumerate(self.examples)
        ]  # fmt: skip
        return torch.stack(rows).square().sum((0, 1)) / self.total


def checked(model: nn.Module, x: Any, count: int, sharing: Any, labels: Tensor | None, tolerance: float) -> set[str]:
    """Compares every block that a rule serves; returns the names of the layers."""
    likelihood = ng.Categorical() if labels is None else MASKED
    got = ng.fisher(model, likelihood, x, labels, structure=ng.Kronecker(sharing))
    oracle = Oracle(model, x, count, None if labels is None else labels == -100)
    compared = set()
    for block in got.partition.blocks:
        (cell,), operator = block.cells, got.blocks.blocks[block.name]
        if cell.module is None or not (operator.trace() > 0):
            continue  # without a rule, or an expert without tokens
        if isinstance(operator, DiagonalMatrix):
            assert_close(operator.diag.double(), oracle.diagonal(cell), tolerance)
        elif cell.groups == 1 and all(watched(model.get_submodule(s.module)) for s in cell.sites):
            assert isinstance(operator, KroneckerProduct)
            expected, apart = oracle.factors(cell, sharing == "reduce"), oracle.factors(cell, False)
            for factor, want, size in zip((operator.left, operator.right), expected, apart, strict=True):
                dense = factor if isinstance(factor, Tensor) else factor.to_dense()
                # Gradients of attention's keys add up to zero over positions: reduce has rounding there.
                norms = [float(torch.linalg.vector_norm(t)) for t in (dense.double() - want, want, size)]
                assert norms[0] <= tolerance * norms[1] + 1e-12 * norms[2], cell.name
        else:
            continue
        compared.add(cell.name)
    return compared


PUBLISHED = ("gpt2", "llama", "llama_tied", "qwen2", "qwen3", "gemma", "bert", "vit", "t5", "mixtral")


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name, sharing, masked):
    """With padding in the input where the model takes a mask, and with labels that are ignored."""
    make, x, without = MODELS[name]
    if masked and name == "vit":
        pytest.skip("one label for each image")
    model = built(make)
    found = checked(model, x, 3, sharing, LABELS if masked else None, 2e-5 if name in SINGLE else 1e-7)
    layers = {n for n, m in model.named_modules() if watched(m)} - {n.rpartition(".")[0] for n in without}
    tied = {n for n in layers if model.get_submodule(n).weight is not dict(model.named_parameters()).get(f"{n}.weight")}
    parts = {f"{n}.{p}" for n in layers for p in ("weight", "bias")} & found  # a head that is tied and has a bias
    assert layers - tied - {n.rpartition(".")[0] for n in parts} <= found


ZOO = (
    "mlp", "frozen_weight", "frozen_bias", "residual", "conv1d", "conv2d", "reused", "shared_parameter",
    "embedding_bag", "embedding_padding", "layer_norm", "mean_pooled_linear", "two_inputs", "structured", "mixer",
    "attention", "flattened", "heads", "tied_embedding", "experts", "positional", "time_first",
)  # fmt: skip
AXES = ("experts", "positional", "time_first")  # where a sum over examples will not do these have fewer factors


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name, sharing, masked):
    case = zoo.case(name)
    f = case().detach()
    if masked and f.dim() == 2:
        pytest.skip("one label for each example")
    labels = torch.zeros(f.shape[:-1], dtype=torch.long)
    if masked:
        labels[0, 1:] = labels[1, 0] = -100
    found = checked(case.model, case.x, len(f), sharing, labels if masked else None, 1e-10)
    alone = sharing == "expand" and not masked
    assert len(found) >= 2 or (name in AXES and not alone)
    assert name != "experts" or not alone or {"experts.0", "experts.1", "head"} == found


class PaddedTied(nn.Module):
    """Two tables with padding that are the head's weight as well, before a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.other = (nn.Embedding(6, 3, padding_idx=0) for _ in range(2))
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 6)
        self.other.weight = self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.other(tokens.flip(1)).tanh()
        return self.head(self.mix(torch.tanh(self.mix(h))) - h.mean(1, keepdim=True).square())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("sharing", SHARING)
def test_padding_ties_and_layers_used_twice(sharing, masked):
    model = prepared(PaddedTied())
    tokens = torch.tensor([[1, 2, 0, 2], [3, 3, 5, 0], [0, 0, 4, 1]])
    labels = torch.where(tokens == 0, -100, tokens)
    found = checked(model, tokens, 3, sharing, labels if masked else None, 1e-10)
    assert found == {"embedding", "mix", "head.bias"}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's call
@pytest.mark.parametrize(("base", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("llama", ["q_proj", "down_proj"])])
def test_adapters(base, targets, sharing):
    peft: Any = pytest.importorskip("peft")
    make, x, _ = MODELS[base]
    options = {"r": 2, "target_modules": targets, "lora_dropout": 0.0, "fan_in_fan_out": base == "gpt2"}
    model = built(lambda: peft.get_peft_model(make(), peft.LoraConfig(**options)))
    found = checked(model, x, 3, sharing, LABELS, 2e-5 if base in SINGLE else 1e-7)
    assert len(found) == 2 * (len(targets) + (base == "gpt2")) and all("lora_" in name for name in found)


def test_the_oracle_sees_what_is_wrong():
    """An example whose tokens are not what the batch has gives other factors."""
    model, x = prepared(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), normal(4, 3)
    checked(model, x, 4, "expand", None, 1e-10)
    with pytest.raises(AssertionError):
        checked(model, x, 3, "expand", None, 1e-10)
