"""A module as a differentiable map: partition, layer rules, tape, Jacobian rows. Knows nothing of likelihoods."""

from natgrad.network.checkpointing import is_reentrant
from natgrad.network.coverage import (
    misaligned_parameters,
    mixing_parameters,
    uncovered_parameters,
    unreached_parameters,
)
from natgrad.network.empty import EmptyTape
from natgrad.network.layers import (
    RULES,
    ConvRule,
    EmbeddingRule,
    LayerRule,
    LinearRule,
    NormRule,
    register_layer,
    rule_for,
)
from natgrad.network.partition import Block, BlockVector, Cell, Partition, cells, trainable_parameters
from natgrad.network.replay import (
    HessianProducts,
    Linearization,
    Pass,
    RandomState,
    fresh_casts,
    full_precision,
    is_compiled,
    is_replaying,
    record,
)
from natgrad.network.rows import DenseRows, EmbeddingRows, LinearRows, Rows
from natgrad.network.tape import (
    Recorder,
    Tape,
    accumulation,
    as_arguments,
    output_tensor,
    recording,
)

__all__ = [
    "RULES",
    "Block",
    "BlockVector",
    "Cell",
    "ConvRule",
    "DenseRows",
    "EmbeddingRows",
    "EmbeddingRule",
    "EmptyTape",
    "HessianProducts",
    "LayerRule",
    "LinearRows",
    "LinearRule",
    "Linearization",
    "NormRule",
    "Partition",
    "Pass",
    "RandomState",
    "Recorder",
    "Rows",
    "Tape",
    "accumulation",
    "as_arguments",
    "cells",
    "fresh_casts",
    "full_precision",
    "is_compiled",
    "is_reentrant",
    "is_replaying",
    "misaligned_parameters",
    "mixing_parameters",
    "output_tensor",
    "record",
    "recording",
    "register_layer",
    "rule_for",
    "trainable_parameters",
    "uncovered_parameters",
    "unreached_parameters",
]
