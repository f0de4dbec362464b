"""Bytes as people write them."""

from __future__ import annotations

import math
import re

from natgrad.errors import ArgumentError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def memory_limit(given: int | float | str, adam: int) -> int:
    """Bytes from a number, ``"4 GB"``, ``"512MiB"`` or a multiple of Adam's state, ``"2x-adam"``.

    Raises:
        ArgumentError: the text is none of these, or the number is not above 0.
    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(?:(x-adam)|([kmgt]?i?)b?)\s*", given.lower())
        if match and match[3] in (None, *_UNITS) and float(match[1]) > 0:
            return int(float(match[1]) * (adam if match[2] else _UNITS[match[3]]))
    elif not isinstance(given, bool) and 0 < given < math.inf:
        return int(given)
    raise ArgumentError(f"max_memory={given!r} was given; use bytes, or a text such as '4 GB', '512MiB' or '2x-adam'.")


def size_text(count: float) -> str:
    """``12.4 MB``; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
