"""Training a policy: act, update, measure, record, save; and go on after an interruption, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from natgrad.checkpoint import load, save
from natgrad.errors import ArgumentError, NonFiniteError, SnapshotError
from natgrad.rl.algorithm import Algorithm, Setup
from natgrad.rl.environments import EnvironmentLike, Environments, Mode, make
from natgrad.rl.objective import behaviour, entropy, explained_variance, mean_kl, surrogate
from natgrad.rl.policy import Critic, Policy, build
from natgrad.rl.rollout import Collector, Samples
from natgrad.rl.spaces import head_for, observation_size

RECENT = 20  # episodes whose mean is the return of a record
Record = dict[str, float]


class Training:
    """A run of an algorithm on an environment.

    ::

        training = Training("CartPole-v1", TRPO(), steps=100_000, folder="runs/cartpole")
        for record in training:
            print(record["steps"], record["return"], record["kl"])

    Args:
        environment: see :func:`natgrad.rl.make`.
        algorithm: TRPO, NPG, ACKTR, PPO.
        steps: of all environments together; the last update is the one that reaches them.
        setup: how it acts, and its networks.
        seed: of weights, actions, episodes and sampled labels. The global random streams are not touched.
        folder: where ``checkpoint.safetensors`` is kept; one that is there already is gone on from. None: none is kept.
        every: updates between checkpoints.
        mode: ``"sync"`` or ``"async"`` environments.
        import_code: whether an id ``module:id`` may import its module.
        device: of policy, critic and updates.
        networks: policy and critic instead of those that ``setup`` describes.

    Attributes:
        policy, critic: what is learned.
        history: a record of every update: ``update``, ``steps``, ``episodes``; ``return`` and ``length`` (means of the
            last 20 episodes, NaN before the first ended); ``kl`` (measured mean KL(old ‖ new) of the update, nats per
            action), ``kl_normaliser`` (of renewing the normaliser after it); ``entropy``; ``surrogate`` (its measured
            gain); ``explained_variance`` (of the critic, before its fit); ``seconds`` since the start, and what the
            algorithm adds.
        resumed: None, or whether the environments went on from their very states.

    Raises:
        ArgumentError: see the arguments; or ``folder`` holds a checkpoint of another run.
    """

    def __init__(
        self,
        environment: EnvironmentLike,
        algorithm: Algorithm,
        *,
        steps: int,
        setup: Setup = Setup(),
        seed: int = 0,
        folder: str | Path | None = None,
        every: int = 10,
        mode: Mode = "sync",
        import_code: bool = False,
        device: str | torch.device = "cpu",
        networks: tuple[Policy, Critic] | None = None,
    ) -> None:
        if steps < 1:
            raise ArgumentError(f"steps must be at least 1, got {steps}.")
        self.algorithm, self.setup, self.steps, self.seed, self.every = algorithm, setup, steps, seed, every
        self.path = None if folder is None else Path(folder) / "checkpoint.safetensors"
        vector = make(environment, setup.environments, mode=mode, import_code=import_code)
        self.environments = Environments(vector, seed)
        if networks is None:
            networks = self._networks()
        self.policy: Policy = networks[0].to(device)
        self.critic: Critic = networks[1].to(device)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.learner = algorithm.learner(self.policy, self.critic, seed)
        self.collector = Collector(
            self.environments,
            self.policy,
            self.critic,
            horizon=setup.horizon,
            gamma=setup.gamma,
            lam=setup.lam,
            generator=self.generator,
        )
        self.history: list[Record] = []
        self.taken = self.episodes = 0
        self.recent: list[tuple[float, int]] = []
        self._seconds, self._since = 0.0, time.perf_counter()
        self.resumed: bool | None = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._resume(self.path)

    def _networks(self) -> tuple[Policy, Critic]:
        setup, vector = self.setup, self.environments.vector
        head = head_for(vector.single_action_space, squashed=setup.squashed)
        size = observation_size(vector.single_observation_space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build(
                size,
                head,
                hidden=setup.hidden,
                recurrent=setup.recurrent,
                normalise=setup.normalise,
                state_dependent_scale=setup.state_dependent_scale,
                log_scale=setup.log_scale,
            )

    @property
    def modules(self) -> nn.ModuleDict:
        """Policy and critic in one module, as they are saved."""
        return nn.ModuleDict({"policy": self.policy, "critic": self.critic})

    def __iter__(self) -> Iterator[Record]:
        """Train; a record after every update. The environments are closed when training ends."""
        self._since = time.perf_counter()
        while self.taken < self.steps:
            record = self.update()
            done = self.taken >= self.steps
            if self.path is not None and (done or len(self.history) % self.every == 0):
                self.save()
            yield record
        self.close()

    def run(self) -> Training:
        """Train to the end; returns itself."""
        for _ in self:
            pass
        return self

    def close(self) -> None:
        """Close the environments."""
        self.environments.close()

    def update(self) -> Record:
        """One rollout and one update.

        Raises:
            EnvironmentFault: an environment failed; nothing was updated.
            NonFiniteError: the policy diverged; the last checkpoint is kept.
        """
        rollout = self.collector.collect()
        samples = self.collector.samples(rollout)
        old = behaviour(self.policy, samples)
        quality = self._explained(samples)
        metrics = self.learner.update(samples, old, self.taken / self.steps)
        self.taken += int(rollout.valid.sum())
        record = self._record(samples, old, metrics | {"explained_variance": quality})
        self.history.append(record)
        return record

    @torch.no_grad()
    def _explained(self, samples: Samples) -> float:
        values = self.critic.values(self.critic(*samples.critic_inputs))
        return float(explained_variance(values[..., 0], samples.returns))

    @torch.no_grad()
    def _record(self, samples: Samples, old: torch.Tensor, metrics: dict[str, float]) -> Record:
        policy, ended = self.policy, self.environments.take_finished()
        new = policy(*samples.inputs)
        if not bool(torch.isfinite(new).all()):
            kept = "" if self.path is None else f" The last checkpoint, {self.path}, is kept."
            raise NonFiniteError(
                f"After update {len(self.history) + 1} the policy's output is not finite: training diverged.{kept} "
                "Take a smaller radius or learning rate, or more damping."
            )
        before, gain = surrogate(policy, old, samples), surrogate(policy, new, samples)
        policy.normaliser.update(samples.observations)  # pyright: ignore[reportCallIssue]
        self.episodes += len(ended)
        self.recent = [*self.recent, *((e.episode_return, e.length) for e in ended)][-RECENT:]
        count = len(self.recent) or math.nan
        values = {
            "update": float(len(self.history) + 1),
            "steps": float(self.taken),
            "episodes": float(self.episodes),
            "return": sum(r for r, _ in self.recent) / count,
            "length": sum(n for _, n in self.recent) / count,
            "kl": float(mean_kl(policy, old, new)),
            "kl_normaliser": float(mean_kl(policy, new, policy(*samples.inputs))),
            "entropy": float(entropy(policy, new)),
            "surrogate": float(gain - before),
            "seconds": self._seconds + time.perf_counter() - self._since,
        }
        return metrics | values

    # Checkpoints

    def save(self) -> None:
        """Write the checkpoint: all that a resumed run needs to go on bit for bit."""
        if self.path is None:
            raise ArgumentError("This training has no folder; give folder=... to keep checkpoints.")
        memory = [self.collector.memory, self.collector.critic_memory]
        save(
            self.path,
            self.modules,
            self.learner,
            run=self._identity(),
            history=self.history,
            environments=self.environments.state_dict(),
            generator=self.generator.get_state(),
            memory=memory,
            recent=[list(pair) for pair in self.recent],
            taken=self.taken,
            episodes=self.episodes,
            seconds=self._seconds + time.perf_counter() - self._since,
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as the same run."""
        setup = asdict(self.setup) | {"hidden": list(self.setup.hidden)}
        return {
            "algorithm": repr(self.algorithm),
            "setup": setup,
            "seed": self.seed,
            "environment": str(getattr(self.environments.vector.spec, "id", "")),
        }

    def _resume(self, path: Path) -> None:
        extras = load(path, self.modules, self.learner)
        ours, theirs = self._identity(), extras["run"]
        different = [name for name in ours if ours[name] != theirs.get(name)]
        if different:
            raise SnapshotError(
                f"{path} is of another run: it differs in {', '.join(different)} (there {theirs[different[0]]!r}, here "
                f"{ours[different[0]]!r}). Name another folder, or delete it."
            )
        self.history, self.taken, self.episodes = extras["history"], extras["taken"], extras["episodes"]
        self.recent = [(pair[0], pair[1]) for pair in extras["recent"]]
        self.generator.set_state(extras["generator"])
        self._seconds = extras["seconds"]
        self.resumed = self.environments.load_state_dict(extras["environments"])
        device = next(self.policy.parameters()).device
        memory = [None if m is None else m.to(device) for m in extras["memory"]]
        self.collector.memory, self.collector.critic_memory = memory
