"""Which structure to use and why; where none keeps the limits, which limit fails and what comes nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from natgrad.planning.choice import FIT, Choice
from natgrad.planning.limits import Limits, text
from natgrad.planning.methods import METHODS
from natgrad.planning.schedules import Found
from natgrad.planning.sizes import size_text

_EXACT = (("dense", "The whole matrix"), ("gram", "The Gram matrix of the batch's rows"))
_ORDER = ("kfac", "ekfac", "block", "gram", "dense", "diagonal", "matrix-free")


def recommend(found: Sequence[Found], limits: Limits) -> tuple[str | None, str | None, str]:
    """The structure to use, else the one that comes nearest, and a sentence: exact where it is no dearer than K-FAC,
    then K-FAC, then what still keeps the limits."""
    fits = {f.choice.name: f.choice for f in found if not f.choice.problem}
    kfac = next(f.choice for f in found if f.choice.name == "kfac")
    for name, exact in _EXACT:
        if name in fits and fits[name].ratio <= kfac.ratio:
            return name, None, (
                f"{exact} is exact, and a step takes {fits[name].ratio:.2f} × SGD's time where K-FAC's takes "
                f"{kfac.ratio:.2f}."
            )  # fmt: skip
    for name in _ORDER:
        if name in fits:
            return name, None, _why(fits[name], kfac, limits)
    possible = [f for f in found if math.isfinite(f.choice.ratio)]
    nearest = min(possible, key=lambda f: (limits.excess(f.choice), f.choice.ratio)).choice
    return None, nearest.name, _none(possible, nearest, limits)


def _why(choice: Choice, kfac: Choice, limits: Limits) -> str:
    why = f"{choice.preset} takes {choice.ratio:.2f} × SGD's time and {size_text(choice.state)} of state"
    if choice.schedule:
        why += f": {choice.schedule}"
    if choice.name != "kfac" and kfac.problem:
        return f"{why}. K-FAC does not fit: {kfac.problem}."
    if not limits.names:
        return f"{why}."
    if METHODS[choice.name].scheduled:
        why += ", the freshest that keep the limits"
    dropped = METHODS[choice.name].fitted and choice.search != FIT
    return why + (". Measuring the step's length (QuadraticFit) does not fit." if dropped else ".")


def _none(possible: Sequence[Found], nearest: Choice, limits: Limits) -> str:
    """For each limit, who keeps it alone, or how near anybody comes; then what comes nearest to all."""
    parts = []
    for name in limits.names:
        keeping = [f.choice.name for f in possible if f.least[name] <= limits.allowed(name)]
        if keeping:
            parts.append(f"{text(limits.allowed(name), name)} is kept by {', '.join(keeping)}")
        else:
            least = min(possible, key=lambda f: f.least[name])
            parts.append(
                f"{text(limits.allowed(name), name)} is kept by none: the least is "
                f"{text(least.least[name], name)} ({least.choice.name})"
            )
    limit = "the limit" if len(limits.names) == 1 else "all limits at once"
    schedule = f" ({nearest.schedule})" if nearest.schedule else ""
    return (
        f"No structure keeps {limit}. {'; '.join(parts)}. The nearest is {nearest.name}{schedule}: {nearest.problem}."
    )
