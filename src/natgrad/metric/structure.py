"""What is kept of JᵀS: the whole matrix, its blocks, its diagonal, its rows, or only its products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.linalg import DenseMatrix, DiagonalMatrix, LinearOperator, LowRankMatrix
from natgrad.metric.estimate import Factor
from natgrad.metric.statistics import (
    Bases,
    JacobianRoot,
    Moment,
    Moments,
    RowStatistics,
    Statistics,
)
from natgrad.network import Block, Cell, Partition, Rows, Tape

Means = Mapping[str, Mapping[str, Tensor]]

_LARGEST_DENSE = 20_000


class Structure(ABC):
    """How the Fisher matrix is approximated; each value works with every likelihood and every estimate."""

    averaged: ClassVar[bool] = True
    """Whether statistics may be averaged over steps (rows and products belong to their batch)."""

    @property
    def aligned(self) -> bool:
        """Whether rows must be told apart by example (sums over examples and positions alone need not)."""
        return True

    by_example: ClassVar[bool] = True
    """Whether rows must be those of single examples even where BatchNorm couples the batch."""

    replayed: ClassVar[bool] = False
    """Whether the operator works on a replay of the observed pass instead of statistics."""

    @abstractmethod
    def blocks(self, cells: Sequence[Cell]) -> tuple[Block, ...]:
        """Group the cells into blocks."""

    @abstractmethod
    def statistics(
        self,
        tape: Tape,
        factor: Factor,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
    ) -> Statistics:
        """What the structure keeps of the observed pass.

        Args:
            tape: the observed pass.
            factor: columns of S at its output.
            partition: from :meth:`blocks`.
            generator: for random signs, where the structure draws any.
            bases: eigenbases in use (eigenvalue-corrected structures only).
        """

    def reader(
        self, tape: Tape, factor: Factor, generator: torch.Generator | None, bases: Bases
    ) -> Callable[[str, Rows], Moments] | None:
        """What is kept of one cell's rows, with a normaliser of zero; None where cells are not read one by one."""
        return None

    def operators(self, partition: Partition, means: Means, bases: Bases) -> dict[str, LinearOperator]:
        """One operator per block, from means of :class:`Moments`."""
        raise NotImplementedError

    def renewed_bases(self, means: Means, bases: Bases) -> tuple[Means, Bases]:
        """Renew eigenbases from averaged factors; the identity for structures without any."""
        return means, bases

    def reason(self, cell: Cell) -> tuple[str, str]:
        """How a cell is treated, and why: ``(treatment, reason)`` for the coverage table."""
        if cell.module is None:
            return self.name, f"{cell.reason}: rows from one backward pass per example"
        return self.name, ""

    @property
    def name(self) -> str:
        return type(self).__name__


def _one_block(cells: Sequence[Cell]) -> tuple[Block, ...]:
    return (Block("*", tuple(cells)),)


def _check_dense(structure: Structure, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    for block in blocks:
        if block.size > _LARGEST_DENSE:
            raise ArgumentError(
                f"{structure.name} would hold a dense matrix of {block.size} × {block.size} numbers for block "
                f"{block.name!r}. Use Kronecker(), Gram() or MatrixFree(), which never form it."
            )
    return blocks


def row_chunks(tape: Tape, factor: Factor, cells: Sequence[Cell]):
    """Jacobian rows, a chunk of columns at a time."""
    for columns in factor.chunks():
        yield tape.rows(cells, columns)


@dataclass(frozen=True)
class Dense(Structure):
    """The whole matrix, in one block: exact for the estimate in use. Memory ``P²``."""

    def blocks(self, cells: Sequence[Cell]) -> tuple[Block, ...]:
        return _check_dense(self, _one_block(cells))

    def statistics(
        self,
        tape: Tape,
        factor: Factor,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
    ) -> Moments:
        sums: dict[str, Tensor] = {}
        for rows in row_chunks(tape, factor, partition.cells):
            for block in partition.blocks:
                r = _block_rows(block, rows)
                if r is not None:
                    product = r.mT @ r
                    sums[block.name] = sums[block.name] + product if block.name in sums else product
        return Moments({name: {"matrix": Moment(s)} for name, s in sums.items()}, factor.normaliser)

    def operators(self, partition: Partition, means: Means, bases: Bases) -> dict[str, LinearOperator]:
        return {name: DenseMatrix(kinds["matrix"], symmetric=True) for name, kinds in means.items()}


def _block_rows(block: Block, rows: Mapping[str, Rows]) -> Tensor | None:
    """Rows of one block ``[K·N, n]``, zero for cells that took no part; None where none did."""
    present = {cell.name: rows[cell.name].dense().flatten(0, 1) for cell in block.cells if cell.name in rows}
    if not present:
        return None
    like = next(iter(present.values()))
    parts = [present.get(c.name, like.new_zeros(like.shape[0], c.size)) for c in block.cells]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass(frozen=True)
class BlockDiagonal(Dense):
    """One dense block per layer (all parameters that one module owns); cross-layer curvature is dropped."""

    def blocks(self, cells: Sequence[Cell]) -> tuple[Block, ...]:
        grouped: dict[str, list[Cell]] = {}
        for cell in cells:
            owner = cell.module if cell.module is not None else cell.parameters[0].rpartition(".")[0]
            grouped.setdefault(owner or "model", []).append(cell)
        return _check_dense(self, tuple(Block(name, tuple(members)) for name, members in grouped.items()))


@dataclass(frozen=True)
class Diagonal(Structure):
    """The exact diagonal for the estimate in use: squares of per-example rows, not of their mean.

    One block per parameter, whether or not a layer's rule serves it: what is kept is the same before any pass was seen.
    """

    def blocks(self, cells: Sequence[Cell]) -> tuple[Block, ...]:
        return tuple(Block(cell.name, (cell,)) for whole in cells for cell in whole.single())

    def statistics(
        self,
        tape: Tape,
        factor: Factor,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
    ) -> Moments:
        sums: dict[str, Tensor] = {}
        for rows in row_chunks(tape, factor, partition.cells):
            for name, r in rows.items():
                square = r.squared_sum()
                sums[name] = sums[name] + square if name in sums else square
        return Moments({name: {"diagonal": Moment(s)} for name, s in sums.items()}, factor.normaliser)

    def reader(
        self, tape: Tape, factor: Factor, generator: torch.Generator | None, bases: Bases
    ) -> Callable[[str, Rows], Moments]:
        zero = torch.zeros_like(factor.normaliser)
        return lambda name, rows: Moments({name: {"diagonal": Moment(rows.squared_sum())}}, zero)

    def operators(self, partition: Partition, means: Means, bases: Bases) -> dict[str, LinearOperator]:
        return {name: DiagonalMatrix(kinds["diagonal"]) for name, kinds in means.items()}


@dataclass(frozen=True)
class Gram(Structure):
    """The whole matrix through its rows, ``F = RᵀR/M``, solved in the space of the ``K·N`` rows (Woodbury).

    The Gram matrix comes from layer inputs and output gradients, ``Σ_layers (A Aᵀ) ∘ (G Gᵀ)``; the Jacobian is not
    formed where a layer shares no weights over positions. Exact for the estimate in use, and cheap when the batch is
    smaller than the model is wide. Belongs to its batch: nothing is averaged over steps.
    """

    averaged: ClassVar[bool] = False

    def blocks(self, cells: Sequence[Cell]) -> tuple[Block, ...]:
        return _one_block(cells)

    def statistics(
        self,
        tape: Tape,
        factor: Factor,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
    ) -> RowStatistics:
        columns = torch.cat(list(factor.chunks()))
        return RowStatistics(tape.rows(partition.cells, columns), factor.normaliser)

    def row_operators(self, partition: Partition, statistics: RowStatistics) -> dict[str, LinearOperator]:
        """The operator of each block that took part, from the batch's rows."""
        out: dict[str, LinearOperator] = {}
        for block in partition.blocks:
            rows = tuple(statistics.rows.get(cell.name) for cell in block.cells)
            if any(r is not None for r in rows):
                root = JacobianRoot(rows, [cell.size for cell in block.cells], statistics.normaliser)
                out[block.name] = LowRankMatrix(root)
        return out


@dataclass(frozen=True)
class MatrixFree(Structure):
    """The whole matrix known by its products ``F v = Jᵀ Λ J v / M``; solved by conjugate gradients."""

    averaged: ClassVar[bool] = False
    replayed: ClassVar[bool] = True

    def blocks(self, cells: Sequence[Cell]) -> tuple[Block, ...]:
        return _one_block(cells)

    def statistics(
        self,
        tape: Tape,
        factor: Factor,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
    ) -> Statistics:
        raise NotImplementedError("MatrixFree works on a replay of the pass; see natgrad.metric.fisher.")

    def reason(self, cell: Cell) -> tuple[str, str]:
        return self.name, ""
