"""The natural gradient as one pure call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.linalg import Solver
from natgrad.metric import Estimate, ParameterOperator, Structure, fisher
from natgrad.network import Pass, as_arguments, trainable_parameters


def natural_gradient(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    y: Target,
    *,
    damping: float = 1e-3,
    structure: Structure | None = None,
    estimate: Estimate | None = None,
    solver: Solver | None = None,
) -> tuple[Tensor, ParameterOperator]:
    """Natural gradient ``(F + λI)⁻¹ ∇L`` of the mean negative log-likelihood at the current parameters.

    Args:
        model, likelihood, x, y: as for :func:`natgrad.fisher`; nothing about the model is changed.
        damping: λ.
        structure, estimate, solver: of the Fisher matrix and its solve.

    Returns:
        The natural gradient, a flat vector in ``model.parameters()`` order, and the Fisher matrix it was made with.
    """
    operator = fisher(model, likelihood, x, y, structure=structure, estimate=estimate)
    args, kwargs = as_arguments(x)
    parameters = trainable_parameters(model)
    with torch.enable_grad():
        f = Pass(model, args, kwargs).run()
        weights = likelihood.weights(f.detach(), y)
        total = f[..., 0].numel() if weights is None else weights.sum()
        loss = likelihood.nll(f, y).sum() / total
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    flat = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters.values(), strict=True)]
    )
    return operator.solve(flat, damping=damping, solver=solver), operator
