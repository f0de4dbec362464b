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
# Of TRPO and NPG: the radius (max_kl or target_kl), and settings of the rollout.
_ONE_STEP: dict[str, tuple[float, dict[str, int]]] = {
    "Acrobot-v1": (0.02, {"horizon": 128}),
    "Pendulum-v1": (0.02, {}),
    "MountainCarContinuous-v0": (0.02, {}),
    "Swimmer-v5": (0.02, {}),
    "Hopper-v5": (0.05, {}),
    "HalfCheetah-v5": (0.1, {"environments": 2, "horizon": 1024}),
    "Walker2d-v5": (0.03, {"environments": 2, "horizon": 1024}),
}
_TRPO: dict[str, dict[str, float]] = {
    "Pendulum-v1": {"max_kl": 0.015},
    # Strong damping: with six joints the weakly curved directions are noise for batches of this size.
    "HalfCheetah-v5": {"damping": 0.6},
    "Walker2d-v5": {"damping": 0.6},
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
        radius, rollout = _ONE_STEP[environment]
        setup = replace(setup, **rollout)
        settings = replace(settings, **{"max_kl" if isinstance(settings, TRPO) else "target_kl": radius})
    if isinstance(settings, TRPO):
        settings = replace(settings, **_TRPO.get(environment, {}))  # pyright: ignore[reportArgumentType]
    if isinstance(settings, PPO):
        settings = replace(settings, **_PPO.get(environment, {}))  # pyright: ignore[reportArgumentType]
    return settings, setup
