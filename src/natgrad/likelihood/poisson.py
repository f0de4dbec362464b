"""The Poisson likelihood: counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from natgrad.errors import ArgumentError
from natgrad.likelihood._math import diagonal_columns, promote, relative_entropy
from natgrad.likelihood.base import Likelihood, Target, check_elementwise


@dataclass(frozen=True)
class Poisson(Likelihood):
    r"""y_c ~ Poisson(exp f_c), independently for each of the C log rates of f [*batch, C].

    Targets: counts, shape [*batch, C]. An exposure enters as an offset of the output, f + log exposure. With
    r = exp f: score = r − y, Λ = diag(r). nll includes log y!, which `torch.nn.PoissonNLLLoss` leaves out.
    """

    def distribution(self, f: Tensor) -> Distribution:
        rate = promote(f).exp()
        return Independent(torch.distributions.Poisson(rate, validate_args=False), 1, validate_args=False)

    def nll(self, f: Tensor, y: Target) -> Tensor:
        f = promote(f)
        y = check_elementwise(self, f, y).to(f.dtype)
        return (f.exp() - y * f + torch.lgamma(y + 1)).sum(-1)

    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        rate = promote(f.detach()).exp()
        return torch.poisson(rate.expand(n, *f.shape), generator=generator)

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        return relative_entropy(promote(f), promote(g)).sum(-1)

    def score(self, f: Tensor, y: Target) -> Tensor:
        f = promote(f)
        return f.exp() - check_elementwise(self, f, y).to(f.dtype)

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        return promote(f).exp() * promote(u)

    def fisher_factor(self, f: Tensor) -> Tensor:
        return diagonal_columns((0.5 * promote(f)).exp())

    def check_target(self, f: Tensor, y: Target) -> None:
        labels = check_elementwise(self, f, y)
        if labels.numel() == 0:
            return
        values = labels.to(torch.float64)
        low, whole = values.min(), (values == values.round()).all()
        if not bool((low >= 0) & whole):
            raise ArgumentError(
                f"Targets of {self} are counts 0, 1, 2, …, but got {'fractions' if not bool(whole) else 'integers'} "
                f"with a smallest value of {float(low):.4g}. Rates per exposure have to be turned into counts, with "
                "the exposure as an offset of the output: f + log(exposure)."
            )
