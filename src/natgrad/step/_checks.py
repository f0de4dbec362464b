"""Argument checks shared by the searches and the dampings."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from natgrad.errors import ArgumentError

NAN_RATE = (
    "lr is nan. A scheduler that multiplies lr = inf by 0, as a warmup from 0 does, gives nan: schedule a finite lr, "
    "or let the factor start above 0."
)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positive(owner: str, name: str, value: float, *, zero: bool = False) -> None:
    """Raise ArgumentError unless ``value`` is a finite number above zero (or zero, where ``zero``)."""
    if _is_number(value) and math.isfinite(value) and (value > 0 or (zero and value == 0)):
        return
    bound = "at least 0" if zero else "above 0"
    raise ArgumentError(f"{owner}: {name} is {value!r}. It must be a finite number {bound}.")


def fraction(owner: str, name: str, value: float) -> None:
    """Raise ArgumentError unless 0 < ``value`` < 1."""
    if not (_is_number(value) and 0 < value < 1):
        raise ArgumentError(f"{owner}: {name} is {value!r}. It must lie strictly between 0 and 1.")


def count(owner: str, name: str, value: int, *, least: int) -> None:
    """Raise ArgumentError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{owner}: {name} is {value!r}. It must be an integer of at least {least}.")


def learning_rate(owner: str, lr: float | Tensor, *, infinite: bool) -> None:
    """Raise ArgumentError for a Python ``lr`` that is NaN, negative or (unless ``infinite``) infinite.

    A tensor is left unchecked, since looking at it would wait for the device; the searches give no step for a
    non-finite one.
    """
    if isinstance(lr, Tensor):
        return
    if _is_number(lr) and math.isnan(lr):
        raise ArgumentError(f"{owner}: {NAN_RATE}")
    if not _is_number(lr) or lr < 0:
        raise ArgumentError(f"{owner}: lr is {lr!r}. It must be a number of at least 0.")
    if math.isinf(lr) and not infinite:
        raise ArgumentError(
            f"{owner}: lr is infinite, which means 'go to the KL boundary', but this search has no KL radius. "
            "Give a finite lr, or use KLClip, TrustRegion or QuadraticFit(max_kl=...)."
        )


def blocks(what: str, wanted: Mapping[str, object], have: Mapping[str, object]) -> None:
    """Raise ArgumentError unless each block of ``wanted`` is in ``have``."""
    missing = [name for name in wanted if name not in have]
    if missing:
        raise ArgumentError(
            f"The {what} has no block for {missing[:5]}{' and more' if len(missing) > 5 else ''} (it has "
            f"{list(have)[:5]}{'...' if len(have) > 5 else ''}). A direction can be judged only where the gradient and "
            "the metric are known: build all three over the same partition of the parameters."
        )
