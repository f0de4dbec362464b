"""Action masks: which actions an environment allows, read from its ``info`` and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space, spaces

from natgrad.errors import EnvironmentFault


def parts(space: Space) -> tuple[int, ...]:
    """The number of choices of each decision: (n,) for Discrete, one for each of MultiDiscrete, () for other spaces."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.ravel())
    return ()


def read(given: Any, space: Space, name: str) -> np.ndarray:
    """One environment's mask as bool [C], from one array or a tuple of one array for each decision.

    Raises:
        EnvironmentFault: it has not one entry for every choice.
    """
    pieces = given if isinstance(given, tuple | list) else (given,)
    mask = np.concatenate([np.asarray(piece).reshape(-1) for piece in pieces]).astype(bool)
    choices = sum(parts(space))
    if choices and mask.size != choices:
        raise EnvironmentFault(
            f"{name} gave an action_mask of {mask.size} entries, but its actions {space} have {choices} choices."
        )
    return mask


def check(mask: np.ndarray, running: np.ndarray, space: Space, name: str) -> None:
    """Raises EnvironmentFault where ``mask`` [n, C] leaves a ``running`` [n] environment without an action."""
    ends = np.cumsum(parts(space))[:-1]
    for piece in np.split(mask, ends, axis=1) if len(ends) else (mask,):
        stuck = running & ~piece.any(1)
        if parts(space) and stuck.any():
            raise EnvironmentFault(
                f"{name} allows no action in environment {int(np.flatnonzero(stuck)[0])}: its action_mask is all zero "
                "though the episode has not ended. End the episode there, or allow an action that does nothing."
            )


def first_allowed(mask: np.ndarray | None, space: Space) -> np.ndarray:
    """An action of ``space`` that ``mask`` [C] allows."""
    if mask is None or not parts(space):
        return np.asarray(space.sample())
    found = [int(piece.argmax()) for piece in np.split(mask, np.cumsum(parts(space))[:-1])]
    start = np.asarray(space.start)  # pyright: ignore[reportAttributeAccessIssue]
    return (np.array(found).reshape(start.shape) + start).astype(space.dtype)
