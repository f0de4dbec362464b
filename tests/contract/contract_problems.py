"""A small classifier in float64, its batches, and the runs that tests of the contract compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad.testing import families, oracles

CATEGORICAL = families.categorical()


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """``x [N, 3] -> logits [N, 3]``: 31 parameters in two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(seed: int, n: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator).to(dtype), torch.randint(
        0, 3, (n,), generator=generator
    )


def backward(model: Callable[[Tensor], Tensor], optimizers: Sequence[Any], seed: int, dtype=torch.float64) -> Tensor:
    """Gradients of the mean loss of one batch, observed by every optimizer."""
    x, y = batch(seed, dtype=dtype)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def run(model: nn.Module, optimizers: Sequence[Any], seeds: Sequence[int], dtype=torch.float64) -> None:
    """One step of every optimizer for each batch."""
    for seed in seeds:
        backward(model, optimizers, seed, dtype)
        for optimizer in optimizers:
            optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def exact_fisher(model: nn.Module, x: Tensor) -> Tensor:
    """The Fisher matrix of the batch, [P, P] in the order of ``model.parameters()``."""
    return oracles.exact_fisher(oracles.jacobian(model, x), CATEGORICAL.fisher(oracles.network_output(model, x)))
