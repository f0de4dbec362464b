"""Momentum: a running sum of gradients, taken before they are preconditioned."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_KEY = "momentum"


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

    def prime(self, gradients: Mapping[str, Tensor]) -> None:
        """Lay out the buffers at zero."""
        for name, g in gradients.items():
            if self.factors[name]:
                self.state[self.parameters[name]][_KEY] = torch.zeros_like(g)
