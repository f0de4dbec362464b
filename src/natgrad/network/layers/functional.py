"""Layers that apply their weight by ``F.linear`` and return something else: the call is watched, not the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from natgrad.network.layers.base import LayerUse, Note
from natgrad.network.layers.linear import LinearRule


def watch_calls(module: nn.Module, note: Note, mode: Callable[[], TorchFunctionMode]) -> Callable[[], None]:
    """Run every call of ``module`` that has a graph under a mode of its own; returns what ends it."""
    entered: list[TorchFunctionMode] = []

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if not torch.is_grad_enabled():
            note("", None)
            return
        entered.append(mode())
        entered[-1].__enter__()

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    handles = (
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end, prepend=True, always_call=True),
    )

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


class FunctionalLinearRule(LinearRule):
    """A module whose own ``weight`` (and ``bias``) is applied by ``F.linear`` (routers of mixtures of experts)."""

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        weight = getattr(module, "weight", None)
        return super().parameters(module) if isinstance(weight, Tensor) and weight.dim() == 2 else ()

    def watch(self, module: nn.Module, note: Note) -> Callable[[], None]:
        return watch_calls(module, note, lambda: _Calls(module, note))


class _Calls(TorchFunctionMode):
    def __init__(self, module: Any, note: Note) -> None:
        super().__init__()
        self.module, self.note = module, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear and isinstance(output, Tensor) and output.requires_grad:
            self._take(*args, output=output, **(kwargs or {}))
        return output

    def _take(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, output: Tensor) -> None:
        if weight is self.module.weight:
            # A bias that is added elsewhere has no part in this use.
            own = ("weight", "bias") if bias is not None and bias is self.module.bias else ("weight",)
            self.note("", LayerUse(x.detach(), x._version, get_gradient_edge(output), None, own))
