"""Embeddings: linear layers on one-hot inputs, which stay indices."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from natgrad.network.layers.base import LayerRule, Layout
from natgrad.network.rows import EmbeddingRows, Rows


class EmbeddingRule(LayerRule):
    """``nn.Embedding``: indices ``[N, *positions]`` choose rows of the table."""

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def layout(self, module: nn.Module) -> Layout:
        return Layout(1, table=True)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        embedding: Any = module
        n = x.shape[0]
        index = x.reshape(n, x.shape[1:].numel())
        g = g.reshape(g.shape[0], n, index.shape[1], g.shape[-1])
        if embedding.padding_idx is not None:
            # autograd gives the padding row no gradient; neither may the Fisher.
            g = g * (index != embedding.padding_idx).to(g.dtype)[..., None]
        return EmbeddingRows(index, g, embedding.num_embeddings, embedding.padding_idx)


class ScaledEmbeddingRule(EmbeddingRule):
    """An embedding whose output is multiplied by a number that the module calls ``embed_scale``."""

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        embedding: Any = module
        return super().rows(module, x, g * embedding.embed_scale, trainable)
