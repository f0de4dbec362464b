"""Run an observed forward pass again, at the same or other parameters, leaving no trace.

BatchNorm's running statistics are changed in copies, random streams are put back, and observers look away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from natgrad.errors import UnsupportedError
from natgrad.network.partition import trainable_parameters
from natgrad.network.tape import Tape, as_arguments, output_tensor, recording

_replaying: ContextVar[bool] = ContextVar("natgrad_replaying", default=False)


def is_replaying() -> bool:
    """True inside a forward pass that natgrad itself runs."""
    return _replaying.get()


@dataclass(frozen=True)
class RandomState:
    """State of the global random streams before a forward pass, so that a replay draws the same dropout masks."""

    cpu: Tensor
    device: torch.device | None
    accelerator: Tensor | None

    @staticmethod
    def capture(device: torch.device) -> RandomState:
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), device if device.type == "cuda" else None, accelerator)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)  # type: ignore[arg-type]


@contextmanager
def random_state(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Draw from ``state`` inside; afterwards the user's streams stand where they stood."""
    before = RandomState.capture(device)
    if state is not None:
        state.restore()
    try:
        yield
    finally:
        before.restore()


@dataclass(frozen=True)
class Pass:
    """An observed forward pass that can be run again.

    Args:
        model: the network.
        args: positional arguments.
        kwargs: keyword arguments.
        random: state of the random streams before the pass (None where none was kept).
        select: how the observed output tensor is found in what the model returns.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: RandomState | None = None
    select: Callable[[Any], Tensor | None] = output_tensor

    def run(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output at ``parameters`` (qualified name → tensor; those not given stay as they are)."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        device = next(self.model.parameters()).device
        token = _replaying.set(True)
        try:
            # The math kernel alone can be differentiated twice.
            with random_state(self.random, device), sdpa_kernel(SDPBackend.MATH):
                output = functional_call(self.model, {**buffers, **(parameters or {})}, self.args, dict(self.kwargs))
        finally:
            _replaying.reset(token)
        selected = self.select(output)
        if selected is None:
            raise UnsupportedError(f"The model returned {type(output).__name__}; natgrad needs a tensor output.")
        return selected


def record(model: nn.Module, x: Any) -> Tape:
    """Run ``model`` on ``x`` without side effects and return the tape.

    Args:
        model: the network, in whatever mode it is.
        x: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        UnsupportedError: the output is neither a tensor nor has one called ``logits``.
    """
    args, kwargs = as_arguments(x)
    observed = Pass(model, args, kwargs)
    with torch.enable_grad(), recording(model) as tape:
        tape.output = observed.run()
    return tape


class Linearization:
    """The Jacobian of an observed pass as a pair of products, ``J v`` and ``Jᵀ u``, from one graph.

    ``Jᵀ u`` is a backward pass; ``J v`` differentiates ``Jᵀ u``, which is linear in ``u``, once more.
    """

    def __init__(self, observed: Pass) -> None:
        self.parameters = trainable_parameters(observed.model)
        with torch.enable_grad():
            self.output = observed.run()
            self._cotangent = torch.zeros_like(self.output, requires_grad=True)
            self._pulled = torch.autograd.grad(
                self.output, list(self.parameters.values()), self._cotangent, create_graph=True, allow_unused=True
            )

    def jvp(self, v: Mapping[str, Tensor]) -> Tensor:
        """``J v`` of the output's shape, for a tensor per parameter name."""
        pairs = [(g, v[n]) for g, n in zip(self._pulled, self.parameters, strict=True) if g is not None]
        pairs = [(g, t.to(g.dtype)) for g, t in pairs if g.requires_grad]
        if not pairs:
            return torch.zeros_like(self.output)
        outputs, grads = zip(*pairs, strict=True)
        (out,) = torch.autograd.grad(outputs, self._cotangent, grads, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.output) if out is None else out

    def vjp(self, u: Tensor) -> dict[str, Tensor]:
        """``Jᵀ u``: a tensor per parameter name, zero where the output does not depend on it."""
        grads = _gradients(self.output, self.parameters.values(), u)
        return dict(zip(self.parameters, grads, strict=True))


class HessianProducts:
    """Products with the Hessian of a scalar function of an observed pass's output."""

    def __init__(self, observed: Pass, loss: Callable[[Tensor], Tensor]) -> None:
        self.parameters = trainable_parameters(observed.model)
        with torch.enable_grad():
            value = loss(observed.run())
            self._gradient = torch.autograd.grad(
                value, list(self.parameters.values()), create_graph=True, allow_unused=True
            )

    def __call__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``H v``: a tensor per parameter name."""
        pairs = [(g, v[n]) for g, n in zip(self._gradient, self.parameters, strict=True) if g is not None]
        pairs = [(g, t) for g, t in pairs if g.requires_grad]
        if not pairs:
            return {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        outputs, grads = zip(*pairs, strict=True)
        found = _gradients(outputs, self.parameters.values(), grads)
        return dict(zip(self.parameters, found, strict=True))


def _gradients(outputs: Any, inputs: Any, grad_outputs: Any) -> list[Tensor]:
    targets: Sequence[Tensor] = list(inputs)
    found = torch.autograd.grad(outputs, targets, grad_outputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, targets, strict=True)]
