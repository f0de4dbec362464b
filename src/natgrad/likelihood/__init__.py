"""Likelihoods: what a model's output means as a distribution over targets."""

from __future__ import annotations

from natgrad.likelihood.base import Likelihood, Target
from natgrad.likelihood.bernoulli import Bernoulli
from natgrad.likelihood.categorical import Categorical
from natgrad.likelihood.distribution import FromDistribution
from natgrad.likelihood.gaussian import Gaussian
from natgrad.likelihood.multi_categorical import MultiCategorical
from natgrad.likelihood.poisson import Poisson
from natgrad.likelihood.weighted import Weighted

__all__ = [
    "Bernoulli",
    "Categorical",
    "FromDistribution",
    "Gaussian",
    "Likelihood",
    "MultiCategorical",
    "Poisson",
    "Target",
    "Weighted",
]
