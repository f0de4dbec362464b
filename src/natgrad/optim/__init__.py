"""The optimizer and its presets."""

from natgrad.optim.examination import CoverageRow
from natgrad.optim.functional import natural_gradient
from natgrad.optim.optimizer import NaturalGradient
from natgrad.optim.presets import (
    EKFAC,
    KFAC,
    NGD,
    BlockNGD,
    DiagonalNGD,
    GaussNewton,
    GramNGD,
    HessianFree,
    Newton,
    TrustRegionNGD,
)

__all__ = [
    "EKFAC",
    "KFAC",
    "NGD",
    "BlockNGD",
    "CoverageRow",
    "DiagonalNGD",
    "GaussNewton",
    "GramNGD",
    "HessianFree",
    "NaturalGradient",
    "Newton",
    "TrustRegionNGD",
    "natural_gradient",
]
