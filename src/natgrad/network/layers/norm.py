"""Scale and shift of norm layers: ``Σ_s g_s ⊙ x̂_s`` and ``Σ_s g_s``.

The normalised input x̂ is recomputed from the input, never by dividing the output by the scale (which may be zero).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.network.layers.base import LayerRule
from natgrad.network.rows import Rows, scale_shift_rows


class NormRule(LayerRule):
    """``LayerNorm``, ``RMSNorm``, ``GroupNorm`` and ``BatchNorm*d`` of torch."""

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        names = ("weight", "bias") if getattr(module, "bias", None) is not None else ("weight",)
        return names if getattr(module, "weight", None) is not None else ()

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        normalised, channel_axis = self._normalised(module, x)
        if channel_axis is None:
            channels = module.weight.numel()  # type: ignore[union-attr]
            positions = x[0:1].numel() // channels
            z = normalised.reshape(x.shape[0], positions, channels)
            g = g.reshape(g.shape[0], x.shape[0], positions, channels)
        else:
            z = normalised.reshape(x.shape[0], x.shape[1], -1).transpose(1, 2)
            g = g.reshape(g.shape[0], x.shape[0], x.shape[1], -1).transpose(2, 3)
        return scale_shift_rows(z, g, trainable)

    def _normalised(self, module: Any, x: Tensor) -> tuple[Tensor, int | None]:
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps), None
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, eps=module.eps), None
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps), 1
        if module.training or module.running_mean is None:
            return F.batch_norm(x, None, None, training=True, eps=module.eps), 1
        # x comes in the precision of statistics, and torch takes no bfloat16 averages beside it.
        mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
        return F.batch_norm(x, mean, var, eps=module.eps), 1


class RootMeanSquareRule(NormRule):
    """Norms of published models, ``y = w ⊙ x / √(mean x² + ε)`` or ``(1 + w)`` in place of ``w``, over the last axis.

    The number ε is found under the names that they give it; what is none of these is found out by its gradient.
    """

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        known = isinstance(getattr(module, "weight", None), Tensor) and self._epsilon(module) is not None
        return ("weight",) if known else ()

    def _normalised(self, module: Any, x: Tensor) -> tuple[Tensor, int | None]:
        epsilon = self._epsilon(module)
        assert epsilon is not None
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon), None

    @staticmethod
    def _epsilon(module: Any) -> float | None:
        found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return found if isinstance(found, float | int) else None
