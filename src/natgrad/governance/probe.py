"""How far a model has moved, measured on inputs that do not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from natgrad.errors import ArgumentError, NonFiniteError, ShapeError
from natgrad.likelihood import Likelihood
from natgrad.metric import check_finite_output
from natgrad.network import Pass, as_arguments


@dataclass(frozen=True)
class ProbeSet:
    """Inputs on which the distance between two states of a model is measured.

    Args:
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; the first axis is the batch.
        weights: weight of each prediction, ``[N, *positions]``, none negative: 0 for padding. None: all count alike.
    """

    inputs: Any
    weights: Tensor | None = None


class ProbeMeter:
    """Evaluates the model on a probe set, in evaluation mode, and leaves no trace.

    The inputs are copied, the random streams and the mixed precision of this moment are kept: at the same parameters
    and buffers the model gives the same output again.

    Args:
        model: the network.
        likelihood: what its output means.
        probe: the probe set.

    Raises:
        ArgumentError: the batch is empty, weights do not fit, or the likelihood does not fit the output.
        NonFiniteError: the output is not finite.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, probe: ProbeSet) -> None:
        self.model, self.likelihood = model, likelihood
        args, kwargs = pytree.tree_map(_copied, as_arguments(probe.inputs))
        self._pass = Pass.begin(model, args, kwargs)
        output = self.output()
        check_finite_output(output)
        likelihood.check_output(output)
        self.weights = _checked_weights(probe.weights, output)
        self.predictions = output.shape[:-1].numel()
        self.digest = _digest((args, kwargs, self.weights))

    def output(self, moved: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output at the model's parameters and buffers, those named in ``moved`` replaced."""
        with torch.no_grad(), _evaluating(self.model):
            return self._pass.run(moved).detach()

    def kl(self, f: Tensor, g: Tensor) -> float:
        """Mean over predictions of KL(p_f ‖ p_g) in nats; NaN or infinite where an output is not finite."""
        with torch.no_grad():
            values = self.likelihood.kl(f, g)
            if self.weights is None:
                mean = values.mean()
            else:
                weights = self.weights.to(values)
                mean = torch.where(weights == 0, 0.0, values * weights).sum() / weights.sum()
        value = float(mean)
        return max(value, 0.0)  # rounding can make a vanishing KL negative; NaN stays NaN, being the first argument


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode inside, each as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _checked_weights(weights: Tensor | None, output: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if weights.shape != output.shape[:-1]:
        raise ShapeError(
            f"The probe's weights have shape {tuple(weights.shape)}, but the output, of shape {tuple(output.shape)}, "
            f"has predictions {tuple(output.shape[:-1])}. Give one weight per prediction."
        )
    wide = torch.promote_types(output.dtype, torch.float32)
    weights = weights.detach().to(device=output.device, dtype=wide, copy=True)
    if not bool(torch.isfinite(weights).all()):
        raise NonFiniteError("The probe's weights have NaN or infinite values.")
    if bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ArgumentError("The probe's weights must not be negative, and at least one must be positive.")
    return weights


def _digest(tree: Any) -> str:
    """SHA-256 of a tree's structure and of the bytes of its tensors."""
    leaves, spec = pytree.tree_flatten(tree)
    digest = hashlib.sha256(repr(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
