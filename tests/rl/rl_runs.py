"""Trainings that are killed and resumed; as a program: trains all of them side by side, one update of each a round."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from rl_environments import Masked

import natgrad as ng
import natgrad.rl as rl

UPDATES = 7
EVERY = 2  # so that a killed run has lost an update, and does it again


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1", max_episode_steps=30)


@dataclass(frozen=True)
class Run:
    """A training of ``UPDATES`` updates.

    ``options``: of the Setup.
    """

    environment: str | Callable[[], gym.Env]
    algorithm: Any
    options: tuple[tuple[str, Any], ...] = ()
    mode: str = "sync"

    def start(self, folder: Path | None) -> rl.Training:
        setup = rl.Setup(**{"environments": 3, "horizon": 24, "hidden": (8,)} | dict(self.options))
        steps = UPDATES * setup.environments * setup.horizon
        options = {"steps": steps, "setup": setup, "seed": 3, "folder": folder, "every": EVERY, "mode": self.mode}
        return rl.Training(self.environment, self.algorithm, **options)


_RECURRENT = (("recurrent", True), ("horizon", 12))
RUNS = {
    "CartPole-NPG": Run(cartpole, rl.NPG()),
    "CartPole-TRPO": Run(cartpole, rl.TRPO()),
    "CartPole-ACKTR": Run(cartpole, rl.ACKTR(entropy=0.01)),
    "CartPole-PPO": Run(cartpole, rl.PPO(epochs=2)),
    "CartPole-PPO-penalty": Run(cartpole, rl.PPO(epochs=2, clip=None, penalty=1.0, max_kl=0.02)),
    "CartPole-PPO-K-FAC": Run(cartpole, rl.PPO(epochs=1, structure=ng.Kronecker(), lr=0.1)),
    "CartPole-TRPO-K-FAC": Run(cartpole, rl.TRPO(structure=ng.Kronecker())),
    "CartPole-TRPO-async": Run(cartpole, rl.TRPO(), mode="async"),
    "CartPole-TRPO-memory": Run(cartpole, rl.TRPO(), _RECURRENT),
    "CartPole-PPO-memory": Run(cartpole, rl.PPO(epochs=2), _RECURRENT),
    "Pendulum-NPG": Run("Pendulum-v1", rl.NPG()),
    "Pendulum-TRPO": Run("Pendulum-v1", rl.TRPO(), (("state_dependent_scale", True),)),
    "Pendulum-ACKTR": Run("Pendulum-v1", rl.ACKTR()),
    "Pendulum-PPO": Run("Pendulum-v1", rl.PPO(epochs=2), (("squashed", True),)),
    "Masked-TRPO": Run(partial(Masked, spaces.MultiDiscrete([3, 2], start=[1, 0])), rl.TRPO()),
    "Hopper-TRPO": Run("Hopper-v5", rl.TRPO()),
}


def outcome(training: rl.Training) -> dict[str, Any]:
    """All that must be the same, in values that ``torch.save`` keeps."""
    history = [{name: value for name, value in r.items() if name != "seconds"} for r in training.history]
    return {
        "history": history,
        "networks": {name: value.clone() for name, value in training.modules.state_dict().items()},
        "observations": torch.from_numpy(training.environments.observations.copy()),
        "resumed": training.resumed,
    }


def main(folder: Path, results: Path) -> None:
    torch.set_num_threads(1)
    trainings = {name: run.start(folder / name) for name, run in RUNS.items()}
    records = {name: iter(training) for name, training in trainings.items()}
    for k in range(1, UPDATES + 1):
        for name in records:
            if next(records[name], None) is None:
                continue
            print(f"{name} {k}", flush=True)
    torch.save({name: outcome(training) for name, training in trainings.items()}, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
