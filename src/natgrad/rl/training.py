"""Training a policy: act, update, measure, record, save; and go on after an interruption, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from natgrad.errors import ArgumentError, EnvironmentFault, NonFiniteError
from natgrad.rl import checkpoint
from natgrad.rl.algorithm import Algorithm, Setup
from natgrad.rl.environments import Environments
from natgrad.rl.fit import check_policy, does_not_fit
from natgrad.rl.objective import behaviour, entropy, explained_variance, mean_kl, surrogate
from natgrad.rl.policy import Critic, Policy, build
from natgrad.rl.rollout import Collector, Samples
from natgrad.rl.spaces import head_for, observation_size
from natgrad.rl.vector import EnvironmentLike, Mode, make

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
        resumed: None, or whether the environments went on from their very states; where they could not, there is a
            warning, and new episodes began.

    Raises:
        ArgumentError: see the arguments; or ``networks`` do not fit the environment.
        EnvironmentFault: the environment could not be made or reset.
        SnapshotError: ``folder`` holds a damaged checkpoint, or one of another run.
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
        if every < 1:
            raise ArgumentError(f"every must be at least 1, got {every}.")
        self.algorithm, self.setup, self.steps, self.seed, self.every = algorithm, setup, steps, seed, every
        self.path = None if folder is None else Path(folder) / "checkpoint.safetensors"
        vector = make(environment, setup.environments, mode=mode, import_code=import_code)
        try:
            self._start(Environments(vector, seed), device, networks)
        except BaseException:
            with suppress(Exception):
                vector.close()
            raise

    def _start(
        self, environments: Environments, device: str | torch.device, networks: tuple[Policy, Critic] | None
    ) -> None:
        setup, seed, self.environments = self.setup, self.seed, environments
        if networks is None:
            networks = self._networks()
        self.policy: Policy = networks[0].to(device)
        self.critic: Critic = networks[1].to(device)
        check_policy(self.policy, environments)
        self._check_critic()
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.learner = self.algorithm.learner(self.policy, self.critic, seed)
        self.collector = Collector(
            environments,
            self.policy,
            self.critic,
            horizon=setup.horizon,
            gamma=setup.gamma,
            lam=setup.lam,
            generator=self.generator,
            noise_correlation=setup.noise_correlation,
        )
        self.history: list[Record] = []
        self.taken = self.episodes = 0
        self.recent: list[tuple[float, int]] = []
        self.earlier, self._since = 0.0, time.perf_counter()
        self.resumed: bool | None = None
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise ArgumentError(f"folder={str(self.path.parent)!r} is a file, or lies in one: {error}") from error
            if self.path.exists():
                checkpoint.resume(self, self.path)

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

    @torch.no_grad()
    def _check_critic(self) -> None:
        """Raises ArgumentError unless the critic takes what the policy takes, and gives one value of each state."""
        n, critic = self.environments.n, self.critic
        if critic.recurrent != self.policy.recurrent:
            which = ("policy", "critic") if self.policy.recurrent else ("critic", "policy")
            raise ArgumentError(
                f"The {which[0]} has a memory and the {which[1]} has none, but both learn from the same sequences: "
                "give both one, or neither."
            )
        rows = torch.from_numpy(self.environments.observations).to(next(self.policy.parameters()))
        starts = torch.ones(n, 1, device=rows.device) if critic.recurrent else None
        try:
            values = critic(rows.unsqueeze(1) if critic.recurrent else rows, starts, critic.start(n))
        except RuntimeError as error:
            raise does_not_fit("critic", self.environments, error) from error
        expected = (n, 1, 1) if critic.recurrent else (n, 1)
        if values.shape != expected:
            raise ArgumentError(
                f"The critic gave outputs of shape {tuple(values.shape)} for {n} states, and must give {expected}: one "
                "column, the value. Give its body a last layer of one output."
            )

    @property
    def seconds(self) -> float:
        """Time of training so far, also that before an interruption (``earlier``)."""
        return self.earlier + time.perf_counter() - self._since

    @property
    def modules(self) -> nn.ModuleDict:
        """Policy and critic in one module, as they are saved."""
        return nn.ModuleDict({"policy": self.policy, "critic": self.critic})

    def __iter__(self) -> Iterator[Record]:
        """Train; a record after every update. The environments are closed when training ends, or fails."""
        self._since = time.perf_counter()
        while self.taken < self.steps:
            try:
                record = self.update()
            except Exception:
                with suppress(Exception):  # what failed is raised, and not what comes of it
                    self.close()
                raise
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
            NonFiniteError: policy or critic diverged; the last checkpoint is kept.
        """
        with self._explaining():
            self._check_finite("Before")
            rollout = self.collector.collect()
            samples = self.collector.samples(rollout)
            old = behaviour(self.policy, samples)
            quality = self._explained(samples)
            metrics = self.learner.update(samples, old, self.taken / self.steps)
            self._check_finite("After")
            record = self._record(
                samples, old, self.taken + int(rollout.valid.sum()), metrics | {"explained_variance": quality}
            )
        self.history.append(record)
        return record

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """What failed, and what is left of the run."""
        try:
            yield
        except (EnvironmentFault, NonFiniteError) as error:
            if self.path is None:
                kept = "This run keeps no checkpoints; give folder=... to have them."
            elif self.path.exists():
                kept = f"The last checkpoint, {self.path}, is kept."
            else:
                kept = f"There is no checkpoint yet in {self.path.parent}: the first is written at update {self.every}."
            raise type(error)(f"{error} {kept}") from error

    def _check_finite(self, when: str) -> None:
        for name, value in self.modules.state_dict().items():
            if not bool(torch.isfinite(value).all()):
                raise self._diverged(when, name)

    def _diverged(self, when: str, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{when} update {len(self.history) + 1} {what} is not finite: training diverged. Take a smaller radius or "
            "learning rate, or more damping."
        )

    @torch.no_grad()
    def _explained(self, samples: Samples) -> float:
        values = self.critic.values(self.critic(*samples.critic_inputs))
        return float(explained_variance(values[..., 0], samples.returns))

    @torch.no_grad()
    def _record(self, samples: Samples, old: torch.Tensor, taken: int, metrics: dict[str, float]) -> Record:
        policy = self.policy
        new = policy(*samples.inputs)
        if not bool(torch.isfinite(new).all()):
            raise self._diverged("After", "the policy's output")
        ended, self.taken = self.environments.take_finished(), taken
        before, gain = surrogate(policy, old, samples), surrogate(policy, new, samples)
        for normaliser in {policy.normaliser, self.critic.normaliser}:  # most often one and the same
            normaliser.update(samples.observations)
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
            "seconds": self.seconds,
        }
        return metrics | values

    # Checkpoints

    def save(self) -> None:
        """Write the checkpoint: all that a resumed run needs to go on bit for bit."""
        if self.path is None:
            raise ArgumentError("This training has no folder; give folder=... to keep checkpoints.")
        checkpoint.write(self, self.path)
