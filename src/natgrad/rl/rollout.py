"""Acting: from a policy and environments to the samples of an update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from natgrad.errors import UnsupportedError
from natgrad.rl.advantage import advantages
from natgrad.rl.environments import Environments
from natgrad.rl.noise import CorrelatedNoise
from natgrad.rl.policy import Critic, Policy


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments, as they happened.

    Attributes:
        observations: [T, N, D] the states acted on.
        mask: [T, N, C] allowed actions, or None.
        actions, f: [T, N, …] the policy's actions, and the parameters of the distribution they were drawn from.
        rewards: [T, N].
        terminated, truncated: [T, N].
        valid: [T, N] False where an environment only reset itself.
        starts: [T, N] where an episode begins.
        following: [T, N, D] the states that the actions led to, before any reset.
        memory: [N, H] of the policy before the first step, or None.
    """

    observations: Tensor
    mask: Tensor | None
    actions: Tensor
    f: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    starts: Tensor
    following: Tensor
    memory: Tensor | None


@dataclass(frozen=True)
class Samples:
    """What an update learns from. The first axis can be indexed: steps, or with a memory whole sequences.

    Attributes:
        observations, mask, starts, memory: what ``policy`` takes; leading shape [B], or [N, T] with a memory.
        actions: taken by the policy.
        log_probs: log π_old(a | s), of the policy that acted.
        advantages: normalised over all of them to mean 0 and variance 1.
        returns: λ-returns in units of the reward.
        critic_memory: [N, H], or None.
    """

    observations: Tensor
    mask: Tensor | None
    starts: Tensor | None
    memory: Tensor | None
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    critic_memory: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """Arguments of the policy."""
        return (self.observations, self.mask, self.starts, self.memory)

    @property
    def critic_inputs(self) -> tuple[Tensor | None, ...]:
        """Arguments of the critic."""
        return (self.observations, self.starts, self.critic_memory)

    def __len__(self) -> int:
        return self.observations.shape[0]

    def take(self, index: Tensor) -> Samples:
        """Those of ``index`` alone."""
        return replace(self, **{n: v[index] for n, v in vars(self).items() if v is not None})


class Collector:
    """Lets a policy act and turns what happened into samples.

    Args:
        environments: where it acts.
        policy, critic: everything is computed on the device and in the dtype of ``policy``.
        horizon: T, steps of each environment per rollout.
        gamma, lam: of :func:`natgrad.rl.advantage.advantages`.
        generator: samples the actions, on the policy's device.
        noise_correlation: of exploration, see :class:`natgrad.rl.noise.CorrelatedNoise`.
    """

    def __init__(
        self,
        environments: Environments,
        policy: Policy,
        critic: Critic,
        *,
        horizon: int,
        gamma: float,
        lam: float,
        generator: torch.Generator,
        noise_correlation: float = 0.0,
    ) -> None:
        self.environments, self.policy, self.critic = environments, policy, critic
        self.horizon, self.gamma, self.lam, self.generator = horizon, gamma, lam, generator
        first = next(policy.parameters())
        self.device, self.dtype = first.device, first.dtype
        if policy.recurrent and not _whole(environments):
            raise UnsupportedError(
                "A recurrent policy cannot learn from environments that reset themselves in a step of their own "
                "(autoreset mode NEXT_STEP): use SAME_STEP or natgrad.rl.make."
            )
        self.memory = policy.start(environments.n)
        self.critic_memory = critic.start(environments.n)
        self.noise: CorrelatedNoise | None = None
        if noise_correlation:
            self.noise = CorrelatedNoise(environments.n, policy.head, noise_correlation, generator)

    def collect(self) -> Rollout:
        """Act for ``horizon`` steps with the policy as it is, and longer until there is one valid step.

        Raises:
            EnvironmentFault: an environment failed.
            NonFiniteError: the policy's output is not finite.
        """
        environments, rows, first, any_valid = self.environments, [], self.memory, False
        while len(rows) < self.horizon or not any_valid:
            observations = torch.from_numpy(environments.observations)
            starts = torch.from_numpy(environments.starts)
            mask = None if environments.mask is None else torch.from_numpy(environments.mask.copy())
            actions, f, self.memory = self.policy.act(
                observations.to(self.device, self.dtype),
                None if mask is None else mask.to(self.device),
                memory=self.memory,
                starts=starts.to(self.device),
                generator=self.generator,
                noise=None if self.noise is None else self.noise.draw(starts.to(self.device)),
            )
            seen = environments.step(self.policy.head.to_environment(actions))
            rows.append((observations, mask, actions, f, starts, seen))
            any_valid = any_valid or bool(seen.valid.any())
        seen = [row[5] for row in rows]

        def stacked(k: int) -> Tensor:
            return torch.stack([row[k] for row in rows]).to(self.device)

        def gathered(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).to(self.device)

        return Rollout(
            observations=stacked(0).to(self.dtype),
            mask=_masks([row[1] for row in rows], self.device),
            actions=stacked(2),
            f=stacked(3),
            rewards=gathered([s.rewards for s in seen]).to(self.dtype),
            terminated=gathered([s.terminated for s in seen]),
            truncated=gathered([s.truncated for s in seen]),
            valid=gathered([s.valid for s in seen]),
            starts=stacked(4),
            following=gathered([s.observations for s in seen]).to(self.dtype),
            memory=first,
        )

    @torch.no_grad()
    def samples(self, rollout: Rollout) -> Samples:
        """Advantages and returns by the critic as it is, laid out for policy and critic."""
        memory = self.critic_memory
        values, following = self._values(rollout)
        raw = advantages(
            rollout.rewards,
            values,
            following,
            rollout.terminated,
            rollout.truncated | ~rollout.valid,
            gamma=self.gamma,
            lam=self.lam,
        )
        normalised = _normalised(raw, values, rollout.valid)
        log_probs = -self.policy.head.likelihood.nll(rollout.f, rollout.actions)
        recurrent = self.policy.recurrent

        def laid_out(x: Tensor) -> Tensor:
            return x.transpose(0, 1).contiguous() if recurrent else x[rollout.valid]

        return Samples(
            observations=laid_out(rollout.observations),
            mask=None if rollout.mask is None else laid_out(rollout.mask),
            starts=laid_out(rollout.starts) if recurrent else None,
            memory=rollout.memory,
            actions=laid_out(rollout.actions),
            log_probs=laid_out(log_probs),
            advantages=laid_out(normalised),
            returns=laid_out(raw + values),
            critic_memory=memory,
        )

    def _values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """V(s_t) and V(s_{t+1}), [T, N] each; s_{t+1} before any reset."""
        critic, done = self.critic, rollout.terminated | rollout.truncated
        if not critic.recurrent:
            shape = rollout.rewards.shape  # the critic takes rows [B, D], like the policy
            values = critic.values(critic(rollout.observations.flatten(0, 1)))[..., 0].reshape(shape)
            last = critic.values(critic(rollout.following[-1]))[..., 0]
            following = torch.cat([values[1:], last.unsqueeze(0)])
            if bool(done.any()):
                following = following.clone()
                following[done] = critic.values(critic(rollout.following[done]))[..., 0]
            return values, following
        starts = rollout.starts.transpose(0, 1)
        outputs, memories = critic.run(rollout.observations.transpose(0, 1), starts, self.critic_memory)
        assert memories is not None
        ahead = rollout.following.transpose(0, 1).flatten(0, 1).unsqueeze(1)
        held = memories.flatten(0, 1)
        next_outputs, _ = critic.run(ahead, torch.zeros_like(ahead[..., 0]), held)
        self.critic_memory = memories[:, -1]
        following = critic.values(next_outputs)[..., 0].reshape(outputs.shape[:2])
        return critic.values(outputs)[..., 0].transpose(0, 1), following.transpose(0, 1)


def _masks(given: list[Tensor | None], device: torch.device) -> Tensor | None:
    """[T, N, C]; before the environments gave their first mask, all was allowed."""
    some = next((mask for mask in given if mask is not None), None)
    if some is None:
        return None
    return torch.stack([torch.ones_like(some) if mask is None else mask for mask in given]).to(device)


def _normalised(raw: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """Advantages of mean 0 and variance 1; all 0 where they differ by rounding alone, which is no signal to follow."""
    chosen = raw[valid]
    spread = chosen.std(unbiased=False)
    size = (chosen.abs() + values[valid].abs()).max()
    # Not ``spread > …``: advantages that are NaN must stay so.
    return torch.where(spread <= 32 * torch.finfo(raw.dtype).eps * size, 0.0, (raw - chosen.mean()) / spread)


def _whole(environments: Environments) -> bool:
    return environments.replayable or environments.mode.name != "NEXT_STEP"
