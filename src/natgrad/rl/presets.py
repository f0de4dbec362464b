"""Settings that are known to work, per algorithm and environment."""

from __future__ import annotations

from dataclasses import replace

from natgrad.errors import ArgumentError
from natgrad.rl.acktr import ACKTR
from natgrad.rl.algorithm import Algorithm, Setup
from natgrad.rl.npg import NPG
from natgrad.rl.ppo import PPO
from natgrad.rl.trpo import TRPO

DEFAULTS: dict[str, tuple[Algorithm, Setup]] = {
    "trpo": (TRPO(), Setup()),
    "npg": (NPG(), Setup()),
    "acktr": (ACKTR(), Setup(horizon=64)),
    "ppo": (PPO(), Setup()),
}
_SETUPS: dict[str, dict[str, float | int | bool]] = {
    "Pendulum-v1": {"gamma": 0.9},
    "MountainCarContinuous-v0": {"noise_correlation": 0.95},
    "Swimmer-v5": {"gamma": 0.9999},
}
_RADII = {"Pendulum-v1": 0.02, "MountainCarContinuous-v0": 0.02}


def settings_for(algorithm: str, environment: str) -> tuple[Algorithm, Setup]:
    """Settings of ``algorithm`` ("trpo", "npg", "acktr", "ppo") for an environment id; the defaults for unknown ones.

    Raises:
        ArgumentError: an unknown algorithm.
    """
    if algorithm not in DEFAULTS:
        raise ArgumentError(f"There is no algorithm {algorithm!r}; there are {', '.join(DEFAULTS)}.")
    settings, setup = DEFAULTS[algorithm]
    setup = replace(setup, **_SETUPS.get(environment, {}))  # pyright: ignore[reportArgumentType]
    radius = _RADII.get(environment)
    if radius is not None and isinstance(settings, TRPO):
        settings = replace(settings, max_kl=radius)
    if radius is not None and isinstance(settings, NPG):
        settings = replace(settings, target_kl=radius)
    return settings, setup
