"""``nn.MultiheadAttention``: its four projections are linear layers that it applies without calling any module.

While a pass is recorded, the calls of ``F.linear`` inside the module are watched, and tell by the weight that they
are given which projection they are. With query, key and value the same tensor there is one call, and one matrix
``[3·width, width + 1]`` that sees one input; otherwise its rows are the sum of those of the calls, each of which
reaches its own outputs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from natgrad.network.layers.base import LayerRule, LayerUse, Layout, Note
from natgrad.network.layers.functional import watch_calls
from natgrad.network.layers.linear import LinearRule
from natgrad.network.rows import LinearRows, Rows, with_ones

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class AttentionRule(LayerRule):
    """The input projections; the output projection is a part of the module with a rule of its own."""

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for part in self.parts(module) for name in part)

    def parts(self, module: nn.Module) -> tuple[tuple[str, ...], ...]:
        bias = ("in_proj_bias",) if module.in_proj_bias is not None else ()
        if module._qkv_same_embed_dim:
            return (("in_proj_weight", *bias),)
        return (*((name,) for name in _SEPARATE), *((name,) for name in bias))

    def layout(self, module: nn.Module) -> Layout:
        return Layout(1)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        raise NotImplementedError("The uses of attention's projections come with rules of their own.")

    def watch(self, module: nn.Module, note: Note) -> Callable[[], None]:
        return watch_calls(module, note, lambda: _Projections(module, note))


@dataclass(frozen=True)
class ProjectionRule(LinearRule):
    """One use of a projection. Time comes first in it, and with it the examples may lie on one axis.

    Args:
        weight: the layer's own name of the weight.
        examples: number of examples N.
        outputs: the outputs that this use reaches, as ``(first, number of all)``, of the fused weight and bias.
        fused: whether the weight is the fused one.
    """

    plain: ClassVar[bool] = False

    weight: str
    examples: int
    outputs: tuple[int, int]
    fused: bool

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        a = x.reshape(1, -1, self.examples, x.shape[-1]).transpose(1, 2)
        g = g.reshape(g.shape[0], 1, -1, self.examples, g.shape[-1]).transpose(2, 3)
        weight = self.weight in trainable
        if self.fused or not weight:
            first, number = self.outputs
            g = F.pad(g, (first, number - first - g.shape[-1]))
        return LinearRows(with_ones(a, weight, any(n != self.weight for n in trainable)), g)


class _Projections(TorchFunctionMode):
    """Notes the projections of one call of the module. Under it, attention does not take its way without gradients."""

    def __init__(self, module: Any, note: Note) -> None:
        super().__init__()
        self.module, self.note, self.examples = module, note, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            query = args[0]
            # As there: what has no axis of examples is one example.
            self.examples = query.shape[1] if query.dim() == 3 else 1
            with self:
                return _ATTENTION(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is F.linear and isinstance(output, Tensor) and output.requires_grad and not output.is_nested:
            self._take(*args, output=output, **kwargs)
        return output

    def _take(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, output: Tensor) -> None:
        found = self._projection(weight)
        if found is None or not self.examples:
            return
        layer, name, outputs, fused = found
        rule = ProjectionRule(name, self.examples, outputs, fused)
        own = (name, "bias" if layer else "in_proj_bias")
        self.note(layer, LayerUse(x.detach(), x._version, get_gradient_edge(output), rule, own))

    def _projection(self, weight: Tensor) -> tuple[str, str, tuple[int, int], bool] | None:
        """Layer, weight's name, outputs of the fused matrix, and whether it is that: of the weight that was applied."""
        module, width = self.module, self.module.embed_dim
        if weight is module.out_proj.weight:
            return "out_proj", "weight", (0, width), False
        for i, name in enumerate(_SEPARATE):
            if weight is getattr(module, name):
                return "", name, (width * i, 3 * width), False
        whole = module.in_proj_weight
        if whole is not None and weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
            first = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
            return "", "in_proj_weight", (first, 3 * width), True
        return None


def _watchable() -> Callable[..., Any]:
    """``F.multi_head_attention_forward`` for use under a mode: it does not look for one again, but goes on."""
    function: Any = F.multi_head_attention_forward
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_ATTENTION = _watchable()
