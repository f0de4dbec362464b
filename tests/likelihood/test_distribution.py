"""FromDistribution against closed forms, textbook Fisher information, and its documented refusals."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from scipy.special import polygamma
from torch import Tensor, distributions

from natgrad.errors import (
    ArgumentError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    UnsupportedError,
)
from natgrad.likelihood import Bernoulli, Categorical, FromDistribution, Gaussian, Likelihood, Poisson


def outputs(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, dtype=torch.float64)


def dense(likelihood: Likelihood, f: Tensor) -> Tensor:
    columns = likelihood.fisher_factor(f)
    return torch.einsum("k...i,k...j->...ij", columns, columns)


def normal(f: Tensor) -> distributions.Distribution:
    return distributions.Normal(f[..., 0], f[..., 1].exp())


def student(f: Tensor) -> distributions.Distribution:
    return distributions.StudentT(5.0, f[..., 0], f[..., 1].exp())


CLOSED = {
    "categorical": (Categorical(), lambda f: distributions.Categorical(logits=f)),
    "bernoulli": (Bernoulli(), lambda f: distributions.Bernoulli(logits=f)),
    "poisson": (Poisson(), lambda f: distributions.Poisson(f.exp())),
    "gaussian": (Gaussian(0.4), lambda f: distributions.Normal(f, 0.4)),
    "learned": (Gaussian.learned(), lambda f: distributions.Normal(*_halves(f))),
}


def _halves(f: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_scale = f.chunk(2, -1)
    return mean, log_scale.exp()


@pytest.mark.parametrize("name", CLOSED)
def test_equals_the_closed_form(name: str) -> None:
    closed, builder = CLOSED[name]
    likelihood = FromDistribution(builder)
    f, g, u = outputs(3, 2, 4), outputs(3, 2, 4), outputs(3, 2, 4)
    y = closed.sample(f)[0]
    likelihood.check_output(f)
    likelihood.check_target(f, y)
    assert torch.allclose(likelihood.nll(f, y), closed.nll(f, y), atol=1e-12)
    assert torch.allclose(likelihood.kl(f, g), closed.kl(f, g), atol=1e-12)
    assert torch.allclose(likelihood.score(f, y), closed.score(f, y), atol=1e-12)
    assert torch.allclose(likelihood.fisher_matvec(f, u), closed.fisher_matvec(f, u), atol=1e-12)
    assert torch.allclose(dense(likelihood, f), dense(closed, f), atol=1e-12)


# --- Fisher information from textbooks -------------------------------------------------------------------------------


def test_normal_of_mean_and_log_scale() -> None:
    f = outputs(4, 2)
    expected = torch.diag_embed(torch.stack([(-2 * f[:, 1]).exp(), torch.full((4,), 2.0).double()], -1))
    assert torch.allclose(dense(FromDistribution(normal), f), expected, rtol=1e-10)


def test_gamma_of_log_shape_and_log_rate() -> None:
    f = outputs(4, 2)
    a = f[:, 0].exp().numpy()
    likelihood = FromDistribution(lambda f: distributions.Gamma(f[..., 0].exp(), f[..., 1].exp()))
    expected = np.stack([np.stack([a**2 * polygamma(1, a), -a], -1), np.stack([-a, a], -1)], -2)
    assert np.allclose(dense(likelihood, f), expected, rtol=1e-9)
    y = likelihood.sample(f)[0]
    wanted = -scipy.stats.gamma.logpdf(y.numpy(), a, scale=1 / f[:, 1].exp().numpy())
    assert np.allclose(likelihood.nll(f, y), wanted)


def test_dirichlet_and_beta_of_log_concentrations() -> None:
    f = outputs(4, 3)
    a = f.exp().numpy()
    likelihood = FromDistribution(lambda f: distributions.Dirichlet(f.exp()))
    expected = np.einsum("ni,nij,nj->nij", a, np.eye(3) * polygamma(1, a)[:, :, None], a) - np.einsum(
        "ni,n,nj->nij", a, polygamma(1, a.sum(-1)), a
    )
    assert np.allclose(dense(likelihood, f), expected, rtol=1e-8, atol=1e-10)
    assert likelihood.sample(f, 2).shape == (2, 4, 3)
    beta = FromDistribution(lambda f: distributions.Beta(f[..., 0].exp(), f[..., 1].exp()))
    pair = FromDistribution(lambda f: distributions.Dirichlet(f.exp()))
    assert torch.allclose(dense(beta, f[:, :2]), dense(pair, f[:, :2]), rtol=1e-8, atol=1e-10)


def test_laplace_has_curvature_in_its_location() -> None:
    """Automatic differentiation of torch's KL gives 0 there, because sign(0) = 0."""
    f, g = outputs(4, 2), outputs(4, 2)
    likelihood = FromDistribution(lambda f: distributions.Laplace(f[..., 0], f[..., 1].exp()))
    scale = f[:, 1].exp()
    expected = torch.diag_embed(torch.stack([scale**-2, torch.ones(4).double()], -1))
    assert torch.allclose(dense(likelihood, f), expected, rtol=1e-10)
    wanted = distributions.kl_divergence(likelihood.distribution(f), likelihood.distribution(g))
    assert torch.allclose(likelihood.kl(f, g), wanted, rtol=1e-10)
    assert torch.allclose(likelihood.kl(g, f), distributions.kl_divergence(*map(likelihood.distribution, (g, f))))


def test_multivariate_normal_of_mean_and_scale_tril() -> None:
    """Λ_ij = ∂_i μᵀ Σ⁻¹ ∂_j μ + ½ tr(Σ⁻¹ ∂_i Σ Σ⁻¹ ∂_j Σ)."""
    rows, columns = torch.tril_indices(3, 3)

    def parameters(f: Tensor) -> tuple[Tensor, Tensor]:
        lower = torch.zeros(*f.shape[:-1], 3, 3, dtype=f.dtype)
        lower[..., rows, columns] = f[..., 3:]
        return f[..., :3], lower.tril(-1) + torch.diag_embed(lower.diagonal(dim1=-2, dim2=-1).exp())

    def builder(f: Tensor) -> distributions.Distribution:
        mean, lower = parameters(f)
        return distributions.MultivariateNormal(mean, scale_tril=lower)

    f = outputs(2, 9)
    likelihood = FromDistribution(builder)
    fisher = dense(likelihood, f)
    for n in range(2):
        lower = parameters(f[n])[1]
        precision = torch.linalg.inv(lower @ lower.mT)
        mean = torch.autograd.functional.jacobian(lambda h: parameters(h)[0], f[n])
        sigma = torch.autograd.functional.jacobian(lambda h: parameters(h)[1] @ parameters(h)[1].mT, f[n])
        covariance = precision @ sigma.movedim(-1, 0)
        expected = mean.mT @ precision @ mean + 0.5 * torch.einsum("iab,jba->ij", covariance, covariance)
        assert torch.allclose(fisher[n], expected, rtol=1e-9, atol=1e-11)
    y = likelihood.sample(f)[0]
    lower = parameters(f)[1]
    for n in range(2):
        wanted = scipy.stats.multivariate_normal.logpdf(
            y[n].numpy(), f[n, :3].numpy(), (lower[n] @ lower[n].mT).numpy()
        )
        assert likelihood.nll(f, y)[n].item() == pytest.approx(-wanted)


# --- no closed form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "builder"),
    [
        ("StudentT", student),
        ("NegativeBinomial", lambda f: distributions.NegativeBinomial(f[..., 0].exp(), logits=f[..., 1])),
        ("Weibull", lambda f: distributions.Weibull(f[..., 0].exp(), f[..., 1].exp())),
        ("StudentT", lambda f: distributions.StudentT(5.0, f)),
    ],
)
def test_families_without_closed_form_are_refused_by_name(family: str, builder) -> None:
    likelihood = FromDistribution(builder)
    f = outputs(3, 2)
    y = likelihood.sample(f)[0]
    likelihood.check_output(f)
    likelihood.check_target(f, y)
    assert likelihood.nll(f, y).isfinite().all() and likelihood.score(f, y).isfinite().all()
    for call in (
        lambda: likelihood.kl(f, f),
        lambda: likelihood.fisher_factor(f),
        lambda: likelihood.fisher_matvec(f, f),
    ):
        with pytest.raises(UnsupportedError, match=rf"{family}.*samples=1000"):
            call()


@pytest.mark.parametrize("samples", [None, 10])
def test_support_that_depends_on_parameters(samples: int | None) -> None:
    likelihood = FromDistribution(lambda f: distributions.Uniform(0.0, f[..., 0].exp()), samples=samples)
    with pytest.raises(UnsupportedError, match="Uniform has a support that depends"):
        likelihood.fisher_factor(outputs(3, 1))


def test_transform_with_learned_parameters_is_not_taken_for_its_base() -> None:
    """torch's KL of equal transforms is that of the bases, which would make Λ zero."""

    def logistic(f: Tensor) -> distributions.Distribution:
        base = distributions.Uniform(torch.zeros_like(f[..., 0]), torch.ones_like(f[..., 0]))
        shift = distributions.AffineTransform(f[..., 0], f[..., 1].exp())
        return distributions.TransformedDistribution(base, [distributions.SigmoidTransform().inv, shift])

    with pytest.raises(UnsupportedError, match="transforms carry parameters"):
        FromDistribution(logistic).fisher_factor(outputs(3, 2))
    f = outputs(2, 2)
    fisher = dense(FromDistribution(logistic, samples=40_000), f)
    scale = f[:, 1].exp()
    # Fisher information of the logistic distribution in (location, log scale)
    expected = torch.diag_embed(torch.stack([1 / (3 * scale**2), torch.full((2,), (3 + np.pi**2) / 9).double()], -1))
    assert torch.allclose(fisher, expected, rtol=0.05, atol=0.02 / scale.min().item())


def test_learned_parameters_hidden_in_composed_transforms() -> None:
    def builder(f: Tensor) -> distributions.Distribution:
        base = distributions.Normal(torch.zeros_like(f[..., 0]), torch.ones_like(f[..., 0]))
        inner = distributions.ComposeTransform(
            [distributions.ExpTransform(), distributions.AffineTransform(f[..., 0], 1.0)]
        )
        return distributions.TransformedDistribution(base, [inner.inv, distributions.TanhTransform()])

    with pytest.raises(UnsupportedError, match="transforms carry parameters"):
        FromDistribution(builder).kl(outputs(3, 1), outputs(3, 1))


def test_cached_values_of_a_transform_are_not_parameters() -> None:
    exp = distributions.ExpTransform(cache_size=1)
    likelihood = FromDistribution(lambda f: distributions.TransformedDistribution(normal(f), [exp]))
    f = outputs(3, 2)
    likelihood.sample(f)
    assert torch.allclose(dense(likelihood, f), dense(FromDistribution(normal), f), rtol=1e-12)


def test_estimated_fisher_of_student() -> None:
    """Information of StudentT(ν, μ, σ): (ν+1)/((ν+3)σ²) in μ and 2ν/(ν+3) in log σ."""
    f = outputs(3, 2)
    likelihood = FromDistribution(student, samples=50_000)
    scale = f[:, 1].exp()
    expected = torch.diag_embed(torch.stack([6 / (8 * scale**2), torch.full((3,), 10 / 8).double()], -1))
    assert torch.allclose(dense(likelihood, f), expected, rtol=0.05, atol=0.03)
    g = f + 0.3
    for n in range(3):
        p = scipy.stats.t(5.0, f[n, 0].item(), scale[n].item())
        q = scipy.stats.t(5.0, g[n, 0].item(), g[n, 1].exp().item())
        wanted, _ = scipy.integrate.quad(lambda y, p=p, q=q: p.pdf(y) * (p.logpdf(y) - q.logpdf(y)), -np.inf, np.inf)
        assert likelihood.kl(f, g)[n].item() == pytest.approx(wanted, rel=0.05)


def test_estimates_are_deterministic_and_private() -> None:
    f, g = outputs(3, 2), outputs(3, 2)
    likelihood = FromDistribution(student, samples=10)
    before = torch.get_rng_state()
    values = [likelihood.kl(f, g) for _ in range(2)]
    factors = [likelihood.fisher_factor(f) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*values) and torch.equal(*factors)
    assert not torch.equal(values[0], FromDistribution(student, samples=10, seed=1).kl(f, g))
    assert (values[0] >= 0).all() and (likelihood.kl(f, f) == 0).all()


def test_estimated_fisher_is_the_mean_outer_product_of_scores() -> None:
    f = outputs(3, 2)
    likelihood = FromDistribution(student, samples=7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = student(f).sample((7,))
    scores = likelihood.score(f.expand(7, 3, 2), y)
    assert torch.allclose(dense(likelihood, f), torch.einsum("kni,knj->nij", scores, scores) / 7, rtol=1e-10)


def test_estimated_kl_is_differentiable_in_its_second_argument() -> None:
    f, g = outputs(3, 2), outputs(3, 2).requires_grad_()
    likelihood = FromDistribution(student, samples=5)
    assert torch.autograd.gradcheck(lambda h: likelihood.kl(f, h), g)
    assert not likelihood.kl(f.requires_grad_(), g.detach()).requires_grad


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_honours_the_generator() -> None:
    likelihood = FromDistribution(lambda f: distributions.Gamma(f[..., 0].exp(), f[..., 1].exp()))
    f = outputs(5, 2).requires_grad_()
    before = torch.get_rng_state()
    one, two = (likelihood.sample(f, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two) and one.shape == (3, 5) and not one.requires_grad
    shared = torch.Generator().manual_seed(5)
    assert not torch.equal(likelihood.sample(f, generator=shared), likelihood.sample(f, generator=shared))
    torch.manual_seed(1)
    first = likelihood.sample(f)
    torch.manual_seed(1)
    assert torch.equal(first, likelihood.sample(f))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reaches_the_builder_as_float32(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def builder(f: Tensor) -> distributions.Distribution:
        seen.append(f.dtype)
        return normal(f)

    f = outputs(3, 2).to(dtype)
    likelihood = FromDistribution(builder)
    y = likelihood.sample(f)[0]
    for value in (
        likelihood.nll(f, y),
        likelihood.kl(f, f),
        likelihood.score(f, y),
        likelihood.fisher_matvec(f, f),
        likelihood.fisher_factor(f),
    ):
        assert value.dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_works_without_gradients_and_leaves_none() -> None:
    f = outputs(3, 2).requires_grad_()
    likelihood = FromDistribution(normal)
    with torch.no_grad():
        y = likelihood.sample(f)[0]
        results = [likelihood.score(f, y), likelihood.fisher_factor(f), likelihood.fisher_matvec(f, f)]
    assert f.grad is None and not any(result.requires_grad for result in results)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_builder_must_be_a_function() -> None:
    with pytest.raises(ArgumentError, match="builder must be a function"):
        FromDistribution(distributions.Categorical)  # would take the output for probabilities
    with pytest.raises(ArgumentError, match="samples must be a positive"):
        FromDistribution(normal, samples=0)
    with pytest.raises(ArgumentError, match="returned Tensor instead of a torch distribution"):
        FromDistribution(lambda f: f).check_output(outputs(3, 2))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "builder",
    [
        lambda f: distributions.Normal(f[0], 1.0),
        lambda f: distributions.Normal(f[:, 0], 1.0),
        lambda f: distributions.Normal(f.sum(), 1.0),
    ],
)
def test_builder_must_keep_the_batch(builder) -> None:
    with pytest.raises(ShapeError, match=r"should begin with \[3, 4\]"):
        FromDistribution(builder).check_output(outputs(3, 4, 2))


def test_detached_builder() -> None:
    with pytest.raises(ArgumentError, match="does not depend differentiably"):
        FromDistribution(lambda f: normal(f.detach())).fisher_factor(outputs(3, 2))


def test_overflow_is_named() -> None:
    f = torch.full((2, 2), -1e3, dtype=torch.float64)
    unchecked = FromDistribution(lambda f: distributions.Normal(f[..., 0], f[..., 1].exp(), validate_args=False))
    with pytest.raises(NonFiniteError, match="Normal is not finite at outputs between -1000"):
        unchecked.fisher_factor(f)


class _Odd(distributions.Normal):
    """A normal distribution whose registered KL is wrong."""


@distributions.register_kl(_Odd, _Odd)
def _odd_kl(p: _Odd, q: _Odd) -> Tensor:
    return -(p.loc - q.loc).square()


def test_kl_that_is_no_divergence() -> None:
    likelihood = FromDistribution(lambda f: _Odd(f[..., 0], f[..., 1].exp()))
    with pytest.raises(NotPositiveDefiniteError, match="negative eigenvalue -2"):
        likelihood.fisher_factor(outputs(3, 2))


def test_targets() -> None:
    likelihood = FromDistribution(lambda f: distributions.Gamma(f[..., 0].exp(), f[..., 1].exp()))
    f = outputs(3, 2)
    with pytest.raises(ArgumentError, match=r"1 of 3 targets lie outside the support of Gamma"):
        likelihood.check_target(f, torch.tensor([1.0, -2.0, 3.0]))
    for call in (likelihood.check_target, likelihood.nll, likelihood.score):
        with pytest.raises(ShapeError, match=r"targets of shape \[3\], but got \[3, 1\]"):
            call(f, torch.ones(3, 1))
