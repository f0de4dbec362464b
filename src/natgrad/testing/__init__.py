"""What tests of natgrad, and of code built on it, compare with: conformance checks, oracles and a zoo of models."""

from natgrad.testing.likelihoods import check_likelihood
from natgrad.testing.operators import check_operator
from natgrad.testing.optimizers import check_optimizer

__all__ = ["check_likelihood", "check_operator", "check_optimizer"]
