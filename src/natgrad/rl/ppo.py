"""Proximal policy optimization (Schulman et al. 2017): clipped ratios, an adaptive KL penalty, or both."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError
from natgrad.metric import EigenKronecker, Exact, Fisher, Kronecker, MonteCarlo, Structure
from natgrad.metric.running import Refresh
from natgrad.optim import NaturalGradient
from natgrad.rl.algorithm import Setup
from natgrad.rl.checks import check_finite, check_positive, check_whole
from natgrad.rl.critic import CriticFit
from natgrad.rl.objective import entropy, mean_kl, ratios, restore, saved
from natgrad.rl.policy import Critic, Policy, check_apart
from natgrad.rl.rollout import Samples
from natgrad.rl.training import Training
from natgrad.rl.vector import EnvironmentLike
from natgrad.step import FactoredTikhonov, TrustRegion

_ADAM_RATE = 3e-4


@dataclass(frozen=True)
class PPO:
    """Several epochs of minibatch steps on one rollout.

    Args:
        clip: ε: the objective is min(r A, clip(r, 1 − ε, 1 + ε) A); None: r A without clipping.
        penalty: β of the penalty β KL(old ‖ new), exact by the distributions; None: no penalty. After every update β
            doubles where the measured KL exceeds 1.5 ``target_kl`` and halves below ``target_kl`` / 1.5 (Schulman et
            al. 2017, section 4), within a factor of 64 of where it began: a penalty that had faded could not return.
        target_kl: set-point of the penalty, and refused without one: ``max_kl`` is what ends an update.
        max_kl: a hard limit: after each minibatch step KL(old ‖ new) is measured on all samples, and a step beyond the
            limit is taken back and ends the update of the policy (the critic's goes on). None: no limit.
        epochs, batch: passes over the samples, and samples of a step (sequences × steps with a memory).
        lr: of Adam, 3e-4 unless given; or longest multiple of the natural gradient, 1 unless given. Falls linearly to
            zero over training where ``anneal``.
        entropy: weight of the policy's entropy in the objective.
        gradient_norm: gradients are clipped to it under Adam.
        structure: None: Adam. A structure: natural gradient with it.
        step_kl: radius of a natural-gradient step: its measured mean KL(before ‖ after) on the minibatch.
        critic: how the critic is fitted, after the policy; None: by Adam with rate ``lr`` (3e-4 with a structure), one
            step beside each of the policy's.
    """

    clip: float | None = 0.2
    penalty: float | None = None
    target_kl: float = 0.01
    max_kl: float | None = None
    epochs: int = 10
    batch: int = 64
    lr: float | None = None
    anneal: bool = True
    entropy: float = 0.0
    gradient_norm: float = 0.5
    structure: Structure | None = None
    step_kl: float = 1e-3
    critic: CriticFit | None = None

    def __post_init__(self) -> None:
        if self.clip is None and self.penalty is None and self.max_kl is None:
            raise ArgumentError("Nothing would hold the policy back: give clip, penalty or max_kl.")
        if self.penalty is None and self.target_kl != PPO.target_kl:
            raise ArgumentError(
                f"target_kl={self.target_kl} is the set-point of the penalty, and there is none. Give penalty, or "
                "max_kl for a limit that ends the update."
            )
        limits = ("clip", "penalty", "max_kl", "target_kl", "lr")
        check_positive(self, *(name for name in limits if getattr(self, name) is not None))
        check_positive(self, "gradient_norm", "step_kl")
        check_whole(self, "epochs", "batch")
        check_finite(self, "entropy")

    def learner(self, policy: Policy, critic: Critic, seed: int) -> PPOLearner:
        """Start learning."""
        return PPOLearner(self, policy, critic, seed)


class PPOLearner:
    """Policy and critic with their optimizers."""

    def __init__(self, settings: PPO, policy: Policy, critic: Critic, seed: int) -> None:
        check_apart(policy, critic)
        self.settings, self.policy, self.critic = settings, policy, critic
        self.generator = torch.Generator().manual_seed(seed)
        self.penalty = settings.penalty
        self.fitter = None if settings.critic is None else settings.critic.fitter(critic, seed)
        rate = settings.lr or _ADAM_RATE
        critic_rate = rate if settings.structure is None else _ADAM_RATE
        self.critic_optimizer = torch.optim.Adam(critic.parameters(), lr=critic_rate, eps=1e-5)
        if settings.structure is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(policy.parameters(), lr=rate, eps=1e-5)
        else:
            # Only Kronecker factors see every step of a sequence by itself: elsewhere one draw per sequence would do
            # for all of its steps.
            kronecker = isinstance(settings.structure, Kronecker | EigenKronecker)
            self.optimizer = NaturalGradient(
                policy,
                policy.head.likelihood,
                lr=settings.lr or 1.0,
                damping=FactoredTikhonov(1e-2),
                metric=Fisher(MonteCarlo() if kronecker else Exact(), settings.structure),
                search=TrustRegion(settings.step_kl, require_improvement=False),
                refresh=Refresh(1, 10) if kronecker else Refresh(1, 1),
                seed=seed,
            )
        self.rates = [o.param_groups[0]["lr"] for o in (self.optimizer, self.critic_optimizer)]

    def update(self, samples: Samples, old: Tensor, progress: float) -> dict[str, float]:
        """Epochs of minibatch steps of policy and critic."""
        settings, device = self.settings, samples.advantages.device
        if settings.anneal:
            for optimizer, rate in zip((self.optimizer, self.critic_optimizer), self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * (1 - progress)
        if self.fitter is None:
            self.critic.returns.update(samples.returns.unsqueeze(-1))
        targets = self.critic.returns(samples.returns.unsqueeze(-1))
        size = max(1, settings.batch // samples.returns[0].numel())
        going, steps, clipped, refused = True, 0, [], 0.0
        for _ in range(settings.epochs):
            for index in torch.randperm(len(samples), generator=self.generator).to(device).split(size):
                part = samples.take(index)
                if going:
                    clipped.append(self._policy_step(part, old[index], samples, old))
                    refused = self._refused
                    going = refused == 0.0
                    steps += going
                if self.fitter is None:
                    self._critic_step(part, targets[index])
        if self.fitter is not None:
            self.fitter.update(samples)
        metrics = {"minibatch_steps": float(steps), "kl_refused": refused, "accepted": float(steps > 0)}
        if self.settings.clip is not None:
            metrics["clipped"] = float(torch.stack(clipped).mean())
        return metrics | self._adapt(samples, old)

    def _policy_step(self, part: Samples, old: Tensor, samples: Samples, old_of_all: Tensor) -> Tensor:
        """One minibatch step; returns the fraction of clipped ratios."""
        settings, policy = self.settings, self.policy
        before = None
        if settings.max_kl is not None:
            before = saved(policy), copy.deepcopy(self.optimizer.state_dict())
        self.optimizer.zero_grad()
        f = policy(*part.inputs)
        r = ratios(policy, f, part)
        objective, clipped = r * part.advantages, torch.zeros((), device=r.device)
        if settings.clip is not None:
            bounded = r.clamp(1 - settings.clip, 1 + settings.clip)
            objective = torch.minimum(objective, bounded * part.advantages)
            clipped = (bounded != r).float().mean()
        objective = objective.mean()
        if self.penalty is not None:
            objective = objective - self.penalty * mean_kl(policy, old, f)
        if settings.entropy:
            objective = objective + settings.entropy * entropy(policy, f)
        (-objective).backward()
        if settings.structure is None:
            nn.utils.clip_grad_norm_(policy.parameters(), settings.gradient_norm)
        self.optimizer.step()
        self._refused = 0.0
        if before is not None and settings.max_kl is not None:
            with torch.no_grad():
                kl = float(mean_kl(policy, old_of_all, policy(*samples.inputs)))
            if not kl <= settings.max_kl:
                restore(policy, before[0])
                self.optimizer.load_state_dict(before[1])  # else the next update would set out along the refused step
                self._refused = kl
        return clipped

    def _critic_step(self, part: Samples, targets: Tensor) -> None:
        self.critic_optimizer.zero_grad()
        loss = 0.5 * (self.critic(*part.critic_inputs) - targets).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.settings.gradient_norm)
        self.critic_optimizer.step()

    @torch.no_grad()
    def _adapt(self, samples: Samples, old: Tensor) -> dict[str, float]:
        """The penalty for the next update, from the KL of this one on all samples."""
        if self.penalty is None:
            return {}
        kl = float(mean_kl(self.policy, old, self.policy(*samples.inputs)))
        first = self.settings.penalty or self.penalty
        if kl > 1.5 * self.settings.target_kl:
            self.penalty = min(2 * self.penalty, 64 * first)
        elif kl < self.settings.target_kl / 1.5:
            self.penalty = max(self.penalty / 2, first / 64)
        return {"penalty": self.penalty}

    def state_dict(self) -> dict[str, Any]:
        """States of both optimizers, of the penalty and of the order of samples."""
        return {
            "policy": self.optimizer.state_dict(),
            "critic": self.critic_optimizer.state_dict(),
            "fitter": None if self.fitter is None else self.fitter.state_dict(),
            "penalty": self.penalty,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.optimizer.load_state_dict(state["policy"])
        self.critic_optimizer.load_state_dict(state["critic"])
        if self.fitter is not None:
            self.fitter.load_state_dict(state["fitter"])
        self.penalty = state["penalty"]
        self.generator.set_state(state["generator"])


def ppo(
    environment: EnvironmentLike,
    *,
    steps: int,
    seed: int = 0,
    setup: Setup = Setup(),
    folder: str | Path | None = None,
    **settings: Any,
) -> Training:
    """Train a policy with PPO; returns the finished :class:`natgrad.rl.Training`, which holds ``policy``.

    ``settings`` are those of :class:`PPO`; the rest is described at :class:`natgrad.rl.Training`.
    """
    return Training(environment, PPO(**settings), steps=steps, setup=setup, seed=seed, folder=folder).run()
