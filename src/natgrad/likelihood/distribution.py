"""A likelihood from any torch distribution: KL and Fisher matrix by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    Laplace,
    Pareto,
    Transform,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)

from natgrad.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError, UnsupportedError
from natgrad.likelihood._math import expm1_minus, promote
from natgrad.likelihood.base import Likelihood, Target, only_labels


@dataclass(frozen=True)
class FromDistribution(Likelihood):
    r"""p(y | f) = builder(f), any torch distribution whose log_prob is differentiable in f.

    builder: maps an output [*batch, C] to a distribution of batch shape [*batch], each prediction by itself, e.g.
        `lambda f: Normal(f[..., 0], f[..., 1].exp())`. Further batch axes become part of the target, so that
        `lambda f: Normal(f, 1.0)` has targets [*batch, C]. It must map every real f to valid parameters (exp,
        softplus, …).
    samples: None, or the number of draws that estimate the KL divergence where torch has no usable closed form.
    seed: of those draws.

    The KL divergence is torch's closed form, and Λ is its Hessian in g at g = f, by C backward passes; exact. The
    families without one (StudentT, NegativeBinomial, mixtures, distributions transformed with learned parameters, …)
    raise UnsupportedError unless `samples` is given. Then, with y_i ~ p_f drawn from a private stream that always
    starts at `seed` and r = log p_g(y) − log p_f(y), KL ≈ mean(e^r − 1 − r): unbiased, never negative, deterministic,
    differentiable in g only; its Hessian is Λ ≈ mean(s sᵀ) of the scores of the same draws, of rank ≤ samples.
    """

    builder: Callable[[Tensor], Distribution]
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.builder) or isinstance(self.builder, type):
            raise ArgumentError(
                f"builder must be a function from the output [*batch, C] to a torch distribution, but got "
                f"{self.builder!r}. Say how the output parametrises it: "
                "FromDistribution(lambda f: Normal(f[..., 0], f[..., 1].exp()))."
            )
        if self.samples is not None and self.samples < 1:
            raise ArgumentError(f"samples must be a positive number of draws or None, but got {self.samples}.")

    def distribution(self, f: Tensor) -> Distribution:
        built = self.builder(promote(f))
        if not isinstance(built, Distribution):
            raise ArgumentError(
                f"The builder of FromDistribution returned {type(built).__name__} instead of a torch distribution."
            )
        batch = f.shape[:-1]
        extra = len(built.batch_shape) - len(batch)
        if extra < 0 or built.batch_shape[: len(batch)] != batch:
            raise ShapeError(
                f"For an output of shape {list(f.shape)} the builder returned a {_family(built)} of batch shape "
                f"{list(built.batch_shape)}, which should begin with {list(batch)}: one distribution per prediction. "
                "Index the output from the end (f[..., 0], not f[:, 0] or f.squeeze())."
            )
        return Independent(built, extra, validate_args=False) if extra else built

    def nll(self, f: Tensor, y: Target) -> Tensor:
        distribution = self.distribution(f)
        return -distribution.log_prob(_labels(distribution, f, y, self))

    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        distribution = self.distribution(f.detach())
        with torch.no_grad():
            if generator is None:
                return distribution.sample(torch.Size([n]))
            # torch.distributions draw from the global stream only: lend them a private one, seeded by the generator.
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            with _private_stream(int(seed), f.device):
                return distribution.sample(torch.Size([n]))

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        p, q = self.distribution(f), self.distribution(g)
        try:
            return _closed_form(p, q)
        except UnsupportedError:
            raise
        except NotImplementedError as error:
            if self.samples is None:
                raise UnsupportedError(
                    f"The KL divergence between {_family(p)} distributions, and with it the Fisher matrix, has no "
                    f"usable closed form in torch ({error}). Estimate it from draws, "
                    "FromDistribution(builder, samples=1000), register one with torch.distributions.kl.register_kl, "
                    "or use the empirical Fisher matrix, which needs the gradient of nll alone."
                ) from None
        with torch.no_grad(), _private_stream(self.seed, f.device):
            y = p.sample(torch.Size([self.samples]))
        return expm1_minus(q.log_prob(y) - p.log_prob(y).detach()).mean(0)

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            g, gradient = self._kl_gradient(f)
            (product,) = torch.autograd.grad((gradient * promote(u).detach()).sum(), g, materialize_grads=True)
        return product

    def fisher_factor(self, f: Tensor) -> Tensor:
        """Columns √λ_k v_k [C, *batch, C] from the eigenvectors v_k of Λ; eigenvalues below zero by rounding are zero.

        Raises NonFiniteError or NotPositiveDefiniteError where Λ is not a positive semi-definite matrix.
        """
        with torch.enable_grad():
            g, gradient = self._kl_gradient(f)
            rows = [
                torch.autograd.grad(gradient[..., c].sum(), g, retain_graph=True, materialize_grads=True)[0]
                for c in range(f.shape[-1])
            ]
        matrix = torch.stack(rows, dim=-2)
        if not bool(matrix.isfinite().all()):
            raise NonFiniteError(
                f"The Fisher matrix of {_family(self.distribution(f))} is not finite at outputs between "
                f"{float(f.min()):.4g} and {float(f.max()):.4g}. The parameters have overflowed or left their domain: "
                "bound them in the builder (softplus rather than exp, clamp), or compute in float64."
            )
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        floor = values.abs().amax(-1) * torch.finfo(values.dtype).eps ** 0.5
        if bool((values[..., 0] < -floor).any()):
            raise NotPositiveDefiniteError(
                f"The Hessian of the KL divergence of {_family(self.distribution(f))} has a negative eigenvalue "
                f"{float(values[..., 0].min()):.4g} (largest: {float(values.max()):.4g}), but a Fisher matrix has "
                "none. The registered KL is not that of the density, or it is not smooth where both distributions "
                "coincide: estimate it from draws, FromDistribution(builder, samples=1000)."
            )
        return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).movedim(-1, 0)

    def check_output(self, f: Tensor) -> None:
        super().check_output(f)
        self.distribution(f)

    def check_target(self, f: Tensor, y: Target) -> None:
        distribution = self.distribution(f)
        labels = _labels(distribution, f, y, self)
        try:
            inside = distribution.support.check(labels)  # pyright: ignore[reportOptionalMemberAccess]
        except NotImplementedError:
            return
        if not bool(inside.all()):
            raise ArgumentError(
                f"{int((~inside).sum())} of {inside.numel()} targets lie outside the support of "
                f"{_family(distribution)}, {distribution.support}; they are between {float(labels.min()):.4g} and "
                f"{float(labels.max()):.4g}. Transform the targets, or choose a family that contains them."
            )

    def _kl_gradient(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """(g, ∂ Σ_batch KL(p_f ‖ p_g)/∂g) at g = f, with its graph: zero in value, Λ in its derivative."""
        f = promote(f).detach()
        g = f.clone().requires_grad_()
        divergence = self.kl(f, g)
        if not divergence.requires_grad:
            raise ArgumentError(
                f"The distribution that the builder returned ({_family(self.distribution(f))}) does not depend "
                "differentiably on the output. Do not detach, convert to Python numbers or round inside the builder."
            )
        (gradient,) = torch.autograd.grad(divergence.sum(), g, create_graph=True)
        return g, gradient


def _labels(distribution: Distribution, f: Tensor, y: Target, likelihood: FromDistribution) -> Tensor:
    labels = only_labels(y, likelihood)
    wanted = distribution.batch_shape + distribution.event_shape
    if labels.shape != wanted:
        raise ShapeError(
            f"An output of shape {list(f.shape)} gives {_family(distribution)} with targets of shape {list(wanted)}, "
            f"but got {list(labels.shape)}. Nothing is broadcast: use target.reshape(...) if the sizes agree."
        )
    return labels


def _closed_form(p: Distribution, q: Distribution) -> Tensor:
    """KL(p ‖ q) twice differentiable where p and q coincide; NotImplementedError where torch has none that is."""
    if isinstance(p, Independent) and isinstance(q, Independent):
        inner = _closed_form(p.base_dist, q.base_dist)
        return inner.flatten(-p.reinterpreted_batch_ndims).sum(-1) if p.reinterpreted_batch_ndims else inner
    if isinstance(p, Laplace) and isinstance(q, Laplace):
        return _laplace_kl(p, q)
    if isinstance(p, (Uniform, Pareto)):
        raise UnsupportedError(
            f"{type(p).__name__} has a support that depends on its parameters, so that KL(p_f ‖ p_g) is not smooth at "
            "g = f and there is no Fisher matrix. Model bounded targets with Beta, heavy tails with StudentT or a "
            "LogNormal."
        )
    if (
        isinstance(p, TransformedDistribution)
        and not _has_own_kl(type(p))
        and any(_has_tensors(t) for t in p.transforms)
    ):
        # torch compares the transforms by value and, where they agree, takes the KL of the bases: at g = f the
        # dependence on the transforms' parameters would silently be lost.
        raise NotImplementedError("its transforms carry parameters")
    return kl_divergence(p, q)


def _laplace_kl(p: Laplace, q: Laplace) -> Tensor:
    """KL of Laplace distributions, log(b_q/b_p) + (|d| + b_p e^{−|d|/b_p})/b_q − 1 with d the distance of locations.

    torch's own has zero second derivative in the location at d = 0, where sign(d) = 0; with one-sided |d| the two
    kinks cancel as they do on paper.
    """
    d = p.loc - q.loc
    distance = torch.where(d >= 0, d, -d) / p.scale
    log_ratio = p.scale.log() - q.scale.log()
    # b_p/b_q (φ(−|d|/b_p) + 1) − 1 − log(b_p/b_q)
    return log_ratio.exp() * expm1_minus(-distance) + expm1_minus(log_ratio)


def _has_own_kl(family: type[Distribution]) -> bool:
    """Whether a KL is registered for this very subclass of TransformedDistribution, as for Gumbel."""
    registry = getattr(torch.distributions.kl, "_KL_REGISTRY", {})
    return family is not TransformedDistribution and (family, family) in registry


def _has_tensors(transform: Transform) -> bool:
    """Whether the transform, or one it is made of, holds a tensor."""
    seen: set[int] = set()  # a transform and its inverse refer to each other
    waiting = [transform]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for name, value in vars(current).items():
            parts = value if isinstance(value, (list, tuple)) else (value,)
            if name != "_cached_x_y" and any(isinstance(part, Tensor) for part in parts):
                return True
            waiting += [part for part in parts if isinstance(part, Transform)]
    return False


def _family(distribution: Distribution) -> str:
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return type(distribution).__name__


@contextmanager
def _private_stream(seed: int, device: torch.device) -> Iterator[None]:
    """The global random streams of the CPU and of `device` start at `seed` inside, and are untouched afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        # not torch.manual_seed: it would reseed accelerators that were not saved
        torch.default_generator.manual_seed(seed)
        if devices:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield
