"""Checks of the optimizer's arguments and of what a closure returns."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from natgrad.errors import ArgumentError, UnsupportedError
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.network import trainable_parameters
from natgrad.step import QuadraticFit, Search, TrustRegion
from natgrad.step.search import KLClip

_LOSSES = {
    nn.CrossEntropyLoss: "ng.Categorical()",
    nn.BCEWithLogitsLoss: "ng.Bernoulli()",
    nn.MSELoss: "ng.Gaussian.of_mse_loss() or ng.Gaussian()",
    nn.PoissonNLLLoss: "ng.Poisson()",
    nn.GaussianNLLLoss: "ng.Gaussian.learned()",
}


def check_arguments(
    model: nn.Module,
    likelihood: Likelihood,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    average: float,
    search: Search,
) -> dict[str, nn.Parameter]:
    """The model's trainable parameters, or an error that names the argument that will not do."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model is of type {type(model).__name__}; natgrad needs the torch.nn.Module itself (not its parameters), "
            "because curvature comes from watching its forward pass."
        )
    if not isinstance(likelihood, Likelihood):
        hint = next((name for kind, name in _LOSSES.items() if isinstance(likelihood, kind)), None)
        raise ArgumentError(
            f"likelihood is of type {type(likelihood).__name__}; "
            + (f"for this loss it is {hint}." if hint else "use ng.Categorical(), ng.Gaussian(), ng.Bernoulli(), …")
        )
    parameters = trainable_parameters(model)
    if not parameters:
        raise ArgumentError("The model has no parameter that requires a gradient, so there is nothing to optimize.")
    for name, p in parameters.items():
        if p.is_complex():
            raise UnsupportedError(
                f"Parameter {name} is complex, which natgrad does not support. Keep real and imaginary parts as two "
                "real parameters (torch.view_as_real)."
            )
    _check_number("lr", lr, infinite=isinstance(search, TrustRegion | KLClip | QuadraticFit))
    _check_number("weight_decay", weight_decay)
    for name, value in (("momentum", momentum), ("average", average)):
        if not 0 <= value < 1:
            raise ArgumentError(f"{name}={value} was given; it must be at least 0 and below 1.")
    if isinstance(search, QuadraticFit) and momentum:
        raise ArgumentError(
            f"momentum={momentum} was given together with QuadraticFit, which fits the momentum of every step itself. "
            "Leave momentum at 0."
        )
    return parameters


def _check_number(name: str, value: float | Tensor, infinite: bool = False) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ArgumentError(f"{name} is a tensor of shape {tuple(value.shape)}; it must hold one number.")
    number = float(value)
    if math.isnan(number) or number < 0 or (math.isinf(number) and not infinite):
        raise ArgumentError(f"{name}={number} was given; it must be a finite number of at least 0.")


def parse_evaluation(result: Any) -> tuple[Tensor, Tensor, Target | None] | None:
    """``(loss, output, target)`` of a natgrad closure; None for what a closure of torch's kind returns.

    Raises:
        ArgumentError: a tuple that is not an evaluation, or a loss without a graph.
    """
    if not isinstance(result, tuple):
        return None
    if len(result) not in (2, 3) or not all(isinstance(t, Tensor) for t in result[:2]):
        kinds = ", ".join(type(item).__name__ for item in result)
        raise ArgumentError(
            f"The closure returned ({kinds}); it must return (loss, output) or (loss, output, target), with loss and "
            "output tensors."
        )
    loss, output = result[:2]
    if loss.numel() != 1:
        raise ArgumentError(f"The closure's loss has shape {tuple(loss.shape)}; it must be one number (take the mean).")
    return loss, output, result[2] if len(result) == 3 else None
