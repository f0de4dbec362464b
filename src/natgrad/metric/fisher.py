"""The Fisher metric: an estimate (which columns of S) and a structure (what is kept of JᵀS)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.linalg import DiagonalMatrix, FunctionOperator, LinearOperator
from natgrad.metric.eigenbasis import completed
from natgrad.metric.estimate import Empirical, Estimate, Exact, Factor, MonteCarlo
from natgrad.metric.kronecker import Kronecker
from natgrad.metric.sampling import Share, SubBatch
from natgrad.metric.statistics import Bases, Moments, ProductStatistics, RowStatistics, Statistics
from natgrad.metric.storage import Unpacked
from natgrad.metric.structure import Gram, Structure
from natgrad.network import (
    Block,
    Cell,
    EmptyTape,
    Linearization,
    Partition,
    Pass,
    Tape,
    cells,
    misaligned_parameters,
    mixing_parameters,
    trainable_parameters,
    uncovered_parameters,
)


class Metric(ABC):
    """What measures distance in parameter space: one operator per block of parameters."""

    needs_observation: bool = True
    """Whether a forward pass must be observed before a step."""

    @property
    def needs_target(self) -> bool:
        """Whether the observed batch's target is needed."""
        return False

    @property
    def averaged(self) -> bool:
        """Whether statistics may be averaged over steps."""
        return False

    @property
    def storage(self) -> Unpacked:
        """How averages and inverses are kept."""
        return Unpacked()

    @property
    def replayed(self) -> bool:
        """Whether the metric runs the observed pass again instead of reading its tape."""
        return False

    @property
    def aligned(self) -> bool:
        """Whether rows must be told apart by example."""
        return False

    @property
    def unmixed(self) -> bool:
        """Whether no call of a layer may stand for several examples: cross terms between them do not average out."""
        return False

    @property
    def by_example(self) -> bool:
        """Whether rows must be those of single examples even where BatchNorm couples the batch."""
        return False

    @property
    def from_loss(self) -> bool:
        """Whether the loss's own backward pass brings every layer what statistics are made of."""
        return False

    @property
    def sub_batch(self) -> SubBatch | None:
        """The part of a batch that is run by itself for statistics; None where they are taken of the pass itself."""
        return None

    def examine(self, tape: Tape, likelihood: Likelihood, generator: torch.Generator) -> dict[str, str]:
        """Parameters that no layer rule may serve in passes like this one, with the reason."""
        found = uncovered_parameters(tape, generator)
        # Weights of predictions select examples and positions of a layer's input, so they need the alignment too.
        if self.aligned or likelihood.needs_target:
            found = misaligned_parameters(tape, generator, batch_statistics=self.by_example) | found
        elif self.unmixed:
            found = mixing_parameters(tape, generator) | found
        return found

    @abstractmethod
    def blocks(self, cell_list: tuple[Cell, ...]) -> tuple[Block, ...]:
        """Group cells into the blocks of the metric."""

    def partition(
        self,
        model: nn.Module,
        uncovered: Mapping[str, str] | None = None,
        divisions: Sequence[Collection[str]] | None = None,
    ) -> Partition:
        """Divide the model's trainable parameters into the metric's blocks.

        Args:
            model: the network.
            uncovered: parameters that no layer rule may serve, with the reason.
            divisions: names of parameters between which no block is shared; None: all trainable ones together.
        """
        order = tuple(trainable_parameters(model))
        if divisions is None:
            return Partition(self.blocks(cells(model, uncovered)), order)
        blocks: dict[str, Block] = {}
        for names in divisions:
            for block in self.blocks(cells(model, uncovered, names)):
                name = block.name
                while name in blocks:  # two whole matrices
                    name += "'"
                blocks[name] = Block(name, block.cells)
        members = frozenset().union(*divisions)
        return Partition(tuple(blocks.values()), tuple(n for n in order if n in members))

    def statistics(
        self,
        tape: Tape,
        likelihood: Likelihood,
        target: Target | None,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
        share: Share | None = None,
    ) -> Statistics:
        """What is kept of an observed pass, or, with ``share``, of a part of its batch (``target`` is the whole's)."""
        raise NotImplementedError

    def no_statistics(self, model: nn.Module, partition: Partition) -> Statistics:
        """The statistics of a batch without examples: zeros of the shapes that those of every batch have."""
        raise NotImplementedError

    def products(
        self,
        observed: Pass,
        likelihood: Likelihood,
        target: Target | None,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
    ) -> ProductStatistics:
        """The metric of an observed pass, run again."""
        raise NotImplementedError

    @abstractmethod
    def operators(self, partition: Partition, statistics: Statistics | None) -> dict[str, LinearOperator]:
        """One operator per block; blocks that took no part in the pass get the zero matrix."""

    def moment_operators(
        self, partition: Partition, means: Mapping[str, Mapping[str, Tensor]], bases: Bases
    ) -> dict[str, LinearOperator]:
        """One operator per block from averaged moments (metrics with ``averaged`` only)."""
        raise NotImplementedError

    def renewed_bases(
        self, means: Mapping[str, Mapping[str, Tensor]], bases: Bases
    ) -> tuple[Mapping[str, Mapping[str, Tensor]], Bases]:
        """Means and eigenbases after renewal; unchanged for metrics without any."""
        return means, bases

    def reason(self, cell: Cell) -> tuple[str, str]:
        """Treatment of a cell and the reason for it, for the coverage table."""
        return type(self).__name__, ""


def check_part(name: str, value: object, kind: Any, what: str) -> None:
    """Raises ArgumentError unless ``value`` is of ``kind``; a class is told that it must be called."""
    if isinstance(value, type) or not isinstance(value, kind):
        given = f"{value.__name__}, a class," if isinstance(value, type) else repr(value)
        raise ArgumentError(f"{name}={given} was given; it must be one of {what}.")


def zero_where_missing(partition: Partition, operators: dict[str, LinearOperator]) -> dict[str, LinearOperator]:
    """Give blocks without statistics the zero matrix, and put all in the partition's order."""
    if not operators:
        like = torch.zeros(0)
    else:
        like = torch.zeros(0, dtype=next(iter(operators.values())).dtype, device=next(iter(operators.values())).device)
    return {b.name: operators.get(b.name) or DiagonalMatrix(like.new_zeros(b.size)) for b in partition.blocks}


@dataclass(frozen=True)
class Fisher(Metric):
    """Fisher metric ``F = (1/M) Σ_n J_nᵀ Λ(f_n) J_n``.

    Args:
        estimate: ``Exact()``, ``MonteCarlo()``, ``Signed()``, or ``Empirical()`` (a different matrix, named as such).
        structure: what is kept of it.
    """

    estimate: Estimate = MonteCarlo()
    structure: Structure = Kronecker()

    def __post_init__(self) -> None:
        check_part("estimate", self.estimate, Estimate, "ng.Exact(), ng.MonteCarlo(), ng.Signed() or ng.Empirical()")
        check_part("structure", self.structure, Structure, "ng.Kronecker(), ng.Dense(), ng.Gram(), ng.Diagonal(), …")

    @property
    def needs_target(self) -> bool:
        return self.estimate.needs_target

    @property
    def averaged(self) -> bool:
        return self.structure.averaged

    @property
    def storage(self) -> Unpacked:
        return self.structure.storage if isinstance(self.structure, Kronecker) else Unpacked()

    @property
    def replayed(self) -> bool:
        return self.structure.replayed

    @property
    def aligned(self) -> bool:
        return self.structure.aligned

    @property
    def unmixed(self) -> bool:
        return not self.estimate.independent

    @property
    def by_example(self) -> bool:
        return self.structure.by_example

    @property
    def from_loss(self) -> bool:
        readable = type(self.structure).reader is not Structure.reader
        return isinstance(self.estimate, Empirical) and readable and self.sub_batch is None

    @property
    def sub_batch(self) -> SubBatch | None:
        sampling = self.structure.sampling if isinstance(self.structure, Kronecker) else None
        return sampling if isinstance(sampling, SubBatch) and sampling.fraction < 1 else None

    def blocks(self, cell_list: tuple[Cell, ...]) -> tuple[Block, ...]:
        return self.structure.blocks(cell_list)

    def reason(self, cell: Cell) -> tuple[str, str]:
        return self.structure.reason(cell)

    def renewed_bases(
        self, means: Mapping[str, Mapping[str, Tensor]], bases: Bases
    ) -> tuple[Mapping[str, Mapping[str, Tensor]], Bases]:
        return self.structure.renewed_bases(means, bases)

    def statistics(
        self,
        tape: Tape,
        likelihood: Likelihood,
        target: Target | None,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
        share: Share | None = None,
    ) -> Statistics:
        assert tape.output is not None
        likelihood.check_output(tape.output)
        of = target if share is None else share.target(target)
        factor = self.estimate.factor(likelihood, tape.output, of, generator)
        if share is not None:
            normaliser = self.estimate.weighting(likelihood, share.output, target)[2]
            factor = factor.standing_for(share.copies, normaliser.to(factor.normaliser.dtype))
        return self.structure.statistics(tape, factor, partition, generator=generator, bases=bases)

    def no_statistics(self, model: nn.Module, partition: Partition) -> Statistics:
        like = next(model.parameters()).detach()
        like = like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
        empty = Factor(like.expand(1, 0, 1), False, like, None)
        statistics = self.structure.statistics(EmptyTape(model), empty, partition)
        return completed(statistics) if isinstance(statistics, Moments) else statistics

    def products(
        self,
        observed: Pass,
        likelihood: Likelihood,
        target: Target | None,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
    ) -> ProductStatistics:
        linearization = Linearization(observed)
        f = linearization.output.detach()
        likelihood.check_output(f)
        whole = Block("*", partition.cells)
        if isinstance(self.estimate, Exact):
            _, weights, normaliser = self.estimate.weighting(likelihood, f, target)
            inner = likelihood.unweighted

            def through_fisher(u: Tensor) -> Tensor:
                product = inner.fisher_matvec(f, u)
                return product if weights is None else product * weights[..., None]

            operator = _products(whole, linearization, through_fisher)
        else:
            factor = self.estimate.factor(likelihood, f, target, generator)
            normaliser = factor.normaliser
            operator = _products(whole, linearization, lambda u: _through_columns(factor, u))
        return ProductStatistics((operator,), normaliser)

    def operators(self, partition: Partition, statistics: Statistics | None) -> dict[str, LinearOperator]:
        if isinstance(statistics, ProductStatistics):
            return block_operators(partition, mean_operator(statistics))
        if isinstance(statistics, RowStatistics):
            assert isinstance(self.structure, Gram)
            return zero_where_missing(partition, self.structure.row_operators(partition, statistics))
        assert isinstance(statistics, Moments)
        statistics = completed(statistics)
        return self.moment_operators(partition, statistics.means(), statistics.bases)

    def moment_operators(
        self, partition: Partition, means: Mapping[str, Mapping[str, Tensor]], bases: Bases
    ) -> dict[str, LinearOperator]:
        return zero_where_missing(partition, self.structure.operators(partition, means, bases))


def _through_columns(factor: Factor, u: Tensor) -> Tensor:
    """``S Sᵀ u`` for the columns of a factor, row by row (prediction by prediction where positions are separate)."""
    products = factor.columns * u
    if factor.separate:
        inner = products.sum(-1, keepdim=True)
    else:
        inner = products.flatten(2).sum(-1).reshape(*products.shape[:2], *[1] * (products.dim() - 2))
    return (inner * factor.columns).sum(0)


def _products(block: Block, linearization: Linearization, output_product) -> FunctionOperator:
    """``v ↦ Jᵀ Λ J v`` on the block's vectors."""

    def product(v: Tensor) -> Tensor:
        pushed = linearization.jvp(block.unpack(v))
        return block.pack(linearization.vjp(output_product(pushed)))

    return parameter_function(block, product, next(iter(linearization.parameters.values())))


def parameter_function(block: Block, product, like: Tensor) -> FunctionOperator:
    """A symmetric operator from a function of one vector; batches of vectors are taken one by one.

    It works in the precision of the parameters, ``like`` being one of them, but in float32 at least.
    """

    def matvec(v: Tensor) -> Tensor:
        if v.dim() == 1:
            return product(v).to(v.dtype)
        flat = v.reshape(-1, v.shape[-1])
        return torch.stack([product(row).to(v.dtype) for row in flat]).reshape(v.shape)

    dtype = torch.promote_types(like.dtype, torch.float32)
    return FunctionOperator(matvec, (block.size, block.size), dtype, like.device)


def block_operators(partition: Partition, whole: LinearOperator) -> dict[str, LinearOperator]:
    """The diagonal blocks of an operator that acts on all cells of the partition at once."""
    if len(partition.blocks) == 1:
        return {partition.blocks[0].name: whole}
    out: dict[str, LinearOperator] = {}
    start = 0
    for block in partition.blocks:
        after = whole.shape[0] - start - block.size

        def product(v: Tensor, start: int = start, size: int = block.size, after: int = after) -> Tensor:
            return whole.matvec(torch.nn.functional.pad(v, (start, after)))[..., start : start + size]

        out[block.name] = FunctionOperator(product, (block.size, block.size), whole.dtype, whole.device)
        start += block.size
    return out


def mean_operator(statistics: ProductStatistics) -> LinearOperator:
    """Sum of the micro-batches' operators over the sum of their normalisers."""
    total = statistics.operators[0]
    for operator in statistics.operators[1:]:
        total = total + operator
    return total / statistics.normaliser
