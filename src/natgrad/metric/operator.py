"""Curvature of a model as a linear operator on its parameters, without any optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError, NonFiniteError
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.linalg import BlockDiagonalMatrix, Inverse, LinearOperator, Solver
from natgrad.metric.estimate import Estimate, Exact
from natgrad.metric.fisher import Fisher, Metric
from natgrad.metric.hessian import Hessian
from natgrad.metric.structure import Dense, Structure
from natgrad.network import Partition, Pass, Tape, as_arguments, full_precision, record, trainable_parameters


class ParameterOperator(LinearOperator):
    """A block-diagonal matrix that acts on flat vectors in ``model.parameters()`` order.

    Attributes:
        blocks: the blocks, each acting on its own vector.
        partition: how parameters map to the blocks' vectors.
    """

    def __init__(self, blocks: BlockDiagonalMatrix, partition: Partition) -> None:
        super().__init__(blocks.shape, blocks.dtype, blocks.device, symmetric=blocks.symmetric)
        self.blocks, self.partition = blocks, partition

    def matvec(self, v: Tensor) -> Tensor:
        parts = self.partition.split(v)
        return self.partition.join({name: self.blocks.blocks[name].matvec(x) for name, x in parts.items()})

    def diagonal(self) -> Tensor:
        return self.partition.join({name: block.diagonal() for name, block in self.blocks.blocks.items()})

    def trace(self) -> Tensor:
        return self.blocks.trace()

    def to_dense(self) -> Tensor:
        # Rows and columns of the block matrix, each reordered from blocks to flat vectors.
        rows = self.partition.join(self.blocks.split(self.blocks.to_dense()))
        return self.partition.join(self.blocks.split(rows.mT)).mT

    def inverse(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Inverse:
        """``(F + λI)⁻¹``, block by block; ``damping`` may be a mapping from block name to λ."""
        inner = self.blocks.inverse(damping=damping, solver=solver)
        assert isinstance(inner.operator, BlockDiagonalMatrix)
        return Inverse(ParameterOperator(inner.operator, self.partition), inner.report)

    def solve(self, b: Tensor, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        return self.inverse(damping=damping, solver=solver) @ b

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        return self.blocks.logdet(damping=damping, solver=solver)


def fisher(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    y: Target | None = None,
    *,
    structure: Structure | None = None,
    estimate: Estimate | None = None,
    generator: torch.Generator | None = None,
) -> ParameterOperator:
    """Fisher matrix ``F = (1/M) Σ_n J_nᵀ Λ(f_n) J_n`` of ``model`` on one batch, at its current parameters.

    Parameters, their gradients, BatchNorm statistics and random streams are left as they are.

    Args:
        model: any module whose output is a tensor (or has one called ``logits``).
        likelihood: what the output means.
        x: input tensor, tuple of positional arguments or dict of keyword arguments; the first axis is the batch.
        y: target; needed by ``Empirical()`` and by weighted likelihoods.
        structure: what is kept of the matrix (default ``Dense()``).
        estimate: which columns of ``Λ = S Sᵀ`` are used (default ``Exact()``).
        generator: source of random draws, on the output's device (default: a fresh one with a fixed seed).

    Returns:
        Operator on flat vectors of length P, the number of trainable parameters, in ``model.parameters()`` order.
        ``M`` is the number of predictions (for weighted likelihoods: the sum of weights).

    Raises:
        ArgumentError: an empty batch, a model without trainable parameters, a target that does not fit.
        NonFiniteError: the output has NaN or infinite values.
    """
    metric = Fisher(Exact() if estimate is None else estimate, Dense() if structure is None else structure)
    return _operator(metric, model, likelihood, x, y, generator)


def hessian(
    model: nn.Module, likelihood: Likelihood, x: Any, y: Target, *, structure: Structure | None = None
) -> ParameterOperator:
    """Hessian of the mean negative log-likelihood of ``(x, y)``; it may have negative eigenvalues.

    Args:
        model: any module whose output is a tensor.
        likelihood: what the output means.
        x: input, as for :func:`fisher`.
        y: target.
        structure: ``Dense()`` (default), ``BlockDiagonal()``, ``Diagonal()`` or ``MatrixFree()``.
    """
    return _operator(Hessian(Dense() if structure is None else structure), model, likelihood, x, y, None)


def _operator(
    metric: Metric,
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    y: Target | None,
    generator: torch.Generator | None,
) -> ParameterOperator:
    if not trainable_parameters(model):
        raise ArgumentError("The model has no parameter that requires a gradient, so it has no Fisher matrix.")
    args, kwargs = as_arguments(x)
    observed = Pass.begin(model, args, kwargs)
    tape = None if metric.replayed else record(model, x)
    with full_precision(next(model.parameters()).device):
        return _of_pass(metric, observed, tape, likelihood, y, generator or _generator(model))


def _of_pass(
    metric: Metric,
    observed: Pass,
    tape: Tape | None,
    likelihood: Likelihood,
    y: Target | None,
    generator: torch.Generator,
) -> ParameterOperator:
    model = observed.model
    if tape is None:
        partition = metric.partition(model)
        with torch.no_grad():
            output = observed.run()
        check_finite_output(output)
        likelihood.check_output(output)
        statistics = metric.products(observed, likelihood, y, partition, generator=generator)
    else:
        assert tape.output is not None
        check_finite_output(tape.output)
        likelihood.check_output(tape.output)
        partition = metric.partition(model, metric.examine(tape, likelihood, _generator(model)))
        statistics = metric.statistics(tape, likelihood, y, partition, generator=generator)
    return ParameterOperator(BlockDiagonalMatrix(metric.operators(partition, statistics)), partition)


def check_finite_output(output: Tensor) -> None:
    """Raise where an output that is about to become curvature is empty or not finite."""
    if output.shape[0] == 0 or output.numel() == 0:
        raise ArgumentError(f"The batch is empty: the model's output has shape {tuple(output.shape)}.")
    if not torch.isfinite(output).all():
        bad = int((~torch.isfinite(output)).sum())
        raise NonFiniteError(
            f"The model's output has {bad} of {output.numel()} values that are NaN or infinite. Look for such values "
            "in the inputs, for a learning rate that is too large, or for an overflow in low precision."
        )


def _generator(model: nn.Module) -> torch.Generator:
    device = next(model.parameters()).device
    return torch.Generator(device=device).manual_seed(0)
