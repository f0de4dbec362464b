"""Which rule serves which module: by exact type, or by the name of a type that is not imported here."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache

from torch import nn

from natgrad.network.layers.attention import AttentionRule
from natgrad.network.layers.base import LayerRule
from natgrad.network.layers.convolution import ConvRule, ConvTransposeRule
from natgrad.network.layers.embedding import EmbeddingRule, ScaledEmbeddingRule
from natgrad.network.layers.functional import FunctionalLinearRule
from natgrad.network.layers.linear import LinearRule, TransposedLinearRule
from natgrad.network.layers.norm import NormRule, RootMeanSquareRule
from natgrad.network.layers.recurrent import RecurrentRule
from natgrad.network.layers.tokens import TokensRule

_LINEAR, _CONV, _CONV_TRANSPOSE, _NORM = LinearRule(), ConvRule(), ConvTransposeRule(), NormRule()
_RECURRENT = RecurrentRule()
RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: _LINEAR,
    nn.modules.linear.NonDynamicallyQuantizableLinear: _LINEAR,
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _CONV_TRANSPOSE,
    nn.ConvTranspose2d: _CONV_TRANSPOSE,
    nn.ConvTranspose3d: _CONV_TRANSPOSE,
    nn.Embedding: EmbeddingRule(),
    nn.MultiheadAttention: AttentionRule(),
    nn.LSTM: _RECURRENT,
    nn.GRU: _RECURRENT,
    nn.RNN: _RECURRENT,
    nn.LayerNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.BatchNorm3d: _NORM,
}
"""Rule of each supported layer type. Subclasses are matched exactly: a subclass may compute something else."""

NAMED_RULES: dict[str, LayerRule] = {
    "transformers.pytorch_utils.Conv1D": TransposedLinearRule(),
    "transformers.models.*RMSNorm": RootMeanSquareRule(),
    "transformers.models.*T5LayerNorm": RootMeanSquareRule(),
    "transformers.models.*ScaledWordEmbedding": ScaledEmbeddingRule(),
    "transformers.models.*Router": FunctionalLinearRule(),
    "transformers.models.vit.*ViTEmbeddings": TokensRule(),
    "transformers.models.deit.*DeiTEmbeddings": TokensRule(),
    "transformers.models.falcon.*FalconLinear": _LINEAR,
}
"""Rules of types known by name, ``module.QualifiedName`` with ``*`` for any characters; the first that fits."""


def register_layer(kind: type[nn.Module] | str, rule: LayerRule) -> None:
    """Teach natgrad a layer type. ``rule`` serves modules of exactly this type (not of its subclasses).

    Args:
        kind: the type, or its full name, which is looked up without importing anything: ``"package.module.Layer"``,
            where ``*`` stands for any characters.
        rule: how its parameters enter its output.
    """
    if isinstance(kind, str):
        NAMED_RULES.pop(kind, None)
        before = dict(NAMED_RULES)
        NAMED_RULES.clear()
        NAMED_RULES.update({kind: rule, **before})  # the latest word comes first
        _named.cache_clear()
    else:
        RULES[kind] = rule


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule that serves ``module``, or None where its parameters need the general treatment."""
    if hasattr(module, "parametrizations"):
        return None  # the true parameters are behind the parametrisation
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return None
    return RULES.get(type(module)) or _named(type(module))


@lru_cache(4096)
def _named(kind: type[nn.Module]) -> LayerRule | None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    return next((rule for pattern, rule in NAMED_RULES.items() if fnmatchcase(name, pattern)), None)
