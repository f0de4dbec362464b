"""Settings that cannot be meant are refused where they are given, with an error that names them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import natgrad.rl as rl
from natgrad.errors import ArgumentError

NAN, INF = math.nan, math.inf
BAD: list[tuple[Any, str, list[Any]]] = [
    (rl.Setup, "environments", [0, -1, 2.5, "a", True, None]),
    (rl.Setup, "horizon", [0, 16.0]),
    (rl.Setup, "gamma", [-0.1, 1.1, NAN, "a", None]),
    (rl.Setup, "lam", [-0.1, 1.1, NAN]),
    (rl.Setup, "log_scale", [NAN, INF, "a"]),
    (rl.Setup, "hidden", [0, -3, 2.5, True, None, "64", (64, 0), (8.0,), [8, "8"]]),
    (rl.TRPO, "max_kl", [0, -0.1, NAN, INF, "a", None, True]),
    (rl.TRPO, "backtracks", [-1, 2.5, None]),
    (rl.NPG, "target_kl", [0.0, -0.1, NAN, INF]),
    (rl.NPG, "lr", [0.0, -1.0, NAN, None]),
    (rl.ACKTR, "max_kl", [0.0, NAN, INF]),
    (rl.ACKTR, "lr", [0.0, -1.0, NAN, INF]),
    (rl.ACKTR, "entropy", [NAN, INF, "a", None]),
    (rl.CriticFit, "epochs", [0, -3, 1.5, None]),
    (rl.CriticFit, "batch", [0, 64.0]),
    (rl.CriticFit, "lr", [0.0, -1.0, NAN]),
    (rl.PPO, "epochs", [0, -1, 2.5, "10"]),
    (rl.PPO, "batch", [0, -1]),
    (rl.PPO, "entropy", [NAN, INF]),
    (rl.PPO, "clip", [0.0, -0.2, NAN, "0.2"]),
    (rl.PPO, "step_kl", [0.0, NAN, None]),
]
GOOD: list[tuple[Any, str, list[Any]]] = [
    (rl.Setup, "environments", [1, np.int64(3)]),
    (rl.Setup, "gamma", [0, 1, np.float32(0.5)]),
    (rl.TRPO, "max_kl", [1, np.float64(0.1)]),
    (rl.TRPO, "backtracks", [0]),
    (rl.NPG, "lr", [INF, 0.5]),
    (rl.ACKTR, "entropy", [0, -0.01]),
]


def each(cases: list[tuple[Any, str, list[Any]]]) -> Any:
    flat = [(owner, name, value) for owner, name, values in cases for value in values]
    ids = [f"{owner.__name__}-{name}-{value!r}" for owner, name, value in flat]
    return pytest.mark.parametrize(("owner", "name", "value"), flat, ids=ids)


@each(BAD)
def test_a_value_without_meaning_is_refused_by_name(owner, name, value):
    with pytest.raises(ArgumentError, match=f"^{name} must .*, got "):
        owner(**{name: value})


@each(GOOD)
def test_values_at_the_edge_are_taken(owner, name, value):
    assert getattr(owner(**{name: value}), name) == value


@pytest.mark.parametrize("hidden", [16, (16,), [16], np.array([16]), torch.Size([16]), np.int64(16)])
def test_one_width_is_one_layer(hidden):
    setup = rl.Setup(hidden=hidden)
    assert setup.hidden == (16,) and type(setup.hidden[0]) is int
    assert setup == rl.Setup(hidden=(16,)) and hash(setup) == hash(rl.Setup(hidden=(16,)))


def test_a_memory_has_a_width():
    assert rl.Setup(hidden=()).hidden == ()
    with pytest.raises(ArgumentError, match="hidden is empty"):
        rl.Setup(hidden=(), recurrent=True)
