"""The optimizer and its presets."""

from natgrad.optim.averaging import iterate_average
from natgrad.optim.examination import CoverageRow
from natgrad.optim.functional import natural_gradient
from natgrad.optim.optimizer import NaturalGradient
from natgrad.optim.presets import (
    EKFAC,
    KFAC,
    NGD,
    AdaptiveKFAC,
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
    "AdaptiveKFAC",
    "BlockNGD",
    "CoverageRow",
    "DiagonalNGD",
    "GaussNewton",
    "GramNGD",
    "HessianFree",
    "NaturalGradient",
    "Newton",
    "TrustRegionNGD",
    "iterate_average",
    "natural_gradient",
]
