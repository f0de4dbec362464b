"""The Bernoulli likelihood: binary and multi-label classification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Independent

from natgrad.errors import ArgumentError
from natgrad.likelihood._math import diagonal_columns, promote, relative_entropy
from natgrad.likelihood.base import Likelihood, Target, check_elementwise


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    r"""y_c ~ Bernoulli(σ(f_c)), independently for each of the C logits of f [*batch, C].

    Targets: shape [*batch, C], numbers in [0, 1] (or bool); between 0 and 1 they are soft targets. nll sums over the C
    logits, whereas `binary_cross_entropy_with_logits(reduction="mean")` also divides by C.

    With p = σ(f): score = p − y, Λ = diag(p(1 − p)).
    """

    def distribution(self, f: Tensor) -> Distribution:
        each = torch.distributions.Bernoulli(logits=promote(f), validate_args=False)
        return Independent(each, 1, validate_args=False)

    def nll(self, f: Tensor, y: Target) -> Tensor:
        f = promote(f)
        y = check_elementwise(self, f, y).to(f.dtype)
        return -(y * F.logsigmoid(f) + (1 - y) * F.logsigmoid(-f)).sum(-1)

    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        p = torch.sigmoid(promote(f.detach()))
        uniform = torch.rand((n, *f.shape), dtype=p.dtype, device=p.device, generator=generator)
        return (uniform < p).to(p.dtype)

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        f, g = promote(f), promote(g)
        ones = relative_entropy(F.logsigmoid(f), F.logsigmoid(g))
        zeros = relative_entropy(F.logsigmoid(-f), F.logsigmoid(-g))
        return (ones + zeros).sum(-1)

    def score(self, f: Tensor, y: Target) -> Tensor:
        f = promote(f)
        return torch.sigmoid(f) - check_elementwise(self, f, y).to(f.dtype)

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        f = promote(f)
        return torch.sigmoid(f) * torch.sigmoid(-f) * promote(u)

    def fisher_factor(self, f: Tensor) -> Tensor:
        f = promote(f)
        return diagonal_columns((0.5 * (F.logsigmoid(f) + F.logsigmoid(-f))).exp())

    def check_target(self, f: Tensor, y: Target) -> None:
        labels = check_elementwise(self, f, y)
        if labels.numel() == 0:
            return
        low, high = labels.to(torch.float64 if labels.dtype == torch.float64 else torch.float32).aminmax()
        if not bool((low >= 0) & (high <= 1)):
            raise ArgumentError(
                f"Targets of {self} are probabilities of the event, between 0 and 1, but got values between "
                f"{float(low):.4g} and {float(high):.4g}. Labels −1/+1 become (target + 1) / 2; class indices belong "
                "to natgrad.Categorical."
            )
