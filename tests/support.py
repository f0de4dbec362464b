"""What several test files share: pairs of a natgrad likelihood and its independent oracle, and problems of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

import natgrad as ng
from natgrad.testing import families, oracles, zoo


def gamma_distribution(f: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Gamma(f[..., 0].exp(), f[..., 1].exp())


@dataclass(frozen=True)
class Pair:
    """A natgrad likelihood beside the formulas it must agree with, and the size of its output."""

    make: Callable[[], Any]
    family: families.Family
    outputs: int


PAIRS: dict[str, Pair] = {
    "categorical": Pair(lambda: ng.Categorical(), families.categorical(), 3),
    "multi_categorical": Pair(lambda: ng.MultiCategorical([2, 3]), families.multi_categorical([2, 3]), 5),
    "bernoulli": Pair(lambda: ng.Bernoulli(), families.bernoulli(), 2),
    "gaussian": Pair(lambda: ng.Gaussian(scale=0.7), families.gaussian(0.7), 2),
    "gaussian_learned": Pair(lambda: ng.Gaussian.learned(), families.gaussian_learned(), 4),
    "poisson": Pair(lambda: ng.Poisson(), families.poisson(), 2),
    "gamma": Pair(lambda: ng.FromDistribution(gamma_distribution), families.gamma(), 2),
}


@dataclass(frozen=True)
class Problem:
    """A zoo model with an output distribution and labels; every oracle quantity is computed once."""

    case: zoo.Case
    pair: Pair

    @property
    def model(self) -> torch.nn.Module:
        return self.case.model

    @property
    def x(self) -> Any:
        return self.case.x

    @cached_property
    def likelihood(self) -> Any:
        return self.pair.make()

    @cached_property
    def f(self) -> Tensor:
        return oracles.network_output(self.case.model, self.case.x, self.case.select)

    @cached_property
    def jacobian(self) -> Tensor:
        return oracles.jacobian(self.case.model, self.case.x, self.case.select)

    @cached_property
    def y(self) -> Tensor:
        return self.pair.family.sample(self.f, 1, torch.Generator().manual_seed(1))[0]

    @cached_property
    def size(self) -> int:
        return self.jacobian.shape[-1]

    @cached_property
    def exact_columns(self) -> Tensor:
        return oracles.exact_columns(self.pair.family.fisher(self.f))

    @cached_property
    def empirical_columns(self) -> Tensor:
        return oracles.score_columns(self.pair.family.score(self.f, self.y)[None])

    def columns(self, estimate: str) -> Tensor:
        return self.exact_columns if estimate == "exact" else self.empirical_columns

    @cached_property
    def total(self) -> float:
        return oracles.total_weight(self.exact_columns)

    @cached_property
    def exact(self) -> Tensor:
        return oracles.exact_fisher(self.jacobian, self.pair.family.fisher(self.f))

    @cached_property
    def empirical(self) -> Tensor:
        return oracles.dense_fisher(self.jacobian, self.empirical_columns, self.total)

    def matrix(self, estimate: str) -> Tensor:
        return self.exact if estimate == "exact" else self.empirical

    def fisher(self, estimate: str, structure: Any, **options: Any) -> Any:
        """natgrad's operator for the same problem."""
        chosen = ng.Exact() if estimate == "exact" else ng.Empirical()
        return ng.fisher(self.model, self.likelihood, self.x, self.y, estimate=chosen, structure=structure, **options)


@cache
def problem(model: str, likelihood: str) -> Problem:
    pair = PAIRS[likelihood]
    return Problem(zoo.case(model, pair.outputs), pair)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Frobenius distance relative to the expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    norm = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(actual - expected) / (norm if norm > 0 else 1.0))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Relative Frobenius distance within the tolerance."""
    error = distance(actual, expected)
    assert error <= tolerance, f"relative error {error:.3e} exceeds {tolerance:.0e}"


def slope(errors: dict[int, float]) -> float:
    """Least-squares slope of log error against log number of samples."""
    n = torch.tensor([float(k) for k in errors]).log()
    e = torch.tensor(list(errors.values())).log()
    n = n - n.mean()
    return float((n * (e - e.mean())).sum() / n.square().sum())
