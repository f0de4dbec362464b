"""Likelihoods: what a model's output means as a distribution over targets."""

from __future__ import annotations

from natgrad.likelihood.base import Likelihood, Target
from natgrad.likelihood.bernoulli import Bernoulli
from natgrad.likelihood.categorical import Categorical
from natgrad.likelihood.gaussian import Gaussian
from natgrad.likelihood.poisson import Poisson

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson", "Target"]
