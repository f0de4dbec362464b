"""Fitting the critic by natural gradient: damped Gauss–Newton on normalised returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from natgrad.likelihood import Gaussian
from natgrad.metric import Exact, Fisher, Gram, Kronecker, Structure
from natgrad.metric.running import Refresh
from natgrad.optim import NaturalGradient
from natgrad.rl.checks import check_positive, check_whole
from natgrad.rl.policy import Critic
from natgrad.rl.rollout import Samples
from natgrad.step import Damping, FactoredTikhonov, KLClip, Search


@dataclass(frozen=True)
class CriticFit:
    """How the critic is fitted to the λ-returns of each rollout.

    The value of a state is Gaussian with σ = 1 in units of normalised returns: the loss is ½ (v − s)², whose Fisher
    matrix is JᵀJ, so that natural gradient is Gauss–Newton.

    Args:
        structure: of the Fisher matrix. The default solves the Gauss–Newton system of a batch exactly: one pass of it
            fits as well as ten passes of Adam.
        epochs: passes over the samples.
        batch: samples of a step; of a recurrent critic: sequences × steps.
        lr, damping, search, average, refresh, momentum: of the optimizer.
    """

    structure: Structure = Gram()
    epochs: int = 1
    batch: int = 512
    lr: float = 1.0
    damping: float | Damping = 0.1
    search: Search = KLClip(0.1)
    average: float = 0.0
    refresh: Refresh = Refresh(1, 1)
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_whole(self, "epochs", "batch")
        check_positive(self, "lr")

    @classmethod
    def kfac(cls) -> CriticFit:
        """The critic of ACKTR: K-FAC, with averages over many small batches."""
        damping = FactoredTikhonov(1e-2)
        return cls(Kronecker(), epochs=4, batch=128, lr=0.5, damping=damping, average=0.95, refresh=Refresh(1, 5))

    def fitter(self, critic: Critic, seed: int) -> CriticFitter:
        """Start fitting ``critic``."""
        return CriticFitter(self, critic, seed)


class CriticFitter:
    """A critic with its optimizer."""

    def __init__(self, fit: CriticFit, critic: Critic, seed: int) -> None:
        self.fit, self.critic = fit, critic
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = NaturalGradient(
            critic,
            Gaussian(),
            lr=fit.lr,
            damping=fit.damping,
            momentum=fit.momentum,
            metric=Fisher(Exact(), fit.structure),
            search=fit.search,
            average=fit.average,
            refresh=fit.refresh,
            seed=seed,
        )

    def update(self, samples: Samples) -> None:
        """Fit the critic to ``samples.returns``; their moments join those it predicts in units of."""
        critic = self.critic
        critic.returns.update(samples.returns.unsqueeze(-1))
        targets = critic.returns(samples.returns.unsqueeze(-1))
        per = samples.returns[0].numel()
        size = max(1, min(len(samples), self.fit.batch // per))
        for _ in range(self.fit.epochs):
            order = torch.randperm(len(samples), generator=self.generator).to(targets.device)
            for index in order.split(size):
                if 2 * len(index) < size:  # a remainder too small to tell curvature from
                    continue
                inputs = (None if v is None else v[index] for v in samples.critic_inputs)
                self.optimizer.zero_grad()
                loss = 0.5 * (critic(*inputs) - targets[index]).square().mean()
                loss.backward()
                self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and that of the order of samples."""
        return {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
