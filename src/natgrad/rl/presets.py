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
# What the environment asks for, whatever the algorithm.
_ENVIRONMENTS: dict[str, dict[str, float]] = {
    "Pendulum-v1": {"gamma": 0.9},
    "MountainCarContinuous-v0": {"noise_correlation": 0.95},
    "Swimmer-v5": {"gamma": 0.9999, "noise_correlation": 0.9},
}
# max_kl of TRPO, target_kl of NPG, and horizon.
_ONE_STEP: dict[str, tuple[float, float, int]] = {
    "Acrobot-v1": (0.02, 0.02, 128),
    "Pendulum-v1": (0.015, 0.02, 256),
    "MountainCarContinuous-v0": (0.02, 0.02, 256),
    "Swimmer-v5": (0.02, 0.02, 256),
    "Hopper-v5": (0.05, 0.05, 256),
    "HalfCheetah-v5": (0.02, 0.02, 256),
    "Walker2d-v5": (0.05, 0.05, 256),
}
_PPO: dict[str, dict[str, float]] = {
    "Acrobot-v1": {"lr": 1e-3, "entropy": 0.01},
    "Pendulum-v1": {"lr": 1e-3},
}


def settings_for(algorithm: str, environment: str) -> tuple[Algorithm, Setup]:
    """Settings of ``algorithm`` ("trpo", "npg", "acktr", "ppo") for an environment id; the defaults for unknown ones.

    Raises:
        ArgumentError: an unknown algorithm.
    """
    if algorithm not in DEFAULTS:
        raise ArgumentError(f"There is no algorithm {algorithm!r}; there are {', '.join(DEFAULTS)}.")
    settings, setup = DEFAULTS[algorithm]
    setup = replace(setup, **_ENVIRONMENTS.get(environment, {}))  # pyright: ignore[reportArgumentType]
    if environment in _ONE_STEP and isinstance(settings, TRPO | NPG):
        max_kl, target_kl, horizon = _ONE_STEP[environment]
        setup = replace(setup, horizon=horizon)
        radius = {"max_kl": max_kl} if isinstance(settings, TRPO) else {"target_kl": target_kl}
        settings = replace(settings, **radius)
    if isinstance(settings, PPO):
        settings = replace(settings, **_PPO.get(environment, {}))  # pyright: ignore[reportArgumentType]
    return settings, setup
