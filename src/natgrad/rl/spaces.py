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
        UnsupportedError: another space.
    """
    if isinstance(space, spaces.Discrete):
        return CategoricalHead(int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        start = tuple(int(s) for s in np.asarray(space.start).ravel())
        return MultiCategoricalHead(tuple(int(n) for n in space.nvec.ravel()), start, space.nvec.shape)
    if isinstance(space, spaces.MultiBinary):
        return BernoulliHead(tuple(space.shape))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        low, high = (tuple(float(v) for v in bound.ravel()) for bound in (space.low, space.high))
        kind = SquashedHead if squashed else GaussianHead
        return kind(low, high, tuple(space.shape), np.dtype(space.dtype).name)
    raise UnsupportedError(
        f"Actions of {space} have no policy head. Supported are Discrete, MultiDiscrete, MultiBinary and Box of "
        "floats; wrap the environment, for example with gymnasium.wrappers.TransformAction, to get one of these."
    )


def observation_size(space: gym.Space) -> int:
    """Entries of a flattened observation; UnsupportedError unless ``space`` is a Box."""
    if isinstance(space, spaces.Box):
        return math.prod(space.shape)
    raise UnsupportedError(
        f"Observations of {space} are not an array. Wrap the environment with gymnasium.wrappers.FlattenObservation; "
        "natgrad.rl.make does so by itself."
    )
