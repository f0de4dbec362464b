"""Layer rules: how a module's parameters enter its output, in one canonical layout.

A rule turns what a module saw (its input) and what flowed back (the gradient of its output) into the rows of the
Jacobian that belong to the module's parameters:

* *linear* layers (``Linear``, ``Conv*d``, ``ConvTranspose*d``): the gradient of one example is ``Σ_s g_s [a_s; 1]ᵀ``,
  with inputs ``a`` of shape ``[groups, N, S, in]`` and output gradients ``g`` of shape ``[K, groups, N, S, out]``;
* *embeddings*: the same with one-hot inputs, kept as indices ``[N, S]``;
* *scale and shift* layers (norms): ``Σ_s g_s ⊙ x̂_s`` and ``Σ_s g_s``, with normalised inputs ``[N, S, C]``.

``N`` is the first axis of the network's batch, ``S`` whatever positions (time, pixels) share the parameters.
"""

from natgrad.network.layers.attention import AttentionRule
from natgrad.network.layers.base import LayerRule, LayerUse, Layout, Note
from natgrad.network.layers.convolution import ConvRule, ConvTransposeRule
from natgrad.network.layers.embedding import EmbeddingRule, ScaledEmbeddingRule
from natgrad.network.layers.functional import FunctionalLinearRule
from natgrad.network.layers.linear import LinearRule, TransposedLinearRule
from natgrad.network.layers.norm import NormRule, RootMeanSquareRule
from natgrad.network.layers.recurrent import RecurrentRule
from natgrad.network.layers.refusals import why_without_rule
from natgrad.network.layers.registry import NAMED_RULES, RULES, register_layer, rule_for

__all__ = [
    "NAMED_RULES",
    "RULES",
    "AttentionRule",
    "ConvRule",
    "ConvTransposeRule",
    "EmbeddingRule",
    "FunctionalLinearRule",
    "LayerRule",
    "LayerUse",
    "Layout",
    "LinearRule",
    "NormRule",
    "Note",
    "RecurrentRule",
    "RootMeanSquareRule",
    "ScaledEmbeddingRule",
    "TransposedLinearRule",
    "register_layer",
    "rule_for",
    "why_without_rule",
]
