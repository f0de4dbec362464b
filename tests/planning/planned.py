"""Models that are planned, and what their optimizers really hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.testing.zoo import Case, case

PRESETS: dict[str, Callable[..., ng.NaturalGradient]] = {
    "kfac": ng.KFAC,
    "ekfac": ng.EKFAC,
    "diagonal": ng.DiagonalNGD,
    "block": ng.BlockNGD,
    "gram": ng.GramNGD,
    "dense": ng.NGD,
    "matrix-free": ng.TrustRegionNGD,
}


def wide(inputs: int = 96, hidden: int = 80, outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
                         nn.Linear(hidden, outputs))  # fmt: skip


def stepped(found: Case, optimizer: ng.NaturalGradient, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        output = found()
        target = torch.zeros(output.shape[:-1], dtype=torch.long)
        F.cross_entropy(output.flatten(0, -2), target.flatten()).backward()
        optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimizer's state; memory that two of them share counts once."""
    storages: dict[int, int] = {}
    for slot in optimizer.state.values():
        for value in slot.values():
            if isinstance(value, Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def single(name: str) -> Case:
    """A model of the zoo in float32."""
    found = case(name)

    def cast(t: Any) -> Any:
        return t.float() if isinstance(t, Tensor) and t.is_floating_point() else t

    x = {k: cast(v) for k, v in found.x.items()} if isinstance(found.x, dict) else (
        tuple(cast(t) for t in found.x) if isinstance(found.x, tuple) else cast(found.x)
    )  # fmt: skip
    return Case(found.name, found.model.float(), x, found.select, found.tags)
