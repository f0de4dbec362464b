"""Learned vectors that a module adds to what it embeds: positions, and the token of a class, of vision transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from natgrad.network.layers.base import LayerRule, LayerUse, Layout, Note
from natgrad.network.rows import EmbeddingRows, Rows

_CLASS, _POSITIONS = "cls_token", "position_embeddings"


class TokensRule(LayerRule):
    """``dropout([cls_token; patches] + position_embeddings)``: tables of 1 and of S rows, ``[1, rows, width]``.

    Every position of every example looks up its own row. What is looked up arrives in the input of ``dropout``, which
    is therefore watched.
    """

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        known = (_CLASS, _POSITIONS)
        return tuple(name for name in known if isinstance(getattr(module, name, None), nn.Parameter))

    def parts(self, module: nn.Module) -> tuple[tuple[str, ...], ...]:
        return tuple((name,) for name in self.parameters(module))

    def layout(self, module: nn.Module) -> Layout:
        return Layout(1, table=True)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        if trainable == (_CLASS,):
            return EmbeddingRows(torch.zeros_like(x[:, :1]), g[:, :, :1], 1)
        return EmbeddingRows(x, g, x.shape[1])

    def watch(self, module: nn.Module, note: Note) -> Callable[[], None]:
        def begin(dropout: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling():
                return
            h = args[0]
            if not torch.is_grad_enabled():
                note("", None)
            elif h.requires_grad:
                index = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
                note("", LayerUse(index, index._version, get_gradient_edge(h)))

        return module.get_submodule("dropout").register_forward_pre_hook(begin).remove
