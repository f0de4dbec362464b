"""Checkpoints of a training: all that a resumed run needs to go on bit for bit."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natgrad.checkpoint import load, save
from natgrad.errors import SnapshotError

if TYPE_CHECKING:
    from natgrad.rl.training import Training


def write(training: Training, path: Path) -> None:
    """Save ``training`` to ``path``."""
    collector = training.collector
    noise = None if collector.noise is None else collector.noise.z
    save(
        path,
        training.modules,
        training.learner,
        run=_identity(training),
        history=training.history,
        environments=training.environments.state_dict(),
        generator=training.generator.get_state(),
        memory=[collector.memory, collector.critic_memory, noise],
        recent=[list(pair) for pair in training.recent],
        taken=training.taken,
        episodes=training.episodes,
        seconds=training.seconds,
    )


def resume(training: Training, path: Path) -> None:
    """Bring ``training`` to where the one that wrote ``path`` was.

    Raises:
        SnapshotError: the checkpoint is damaged, or of another run.
    """
    extras = load(path)
    if "run" not in extras or "environments" not in extras:
        raise SnapshotError(f"{path} is no checkpoint of natgrad.rl. Name another folder, or move it away.")
    _check_same_run(_identity(training), extras["run"], path)
    load(path, training.modules, training.learner)
    training.history, training.taken, training.episodes = extras["history"], extras["taken"], extras["episodes"]
    training.recent = [(pair[0], pair[1]) for pair in extras["recent"]]
    training.generator.set_state(extras["generator"])
    training.earlier = extras["seconds"]
    training.resumed = training.environments.load_state_dict(extras["environments"])
    if not training.resumed:
        warnings.warn(
            f"{training.environments.name} could not be brought back to the states of the checkpoint: it is not "
            "deterministic given seed and actions, or resets itself. Training goes on with new episodes, and is "
            "not the run that an uninterrupted one would have been.",
            UserWarning,
            stacklevel=5,
        )
    device, collector = next(training.policy.parameters()).device, training.collector
    collector.memory, collector.critic_memory, noise = (None if m is None else m.to(device) for m in extras["memory"])
    if collector.noise is not None and noise is not None:
        collector.noise.z = noise


def _identity(training: Training) -> dict[str, Any]:
    """What must be the same for a run to go on as the same run."""
    setup = asdict(training.setup) | {"hidden": list(training.setup.hidden)}
    setup["environments"] = training.environments.n  # a VectorEnv of the user has a number of its own
    return {
        "algorithm": re.sub(r" at 0x[0-9a-f]+", "", repr(training.algorithm)),
        "seed": training.seed,
        "environment": training.environments.name,
        **setup,
    }


def _check_same_run(ours: dict[str, Any], theirs: dict[str, Any], path: Path) -> None:
    different = [name for name in ours if ours[name] != theirs.get(name)]
    if different:
        differences = "; ".join(f"{name} is {theirs.get(name)!r} there and {ours[name]!r} here" for name in different)
        raise SnapshotError(f"{path} is of another run: {differences}. Name another folder, or delete it.")
