"""Checks of settings: one clear error for a value that an algorithm cannot work with, before anything is trained."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from natgrad.errors import ArgumentError


def check_whole(settings: Any, *names: str, least: int = 1) -> None:
    """Raise ArgumentError unless each field is a whole number of at least ``least``."""
    for name in names:
        value = getattr(settings, name)
        if not _is(Integral, value):
            raise ArgumentError(f"{name} must be a whole number, got {value!r}.")
        if value < least:
            raise ArgumentError(f"{name} must be at least {least}, got {value}.")


def check_positive(settings: Any, *names: str) -> None:
    """Raise ArgumentError unless each field is a number above zero, perhaps infinite."""
    for name in names:
        value = getattr(settings, name)
        if not (_is(Real, value) and value > 0):
            raise ArgumentError(f"{name} must be positive, got {value!r}.")


def check_finite(settings: Any, *names: str) -> None:
    """Raise ArgumentError unless each field is a finite number."""
    for name in names:
        value = getattr(settings, name)
        if not (_is(Real, value) and math.isfinite(value)):
            raise ArgumentError(f"{name} must be a finite number, got {value!r}.")


def check_fraction(settings: Any, *names: str) -> None:
    """Raise ArgumentError unless each field lies between 0 and 1, both included."""
    for name in names:
        value = getattr(settings, name)
        if not (_is(Real, value) and 0 <= value <= 1):
            raise ArgumentError(f"{name} must lie between 0 and 1, got {value!r}.")


def widths(hidden: Any) -> tuple[int, ...]:
    """``hidden`` as a tuple; one number is one layer.

    Raises:
        ArgumentError: a width that is no whole number of at least 1.
    """
    if _is(Integral, hidden):
        hidden = (hidden,)
    try:
        found = tuple(hidden)
    except TypeError:
        found = (hidden,)
    if isinstance(hidden, str) or not all(_is(Integral, width) and width >= 1 for width in found):
        raise ArgumentError(f"hidden must be widths of at least 1, such as (64, 64), got {hidden!r}.")
    return tuple(int(width) for width in found)


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
