"""Small float64 models with inputs, one for each feature of networks that curvature code gets wrong.

`cases(outputs)` builds them all; each is deterministic, smooth or piecewise linear, and has at most some 130
parameters, so that dense oracles stay cheap. Models are in training mode unless the case says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A model, its input and what is special about it.

    x: a Tensor, a tuple of positional or a mapping of keyword arguments; the first axis is the row.
    select: takes the output tensor [N, *positions, C] out of what the model returns (identity for most).
    tags: `sequence` (output has positions), `coupled` (rows depend on each other), `tied` (a parameter used more than
    once), `axes` (the first axis of some layer's input is not the row), `structured` (the output is not a Tensor),
    `rnn`."""

    name: str
    model: nn.Module
    x: Any
    select: Callable[[Any], Tensor] | None = None
    tags: frozenset[str] = field(default_factory=frozenset)

    def __call__(self) -> Tensor:
        """The model's output tensor, with its graph."""
        if isinstance(self.x, Mapping):
            output = self.model(**self.x)
        else:
            output = self.model(*(self.x if isinstance(self.x, tuple) else (self.x,)))
        return output if self.select is None else self.select(output)


class Residual(nn.Module):
    """A skip connection added in place into the output of a layer."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        r = self.body(h)
        r += h
        return self.head(torch.tanh(r))


class Reused(nn.Module):
    """One Linear called twice."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.shared(torch.tanh(self.stem(x))))
        return self.head(torch.tanh(self.shared(h)))


class SharedParameter(nn.Module):
    """Two Linear modules that hold the same weight Parameter, each with its own bias."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, outputs)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedHead(nn.Module):
    """A language model whose output head is its embedding, through F.linear (which no module hook sees)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(outputs, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        h = torch.tanh(self.mix(h + h.mean(1, keepdim=True)))
        return F.linear(h, self.embedding.weight)


class Mixer(nn.Module):
    """Output [N, T, C] whose positions interact through a Linear along time."""

    def __init__(self, outputs: int, time: int = 3) -> None:
        super().__init__()
        self.stem, self.time, self.head = nn.Linear(2, 3), nn.Linear(time, time), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        h = h + torch.tanh(self.time(h.transpose(1, 2))).transpose(1, 2)
        return self.head(h)


class Positional(nn.Module):
    """A position embedding looked up once for the whole batch, as in GPT-2: its input has no batch axis."""

    def __init__(self, outputs: int, time: int = 3) -> None:
        super().__init__()
        self.tokens, self.position = nn.Embedding(5, 3), nn.Embedding(time, 3)
        self.head = nn.Linear(3, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(h - h.mean(1, keepdim=True).square()))


class Flattened(nn.Module):
    """Tokens are flattened to [N·T, d] before the layers and unflattened after them."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 3), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        h = h + h.mean(1, keepdim=True).square()
        return self.head(h.flatten(0, 1)).unflatten(0, x.shape[:2])


class TimeFirst(nn.Module):
    """Works time-first inside, on a batch as long as the sequence, where shapes alone cannot tell the axes apart."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 3), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x.transpose(0, 1)))
        h = h + h.mean(0, keepdim=True).square()
        return self.head(h).transpose(0, 1)


class Heads(nn.Module):
    """A Linear shared by the two heads of each token: its input is [N, T, 2, d]."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 2), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x.unflatten(-1, (2, 2)))).flatten(2))


class Attention(nn.Module):
    """A causal pre-norm transformer block of plain Linear layers: output [N, T, C]."""

    def __init__(self, outputs: int, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mask = torch.ones_like(scores[0], dtype=torch.bool).tril()
        attention = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.head(x + self.out(attention @ v))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention, whose projections bypass module hooks."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class CrossAttention(nn.Module):
    """Time-first nn.MultiheadAttention over a memory of other length and width, with a bias key and value."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.memory = nn.Linear(2, 3)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        keys = torch.tanh(self.memory(memory)).transpose(0, 1)
        mixed = self.attention(x.transpose(0, 1), keys, memory.transpose(0, 1))[0]
        return self.head(x + mixed.transpose(0, 1))


class TiedEmbedding(nn.Module):
    """A language model whose output head is a Linear layer with the weight of its embedding."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(outputs, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, outputs)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        return self.head(torch.tanh(self.mix(h + h.mean(1, keepdim=True))))


class Experts(nn.Module):
    """Every token goes to one of three experts by its content; the last one gets none."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.head = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = (tokens[:, 0] > 0).long()
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            (places,) = torch.where(chosen == i)
            out = out.index_add(0, places, torch.tanh(expert(tokens[places])))
        return self.head((tokens + out).unflatten(0, x.shape[:2]))


class Recurrent(nn.Module):
    """An LSTM read at every step."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Bag(nn.Module):
    """Embedding with a padding row, mean-pooled over the real tokens."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3, padding_idx=0)
        self.head = nn.Linear(3, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).to(self.embedding.weight.dtype).unsqueeze(-1)
        return self.head(torch.tanh((self.embedding(tokens) * mask).sum(1) / mask.sum(1)))


class RawParameter(nn.Module):
    """Parameters that belong to no layer: a gain vector and a scalar temperature."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=torch.float64))
        self.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gain * torch.tanh(self.stem(x))) * self.temperature


class Unused(nn.Module):
    """A trainable module that takes no part in the forward pass."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.expert, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)))


class Structured(nn.Module):
    """Returns a mapping, as many published models do."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, outputs)

    def forward(self, inputs: Tensor, scale: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.stem(inputs)) * scale
        return {"hidden": hidden, "logits": self.head(hidden)}


class TwoInputs(nn.Module):
    """Two positional arguments."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4, bias=False), nn.Linear(4, outputs)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(a) + self.right(b)))


def _conv(layer: nn.Module, flat: int, outputs: int) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(flat, outputs))


def _pooled(layer: nn.Module, channels: int, outputs: int) -> nn.Module:
    dims = layer.get_parameter("weight").dim() - 2
    pool: nn.Module = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)
    return nn.Sequential(layer, nn.Tanh(), pool, nn.Flatten(), nn.Linear(channels, outputs))


def _normed(norm: nn.Module, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, outputs))


def _frozen(outputs: int, which: str) -> nn.Module:
    model = _mlp(outputs)
    model.get_parameter(which).requires_grad = False
    return model


def _mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def _inplace(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.ELU(inplace=True), nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, outputs)
    )


def _deep_linear(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, outputs))


def _mean_pooled_linear(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, outputs), _MeanOverTime())


class _MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


Builder = Callable[[int], nn.Module]
_R = (5, 3)

# name: (builder, shape of the input or a function that makes it, tags)
_MODELS: dict[str, tuple[Builder, Any, str]] = {
    "mlp": (_mlp, _R, ""),
    "deep_linear": (_deep_linear, _R, ""),
    "bias_free": (lambda c: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, c, bias=False)), _R, ""),
    "frozen_bias": (lambda c: _frozen(c, "0.bias"), _R, ""),
    "frozen_weight": (lambda c: _frozen(c, "0.weight"), _R, ""),
    "inplace": (_inplace, _R, ""),
    "residual": (Residual, _R, ""),
    "raw_parameter": (RawParameter, _R, ""),
    "unused": (Unused, _R, ""),
    "conv1d": (lambda c: _conv(nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=1), 9, c), (4, 2, 7), ""),
    "conv1d_circular": (lambda c: _conv(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), 8, c), (4, 2, 4), ""),
    "conv2d": (lambda c: _conv(nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(0, 1)), 12, c), (4, 2, 3, 4), ""),
    "conv2d_same": (
        lambda c: _pooled(nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), 3, c),
        (4, 2, 3, 4),
        "",
    ),
    "conv2d_reflect": (
        lambda c: _pooled(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), 3, c),
        (4, 2, 3, 3),
        "",
    ),
    "conv2d_groups": (lambda c: _pooled(nn.Conv2d(4, 6, 2, groups=2), 6, c), (4, 4, 3, 3), ""),
    "conv2d_depthwise": (lambda c: _pooled(nn.Conv2d(3, 3, 2, groups=3, bias=False), 3, c), (4, 3, 3, 3), ""),
    "conv3d": (lambda c: _pooled(nn.Conv3d(1, 3, 2, stride=(2, 1, 1)), 3, c), (4, 1, 4, 3, 3), ""),
    "conv_transpose1d": (
        lambda c: _conv(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=2, output_padding=1, dilation=2), 18, c),
        (4, 2, 3),
        "",
    ),
    "conv_transpose2d_groups": (
        lambda c: _pooled(nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 1), groups=2), 6, c),
        (4, 4, 2, 3),
        "",
    ),
    "layer_norm": (lambda c: _normed(nn.LayerNorm(4), c), _R, ""),
    "rms_norm": (lambda c: _normed(nn.RMSNorm(4), c), _R, ""),
    "group_norm": (lambda c: _conv(nn.GroupNorm(2, 4), 12, c), (4, 4, 3), ""),
    "batch_norm_eval": (lambda c: _normed(nn.BatchNorm1d(4), c).eval(), _R, ""),
    "batch_norm_train": (lambda c: _normed(nn.BatchNorm1d(4), c), _R, "coupled"),
    "reused": (Reused, _R, "tied"),
    "shared_parameter": (SharedParameter, _R, "tied"),
    "embedding_bag": (Bag, lambda: torch.tensor([[1, 2, 0], [3, 3, 5], [2, 0, 0], [5, 1, 3]]), ""),
    "embedding_padding": (
        lambda c: nn.Sequential(nn.Embedding(6, 2, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(6, c)),
        lambda: torch.tensor([[1, 2, 0], [3, 3, 5], [2, 0, 0], [5, 1, 3]]),
        "",
    ),
    "mean_pooled_linear": (_mean_pooled_linear, (4, 3, 2), ""),
    "mixer": (Mixer, (4, 3, 2), "sequence"),
    "attention": (Attention, (3, 3, 4), "sequence"),
    "multihead": (SelfAttention, (3, 3, 4), "sequence"),
    "encoder_layer": (
        lambda c: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True), nn.Linear(4, c)),
        (3, 3, 4),
        "sequence",
    ),
    "lstm": (Recurrent, (3, 3, 2), "sequence rnn"),
    "tied_head": (TiedHead, lambda: torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 1]]), "sequence tied"),
    "tied_embedding": (TiedEmbedding, lambda: torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 1]]), "sequence tied"),
    "cross_attention": (
        CrossAttention,
        lambda: (torch.randn(3, 2, 4).double(), torch.randn(3, 5, 2).double()),
        "sequence",
    ),
    "experts": (Experts, (4, 3, 3), "sequence axes"),
    "positional": (Positional, lambda: torch.tensor([[0, 1, 2], [4, 3, 2], [1, 1, 0], [2, 4, 1]]), "sequence axes"),
    "flattened": (Flattened, (4, 3, 2), "sequence axes"),
    "time_first": (TimeFirst, (3, 3, 2), "sequence axes"),
    "heads": (Heads, (4, 3, 4), "sequence"),
    "two_inputs": (TwoInputs, lambda: (torch.randn(5, 3).double(), torch.randn(5, 2).double()), ""),
    "structured": (Structured, lambda: {"inputs": torch.randn(5, 3).double(), "scale": torch.rand(5, 4).double()}, ""),
}

NAMES: tuple[str, ...] = tuple(_MODELS)


def case(name: str, outputs: int = 3, *, seed: int = 0) -> Case:
    """The named model with C = `outputs`; neither the global random stream nor anything else is touched."""
    builder, source, tags = _MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = builder(outputs).to(torch.float64)
        x = source() if callable(source) else torch.randn(source, dtype=torch.float64)
        with torch.no_grad():  # norm layers start at scale one and shift zero, where mistakes hide
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
            for module in model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0.0
                if isinstance(module, nn.BatchNorm1d) and not module.training:
                    assert module.running_mean is not None and module.running_var is not None
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)
    select = (lambda out: out["logits"]) if name == "structured" else None
    return Case(name, model, x, select, frozenset(tags.split() + (["structured"] if select else [])))


def cases(outputs: int = 3, *, seed: int = 0) -> list[Case]:
    """Every model of the zoo."""
    return [case(name, outputs, seed=seed) for name in NAMES]
