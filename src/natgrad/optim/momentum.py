"""Momentum: a running sum of gradients, taken before they are preconditioned; or the step before, where fitted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.network import BlockVector, Partition
from natgrad.optim.groups import Group
from natgrad.step import QuadraticFit, Search

_KEY, _STEP = "momentum", "previous"


def factors(groups: Mapping[str, Group], search: Search) -> dict[str, float]:
    """μ of each parameter; 0 where the search fits the momentum of every step, whatever a schedule cycles."""
    fitted = isinstance(search, QuadraticFit)
    return {name: 0.0 if fitted else group["momentum"] for name, group in groups.items()}


@dataclass(frozen=True)
class Momentum:
    """``m ← μ m + g`` per parameter, kept in the optimizer's state once a step is taken.

    Args:
        state: the optimizer's per-parameter state.
        parameters: parameters by name.
        factors: μ of each, by name; 0 keeps nothing.
    """

    state: MutableMapping[Any, Any]
    parameters: Mapping[str, nn.Parameter]
    factors: Mapping[str, float]

    def averaged(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``μ m + g``, not kept yet."""
        out: dict[str, Tensor] = {}
        for name, g in gradients.items():
            before = self.state[self.parameters[name]].get(_KEY) if self.factors[name] else None
            out[name] = g if before is None else before * self.factors[name] + g
        return out

    def keep(self, averaged: Mapping[str, Tensor], finite: Tensor) -> None:
        """Keep what :meth:`averaged` gave; what was there stays unless ``finite`` (0-d bool)."""
        for name, m in averaged.items():
            if self.factors[name]:
                slot = self.state[self.parameters[name]]
                slot[_KEY] = torch.where(finite, m, slot.get(_KEY, torch.zeros_like(m)))

    def previous(self, partition: Partition, direction: BlockVector, names: Collection[str]) -> BlockVector | None:
        """The step before, of the parameters called ``names`` in the blocks of ``direction``; None for the first."""
        own = {n: self.state[p] for n, p in self.parameters.items() if n in names}
        found = {n: slot[_STEP] for n, slot in own.items() if _STEP in slot}
        if not found:
            return None
        vectors = partition.pack_present(found)
        return {name: vectors.get(name, torch.zeros_like(d)) for name, d in direction.items()}

    def prime(self, gradients: Mapping[str, Tensor], fitted: bool) -> None:
        """Lay out the buffers at zero; where momentum is ``fitted``, the step before."""
        for name, g in gradients.items():
            if fitted:
                self.state[self.parameters[name]][_STEP] = torch.zeros_like(g)
            if self.factors[name]:
                self.state[self.parameters[name]][_KEY] = torch.zeros_like(g)
