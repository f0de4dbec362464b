"""What a closure evaluates, and how to evaluate it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.likelihood.base import Target
from natgrad.network import RandomState, fresh_casts
from natgrad.optim.observer import Observer

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Evaluation:
    """What is known of the loss of one step.

    Args:
        loss: what ``step`` returns: the closure's loss, detached where natgrad ran the backward pass itself.
        again: evaluates the closure again, observing nothing, as ``(loss, output)``; None for other closures.
        random: state of the random streams before the closure first ran.
    """

    loss: Any = None
    again: Callable[[], tuple[Tensor, Tensor]] | None = None
    random: RandomState | None = None


def evaluate(
    closure: Closure | None,
    observer: Observer,
    device: torch.device,
    zero_grad: Callable[[], None],
    observe: Callable[[Tensor, Target | None], None],
) -> Evaluation:
    """Run ``closure`` once; the backward pass too, where it returns ``(loss, output)`` or ``(loss, output, target)``.

    Raises:
        ArgumentError: the closure returned what it must not, called ``backward()`` and returned a tuple, or returned
            something else without calling it.
    """
    if closure is None:
        return Evaluation()
    random = RandomState.capture(device)
    with torch.enable_grad(), observer.forced():
        result = closure()
    evaluation = parse_evaluation(result)
    if evaluation is None:
        _check_reached(result, observer)
        return Evaluation(result)
    loss, output, target = evaluation
    if not loss.requires_grad:
        raise ArgumentError(
            "The closure's loss has no graph: it was detached, computed under no_grad, or the closure already "
            "called backward(). Return (loss, output) straight from the computation."
        )
    if observer.reached(output):
        raise ArgumentError(
            "The closure called backward() and returned (loss, output). Return them without calling backward(): "
            "step() does it, and may evaluate the closure again."
        )
    zero_grad()
    with torch.enable_grad():
        observe(output, target)
        # The closure may have run the model more than once; the output it returned is what counts.
        observer.keep(observer.find(output))
        loss.backward()

    kind = device.type
    casting = {
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }

    def again() -> tuple[Tensor, Tensor]:
        with observer.paused(), torch.autocast(kind, **casting), fresh_casts():
            value = parse_evaluation(closure())
        assert value is not None
        return value[0], value[1]

    return Evaluation(loss.detach(), again, random)


def _check_reached(result: Any, observer: Observer) -> None:
    """Raises ArgumentError where a closure of torch's kind has plainly not called ``backward()``: nothing would happen.

    A closure that returns None or a number may have skipped its batch.
    """
    mapped = isinstance(result, list | dict)
    if not (mapped or (isinstance(result, Tensor) and result.requires_grad)):
        return
    gradients = [p.grad for p in observer.model.parameters() if p.grad is not None]
    if any(o.used for o in observer.observations) or any(bool(g.any()) for g in gradients):
        return
    if gradients and not observer.observations:
        return  # a backward pass that gave zeros
    what = f"a {type(result).__name__}" if mapped else "a loss that still has its graph"
    raise ArgumentError(
        f"The closure returned {what}, and no backward pass has reached the model, so that there is no gradient. "
        "Return a tuple (loss, output) or (loss, output, target), for which step() runs the backward pass itself; or "
        "call loss.backward() in the closure and return the loss."
    )


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
