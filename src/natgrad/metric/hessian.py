"""Metrics beside the Fisher: the Hessian of the loss (which may be indefinite) and the Euclidean metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.errors import NotObservedError, UnsupportedError
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.linalg import DenseMatrix, DiagonalMatrix, IdentityMatrix, LinearOperator
from natgrad.metric.fisher import Metric, block_operators, check_part, mean_operator, parameter_function
from natgrad.metric.statistics import ProductStatistics, Statistics
from natgrad.metric.structure import Dense, Diagonal, MatrixFree, Structure
from natgrad.network import Block, Cell, HessianProducts, Partition, Pass


@dataclass(frozen=True)
class Hessian(Metric):
    """Hessian of the mean negative log-likelihood. Unlike the Fisher it may have negative eigenvalues.

    Args:
        structure: ``Dense()``, ``BlockDiagonal()``, ``Diagonal()`` (both formed from the products) or ``MatrixFree()``.

    Raises:
        UnsupportedError: a structure that only makes sense for a sum of outer products.
    """

    structure: Structure = Dense()

    def __post_init__(self) -> None:
        check_part("structure", self.structure, Structure, "ng.Dense(), ng.BlockDiagonal(), ng.Diagonal(), …")
        if not isinstance(self.structure, Dense | Diagonal | MatrixFree):
            raise UnsupportedError(
                f"A Hessian has no {self.structure.name} structure: it is not a sum of outer products of rows. Use "
                "Dense(), BlockDiagonal(), Diagonal() or MatrixFree(); for a Kronecker-factored curvature use Fisher."
            )

    @property
    def needs_target(self) -> bool:
        return True

    @property
    def replayed(self) -> bool:
        return True

    def blocks(self, cell_list: tuple[Cell, ...]) -> tuple[Block, ...]:
        return self.structure.blocks(cell_list)

    def reason(self, cell: Cell) -> tuple[str, str]:
        return f"Hessian, {self.structure.name}", ""

    def products(
        self,
        observed: Pass,
        likelihood: Likelihood,
        target: Target | None,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
    ) -> ProductStatistics:
        if target is None:
            raise NotObservedError(
                "The Hessian needs the target of the observed batch, but only its output was seen. Call "
                "opt.observe(output, target) before loss.backward(), or return (loss, output, target) from the closure."
            )
        weights: list[Tensor] = []

        def total_loss(f: Tensor) -> Tensor:
            likelihood.check_output(f)
            likelihood.check_target(f, target)
            w = likelihood.weights(f, target)
            weights.append(f.new_full((), f.shape[:-1].numel()) if w is None else w.sum())
            return likelihood.nll(f, target).sum()

        products = HessianProducts(observed, total_loss)
        whole = Block("*", tuple(partition.cells))
        like = next(iter(products.parameters.values()))
        operator = parameter_function(whole, lambda v: whole.pack(products(whole.unpack(v))), like)
        return ProductStatistics((operator,), weights[0].detach())

    def operators(self, partition: Partition, statistics: Statistics | None) -> dict[str, LinearOperator]:
        assert isinstance(statistics, ProductStatistics)
        whole = mean_operator(statistics)
        if isinstance(self.structure, MatrixFree):
            return block_operators(partition, whole)
        out: dict[str, LinearOperator] = {}
        start = 0
        for block in partition.blocks:
            columns = self._columns(whole, start, block.size)
            if isinstance(self.structure, Diagonal):
                out[block.name] = DiagonalMatrix(columns.diagonal().clone())
            else:
                out[block.name] = DenseMatrix((columns + columns.mT) / 2, symmetric=True)
            start += block.size
        return out

    @staticmethod
    def _columns(whole: LinearOperator, start: int, size: int) -> Tensor:
        """The diagonal block ``[start : start + size]`` of an operator, one product per column."""
        n = whole.shape[0]
        block = torch.empty(size, size, dtype=whole.dtype, device=whole.device)
        for i in range(size):
            unit = torch.zeros(n, dtype=whole.dtype, device=whole.device)
            unit[start + i] = 1.0
            block[:, i] = whole.matvec(unit)[start : start + size]
        return block


@dataclass(frozen=True)
class Euclidean(Metric):
    """The identity: natural gradient descent becomes gradient descent."""

    needs_observation: bool = False

    def blocks(self, cell_list: tuple[Cell, ...]) -> tuple[Block, ...]:
        return tuple(Block(cell.name, (cell,)) for cell in cell_list)

    def operators(self, partition: Partition, statistics: Statistics | None) -> dict[str, LinearOperator]:
        return {block.name: IdentityMatrix(block.size) for block in partition.blocks}
