"""The laws of a likelihood, for every likelihood; and that the check notices when one is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, distributions

from natgrad.errors import ArgumentError
from natgrad.likelihood import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    Likelihood,
    MultiCategorical,
    Poisson,
    Weighted,
)
from natgrad.testing.likelihoods import check_likelihood

LIKELIHOODS: dict[str, Likelihood] = {
    "categorical": Categorical(),
    "two categorical decisions": MultiCategorical([2, 2]),
    "decisions of which one has no choice": MultiCategorical((1, 3)),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "gaussian of scale 0.3": Gaussian(0.3),
    "gaussian with a scale per output": Gaussian([0.3, 1.0, 2.0, 0.7]),
    "gaussian of the squared error": Gaussian.of_mse_loss(),
    "gaussian with learned scale": Gaussian.learned(),
    "poisson": Poisson(),
}


def outputs(*batch: int, size: int = 4) -> Tensor:
    return torch.randn(*batch, size, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(3,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_laws(name: str, batch: tuple[int, ...]) -> None:
    check_likelihood(LIKELIHOODS[name], outputs(*batch))


def test_laws_of_weighted() -> None:
    f = outputs(4, 3)
    y = torch.tensor([[0, 1, -100], [2, 3, 0], [-100, -100, -100], [1, 1, 2]])
    likelihood = Weighted(
        Categorical(),
        ignore_index=-100,
        class_weights=[0.5, 2.0, 0.0, 1.0],
        label_smoothing=0.1,
        weights=lambda labels: 1.0 + labels,
    )
    check_likelihood(likelihood, f, (y, torch.rand(4, 3)))


@dataclass(frozen=True)
class _Wrong(Categorical):
    """A categorical likelihood with one method replaced."""

    method: str = ""
    replacement: Callable[..., Tensor] | None = None

    def __getattribute__(self, name: str) -> object:
        get = object.__getattribute__
        return get(self, "replacement") if name == get(self, "method") else get(self, name)


right = Categorical()
WRONG: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "one sample too few in the factor": ("fisher_factor", lambda f: right.fisher_factor(f)[1:], "fisher_factor"),
    "p instead of √p": (
        "fisher_factor",
        lambda f: right.fisher_factor(f) * torch.softmax(f, -1).sqrt().movedim(-1, 0).unsqueeze(-1),
        "fisher_factor",
    ),
    "factor averaged": ("fisher_factor", lambda f: right.fisher_factor(f) / f.shape[-1] ** 0.5, "fisher_factor"),
    "matvec without the mean": ("fisher_matvec", lambda f, u: torch.softmax(f, -1) * u, "fisher_matvec"),
    "KL the other way round": ("kl", lambda f, g: right.kl(g, f), "KL"),
    "KL doubled": ("kl", lambda f, g: 2 * right.kl(f, g), "Hessian"),
    "score with the other sign": ("score", lambda f, y: -right.score(f, y), "score"),
    "nll shifted": ("nll", lambda f, y: right.nll(f, y) + 1, "nll"),
    "labels too flat": (
        "sample",
        lambda f, n=1, *, generator=None: right.sample(0.9 * f, n, generator=generator),
        "freq",
    ),
    "global stream": ("sample", lambda f, n=1, *, generator=None: right.sample(f, n), "global"),
    "same draw again": (
        "sample",
        lambda f, n=1, *, generator=None: right.sample(f, n, generator=torch.Generator().manual_seed(1)),
        "advance",
    ),
}


@pytest.mark.parametrize("defect", WRONG)
def test_check_notices(defect: str) -> None:
    method, replacement, message = WRONG[defect]
    with pytest.raises(AssertionError, match=message):
        check_likelihood(_Wrong(method, replacement), outputs(2, 2))


def test_check_accepts_the_harness_itself() -> None:
    check_likelihood(_Wrong("nll", right.nll), outputs(2, 2))


def test_check_needs_double_precision() -> None:
    with pytest.raises(ArgumentError, match="float64"):
        check_likelihood(Categorical(), torch.randn(2, 3))


def _mvn(f: Tensor) -> distributions.Distribution:
    lower = torch.diag_embed(f[..., 2:4].exp())
    below = torch.zeros_like(lower)
    below[..., 1, 0] = f[..., 4]
    return distributions.MultivariateNormal(f[..., :2], scale_tril=lower + below)


def _batchwise(family: Callable[..., distributions.Distribution], *links: Callable[[Tensor], Tensor]):
    """One scalar parameter per output column."""
    return lambda f: family(*(link(f[..., k]) for k, link in enumerate(links)))


def _same(x: Tensor) -> Tensor:
    return x


CLOSED: dict[str, tuple[Callable[[Tensor], distributions.Distribution], int]] = {
    "normal": (_batchwise(distributions.Normal, _same, torch.exp), 2),
    "normals": (lambda f: distributions.Normal(f[..., :2], f[..., 2:].exp()), 4),
    "laplace": (_batchwise(distributions.Laplace, _same, torch.exp), 2),
    "laplaces": (lambda f: distributions.Laplace(f, 0.7), 3),
    "gamma": (_batchwise(distributions.Gamma, torch.exp, torch.exp), 2),
    "beta": (_batchwise(distributions.Beta, torch.exp, torch.exp), 2),
    "dirichlet": (lambda f: distributions.Dirichlet(f.exp()), 3),
    "multivariate normal": (_mvn, 5),
    "categorical": (lambda f: distributions.Categorical(logits=f), 3),
    "log-normal": (_batchwise(distributions.LogNormal, _same, torch.exp), 2),
    "gumbel": (_batchwise(distributions.Gumbel, _same, torch.exp), 2),
    "cauchy": (_batchwise(distributions.Cauchy, _same, torch.exp), 2),
    "geometric": (lambda f: distributions.Geometric(logits=f[..., 0]), 1),
    "binomial": (lambda f: distributions.Binomial(5, logits=f), 2),
}


@pytest.mark.parametrize("name", CLOSED)
def test_laws_of_torch_distributions(name: str) -> None:
    builder, size = CLOSED[name]
    check_likelihood(FromDistribution(builder), 0.5 * outputs(2, 2, size=size))


SAMPLED: dict[str, tuple[Callable[[Tensor], distributions.Distribution], int, float]] = {
    "student": (lambda f: distributions.StudentT(4 + f[..., 2].exp(), f[..., 0], f[..., 1].exp()), 3, 0.1),
    "negative binomial": (lambda f: distributions.NegativeBinomial(f[..., 0].exp(), logits=f[..., 1]), 2, 0.1),
    # the likelihood ratio of distant Weibulls has heavy tails
    "weibull": (_batchwise(distributions.Weibull, torch.exp, torch.exp), 2, 0.25),
    "von Mises": (_batchwise(distributions.VonMises, _same, torch.exp), 2, 0.1),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_laws_of_estimated_distributions(name: str) -> None:
    builder, size, allowance = SAMPLED[name]
    f = 0.3 * outputs(2, 2, size=size)
    check_likelihood(FromDistribution(builder, samples=20_000), f, allowance=allowance)
