"""Reentrant activation checkpointing: its graph allows no backward pass but the loss's own, its layers run without one.

A pass with it is run again by the other kind, which differs in nothing else: the same inputs are kept, the same numbers
come out, and random streams are put back in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import checkpoint as kinds

_NODE = "CheckpointFunctionBackward"


def is_reentrant(output: Tensor) -> bool:
    """Whether the graph of ``output`` goes through a reentrant checkpoint."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == _NODE:
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


class _Other:
    """Takes the place of the reentrant kind's function."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return kinds.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def never_reentrant() -> Iterator[None]:
    """Inside, ``checkpoint(..., use_reentrant=True)`` is the kind that is not."""
    kept = kinds.CheckpointFunction
    kinds.CheckpointFunction = _Other  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        kinds.CheckpointFunction = kept
