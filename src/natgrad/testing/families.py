"""Output distributions as written-out formulas, independent of `natgrad.likelihood`: the other half of the oracles.

`f` has shape [*batch, C]; everything is per prediction (one element of *batch), in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev


@dataclass(frozen=True)
class Family:
    """An output distribution as formulas. nll(f, y) -> [*batch]; kl(f, g) = KL(p_f ‖ p_g) -> [*batch];
    fisher(f) = Λ(f) -> [*batch, C, C]; sample(f, n, generator) -> [n, *target shape]."""

    name: str
    nll: Callable[[Tensor, Tensor], Tensor]
    kl: Callable[[Tensor, Tensor], Tensor]
    fisher: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, int, torch.Generator], Tensor]

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """∂nll/∂f, shape [*batch, C], by autograd."""
        f = f.detach().requires_grad_()
        return torch.autograd.grad(self.nll(f, y).sum(), f)[0]

    def fisher_from_kl(self, f: Tensor) -> Tensor:
        """Λ as the Hessian of KL(p_f ‖ p_g) in g at g = f, one prediction at a time; shape [*batch, C, C]."""
        rows = f.detach().reshape(-1, f.shape[-1])
        blocks = [jacrev(jacrev(lambda g, row=row: self.kl(row, g)))(row) for row in rows]
        return torch.stack(blocks).reshape(*f.shape, f.shape[-1])

    def fisher_from_scores(self, f: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Λ estimated from n sampled scores; shape [*batch, C, C]."""
        scores = self.score(f.expand(n, *f.shape), self.sample(f, n, generator))
        return torch.einsum("n...c,n...d->...cd", scores, scores) / n


def categorical() -> Family:
    """Logits f; y integer labels."""

    def nll(f: Tensor, y: Tensor) -> Tensor:
        return torch.logsumexp(f, -1) - f.gather(-1, y.unsqueeze(-1)).squeeze(-1)

    def kl(f: Tensor, g: Tensor) -> Tensor:
        log_p = f - torch.logsumexp(f, -1, keepdim=True)
        log_q = g - torch.logsumexp(g, -1, keepdim=True)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def fisher(f: Tensor) -> Tensor:
        p = f.exp() / f.exp().sum(-1, keepdim=True)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    def sample(f: Tensor, n: int, generator: torch.Generator) -> Tensor:
        p = (f - torch.logsumexp(f, -1, keepdim=True)).exp().reshape(-1, f.shape[-1])
        return torch.multinomial(p, n, replacement=True, generator=generator).T.reshape(n, *f.shape[:-1])

    return Family("categorical", nll, kl, fisher, sample)


def multi_categorical(classes: Sequence[int]) -> Family:
    """Logits f of decisions with ``classes[k]`` classes each; y [*batch, K] integer labels.

    Written over the joint outcomes: log p(y) is linear in f up to the logarithm of Π_k Σ_c exp f_kc.
    """
    outcomes = torch.cartesian_prod(*map(torch.arange, classes)).reshape(-1, len(classes))  # [O, K]
    first = torch.tensor([sum(classes[:k]) for k in range(len(classes))])
    table = torch.zeros(len(outcomes), sum(classes), dtype=torch.float64)  # which logits an outcome adds up
    table[torch.arange(len(outcomes))[:, None], outcomes + first] = 1.0

    def log_p(f: Tensor) -> Tensor:
        return torch.log_softmax(f @ table.to(f).T, -1)

    def nll(f: Tensor, y: Tensor) -> Tensor:
        return -log_p(f).gather(-1, _mixed_radix(y, classes).unsqueeze(-1)).squeeze(-1)

    def kl(f: Tensor, g: Tensor) -> Tensor:
        return (log_p(f).exp() * (log_p(f) - log_p(g))).sum(-1)

    def fisher(f: Tensor) -> Tensor:
        chosen, p = table.to(f), log_p(f).exp()
        mean = p @ chosen
        return torch.einsum("...o,oi,oj->...ij", p, chosen, chosen) - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def sample(f: Tensor, n: int, generator: torch.Generator) -> Tensor:
        p = log_p(f).exp().reshape(-1, len(outcomes))
        drawn = torch.multinomial(p, n, replacement=True, generator=generator).T
        return outcomes[drawn].reshape(n, *f.shape[:-1], len(classes))

    return Family("multi_categorical", nll, kl, fisher, sample)


def _mixed_radix(y: Tensor, classes: Sequence[int]) -> Tensor:
    """The index of the joint outcome y, the last decision changing fastest."""
    index = torch.zeros_like(y[..., 0])
    for k, n in enumerate(classes):
        index = index * n + y[..., k]
    return index


def bernoulli() -> Family:
    """C independent logits f; y in {0, 1}, shape of f."""

    def nll(f: Tensor, y: Tensor) -> Tensor:
        return (torch.log1p(f.exp()) - y * f).sum(-1)

    def kl(f: Tensor, g: Tensor) -> Tensor:
        p = torch.sigmoid(f)
        return (p * (f - g) + torch.log1p(g.exp()) - torch.log1p(f.exp())).sum(-1)

    def fisher(f: Tensor) -> Tensor:
        p = torch.sigmoid(f)
        return torch.diag_embed(p * (1 - p))

    def sample(f: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return (torch.rand(n, *f.shape, generator=generator, dtype=f.dtype) < torch.sigmoid(f)).to(f.dtype)

    return Family("bernoulli", nll, kl, fisher, sample)


def gaussian(scale: float = 1.0) -> Family:
    """Means f with a fixed standard deviation; y has the shape of f."""

    def nll(f: Tensor, y: Tensor) -> Tensor:
        return (((y - f) / scale).square() / 2 + math.log(scale) + math.log(2 * math.pi) / 2).sum(-1)

    def kl(f: Tensor, g: Tensor) -> Tensor:
        return (f - g).square().sum(-1) / (2 * scale**2)

    def fisher(f: Tensor) -> Tensor:
        return torch.diag_embed(torch.full_like(f, 1 / scale**2))

    def sample(f: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return f + scale * torch.randn(n, *f.shape, generator=generator, dtype=f.dtype)

    return Family(f"gaussian[{scale}]", nll, kl, fisher, sample)


def gaussian_learned() -> Family:
    """f = [mean, log standard deviation]; y has half of f's last axis."""

    def nll(f: Tensor, y: Tensor) -> Tensor:
        mean, log_scale = f.chunk(2, -1)
        return (((y - mean) / log_scale.exp()).square() / 2 + log_scale + math.log(2 * math.pi) / 2).sum(-1)

    def kl(f: Tensor, g: Tensor) -> Tensor:
        (m, s), (n, t) = f.chunk(2, -1), g.chunk(2, -1)
        return (t - s + ((2 * s).exp() + (m - n).square()) / (2 * (2 * t).exp()) - 0.5).sum(-1)

    def fisher(f: Tensor) -> Tensor:
        log_scale = f.chunk(2, -1)[1]
        return torch.diag_embed(torch.cat([(-2 * log_scale).exp(), torch.full_like(log_scale, 2.0)], -1))

    def sample(f: Tensor, n: int, generator: torch.Generator) -> Tensor:
        mean, log_scale = f.chunk(2, -1)
        return mean + log_scale.exp() * torch.randn(n, *mean.shape, generator=generator, dtype=f.dtype)

    return Family("gaussian_learned", nll, kl, fisher, sample)


def poisson() -> Family:
    """Log rates f; y counts of the shape of f."""

    def nll(f: Tensor, y: Tensor) -> Tensor:
        return (f.exp() - y * f + torch.lgamma(y + 1)).sum(-1)

    def kl(f: Tensor, g: Tensor) -> Tensor:
        return (f.exp() * (f - g) + g.exp() - f.exp()).sum(-1)

    def fisher(f: Tensor) -> Tensor:
        return torch.diag_embed(f.exp())

    def sample(f: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return torch.poisson(f.exp().expand(n, *f.shape), generator=generator)

    return Family("poisson", nll, kl, fisher, sample)


def gamma() -> Family:
    """f = [log shape, log rate] of one Gamma variable (last axis 2); y > 0 of shape [*batch].
    Λ = [[a²ψ'(a), −a], [−a, a]] with a the shape."""

    def nll(f: Tensor, y: Tensor) -> Tensor:
        a, b = f[..., 0].exp(), f[..., 1].exp()
        return torch.lgamma(a) - a * f[..., 1] - (a - 1) * y.log() + b * y

    def kl(f: Tensor, g: Tensor) -> Tensor:
        a, c = f[..., 0].exp(), g[..., 0].exp()
        log_ratio = g[..., 1] - f[..., 1]
        shapes = (a - c) * torch.digamma(a) - torch.lgamma(a) + torch.lgamma(c)
        return shapes - c * log_ratio + a * (log_ratio.exp() - 1)

    def fisher(f: Tensor) -> Tensor:
        a = f[..., 0].exp()
        rows = [torch.stack([a.square() * torch.polygamma(1, a), -a], -1), torch.stack([-a, a], -1)]
        return torch.stack(rows, -2)

    def sample(f: Tensor, n: int, generator: torch.Generator) -> Tensor:
        a, b = f[..., 0].exp(), f[..., 1].exp()
        standard = torch._standard_gamma(a.expand(n, *a.shape), generator=generator)  # pyright: ignore
        return standard / b

    return Family("gamma", nll, kl, fisher, sample)
