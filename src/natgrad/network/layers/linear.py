"""Linear layers: the gradient of one example is ``Σ_s g_s [a_s; 1]ᵀ``."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from natgrad.errors import ShapeError
from natgrad.network.layers.base import LayerRule, Layout
from natgrad.network.rows import LinearRows, Rows, with_ones


class LinearRule(LayerRule):
    """``nn.Linear``: every axis between the first and the last is a shared position."""

    plain: ClassVar[bool] = True

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight", "bias") if getattr(module, "bias", None) is not None else ("weight",)

    def layout(self, module: nn.Module) -> Layout:
        return Layout(1)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        if x.dim() < 2:
            raise ShapeError(
                f"A Linear layer saw an input of shape {tuple(x.shape)}, which has no batch axis. "
                "Give the model a batch: x[None] for a single example."
            )
        positions = x.shape[1:-1].numel()
        a = x.reshape(1, x.shape[0], positions, x.shape[-1])
        g = g.reshape(g.shape[0], 1, g.shape[1], positions, g.shape[-1])
        return LinearRows(with_ones(a, "weight" in trainable, "bias" in trainable), g)


class TransposedLinearRule(LinearRule):
    """A linear layer whose weight is ``[in, out]`` (``Conv1D`` of GPT-2): the rows are those of ``nn.Linear``."""

    def layout(self, module: nn.Module) -> Layout:
        return Layout(1, transposed=True)
