"""Which parameters the layers' rules serve: learned from real passes, and how each parameter is treated as a result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.distributed import Replicas
from natgrad.likelihood import Likelihood
from natgrad.metric import Metric
from natgrad.network import (
    Division,
    Partition,
    Pass,
    Tape,
    division_of,
    trainable_parameters,
    unreached_parameters,
)
from natgrad.optim.naming import Renaming, names_after, names_here


@dataclass(frozen=True)
class CoverageRow:
    """How one parameter is treated.

    Attributes:
        parameter: qualified name.
        shape: its shape.
        block: name of the curvature block it belongs to.
        treatment: the structure it gets.
        reason: why, where it is not what the structure's name says.
    """

    parameter: str
    shape: tuple[int, ...]
    block: str
    treatment: str
    reason: str


def coverage_rows(metric: Metric, partition: Partition, undivided: str = "") -> list[CoverageRow]:
    """One row per trainable parameter, in the order of the blocks; ``undivided``: why whole batches are taken."""
    note = f"statistics of whole batches: {undivided}" if undivided else ""
    rows: list[CoverageRow] = []
    for block in partition.blocks:
        for cell in block.cells:
            treatment, reason = metric.reason(cell)
            reason = "; ".join(part for part in (reason, note) if part)
            for name, shape in zip(cell.parameters, cell.shapes, strict=True):
                rows.append(CoverageRow(name, tuple(shape), block.name, treatment, reason))
    return rows


@dataclass
class Examination:
    """What the passes so far have shown.

    Attributes:
        uncovered: parameters that no layer rule may serve, with the reason; None before the first finite pass.
        unreached: parameters on which no observed output has depended yet.
        alone: whether no pass with more than one row was examined.
        stale: whether blocks made before the last examination are out of date.
        again: whether the next pass is examined as the first one was, because another module is observed now.
        division: how batches are divided; None before it was asked for and could be told.
    """

    uncovered: dict[str, str] | None = None
    unreached: frozenset[str] = field(default_factory=frozenset)
    alone: bool = False
    stale: bool = False
    again: bool = False
    division: Division | None = None
    _agreed: dict[str, Any] | None = None

    def shared(self, replicas: Replicas) -> tuple[Examination, bool]:
        """What the passes of all processes have shown together, and whether each had seen the same. A collective.

        A parameter must be served by its layer's rule everywhere or nowhere; it counts as reached where any process
        reached it.
        """
        if not any(replicas.any(self.state() != self._agreed)):
            return self, True
        found: list[dict[str, Any]] = replicas.gather(self.state())
        served = [state["uncovered"] for state in found if state["uncovered"] is not None]
        uncovered: dict[str, str] | None = {n: why for state in reversed(served) for n, why in state.items()}
        uncovered = dict(sorted(uncovered.items())) if served else None
        unreached = frozenset.intersection(*[frozenset(state["unreached"]) for state in found])
        agreed = all((state["uncovered"] or {}).keys() == (uncovered or {}).keys() for state in found)
        alone = all(state["alone"] for state in found)
        whole = next((state["division"] for state in found if state["division"] and state["division"][1]), None)
        division = self.division if whole is None else Division((), whole[1])
        merged = Examination(uncovered, unreached, alone, self.stale or not agreed, self.again, division)
        merged._agreed = merged.state()
        return merged, agreed

    def possible(self, tape: Tape) -> bool:
        """Whether this pass can be examined: the first one must be finite, for nothing can be told from NaN."""
        if self.uncovered is not None and not self.again:
            return True
        seen = [_output(tape), *(use.input for uses in tape.uses.values() for use in uses)]
        return all(bool(torch.isfinite(t).all()) for t in seen)

    def examine(
        self,
        metric: Metric,
        likelihood: Likelihood,
        tape: Tape,
        generator: torch.Generator,
        partition: Partition | None = None,
    ) -> bool:
        """Learn from the first pass, and from a later one where it can show more; whether it did, and drew numbers.

        A later pass can show more where it reaches parameters that none reached before (an expert), where it reaches
        some without a call of the layer that serves them in ``partition``, or where it is the first with more than one
        row: with one, every axis looks like the batch.
        """
        first, alone = self.uncovered is None or self.again, _output(tape).shape[0] == 1
        names = tuple(trainable_parameters(tape.model)) if first else tuple(sorted(self.unreached))
        unreached = unreached_parameters(tape, names)
        seen = unreached == self.unreached and (alone or not self.alone)
        if not first and seen and not _bypassed(tape, partition):
            return False
        found, known = metric.examine(tape, likelihood, generator), self.uncovered or {}
        self.stale = found.keys() != known.keys() if self.again else not found.keys() <= known.keys()
        self.uncovered = found if self.again else {**found, **known}
        self.unreached, self.alone, self.again = unreached, alone, False
        return True

    @property
    def settled(self) -> bool:
        """Whether a pass that calls the same layers has nothing new to show."""
        return self.uncovered is not None and not (self.again or self.unreached or self.stale or self.alone)

    def divide(self, observed: Pass, tape: Tape) -> None:
        """Learn how batches are divided, where it is not known yet."""
        if self.division is None:
            self.division = division_of(observed, tape)

    @property
    def undivided(self) -> str:
        """Why statistics are of whole batches where the metric asks for parts; empty where they are not."""
        return "" if self.division is None else self.division.whole

    def carried(self, before: nn.Module | None, after: nn.Module) -> Examination:
        """What is known of the parameters where ``after`` is observed in place of ``before`` (None: of none yet)."""
        if before is after:
            return self
        name = names_here(after) if before is None else names_after(before, after)
        return replace(self.renamed(name), again=self.again or before is not None, division=None)

    def renamed(self, name: Renaming) -> Examination:
        """The same of parameters that are called otherwise."""
        uncovered = None if self.uncovered is None else {name(n): why for n, why in self.uncovered.items()}
        return replace(self, uncovered=uncovered, unreached=frozenset(map(name, self.unreached)), _agreed=None)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        division = None if self.division is None else (list(self.division.places), self.division.whole)
        unreached = sorted(self.unreached)
        return {"uncovered": self.uncovered, "unreached": unreached, "alone": self.alone, "division": division}

    @staticmethod
    def restored(state: dict[str, Any]) -> Examination:
        """What :meth:`state` gave."""
        kept = state.get("division")
        division = None if kept is None else Division(tuple(kept[0]), kept[1])
        return Examination(state["uncovered"], frozenset(state["unreached"]), state["alone"], division=division)


def _bypassed(tape: Tape, partition: Partition | None) -> bool:
    """Whether the pass uses parameters of a layer that it did not call: nothing was seen of them."""
    cells = () if partition is None else partition.cells
    unseen = [c for c in cells if c.sites and not any(tape.uses.get(site.module) for site in c.sites)]
    absent = [n for c in unseen for n in c.parameters]
    known = trainable_parameters(tape.model) if absent else {}
    absent = [n for n in absent if n in known]
    return bool(absent) and len(unreached_parameters(tape, absent)) < len(absent)


def _output(tape: Tape) -> Tensor:
    assert tape.output is not None
    return tape.output
