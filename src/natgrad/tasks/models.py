"""The small models of the built-in tasks. Weights depend on the seed given, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Turns a model builder into a factory seed -> model that leaves the caller's random stream untouched."""

    def factory(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return factory


def mlp(widths: Sequence[int], activation: type[nn.Module], *, code: int | None = None) -> nn.Sequential:
    """Linear layers between ``widths`` with ``activation`` between them, Xavier-normal weights and zero biases.

    The layer that produces ``widths[code]`` stays linear, as the code layer of an autoencoder does.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 1
    for position in range(1, len(widths)):
        linear = nn.Linear(widths[position - 1], widths[position])
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if position != last and position != code:
            layers.append(activation())
    return nn.Sequential(*layers)


def linear(inputs: int, *, bias: float) -> nn.Linear:
    """One linear predictor whose bias starts at a given value."""
    layer = nn.Linear(inputs, 1)
    nn.init.constant_(layer.bias, bias)
    return layer


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """``widths`` from the input to the code, then mirrored; tanh units, linear code, logits of the inputs out."""
    return mlp([*widths, *reversed(widths[:-1])], nn.Tanh, code=len(widths) - 1)


def small_convnet(channels: tuple[int, int], size: int, classes: int) -> nn.Sequential:
    """Two 3x3 convolutions, the second with stride 2, then one linear layer, for [N, 1, size, size] images."""
    first, second = channels
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * ((size + 1) // 2) ** 2, classes),
    )


class Block(nn.Module):
    """A pre-norm transformer block with causal self-attention; [N, T, width] -> [N, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part in self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(-3, -2).flatten(-2))
        return x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class Transformer(nn.Module):
    """A decoder-only language model over a small vocabulary; int64 [N, T] -> logits [N, T, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # Residual branches start small, so that their sum over the layers keeps the scale of one.
                branches = 2 * layers if name.endswith(("project", "contract")) else 1
                nn.init.normal_(module.weight, std=(branches * module.in_features) ** -0.5)
                nn.init.zeros_(module.bias)
        # Small embeddings, and logits near zero: the first loss is the logarithm of the vocabulary's size.
        for module in (self.token, self.position, self.head):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
