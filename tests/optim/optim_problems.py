"""A small classifier, batches, and the steps that dense oracles expect."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad.testing import families, oracles

CATEGORICAL = families.categorical()


def make(seed: int = 0, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    """Linear(3, 4) … Linear(4, 3), 31 parameters without batch norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(4)] if norm else []
        return nn.Sequential(
            nn.Linear(3, 4), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 3)
        ).double()  # fmt: skip


def batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def exact_fisher(model: nn.Module, x: Tensor) -> Tensor:
    return oracles.exact_fisher(oracles.jacobian(model, x), CATEGORICAL.fisher(oracles.network_output(model, x)))


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """On a copy that nobody watches."""
    model = copy.deepcopy(model)
    return oracles.flat_gradient(model, F.cross_entropy(model(x), y))


def mean_kl(old: Tensor, new: Tensor) -> float:
    """Mean KL(old ‖ new) of two batches of logits, written out."""
    p, q = old.detach().log_softmax(-1), new.detach().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
