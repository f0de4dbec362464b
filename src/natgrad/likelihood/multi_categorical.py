"""Several categorical decisions at once, each with a number of classes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from natgrad.errors import ArgumentError, ShapeError
from natgrad.likelihood.base import Likelihood, Target, only_labels
from natgrad.likelihood.categorical import Categorical

_ONE = Categorical()


@dataclass(frozen=True)
class MultiCategorical(Likelihood):
    r"""y_k ~ Categorical(softmax(f_k)), independent for k = 1 … K; f = [f_1, …, f_K] holds their logits.

    classes: the number of classes of each decision; f is [*batch, Σ classes], y is [*batch, K], integers. Λ is block
    diagonal with the blocks of :class:`Categorical`; nll and KL are sums over the decisions. Logits may be −∞.
    """

    classes: Sequence[int]

    def __post_init__(self) -> None:
        classes = tuple(int(n) for n in self.classes)
        if not classes or min(classes) < 1:
            raise ArgumentError(
                f"classes must be one positive number of classes per decision, but got {self.classes!r}, "
                "for example MultiCategorical([3, 2])."
            )
        object.__setattr__(self, "classes", classes)

    def distribution(self, f: Tensor) -> Distribution:
        return _Independent([_ONE.distribution(part) for part in self._parts(f)])

    def nll(self, f: Tensor, y: Target) -> Tensor:
        labels = self._labels(f, y)
        return torch.stack([_ONE.nll(part, labels[..., k]) for k, part in enumerate(self._parts(f))]).sum(0)

    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.stack([_ONE.sample(part, n, generator=generator) for part in self._parts(f)], dim=-1)

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        pairs = zip(self._parts(f), self._parts(g), strict=True)
        return torch.stack([_ONE.kl(p, q) for p, q in pairs]).sum(0)

    def score(self, f: Tensor, y: Target) -> Tensor:
        labels = self._labels(f, y)
        return torch.cat([_ONE.score(part, labels[..., k]) for k, part in enumerate(self._parts(f))], dim=-1)

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        pairs = zip(self._parts(f), self._parts(u), strict=True)
        return torch.cat([_ONE.fisher_matvec(part, v) for part, v in pairs], dim=-1)

    def fisher_factor(self, f: Tensor) -> Tensor:
        columns, start = [], 0
        for part in self._parts(f):
            block = _ONE.fisher_factor(part)
            size = part.shape[-1]
            columns.append(torch.nn.functional.pad(block, (start, f.shape[-1] - start - size)))
            start += size
        return torch.cat(columns)

    def check_output(self, f: Tensor) -> None:
        super().check_output(f)
        if f.shape[-1] != sum(self.classes):
            raise ShapeError(
                f"{self} needs {sum(self.classes)} logits on the last axis of the output, the sum of its classes, but "
                f"got shape {list(f.shape)}."
            )

    def check_target(self, f: Tensor, y: Target) -> None:
        labels = self._labels(f, y)
        for k, part in enumerate(self._parts(f)):
            decision = labels[..., k]
            if decision.numel() and bool((decision < 0).any() | (decision >= part.shape[-1]).any()):
                raise ArgumentError(
                    f"Decision {k} of {self} has labels between {int(decision.min())} and {int(decision.max())}, but "
                    f"they must lie between 0 and {part.shape[-1] - 1}."
                )

    def _parts(self, f: Tensor) -> tuple[Tensor, ...]:
        return f.split(list(self.classes), dim=-1)

    def _labels(self, f: Tensor, y: Target) -> Tensor:
        labels = only_labels(y, self)
        wanted = (*f.shape[:-1], len(self.classes))
        if labels.shape != wanted or labels.is_floating_point():
            raise ShapeError(
                f"{self} with an output of shape {list(f.shape)} needs integer targets of shape {list(wanted)}, one "
                f"per decision, but got {labels.dtype} {list(labels.shape)}."
            )
        return labels


class _Independent(Distribution):
    """Independent categorical variables, stacked on the last axis of the event."""

    def __init__(self, parts: list[Distribution]) -> None:
        self.parts = parts
        super().__init__(parts[0].batch_shape, torch.Size([len(parts)]), validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # pyright: ignore
        return torch.stack([p.sample(sample_shape) for p in self.parts], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.stack([p.log_prob(v) for p, v in zip(self.parts, value.unbind(-1), strict=True)]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([p.entropy() for p in self.parts]).sum(0)
