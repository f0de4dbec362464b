"""Statistics of the whole batch from those of its parts.

What is added are sums and counts, never means: the processes' parts of a batch need not be of one size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from natgrad.distributed.ownership import computed_by_owners
from natgrad.distributed.replicas import Replicas
from natgrad.errors import NatgradError
from natgrad.linalg import FunctionOperator, LinearOperator
from natgrad.metric import Bases, Moment, Moments, ProductStatistics, RowStatistics, Statistics
from natgrad.metric.eigenbasis import completed, new_basis, no_eigenvalues, projected

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

    def __call__(self, statistics: Statistics) -> Statistics:
        """The statistics of the whole batch, the same in every process. A collective.

        * Moments are added. Where an eigenbasis is new it is that of the added factors, found by one process for all,
          and each projects its own rows on it. A process whose part left a block out (an expert) adds zeros.
        * Jacobian rows are gathered, so that every process solves with the Gram matrix of the whole batch.
        * Products are added each time a product is taken.

        Args:
            statistics: those of this process's part of the batch.

        Raises:
            NonFiniteError: a factor whose eigenbasis is to be found is not finite.
        """
        if isinstance(statistics, Moments):
            if self.replicas.group is None:
                return completed(statistics)
            whole = self._moments(statistics)
            return self._completed(whole, statistics) if any(self.replicas.any(bool(statistics.rows))) else whole
        if self.replicas.group is None:
            return statistics
        if isinstance(statistics, RowStatistics):
            first, *others = self.replicas.gather(statistics)
            for other in others:
                first = first + other
            return first
        return self._products(statistics)

    def _moments(self, moments: Moments) -> Moments:
        forms = {
            (block, kind): (m.sum.shape, m.sum.dtype, None if m.count is None else m.count.dtype)
            for block, kinds in moments.values.items()
            for kind, m in kinds.items()
        }
        if any(self.replicas.any(not forms.keys() <= self._forms.keys())):
            for found in self.replicas.gather(forms):
                self._forms = {**found, **self._forms}
            self._forms = dict(sorted(self._forms.items()))
        own = [_own(place, form, moments) for place, form in self._forms.items()]
        counts = [m.count for m in own if m.count is not None]
        totals = self.replicas.sum([moments.normaliser, *[m.sum for m in own], *counts])
        sums, counted = totals[1 : len(own) + 1], iter(totals[len(own) + 1 :])
        values: dict[str, dict[str, Moment]] = {}
        for (block, kind), moment, total in zip(self._forms, own, sums, strict=True):
            values.setdefault(block, {})[kind] = Moment(total, None if moment.count is None else next(counted))
        return Moments(values, totals[0], moments.bases)

    def _completed(self, whole: Moments, own: Moments) -> Moments:
        """``whole`` with the eigenvalues of rows that waited for a basis in any process."""
        names = sorted({name for found in self.replicas.gather(list(own.rows)) for name in found})
        factors = {name: [m.sum for m in whole.values[name].values()] for name in names}
        costs = {name: float(sum(t.numel() * t.shape[-1] for t in own)) for name, own in factors.items()}
        bases: Bases = {}
        for name, found in computed_by_owners(self.replicas, costs, lambda name: new_basis(whole, name)).items():
            if isinstance(found, NatgradError):
                raise found
            bases[name] = found
        mine = projected(own, {name: basis for name, basis in bases.items() if name in own.rows}).values
        parts = [
            mine[name]["eigenvalues"].sum if name in own.rows else no_eigenvalues(whole, name, bases[name])
            for name in names
        ]
        values = dict(whole.values)
        for name, total in zip(names, self.replicas.sum(parts), strict=True):
            values[name] = {**values[name], "eigenvalues": Moment(total)}
        return Moments(values, whole.normaliser, whole.bases | bases)

    def _products(self, statistics: ProductStatistics) -> ProductStatistics:
        first = statistics.operators[0]
        operators = statistics.operators

        def product(v: Tensor) -> Tensor:
            return self.replicas.sum([_applied(operators, v)])[0]

        whole = FunctionOperator(product, first.shape, first.dtype, first.device)
        return ProductStatistics((whole,), self.replicas.sum([statistics.normaliser])[0])


def _own(place: Place, form: Form, moments: Moments) -> Moment:
    """What this process adds to the moment at ``place``."""
    (block, kind), (shape, dtype, count_dtype) = place, form
    moment = moments.values.get(block, {}).get(kind)
    if moment is not None:
        return moment
    zero, device = torch.zeros, moments.normaliser.device
    return Moment(
        zero(shape, dtype=dtype, device=device),
        None if count_dtype is None else zero((), dtype=count_dtype, device=device),
    )


def _applied(operators: tuple[LinearOperator, ...], v: Tensor) -> Tensor:
    out = operators[0].matvec(v)
    for operator in operators[1:]:
        out = out + operator.matvec(v)
    return out
