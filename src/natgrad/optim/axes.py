"""Outputs whose last axis is not what one prediction is made of, such as ``[N, C, H, W]`` of a segmentation network.

The user observes the output with its axes moved; the loss may be made of the output as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

Axes = tuple[int, ...]


def moved_axes(output: Tensor, view: Tensor) -> Axes | None:
    """``axes`` with ``view`` the same as ``output.permute(axes)``, where it is a view of ``output``; else None."""
    base = view._base
    if base is None or not (base is output or base is output._base) or view.dim() != output.dim():
        return None
    if view.storage_offset() != output.storage_offset() or view.dtype != output.dtype or not view.requires_grad:
        return None
    left, axes = list(range(output.dim())), []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        # The stride of an axis of length one says nothing.
        fits = (i for i in left if output.shape[i] == size and (size == 1 or output.stride(i) == stride))
        axis = next(fits, None)
        if axis is None:
            return None
        left.remove(axis)
        axes.append(axis)
    return tuple(axes)


def moved(output: Tensor, axes: Axes | None) -> Tensor:
    """``output.permute(axes)``; None, and a tensor of other axes, stay as they are."""
    return output if axes is None or output.dim() != len(axes) else output.permute(axes)


def inverse(axes: Axes | None) -> Axes | None:
    """The order that undoes ``axes``."""
    return None if axes is None else tuple(axes.index(i) for i in range(len(axes)))


def in_order(output: Any, *orders: Axes | None) -> Any:
    """A tensor with one order of its axes after another; anything else as it is."""
    for axes in orders:
        output = moved(output, axes) if isinstance(output, Tensor) else output
    return output
