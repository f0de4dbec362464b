"""The models, batches and contenders that are timed, and how many operations each needs at the least.

Operations are those of matrix products and factorisations at two per multiply-add, counted for the cheapest known way
of doing the same: what a method does beyond them shows as a lower share of the machine's matrix-product rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad as ng
from natgrad.likelihood import Likelihood


@dataclass(frozen=True)
class Layer:
    """A linear layer as matrix products: ``[rows, n] x [n, m]``; ``first`` needs no gradient of its input."""

    rows: int
    n: int
    m: int
    first: bool


@dataclass(frozen=True)
class Workload:
    """A model with a batch.

    Args:
        name: short name for ``--only``.
        title: what it is.
        build: makes the model (the global seed is set before).
        x, y: one batch.
        likelihood: what the output means.
        loss: mean negative log-likelihood up to a constant, as a user would write it.
        attention: operations of attention's own products, forward.
        gemm: shape ``(rows, inner, columns)`` of the workload's typical matrix product.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    likelihood: Likelihood
    loss: Callable[[Tensor, Tensor], Tensor]
    gemm: tuple[int, int, int]
    attention: float = 0.0
    layers: tuple[Layer, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _layers(self.model(), self.x))

    def model(self) -> nn.Module:
        """A fresh model; always the same one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model().parameters())


def _layers(model: nn.Module, x: Tensor) -> tuple[Layer, ...]:
    found: list[Layer] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        (given,) = args
        bias = int(getattr(module, "bias", None) is not None)
        rows = given.shape[:-1].numel()
        found.append(Layer(rows, given.shape[-1] + bias, output.shape[-1], not given.requires_grad))

    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, nn.Linear)]
    model(x)
    for handle in handles:
        handle.remove()
    return tuple(found)


def autoencoder(width: int = 1, batch: int = 1000) -> Workload:
    """W1: 784-1000-500-250-30 mirrored, Bernoulli; ``width`` divides all inner widths."""
    sizes = [784, *(w // width for w in (1000, 500, 250)), 30]
    sizes = [*sizes, *reversed(sizes[:-1])]

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for i, (n, m) in enumerate(pairwise(sizes)):
            layers.append(nn.Linear(n, m))
            if i not in (3, len(sizes) - 2):
                layers.append(nn.Tanh())
        return nn.Sequential(*layers)

    generator = torch.Generator().manual_seed(0)
    # Blurred noise, most of it near black or white: as grey levels of a handwritten digit are.
    noise = F.avg_pool2d(torch.randn(batch, 1, 34, 34, generator=generator), 7, stride=1)
    images = torch.sigmoid(25 * noise).flatten(1)
    title = f"autoencoder {'-'.join(map(str, sizes[: len(sizes) // 2 + 1]))} mirrored, batch {batch}, Bernoulli"
    return Workload("W1", title, build, images, images, ng.Bernoulli(), _bernoulli_loss, (batch, sizes[0], sizes[1]))


def _bernoulli_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, target, reduction="sum") / output.shape[0]


class Attention(nn.Module):
    """Causal self-attention made of linear layers, so that every parameter belongs to a layer natgrad knows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.project = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.feed_forward(x)


class Decoder(nn.Module):
    """A small language model: ``[N, T]`` token indices to ``[N, T, vocabulary]`` logits."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1], device=x.device).expand_as(x)
        return self.head(self.norm(self.blocks(self.token(x) + self.position(where))))


def transformer(tokens: int = 8192, length: int = 256, width: int = 128, depth: int = 4) -> Workload:
    """W2: causal transformer, Categorical over a vocabulary of ``width`` characters."""
    heads, vocabulary, batch = 4, width, tokens // length
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    title = f"transformer of {depth} layers, d={width}, T={length}, {batch * length} tokens a step, Categorical"
    # Two products of T x T x d per layer and sequence, half of it masked.
    attention = depth * batch * 2.0 * length * length * width
    return Workload(
        "W2", title, lambda: Decoder(vocabulary, length, width, depth, heads), x, y, ng.Categorical(),
        _categorical_loss, (batch * length, width, 4 * width), attention,
    )  # fmt: skip


def _categorical_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def small_classifier(batch: int = 256, inputs: int = 64, hidden: int = 32) -> Workload:
    """W0: an MLP small enough for dense matrices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, inputs, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    return Workload(
        "W0", f"MLP {inputs}-{hidden}-10, batch {batch}, Categorical (dense presets fit only here)",
        lambda: nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 10)), x, y, ng.Categorical(),
        _categorical_loss, (batch, inputs, hidden),
    )  # fmt: skip


@dataclass(frozen=True)
class Flops:
    """What the methods need at the least on one workload, as in the cost model of K-FAC and Gram (per step).

    For a layer with rows N, input n (bias included) and output m: forward, input gradient and weight gradient take
    2Nmn each; a tangent of the forward pass 4Nmn; the factors 2N(m² + n²), computed as full products; their inverses
    m³ + n³ by Cholesky; preconditioning 2mn(m + n).
    """

    layers: tuple[Layer, ...]
    attention: float = 0.0

    @property
    def forward(self) -> float:
        return sum(2.0 * q.rows * q.m * q.n for q in self.layers) + self.attention

    @property
    def inputs(self) -> float:
        """Backward to the layers' inputs: all a sampled label costs."""
        return sum(2.0 * q.rows * q.m * q.n for q in self.layers if not q.first) + 2.5 * self.attention

    @property
    def weights(self) -> float:
        return sum(2.0 * q.rows * q.m * q.n for q in self.layers)

    @property
    def gradient(self) -> float:
        return self.forward + self.inputs + self.weights

    @property
    def tangent(self) -> float:
        """One tangent beside a forward pass: the input's tangent times the weights (the first layer's input has none),
        and the input times the weights' tangent. Attention's own products have two factors as well."""
        return sum(2.0 * q.rows * q.m * q.n * (1 if q.first else 2) for q in self.layers) + 2 * self.attention

    @property
    def fit(self) -> float:
        """``QuadraticFit``: one forward pass with the tangents of two vectors, the direction and the last step."""
        return self.forward + 2 * self.tangent

    @property
    def factors(self) -> float:
        return sum(2.0 * q.rows * (q.m**2 + q.n**2) for q in self.layers)

    @property
    def inverses(self) -> float:
        return float(sum(q.m**3 + q.n**3 for q in self.layers))

    @property
    def precondition(self) -> float:
        return sum(2.0 * q.m * q.n * (q.m + q.n) for q in self.layers)

    def gram(self, examples: int) -> float:
        """Gram matrix from inputs and output gradients, its Cholesky factor, and the weighted sum of rows.

        Without positions 2N²(m + n) a layer; with T positions the rows themselves are the cheaper way.
        """
        total = examples**3 / 3
        for q in self.layers:
            if q.rows == examples:
                total += 2.0 * examples**2 * (q.m + q.n) + 2.0 * examples * q.m * q.n
            else:
                total += 2.0 * q.rows * q.m * q.n + 2.0 * examples**2 * q.m * q.n + 2.0 * examples * q.m * q.n
        return total

    @property
    def product(self) -> float:
        """One product with the Gauss-Newton matrix after linearisation: tangent (two products a layer) and pullback."""
        return 2 * (self.inputs + self.weights)


def flops_of(workload: Workload) -> Flops:
    return Flops(workload.layers, workload.attention)
