"""Conformance of a likelihood, built in or the user's own: the laws that natural gradient rests on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.likelihood import Likelihood, Target


def check_likelihood(
    likelihood: Likelihood,
    f: Tensor,
    y: Target | None = None,
    *,
    samples: int = 20_000,
    tolerance: float = 1e-8,
    allowance: float = 0.0,
    seed: int = 0,
) -> None:
    """Raises AssertionError, naming the law, unless `likelihood` obeys the laws of a likelihood at the outputs f.

    f: outputs [N, *positions, C], float64, a few predictions with moderate parameters. y: targets; sampled if None.
    samples: draws for the laws in expectation, which have to hold within 6 standard errors. tolerance: of the exact
    laws, relative. allowance: an additional relative error of the laws in expectation, for likelihoods whose KL is
    itself estimated (FromDistribution(samples=...)).

    Laws. With Λ the Hessian in g of KL(p_f ‖ p_g) at g = f: the factor's columns satisfy Σ s sᵀ = Λ; fisher_matvec is
    the product with Λ; KL ≥ 0, with value and gradient zero at g = f; score = ∂nll/∂f; nll = −log_prob of
    `distribution`; sampled labels give E[score] = 0, E[score scoreᵀ] = Λ, E[log p_f − log p_g] = KL and, where the
    outcomes can be listed, their probabilities as frequencies; sampling repeats with the generator's seed and leaves
    the global random stream alone. Weighted likelihoods: weights scale nll and score, and nothing else.
    """
    if f.dtype != torch.float64 or f.ndim < 2:
        raise ArgumentError(
            f"check_likelihood needs float64 outputs [N, *positions, C], but got {f.dtype} of shape {list(f.shape)}: "
            "the laws are checked to a tolerance that lower precision cannot meet. Use f.double()."
        )
    f = f.detach()
    model = likelihood.unweighted
    likelihood.check_output(f)
    check_sampling(model, f, samples=samples, seed=seed)
    check_kl(model, f, tolerance=tolerance)
    check_fisher(likelihood, f, tolerance=tolerance)
    check_expectations(model, f, samples=samples, allowance=allowance, seed=seed)
    labels = model.sample(f, generator=_generator(f, seed))[0]
    check_nll(model, f, labels, tolerance=tolerance)
    if y is not None:
        likelihood.check_target(f, y)
        check_score(likelihood, f, y, tolerance=tolerance)
    if model is not likelihood and y is not None:
        check_weights(likelihood, f, y)


def hessian_of_kl(likelihood: Likelihood, f: Tensor) -> Tensor:
    """∂²/∂g² KL(p_f ‖ p_g) at g = f, shape [*batch, C, C], by one backward pass per output."""
    g = f.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.kl(f, g).sum(), g, create_graph=True)
    rows = [
        torch.autograd.grad(gradient[..., c].sum(), g, retain_graph=True, materialize_grads=True)[0]
        for c in range(f.shape[-1])
    ]
    return torch.stack(rows, dim=-2)


def check_fisher(likelihood: Likelihood, f: Tensor, *, tolerance: float = 1e-8) -> None:
    """Factor and matvec against the Hessian of the KL divergence."""
    fisher = hessian_of_kl(likelihood, f)
    columns = likelihood.fisher_factor(f)
    _require(columns.shape[1:] == f.shape, f"fisher_factor has shape {list(columns.shape)}, not [K, {list(f.shape)}]")
    product = torch.einsum("k...i,k...j->...ij", columns, columns)
    _require_close(product, fisher, tolerance, "fisher_factor: Σ_k s_k s_kᵀ must be the Hessian of the KL divergence")
    for c in range(f.shape[-1]):
        unit = torch.zeros_like(f)
        unit[..., c] = 1.0
        column = likelihood.fisher_matvec(f, unit)
        _require_close(column, fisher[..., c], tolerance, "fisher_matvec must multiply by the Hessian of the KL")


def check_kl(likelihood: Likelihood, f: Tensor, *, tolerance: float = 1e-8) -> None:
    """KL ≥ 0 per prediction; value and gradient vanish where both outputs agree."""
    batch = f.shape[:-1]
    g = f.clone().requires_grad_()
    divergence = likelihood.kl(f, g)
    same = divergence.detach()
    _require(same.shape == batch, f"kl has shape {list(same.shape)}, not one value per prediction, {list(batch)}")
    _require(
        bool((same.abs() <= tolerance).all()), f"KL(p_f ‖ p_f) must be 0, but is up to {float(same.abs().max()):.3g}"
    )
    (gradient,) = torch.autograd.grad(divergence.sum(), g)
    _require(bool((gradient.abs() <= tolerance).all()), "the gradient of KL(p_f ‖ p_g) in g must vanish at g = f")
    generator = _generator(f, 1)
    for size in (1e-3, 0.1, 1.0):
        step = size * torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)
        value = likelihood.kl(f, f + step)
        _require(bool((value >= 0).all()), f"KL(p_f ‖ p_g) must not be negative, but is {float(value.min()):.3g}")


def check_nll(likelihood: Likelihood, f: Tensor, y: Tensor, *, tolerance: float = 1e-8) -> None:
    """nll is −log_prob of `distribution`, per prediction, and score its gradient."""
    value = likelihood.nll(f, y)
    batch = f.shape[:-1]
    _require(value.shape == batch, f"nll has shape {list(value.shape)}, not one value per prediction, {list(batch)}")
    _require_close(
        value, -likelihood.distribution(f).log_prob(y), tolerance, "nll must be −log_prob of distribution(f)"
    )
    check_score(likelihood, f, y, tolerance=tolerance)


def check_score(likelihood: Likelihood, f: Tensor, y: Target, *, tolerance: float = 1e-8) -> None:
    """score is the gradient of nll, weights included."""
    g = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.nll(g, y).sum(), g)
    _require_close(likelihood.score(f, y), gradient, tolerance, "score must be ∂nll/∂f")


def check_sampling(likelihood: Likelihood, f: Tensor, *, samples: int = 20_000, seed: int = 0) -> None:
    """Draws come from the generator alone, are valid targets, and have the right frequencies where these are finite."""
    before = torch.get_rng_state()
    first = likelihood.sample(f, 3, generator=_generator(f, seed))
    _require(bool(torch.equal(before, torch.get_rng_state())), "sample must not touch the global random stream")
    again = likelihood.sample(f, 3, generator=_generator(f, seed))
    _require(bool(torch.equal(first, again)), "sample must repeat with the same seed of its generator")
    generator = _generator(f, seed)
    successive = [likelihood.sample(f, 3, generator=generator) for _ in range(8)]
    _require(
        any(not torch.equal(successive[0], other) for other in successive[1:]), "sample must advance its generator"
    )
    _require(first.shape[0] == 3, f"sample(f, 3) must put the draws on the first axis, but has {list(first.shape)}")
    likelihood.check_target(f, first[0])
    distribution = likelihood.distribution(f)
    if not distribution.has_enumerate_support or distribution.event_shape:
        return
    drawn = likelihood.sample(f, samples, generator=_generator(f, seed))
    for outcome in distribution.enumerate_support():
        p = distribution.log_prob(outcome).exp()
        frequency = (drawn == outcome).to(p.dtype).mean(0)
        error = 6 * (p * (1 - p) / samples).sqrt() + 6 / samples
        _require(bool(((frequency - p).abs() <= error).all()), "sampled frequencies must be the probabilities")


def check_expectations(
    likelihood: Likelihood, f: Tensor, *, samples: int = 20_000, allowance: float = 0.0, seed: int = 0
) -> None:
    """E[score] = 0, E[score scoreᵀ] = Λ and E[log p_f − log p_g] = KL over labels drawn from the model."""
    y = likelihood.sample(f, samples, generator=_generator(f, seed))
    repeated = f.expand(samples, *f.shape)
    score = likelihood.score(repeated, y)
    _require_mean(score, torch.zeros_like(f), 0.0, "E[score] over the model's own labels must be 0")
    columns = likelihood.fisher_factor(f)
    fisher = torch.einsum("k...i,k...j->...ij", columns, columns)
    outer = score.unsqueeze(-1) * score.unsqueeze(-2)
    _require_mean(outer, fisher, allowance, "E[score scoreᵀ] over the model's own labels must be the Fisher matrix")
    step = torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=_generator(f, 2))
    # far enough for KL(p_f ‖ p_g) and KL(p_g ‖ p_f), which agree to second order, to differ
    g = f + 0.8 * step
    ratio = likelihood.nll(g.expand_as(repeated), y) - likelihood.nll(repeated, y)
    _require_mean(ratio, likelihood.kl(f, g), allowance, "E[log p_f − log p_g] must be KL(p_f ‖ p_g)")


def check_weights(likelihood: Likelihood, f: Tensor, y: Target) -> None:
    """Weights are one non-negative number per prediction; where they vanish so do loss and score."""
    for name, weight in (
        ("weights", likelihood.weights(f, y)),
        ("curvature_weights", likelihood.curvature_weights(f, y)),
    ):
        if weight is None:
            continue
        _require(weight.shape == f.shape[:-1], f"{name} has shape {list(weight.shape)}, not {list(f.shape[:-1])}")
        _require(bool((weight >= 0).all() & weight.isfinite().all()), f"{name} must be finite and not negative")
    weight = likelihood.curvature_weights(f, y)
    if weight is not None:
        dropped = weight == 0
        _require(bool((likelihood.nll(f, y)[dropped] == 0).all()), "nll must be 0 where there is no curvature")
        _require(bool((likelihood.score(f, y)[dropped] == 0).all()), "score must be 0 where there is no curvature")
    g = f + 0.1
    pairs: list[tuple[str, Callable[[Likelihood], Tensor]]] = [
        ("kl", lambda one: one.kl(f, g)),
        ("fisher_factor", lambda one: one.fisher_factor(f)),
        ("fisher_matvec", lambda one: one.fisher_matvec(f, g)),
        ("sample", lambda one: one.sample(f, 2, generator=_generator(f, 3))),
    ]
    for name, method in pairs:
        same = torch.equal(method(likelihood), method(likelihood.unweighted))
        _require(same, f"{name} of a weighted likelihood must be that of the likelihood without its weights")


def _generator(f: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(device=f.device).manual_seed(seed)


def _require(holds: bool, law: str) -> None:
    if not holds:
        raise AssertionError(law)


def _require_close(got: Tensor, wanted: Tensor, tolerance: float, law: str) -> None:
    _require(got.shape == wanted.shape, f"{law}: shape {list(got.shape)} instead of {list(wanted.shape)}")
    error = (got - wanted).abs().max()
    bound = tolerance * (1.0 + wanted.abs().max())
    _require(bool(error <= bound), f"{law}: off by {float(error):.3g}, allowed {float(bound):.3g}")


def _require_mean(draws: Tensor, wanted: Tensor, allowance: float, law: str) -> None:
    """The mean over the first axis lies within 6 standard errors (and `allowance`) of `wanted`."""
    error = (draws.mean(0) - wanted).abs()
    bound = 6 * draws.std(0) / draws.shape[0] ** 0.5 + allowance * wanted.abs().max() + 1e-9
    _require(
        bool((error <= bound).all()), f"{law}: off by up to {float((error / bound).max()):.3g} times what is allowed"
    )
