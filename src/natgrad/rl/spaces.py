"""From an environment's spaces to the head and the inputs of a policy."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from natgrad.errors import UnsupportedError
from natgrad.rl.heads import BernoulliHead, CategoricalHead, GaussianHead, Head, MultiCategoricalHead, SquashedHead


def head_for(space: gym.Space, *, squashed: bool = False) -> Head:
    """The head for actions of ``space``: Discrete, MultiDiscrete, MultiBinary or Box.

    Raises:
        UnsupportedError: another space, or one with nothing to decide; ``squashed`` of actions that are not continuous.
    """
    if squashed and not isinstance(space, spaces.Box):
        raise UnsupportedError(
            f"squashed is for continuous actions, but this environment's are {space}. Leave it out (squashed=False, "
            "--no-squashed)."
        )
    if isinstance(space, spaces.Discrete):
        if space.n == 1:
            raise UnsupportedError(f"Actions of {space} leave nothing to decide: there must be two or more.")
        return CategoricalHead(int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        start = tuple(int(s) for s in np.asarray(space.start).ravel())
        return MultiCategoricalHead(tuple(int(n) for n in space.nvec.ravel()), start, space.nvec.shape)
    if isinstance(space, spaces.MultiBinary):
        return BernoulliHead(tuple(space.shape))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        if math.prod(space.shape) == 0:
            raise UnsupportedError(f"Actions of {space} have no entries, so that there is nothing to decide.")
        low, high = (tuple(float(v) for v in bound.ravel()) for bound in (space.low, space.high))
        kind = SquashedHead if squashed else GaussianHead
        return kind(low, high, tuple(space.shape), np.dtype(space.dtype).name)
    raise UnsupportedError(
        f"Actions of {space} have no policy head. Supported are Discrete, MultiDiscrete, MultiBinary and Box of "
        "floats; wrap the environment, for example with gymnasium.wrappers.TransformAction, to get one of these."
    )


def observation_size(space: gym.Space) -> int:
    """Entries of a flattened observation; UnsupportedError unless ``space`` is a Box with at least one."""
    if isinstance(space, spaces.Box):
        size = math.prod(space.shape)
        if size == 0:
            raise UnsupportedError(
                f"Observations of {space} have no entries. Let the environment observe at least one number; a constant "
                "will do."
            )
        return size
    raise UnsupportedError(
        f"Observations of {space} are not an array. Wrap the environment with gymnasium.wrappers.FlattenObservation; "
        "natgrad.rl.make does so by itself."
    )
