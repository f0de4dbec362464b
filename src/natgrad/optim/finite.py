"""What is not finite, and what would not be: gradients, directions, sums of parameters and steps. Nothing waits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.network import BlockVector
from natgrad.step import Damping, Step
from natgrad.step.local import largest, rejected


def all_finite(tensors: Mapping[str, Tensor]) -> Tensor:
    """Whether every entry is finite, 0-d; no wait for the device."""
    return torch.isfinite(largest(tensors))


def clear_unless_finite(gradients: Mapping[str, Tensor]) -> None:
    """Zero in place, unless all are finite."""
    finite = all_finite(gradients)
    for grad in gradients.values():
        grad.copy_(torch.where(finite, grad, 0.0))


def fits(parameters: Mapping[str, Tensor], change: Mapping[str, Tensor], delta: BlockVector) -> Tensor:
    """Whether parameters and their change can be added, 0-d bool: both may be finite and the sum not.

    In a wide range a change of a thousandth of it is refused by itself, which spares a look at the parameters: it
    would take a thousand such steps to leave the range.
    """
    top = min(torch.finfo(parameters[name].dtype).max for name in change)
    size = largest(delta)
    if top > 1e30:
        return size <= 1e-3 * top
    return size + largest({name: parameters[name].detach() for name in change}) <= top


def skipped(damping: Damping) -> Step:
    """The record of a step that was not taken because its gradient is not finite."""
    return rejected(damping.value, "the gradient is not finite", tried=False, predicted=math.nan)
