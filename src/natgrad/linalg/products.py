"""Matrix products that cost what they should, whatever the width of the matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# CPU kernels lose up to 40 % where the rows of the result start at odd addresses, as with a width of 785 or 1001.
_ALIGNED = 16
_WIDE = 512
_TALL = 128
_BLOCKS = 4


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` for ``[*batch, m, k]`` and ``[*batch, k, n]``.

    A wide result of unaligned width lies in storage whose rows are padded, and is not contiguous: the zero columns
    added to ``y`` cost less than they save.
    """
    m, n = x.shape[-2], y.shape[-1]
    if n % _ALIGNED == 0 or n < _WIDE or m < _TALL:
        return x @ y
    return (x @ F.pad(y, (0, -n % _ALIGNED)))[..., :n]


def gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The symmetric matrix ``xᵀ y`` of ``[*batch, N, n]``; ``y`` is x (None), or x with its rows weighted.

    For a single wide matrix the blocks above the diagonal are computed and mirrored: 5/8 of the operations.
    """
    y = x if y is None else y
    *batch, _, n = x.shape
    if len(batch) == 1 and batch[0] == 1:
        return gram(x[0], y[0])[None]
    if batch or n < _WIDE or x.device.type != "cpu" or x.requires_grad or y.requires_grad:
        return product(x.mT, y)
    out = x.new_empty(n, n + -n % _ALIGNED)[:, :n]
    step = -(-n // (_BLOCKS * _ALIGNED)) * _ALIGNED
    for start in range(0, n, step):
        stop = min(start + step, n)
        torch.mm(x[:, start:stop].mT, y[:, start:], out=out[start:stop, start:])
        out[stop:, start:stop] = out[start:stop, stop:].mT
    return out
