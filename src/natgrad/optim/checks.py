"""Checks of the optimizer's arguments and of what a closure returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real

from torch import Tensor, nn

from natgrad.errors import ArgumentError, UnsupportedError
from natgrad.likelihood import Likelihood
from natgrad.linalg import Solver
from natgrad.metric import Metric
from natgrad.metric.fisher import check_part
from natgrad.metric.running import Refresh
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


def check_likelihood(likelihood: Likelihood) -> None:
    """Raises ArgumentError unless ``likelihood`` is one; a loss of torch is told its counterpart."""
    if not isinstance(likelihood, Likelihood):
        hint = next((name for kind, name in _LOSSES.items() if isinstance(likelihood, kind)), None)
        raise ArgumentError(
            f"likelihood is of type {type(likelihood).__name__}; "
            + (f"for this loss it is {hint}." if hint else "use ng.Categorical(), ng.Gaussian(), ng.Bernoulli(), …")
        )


def check_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a module.

    Raises:
        ArgumentError: there is none.
        UnsupportedError: one is complex.
    """
    named = trainable_parameters(model)
    if not named:
        raise ArgumentError("The model has no parameter that requires a gradient, so there is nothing to optimize.")
    check_real(named.items())
    return list(named.values())


def check_real(parameters: Iterable[tuple[str | int, Tensor]]) -> None:
    """Raises UnsupportedError for a complex parameter, by its name or number."""
    for name, p in parameters:
        if p.is_complex():
            raise UnsupportedError(
                f"Parameter {name} is complex, which natgrad does not support. Keep real and imaginary parts as two "
                "real parameters (torch.view_as_real)."
            )


def check_module(model: object) -> None:
    """Raises ArgumentError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model is of type {type(model).__name__}; attach() takes the torch.nn.Module whose passes are observed."
        )


def check_members(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Raises ArgumentError unless all ``parameters`` are those of ``model``."""
    known = {id(p) for p in model.parameters()}
    foreign = sum(id(p) not in known for p in parameters)
    if foreign:
        raise ArgumentError(
            f"{foreign} of the optimizer's parameters do not belong to the module that it observes. Give it the "
            "parameters() of that very module (not of a copy), and attach() the module itself or one that contains it."
        )


def check_parts(metric: Metric, solver: Solver | None, search: Search, refresh: Refresh) -> None:
    """Raises ArgumentError for a part that is none, such as a name or a class, naming the argument."""
    check_part("metric", metric, Metric, "ng.Fisher(estimate, structure), ng.Hessian(structure) or ng.Euclidean()")
    if isinstance(refresh, type) or not (hasattr(refresh, "statistics_due") and hasattr(refresh, "inverse_due")):
        raise ArgumentError(f"refresh={refresh!r} was given; it must be ng.Refresh(statistics, inverse).")
    searches = "ng.LearningRate(), ng.KLClip(), ng.TrustRegion(), ng.Armijo() or ng.QuadraticFit()"
    check_part("search", search, Callable, searches)
    if not hasattr(search, "needs_probe"):
        raise ArgumentError(f"search={search!r} was given; it must be one of {searches}.")
    if solver is not None:
        check_part("solver", solver, Callable, "None, ng.SaddleFree(), natgrad.linalg.Cholesky(), natgrad.linalg.CG()")


def check_arguments(
    lr: float | Tensor, momentum: float, weight_decay: float, average: float, search: Search, seed: int, maximize: bool
) -> None:
    """Raises ArgumentError for a number out of range, naming the argument."""
    if not isinstance(maximize, bool):
        raise ArgumentError(f"maximize={maximize!r} was given; it must be True or False.")
    if not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"seed={seed!r} was given; it must be a whole number of at least 0.")
    _check_number("lr", lr, infinite=isinstance(search, TrustRegion | KLClip | QuadraticFit))
    _check_number("weight_decay", weight_decay)
    for name, value in (("momentum", momentum), ("average", average)):
        if not isinstance(value, Real) or not 0 <= value < 1:
            raise ArgumentError(f"{name}={value!r} was given; it must be a number of at least 0 and below 1.")
    if isinstance(search, QuadraticFit) and momentum:
        raise ArgumentError(
            f"momentum={momentum} was given together with QuadraticFit, which fits the momentum of every step itself. "
            "Leave momentum at 0."
        )


def _check_number(name: str, value: float | Tensor, infinite: bool = False) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ArgumentError(f"Tensor {name} must be 1-element, one number, but has shape {tuple(value.shape)}.")
    if not isinstance(value, Real | Tensor):
        raise ArgumentError(f"{name}={value!r} was given; it must be a number.")
    number = float(value)
    if math.isnan(number) or number < 0 or (math.isinf(number) and not infinite):
        raise ArgumentError(f"{name}={number} was given; it must be a finite number of at least 0.")
