"""What a step may take: limits on mean time, on memory, and on the slowest steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from natgrad.errors import ArgumentError
from natgrad.planning.choice import Choice
from natgrad.planning.sizes import memory_limit, size_text


@dataclass(frozen=True)
class Limits:
    """Limits of a plan; None sets none.

    Args:
        overhead: mean time of a step beyond SGD's, as a part of it.
        memory: bytes of optimizer state.
        p99: 99th percentile of step times over their median.
    """

    overhead: float | None = None
    memory: int | None = None
    p99: float | None = None

    @staticmethod
    def of(overhead: float | None, memory: int | str | None, p99: float | None, adam: int) -> Limits:
        """The limits as a user gives them; ``adam``: bytes of Adam's state.

        Raises:
            ArgumentError: a limit that cannot be meant.
        """
        if overhead is not None and not (_real(overhead) and 0 < overhead < math.inf):
            raise ArgumentError(f"max_overhead={overhead!r} was given; it must be a number above 0: 0.1 is a tenth.")
        if p99 is not None and not (_real(p99) and 1 <= p99 < math.inf):
            raise ArgumentError(
                f"max_p99={p99!r} was given; it must be a number of at least 1: 1.3 lets the slowest steps take 1.3 "
                "times the median."
            )
        return Limits(overhead, None if memory is None else memory_limit(memory, adam), p99)

    @property
    def names(self) -> tuple[str, ...]:
        """The limits that are set."""
        return tuple(name for name in ("overhead", "memory", "p99") if getattr(self, name) is not None)

    def allowed(self, name: str) -> float:
        """What the limit of that name lets :func:`value` be."""
        given = getattr(self, name)
        return math.inf if given is None else 1.0 + given if name == "overhead" else given

    def excess(self, choice: Choice) -> float:
        """By how many times a choice takes more than is allowed, of all limits together; 1 where it keeps them."""
        return math.prod(max(1.0, value(choice, name) / self.allowed(name)) for name in self.names)

    def broken(self, choice: Choice) -> tuple[str, ...]:
        """The limits that a choice breaks."""
        return tuple(name for name in self.names if value(choice, name) > self.allowed(name))

    def problem(self, choice: Choice) -> str:
        """By how much a choice breaks which limits; empty where it keeps them."""
        return "; ".join(
            f"{text(value(choice, name), name)} (limit {number(self.allowed(name), name)})"
            for name in self.broken(choice)
        )


def value(choice: Choice, name: str) -> float:
    """What a choice takes of what the limit of that name is about."""
    return {"overhead": choice.ratio, "memory": float(choice.state), "p99": choice.p99}[name]


def number(amount: float, name: str) -> str:
    """The amount, short."""
    return size_text(amount) if name == "memory" else f"{amount:.4g}"


def text(amount: float, name: str) -> str:
    """The amount with its unit."""
    units = {"overhead": "{} × SGD's time", "memory": "{} of state", "p99": "slowest steps {} × the median"}
    return units[name].format(number(amount, name))


def _real(given: object) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)
