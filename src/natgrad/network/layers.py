"""Layer rules: how a module's parameters enter its output, in one canonical layout.

A rule turns what a module saw (its input) and what flowed back (the gradient of its output) into the rows of the
Jacobian that belong to the module's parameters:

* *linear* layers (``Linear``, ``Conv*d``): the gradient of one example is ``Σ_s g_s [a_s; 1]ᵀ``, with inputs
  ``a`` of shape ``[groups, N, S, in]`` and output gradients ``g`` of shape ``[K, groups, N, S, out]``;
* *embeddings*: the same with one-hot inputs, kept as indices ``[N, S]``;
* *scale and shift* layers (norms): ``Σ_s g_s ⊙ x̂_s`` and ``Σ_s g_s``, with normalised inputs ``[N, S, C]``.

``N`` is the first axis of the network's batch, ``S`` whatever positions (time, pixels) share the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.errors import ShapeError
from natgrad.network.rows import EmbeddingRows, LinearRows, Rows, scale_shift_rows


class LayerRule(ABC):
    """How one kind of module maps inputs and output gradients to Jacobian rows."""

    @abstractmethod
    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the module's own parameters that the rule understands, weight first."""

    @abstractmethod
    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        """Rows of the Jacobian for the module's ``trainable`` parameters.

        Args:
            module: the layer.
            x: the input of one use of the layer.
            g: gradients with respect to the output of that use, ``[K, *output.shape]``.
            trainable: the subset of :meth:`parameters` that requires a gradient, in that order.
        """


def _with_ones(a: Tensor, trainable: tuple[str, ...]) -> Tensor:
    """Append the homogeneous coordinate that carries the bias; only it where the weight is frozen."""
    if "bias" not in trainable:
        return a
    if "weight" not in trainable:
        return a.new_ones(*a.shape[:-1], 1)
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


class LinearRule(LayerRule):
    """``nn.Linear``: every axis between the first and the last is a shared position."""

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight", "bias") if module.bias is not None else ("weight",)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        if x.dim() < 2:
            raise ShapeError(
                f"A Linear layer saw an input of shape {tuple(x.shape)}, which has no batch axis. "
                "Give the model a batch: x[None] for a single example."
            )
        a = x.reshape(1, x.shape[0], -1, x.shape[-1])
        g = g.reshape(g.shape[0], 1, g.shape[1], -1, g.shape[-1])
        return LinearRows(_with_ones(a, trainable), g)


_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class ConvRule(LayerRule):
    """``nn.Conv1d/2d/3d`` as a linear layer on patches; each group is a matrix of its own."""

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight", "bias") if module.bias is not None else ("weight",)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        conv: Any = module
        groups, n = conv.groups, x.shape[0]
        if "weight" in trainable:
            patches = self._patches(conv, x)  # [N, C_in, *kernel, S]
            a = patches.reshape(n, groups, -1, patches.shape[-1]).permute(1, 0, 3, 2)
        else:
            positions = g.shape[3:].numel()
            a = x.new_ones(groups, n, positions, 1)
        g = g.reshape(g.shape[0], n, groups, conv.out_channels // groups, -1).permute(0, 2, 1, 4, 3)
        return LinearRows(_with_ones(a, trainable), g)

    @staticmethod
    def _patches(conv: Any, x: Tensor) -> Tensor:
        """All receptive fields of ``x``: ``[N, C_in, *kernel, S]``, positions in row-major order."""
        spatial = len(conv.kernel_size)
        # The module keeps the padding of both ends, last axis first, whatever way it was given.
        pad = list(conv._reversed_padding_repeated_twice)
        if any(pad):
            x = F.pad(x, pad, mode=_PAD_MODES[conv.padding_mode])
        for axis in range(spatial):
            # One sliding window per spatial axis; dilation keeps every d-th element of the window.
            k, s, d = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
            x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d] if d > 1 else x.unfold(2 + axis, k, s)
        # [N, C, *positions, *kernel] -> [N, C, *kernel, S]
        order = [0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial)]
        return x.permute(order).flatten(-spatial)


class EmbeddingRule(LayerRule):
    """``nn.Embedding``: a linear layer on one-hot inputs, which stay indices."""

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        embedding: Any = module
        n = x.shape[0]
        index = x.reshape(n, -1)
        g = g.reshape(g.shape[0], n, index.shape[1], -1)
        if embedding.padding_idx is not None:
            # autograd gives the padding row no gradient; neither may the Fisher.
            g = g * (index != embedding.padding_idx).to(g.dtype)[..., None]
        return EmbeddingRows(index, g, embedding.num_embeddings, embedding.padding_idx)


class NormRule(LayerRule):
    """Scale and shift of ``LayerNorm``, ``RMSNorm``, ``GroupNorm`` and ``BatchNorm*d``.

    The normalised input is recomputed from the input, never by dividing the output by the scale (which may be zero).
    """

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        names = ("weight", "bias") if getattr(module, "bias", None) is not None else ("weight",)
        return names if getattr(module, "weight", None) is not None else ()

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        normalised, channel_axis = self._normalised(module, x)
        if channel_axis is None:
            channels = module.weight.numel()  # type: ignore[union-attr]
            z = normalised.reshape(x.shape[0], -1, channels)
            g = g.reshape(g.shape[0], x.shape[0], -1, channels)
        else:
            z = normalised.reshape(x.shape[0], x.shape[1], -1).transpose(1, 2)
            g = g.reshape(g.shape[0], x.shape[0], x.shape[1], -1).transpose(2, 3)
        return scale_shift_rows(z, g, trainable)

    @staticmethod
    def _normalised(module: Any, x: Tensor) -> tuple[Tensor, int | None]:
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


_LINEAR, _CONV, _EMBEDDING, _NORM = LinearRule(), ConvRule(), EmbeddingRule(), NormRule()
RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: _LINEAR,
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.Embedding: _EMBEDDING,
    nn.LayerNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.BatchNorm3d: _NORM,
}
"""Rule of each supported layer type. Subclasses are matched exactly: a subclass may compute something else."""


def register_layer(kind: type[nn.Module], rule: LayerRule) -> None:
    """Teach natgrad a layer type. ``rule`` serves modules of exactly this type (not of its subclasses)."""
    RULES[kind] = rule


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule that serves ``module``, or None where its parameters need the general treatment."""
    if hasattr(module, "parametrizations"):
        return None  # the true parameters are behind the parametrisation
    rule = RULES.get(type(module))
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return None
    return rule
