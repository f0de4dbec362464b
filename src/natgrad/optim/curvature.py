"""The curvature an optimizer carries from step to step: averaged moments, eigenbases and inverses, kept as tensors.

Everything that must survive a checkpoint lives in the optimizer's per-parameter state, under the first parameter of
the block it belongs to, as plain tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.distributed import Replicas, computed_by_owners, owners
from natgrad.errors import NatgradError, NonFiniteError, NotPositiveDefiniteError
from natgrad.linalg import MATRICES, IdentityMatrix, Inverse, LinearOperator, Solver, found_in, named_tensors
from natgrad.linalg.packed import unpacked, width_of
from natgrad.metric import Bases, Basis, Euclidean, Metric, Moments, Statistics
from natgrad.metric.storage import whole
from natgrad.network import BlockVector, Partition
from natgrad.optim.averages import AVERAGE, WEIGHT, Averages
from natgrad.optim.stacks import Stacks, inverted_together
from natgrad.step import Damping

_TOLERATED_FAILURES = 3
_BASIS, _INVERSE = "basis.", "inverse."
STATE_PREFIXES = (AVERAGE, WEIGHT, _BASIS, _INVERSE)


class Curvature:
    """Metric operators and damped inverses per block.

    Args:
        metric: what is estimated.
        partition: blocks of the model.
        parameters: trainable parameters by name.
        state: the optimizer's per-parameter state.
        decay: weight of the past in the averages.
        replicas: the processes that share the work.
    """

    def __init__(
        self,
        metric: Metric,
        partition: Partition,
        parameters: Mapping[str, nn.Parameter],
        state: MutableMapping[Any, Any],
        decay: float,
        replicas: Replicas = Replicas(),
    ) -> None:
        self.metric, self.partition, self.decay, self._replicas = metric, partition, decay, replicas
        self._storage = metric.storage
        self._slots: dict[str, Any] = {b.name: state[parameters[b.parameters[0]]] for b in partition.blocks}
        self._averages = Averages(self._slots)
        self.operators: dict[str, LinearOperator] = {}
        self.inverses: dict[str, LinearOperator] = {}
        self._stacks = Stacks()
        self.failures = 0
        if isinstance(metric, Euclidean):
            for block in partition.blocks:
                p = parameters[block.parameters[0]]
                self.operators[block.name] = IdentityMatrix(block.size, p.dtype, p.device)
            self.inverses = dict(self.operators)
        else:
            self._restore()

    @property
    def bases(self) -> Bases:
        """Eigenbases in use, by block."""
        return {
            name: (found_in(slot, _BASIS + "left"), found_in(slot, _BASIS + "right"))
            for name, slot in self._slots.items()
            if AVERAGE + "eigenvalues" in slot
        }

    @property
    def needs_refresh(self) -> bool:
        """Whether a block has no inverse, or one that is not kept: iterative solves follow the latest averages."""
        return any(b.name not in self.inverses or not _kept(self.inverses[b.name]) for b in self.partition.blocks)

    def forget_all_but(self, partition: Partition) -> None:
        """Drop what is known of blocks that ``partition`` does not share (a parameter was frozen or unfrozen)."""
        same = set(partition.blocks)
        for block in self.partition.blocks:
            if block not in same:
                slot = self._slots[block.name]
                for key in [k for k in slot if isinstance(k, str) and k.startswith(STATE_PREFIXES)]:
                    del slot[key]

    def update(self, statistics: Statistics, valid: Tensor | None = None) -> None:
        """Take in the statistics of one step; nothing enters the averages where ``valid`` (0-d bool) is false."""
        if not self.metric.averaged:
            self.operators = self.metric.operators(self.partition, statistics)
            self.inverses = {}
            return
        assert isinstance(statistics, Moments)
        for name, basis in statistics.bases.items():
            self._store_basis(name, basis)
        laid_out = self._averages.update(self._storage.moments(statistics).means(), self.decay, valid)
        if laid_out or statistics.bases or not self.operators:
            self._rebuild()  # otherwise operators see the averages change under them

    def release(self) -> None:
        """Drop what belongs to one batch alone, so that it is not held beside that of the next one."""
        if not self.metric.averaged and not isinstance(self.metric, Euclidean):
            self.operators, self.inverses = {}, {}

    def prime(self, empty: Moments, dampings: Mapping[str, Damping], solver: Solver | None) -> None:
        """Lay out averages and inverses as they will be, at zero and at 1/λ, from the moments of no data."""
        self.update(empty, torch.zeros((), dtype=torch.bool, device=empty.normaliser.device))
        try:
            self.refresh(dampings, solver)
        except (NotPositiveDefiniteError, NonFiniteError):
            self.inverses = {}  # λ = 0: there is no inverse until there is data

    def share(self, number: int, shares: int) -> frozenset[str]:
        """The blocks of one of ``shares`` shares of about equal cost of renewal."""
        return frozenset(name for name, owner in owners(self._costs(), shares).items() if owner == number)

    def refresh(
        self, dampings: Mapping[str, Damping], solver: Solver | None, names: Collection[str] | None = None
    ) -> None:
        """Renew bases and inverses from what has been averaged; a block that cannot be inverted keeps its last one.

        Args:
            dampings: the rule of each block.
            solver: how to invert; None is each block's own method.
            names: the blocks to renew; None for all.

        Raises:
            NotPositiveDefiniteError, NonFiniteError: no inverse has ever been had, or renewal failed several times in
                a row.
        """
        if isinstance(self.metric, Euclidean):
            return
        due = [name for name in self.operators if names is None or name in names]
        stale = self._renew_bases(due) if self.metric.averaged else {}
        failed: dict[str, NatgradError] = {}
        for name, found in {**self._inverted(due, dampings, solver), **stale}.items():
            if not isinstance(found, NatgradError):
                self.inverses[name] = found
            elif name not in self.inverses or not isinstance(found, (NotPositiveDefiniteError, NonFiniteError)):
                raise found
            else:
                failed[name] = found
        self.failures = self.failures + 1 if failed else 0
        if failed:
            first = next(iter(failed))
            if self.failures > _TOLERATED_FAILURES:
                raise failed[first]
            warnings.warn(
                f"The curvature of {', '.join(failed)} could not be inverted; the last good inverse stays in use "
                f"({self.failures} of at most {_TOLERATED_FAILURES} times in a row). {failed[first]}",
                RuntimeWarning,
                stacklevel=3,
            )
        if self.metric.averaged:
            for name in due:
                if name in self.inverses:
                    self._store_inverse(name, self.inverses[name])

    def preconditioned(self, vectors: BlockVector) -> BlockVector:
        """``(F_b + λ_b I)⁻¹ v_b`` of every vector."""
        return self._stacks.matvec(self.inverses, vectors)

    def _inverted(
        self, names: Sequence[str], dampings: Mapping[str, Damping], solver: Solver | None
    ) -> dict[str, LinearOperator | NatgradError]:
        """The inverse of each block, or why there is none; each by one process alone where it can be handed on."""

        def inverse(name: str) -> LinearOperator | NatgradError:
            try:
                return self._storage.inverse(dampings[name].inverse(unpacked(self.operators[name]), solver))
            except NatgradError as error:
                return error

        if self._replicas.size == 1 or not self.metric.averaged:
            found = inverted_together(names, dampings, self.operators) if solver is None else {}
            return {name: found[name] if name in found else inverse(name) for name in names}

        def parts(name: str) -> tuple[str, dict[str, Tensor]] | NatgradError | None:
            found = inverse(name)
            if isinstance(found, NatgradError):
                return found
            matrix: Any = _matrix(found)
            return (matrix.kind, matrix.tensors()) if _kept(found) else None

        out: dict[str, LinearOperator | NatgradError] = {}
        costs = self._costs()
        for name, found in computed_by_owners(self._replicas, {n: costs[n] for n in names}, parts).items():
            if found is None:  # an iterative solve cannot be handed on
                out[name] = inverse(name)
            else:
                out[name] = found if isinstance(found, NatgradError) else self._storage.restored(*found)
        return out

    def _costs(self) -> dict[str, float]:
        """Cost of decomposing each block, in multiplications up to a constant: the cube of each square moment."""

        def cost(t: Tensor) -> int:
            return t.numel() * t.shape[-1] if t.dim() > 1 and t.shape[-2] > 1 else t.numel()

        def factor_cost(t: Tensor) -> int:
            width = width_of(t.shape)
            return cost(t) if width is None else t.shape[:-2].numel() * width**3

        costs = dict.fromkeys(self.operators, 0.0)
        for name, kinds in self._averages.means().items():
            costs[name] += sum(cost(t) if kind == "eigenvalues" else factor_cost(t) for kind, t in kinds.items())
        return costs

    def _rebuild(self) -> None:
        self.operators = self.metric.moment_operators(self.partition, self._averages.means(), self.bases)

    def _renew_bases(self, names: Sequence[str]) -> dict[str, NatgradError]:
        """Renew the eigenbases of these blocks; those whose basis stays as it was, and why."""
        old, failed = {name: basis for name, basis in self.bases.items() if name in names}, {}
        if not old:
            return failed
        means, costs = self._averages.means(), self._costs()

        def renewed(name: str) -> tuple[Basis, Tensor]:
            kinds, bases = self.metric.renewed_bases({name: whole(means[name])}, {name: old[name]})
            return bases[name], kinds[name]["eigenvalues"]

        for name, found in computed_by_owners(self._replicas, {n: costs[n] for n in old}, renewed).items():
            if isinstance(found, NatgradError):
                failed[name] = found
                continue
            basis, self._slots[name][AVERAGE + "eigenvalues"] = found
            self._store_basis(name, basis)
        self._rebuild()
        return failed

    def _store_basis(self, name: str, basis: Basis) -> None:
        for side, part in zip(("left", "right"), basis, strict=True):
            self._slots[name].update(named_tensors(_BASIS + side, part))

    def _store_inverse(self, name: str, inverse: LinearOperator) -> None:
        slot = self._slots[name]
        for key in [k for k in slot if isinstance(k, str) and k.startswith(_INVERSE)]:
            del slot[key]
        if _kept(inverse):
            matrix: Any = _matrix(inverse)
            for key, tensor in matrix.tensors().items():
                slot[f"{_INVERSE}{matrix.kind}.{key}"] = tensor

    def _restore(self) -> None:
        """Operators and inverses from the state of a checkpoint; nothing where there is none."""
        if not self.metric.averaged or not self._averages.means():
            return
        for name, kinds in self._averages.means().items():
            self._slots[name].update({AVERAGE + kind: self._storage.average(kind, t) for kind, t in kinds.items()})
        self._rebuild()
        for name, slot in self._slots.items():
            found: dict[str, dict[str, Tensor]] = {}
            for key, tensor in slot.items():
                if isinstance(key, str) and key.startswith(_INVERSE):
                    kind, _, part = key[len(_INVERSE) :].partition(".")
                    found.setdefault(kind, {})[part] = tensor
            for kind, tensors in found.items():
                self.inverses[name] = self._storage.restored(kind, tensors)
                self._store_inverse(name, self.inverses[name])


def _matrix(inverse: LinearOperator) -> LinearOperator:
    return inverse.operator if isinstance(inverse, Inverse) else inverse


def _kept(inverse: LinearOperator) -> bool:
    """Whether an inverse is a matrix that a checkpoint can hold."""
    return getattr(_matrix(inverse), "kind", None) in MATRICES
