"""Statistics of the whole batch from those of its parts.

What is added are sums and counts, never means: the processes' parts of a batch need not be of one size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from natgrad.distributed.replicas import Replicas
from natgrad.linalg import FunctionOperator, LinearOperator
from natgrad.metric import Bases, Moment, Moments, ProductStatistics, RowStatistics, Statistics, rotated_eigenvalues

Place: TypeAlias = "tuple[str, str]"
"""Block and kind of a moment."""

Form: TypeAlias = "tuple[torch.Size, torch.dtype, torch.dtype | None]"
"""Shape and dtype of a moment's sum, and the dtype of its count where it has one of its own."""


@dataclass
class StatisticsSum:
    """Adds up the statistics of all processes; remembers only in which order moments are laid out.

    Args:
        replicas: the processes.
    """

    replicas: Replicas
    _forms: dict[Place, Form] = field(default_factory=dict)

    def __call__(self, statistics: Statistics, known: Bases) -> Statistics:
        """The statistics of the whole batch, the same in every process. A collective.

        * Moments are added. Where an eigenbasis is new, each process found one from its own part: rank 0's is taken
          and the others' eigenvalues are carried over to it, so that their sum stays and each of them is approximate.
          A process whose part left a block out (an expert) adds zeros.
        * Jacobian rows are gathered, so that every process solves with the Gram matrix of the whole batch.
        * Products are added each time a product is taken.

        Args:
            statistics: those of this process's part of the batch.
            known: the eigenbases that all processes already share.
        """
        if self.replicas.group is None:
            return statistics
        if isinstance(statistics, Moments):
            return self._moments(statistics, known)
        if isinstance(statistics, RowStatistics):
            first, *others = self.replicas.gather(statistics)
            for other in others:
                first = first + other
            return first
        return self._products(statistics)

    def _moments(self, moments: Moments, known: Bases) -> Moments:
        forms = {
            (block, kind): (m.sum.shape, m.sum.dtype, None if m.count is None else m.count.dtype)
            for block, kinds in moments.values.items()
            for kind, m in kinds.items()
        }
        new = {name: basis for name, basis in moments.bases.items() if name not in known}
        unplaced, unshared = self.replicas.any(not forms.keys() <= self._forms.keys(), bool(new))
        if unplaced:
            for found in self.replicas.gather(forms):
                self._forms = {**found, **self._forms}
            self._forms = dict(sorted(self._forms.items()))
        shared: Bases = {}
        if unshared:
            for found in self.replicas.gather(new):
                shared = {**found, **shared}
        own = [self._own(place, form, moments, new, shared) for place, form in self._forms.items()]
        counts = [m.count for m in own if m.count is not None]
        totals = self.replicas.sum([moments.normaliser, *[m.sum for m in own], *counts])
        sums, counted = totals[1 : len(own) + 1], iter(totals[len(own) + 1 :])
        values: dict[str, dict[str, Moment]] = {}
        for (block, kind), moment, total in zip(self._forms, own, sums, strict=True):
            values.setdefault(block, {})[kind] = Moment(total, None if moment.count is None else next(counted))
        return Moments(values, totals[0], {**known, **shared})

    def _own(self, place: Place, form: Form, moments: Moments, new: Bases, shared: Bases) -> Moment:
        """What this process adds to the moment at ``place``."""
        (block, kind), (shape, dtype, count_dtype) = place, form
        moment = moments.values.get(block, {}).get(kind)
        if moment is None:
            zero, device = torch.zeros, moments.normaliser.device
            return Moment(
                zero(shape, dtype=dtype, device=device),
                None if count_dtype is None else zero((), dtype=count_dtype, device=device),
            )
        if kind == "eigenvalues" and block in new:
            return Moment(rotated_eigenvalues(moment.sum, new[block], shared[block]))
        return moment

    def _products(self, statistics: ProductStatistics) -> ProductStatistics:
        first = statistics.operators[0]
        operators = statistics.operators

        def product(v: Tensor) -> Tensor:
            return self.replicas.sum([_applied(operators, v)])[0]

        whole = FunctionOperator(product, first.shape, first.dtype, first.device)
        return ProductStatistics((whole,), self.replicas.sum([statistics.normaliser])[0])


def _applied(operators: tuple[LinearOperator, ...], v: Tensor) -> Tensor:
    out = operators[0].matvec(v)
    for operator in operators[1:]:
        out = out + operator.matvec(v)
    return out
