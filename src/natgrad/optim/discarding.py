"""Notices that gradients were discarded without the optimizer being told: ``model.zero_grad()`` does not call it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.variable import Variable


@dataclass(eq=False)
class Gradients:
    """The accumulated gradients of a module.

    Args:
        model: the module, with parameters of which some get gradients.
    """

    model: nn.Module
    _seen: tuple[int, int] | None = None

    def note(self) -> bool:
        """Remember how they stand, at the end of a backward pass; whether there are any."""
        first = self._first()
        self._seen = None if first is None else _fingerprint(first)
        return first is not None

    def discarded(self) -> bool:
        """Whether those that were noted are gone: all are None, or zero since. Looks at values only where they changed.

        In an accumulation nothing changes them between backward and forward passes, so that nothing waits for a device.
        """
        first = self._first()
        if first is None:
            return True
        if self._seen == _fingerprint(first):
            return False
        return not any(bool(p.grad.any()) for p in self.model.parameters() if p.grad is not None)

    def _first(self) -> Tensor | None:
        return next((p.grad for p in self.model.parameters() if p.grad is not None), None)


def _fingerprint(gradient: Tensor) -> tuple[int, int]:
    return id(gradient), 0 if gradient.is_inference() else gradient._version


def after_backward(call: Callable[[], None]) -> None:
    """Have ``call`` run at the end of the backward pass that is under way."""
    with suppress(RuntimeError):  # a graph that was compiled together with its backward pass has no end to wait for
        Variable._execution_engine.queue_callback(call)  # type: ignore[attr-defined]
