"""Convolutions as linear layers on patches; each group is a matrix of its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.network.layers.base import LayerRule, Layout
from natgrad.network.rows import LinearRows, Rows, with_ones

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class ConvRule(LayerRule):
    """``nn.Conv1d/2d/3d``: inputs are patches ``[in / groups · kernel]``, positions those of the output."""

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight", "bias") if module.bias is not None else ("weight",)

    def layout(self, module: nn.Module) -> Layout:
        return Layout(module.groups)  # type: ignore[arg-type]

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        conv: Any = module
        groups, n = conv.groups, x.shape[0]
        if "weight" in trainable:
            patches = self._patches(conv, x, g)  # [N, C_in, *kernel, S]
            a = patches.reshape(n, groups, -1, patches.shape[-1]).permute(1, 0, 3, 2)
        else:
            a = x.new_ones(groups, n, g.shape[3:].numel(), 1)
        g = g.reshape(g.shape[0], n, groups, conv.out_channels // groups, -1).permute(0, 2, 1, 4, 3)
        return LinearRows(with_ones(a, "weight" in trainable, "bias" in trainable), g)

    def _patches(self, conv: Any, x: Tensor, g: Tensor) -> Tensor:
        """What every output position sees of ``x``: ``[N, C_in, *kernel, S]``, positions in row-major order."""
        # The module keeps the padding of both ends, last axis first, whatever way it was given.
        pad = list(conv._reversed_padding_repeated_twice)
        if any(pad):
            x = F.pad(x, pad, mode=_PAD_MODES[conv.padding_mode])
        return _windows(x, conv.kernel_size, conv.stride, conv.dilation)


class ConvTransposeRule(ConvRule):
    """``nn.ConvTranspose1d/2d/3d``: a convolution of the input with zeros put in, by the mirrored kernel.

    With ``x̃[i·stride] = x[i]`` and zeros elsewhere, ``y[j] = Σ_k W[k] x̃[j + padding − k·dilation]``.
    """

    def layout(self, module: nn.Module) -> Layout:
        return Layout(module.groups, transposed=True)  # type: ignore[arg-type]

    def _patches(self, conv: Any, x: Tensor, g: Tensor) -> Tensor:
        pad: list[int] = []
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], conv.stride, strict=True)))
        spread[(..., *(slice(None, None, s) for s in conv.stride))] = x
        axes = zip(spread.shape[2:], g.shape[3:], conv.kernel_size, conv.padding, conv.dilation, strict=True)
        for size, out, k, p, d in reversed(list(axes)):
            # As many windows as there are outputs, however output_padding or output_size made their number.
            before = d * (k - 1) - p
            pad += [before, out + d * (k - 1) - size - before]
        ones = (1,) * len(conv.kernel_size)
        windows = _windows(F.pad(spread, pad), conv.kernel_size, ones, conv.dilation)
        return windows.flip(tuple(range(2, 2 + len(ones))))


def _windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """All windows of ``x``: ``[N, C, *kernel, S]``."""
    spatial = len(kernel)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        # One sliding window per spatial axis; dilation keeps every d-th element of the window.
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d] if d > 1 else x.unfold(2 + axis, k, s)
    # [N, C, *positions, *kernel] -> [N, C, *kernel, S]
    order = [0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial)]
    return x.permute(order).flatten(-spatial)
