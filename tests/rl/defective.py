"""The defects themselves, as other implementations have them: variants of natgrad's parts that the tests must tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from natgrad.likelihood import Gaussian, Likelihood
from natgrad.linalg import LinearOperator, SolveReport
from natgrad.linalg.operator import Inverse
from natgrad.optim.probe import ModelProbe
from natgrad.rl.critic import CriticFitter
from natgrad.rl.heads import GaussianHead
from natgrad.rl.objective import mean_kl
from natgrad.rl.one_step import OneStepLearner
from natgrad.rl.policy import Critic, Policy
from natgrad.rl.ppo import PPO, PPOLearner
from natgrad.rl.rollout import Collector, Rollout, Samples
from natgrad.step import LocalModel, Step, Trial, TrustRegion
from natgrad.step.local import BlockVector, Probe

# D1, D2, D3: divergences


class ReversedGaussian(Gaussian):
    """D1: KL(new ‖ old)."""

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        return super().kl(g, f)


@dataclass(frozen=True)
class ReversedHead(GaussianHead):
    likelihood: Likelihood = field(default=ReversedGaussian(scale=None), init=False)


def inconsistent_kl(policy: Policy, old: Tensor, new: Tensor) -> Tensor:
    """D2: new ‖ old for the Gaussian, old ‖ new for the others."""
    return mean_kl(policy, new, old) if isinstance(policy.head, GaussianHead) else mean_kl(policy, old, new)


def unweighted_kl(policy: Policy, old: Tensor, new: Tensor) -> Tensor:
    """D3: Σ_a (r − 1 − log r), without π_old(a)."""
    log_ratio = torch.log_softmax(new, -1) - torch.log_softmax(old, -1)
    return (log_ratio.exp() - 1 - log_ratio).sum(-1).mean()


# D4, D5, D8, D13, D14, D15: line searches


class PartialProduct(OneStepLearner):
    """D4: the ratio is a product over the components of the action at the start, and not in the line search."""

    def update(self, samples: Samples, old: Tensor, progress: float) -> dict[str, float]:
        def log_prob(f: Tensor) -> Tensor:
            mean, log_scale = f.chunk(2, -1)
            return -0.5 * ((samples.actions - mean) / log_scale.exp()).square() - log_scale

        def closure() -> tuple[Tensor, Tensor]:
            f = self.policy(*samples.inputs)
            difference = log_prob(f) - log_prob(old)
            r = difference.sum(-1, keepdim=True).exp() if torch.is_grad_enabled() else difference.exp()
            return -(r * samples.advantages.unsqueeze(-1)).mean(), f

        self.optimizer.step(closure)
        return {name.removeprefix("natgrad/"): value for name, value in self.optimizer.metrics().items()}


def compounded(c: float, backtracks: int) -> Callable[[float, Callable[[float], float]], float]:
    """D5: the expected improvement is multiplied by α in every trial, which gives 1, ½, ⅛, 1/64, … of it."""

    def search(expected: float, improvement: Callable[[float], float]) -> float:
        alpha = 1.0
        for _ in range(backtracks + 1):
            expected *= alpha
            if improvement(alpha) >= c * expected:
                return alpha
            alpha *= 0.5
        return 0.0

    return search


class CompoundedPrediction(TrustRegion):
    """D5: the prediction that is reported is that of the first trial, multiplied up from trial to trial."""

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        step = super().__call__(local, direction, lr, probe)
        k = step.backtracks
        wrong = step.loss_change_predicted * self.shrink ** (k * (k + 1) // 2 - k)  # type: ignore[operator]
        return replace(step, loss_change_predicted=wrong)


class Tolerant(TrustRegion):
    """D14 and D15: KL is not looked at, or accepted up to 1.5 of the radius."""

    tolerance = math.inf

    def _verdict(self, t: float, kl: float, change: float | None) -> str:
        return super()._verdict(t, kl / self.tolerance, change)


class OneAndAHalf(Tolerant):
    tolerance = 1.5


class LogsRejected(TrustRegion):
    """D8: after a failed search the KL of the rejected trial is reported."""

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        assert probe is not None
        trials: list[Trial] = []

        class Remembering:
            curvature = probe.curvature

            def __call__(self, delta: BlockVector) -> Trial:
                trials.append(probe(delta))
                return trials[-1]

        step = super().__call__(local, direction, lr, Remembering())
        return step if step.accepted is True else replace(step, kl_measured=float(trials[-1].kl))


class Sanitizing(TrustRegion):
    """D13: a step length that is NaN becomes 1, a direction that is NaN becomes 0; nothing is looked at again."""

    def __call__(
        self, local: LocalModel, direction: BlockVector, lr: float | Tensor, probe: Probe | None = None
    ) -> Step:
        clean = {name: torch.nan_to_num(v, nan=0.0) for name, v in direction.items()}
        length = math.sqrt(2 * self.max_kl) * float((2 * local.kl(clean)).rsqrt())
        length = length if math.isfinite(length) else 1.0
        return Step({name: -length * v for name, v in clean.items()}, True, length, 0.0, kl_measured=0.0)


class SanitizedAdvantages(OneStepLearner):
    """D13: what is NaN counts as 0."""

    def update(self, samples: Samples, old: Tensor, progress: float) -> dict[str, float]:
        return super().update(replace(samples, advantages=torch.nan_to_num(samples.advantages)), old, progress)


class Unrestored(ModelProbe):
    """D7: the parameters of the last trial stay."""

    @torch.no_grad()
    def __call__(self, delta: BlockVector) -> Trial:
        trial = super().__call__(delta)
        for name, value in self._moved(delta).items():
            dict(self.model.named_parameters())[name].copy_(value)
        return trial


# D6: advantages


class Leaks(Collector):
    """Only termination is an end: advantages go on into the next episode after a truncation."""

    def samples(self, rollout: Rollout) -> Samples:
        return super().samples(replace(rollout, truncated=torch.zeros_like(rollout.truncated)))


class TruncationIsTerminal(Collector):
    """A state where an episode was cut off counts as one without a future."""

    def samples(self, rollout: Rollout) -> Samples:
        return super().samples(replace(rollout, terminated=rollout.terminated | rollout.truncated))


class BootstrapsFromBefore(Collector):
    """A truncated episode goes on with V(s_t) instead of V(s_{t+1})."""

    def _values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        values, following = super()._values(rollout)
        return values, torch.where(rollout.truncated, values, following)


class BootstrapsFromReset(Collector):
    """A truncated episode goes on with the value of the state that the reset led to."""

    def _values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        values, following = super()._values(rollout)
        ahead = torch.cat([values[1:], following[-1:]])
        return values, torch.where(rollout.truncated, ahead, following)


class LearnsFromResets(Collector):
    """Steps in which an environment only reset itself are samples like others."""

    def samples(self, rollout: Rollout) -> Samples:
        return super().samples(replace(rollout, valid=torch.ones_like(rollout.valid)))


class DividesByNothing(Collector):
    """D15: advantages that do not differ but for rounding are divided by their standard deviation."""

    def samples(self, rollout: Rollout) -> Samples:
        samples = super().samples(rollout)
        with torch.no_grad():
            values, _ = self._values(rollout)
        raw = samples.returns - values[rollout.valid]
        return replace(samples, advantages=(raw - raw.mean()) / raw.std(unbiased=False).clamp(min=1e-8))


# D9, D10: conjugate gradients


class _Solves(LinearOperator):
    def __init__(self, operator: LinearOperator, damping: float | Tensor, solve: Callable) -> None:
        super().__init__(operator.shape, operator.dtype, operator.device, symmetric=True)
        self.operator, self.damping, self.solve_ = operator, damping, solve

    def matvec(self, v: Tensor) -> Tensor:
        return self.solve_(lambda u: self.operator.matvec(u) + self.damping * u, v)


@dataclass(frozen=True)
class AbsoluteCG:
    """D9: starts at a random point and stops where rᵀr < 1e-10, whatever the size of b."""

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        return Inverse(_Solves(operator, damping, self.iterate), SolveReport("cg"))

    @staticmethod
    def iterate(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        x = torch.randn(b.shape, dtype=b.dtype, generator=torch.Generator().manual_seed(0))
        r = b - matvec(x)
        p, rho = r, r @ r
        for _ in range(200):
            if rho < 1e-10:
                break
            image = matvec(p)
            alpha = rho / (p @ image)
            x, r = x + alpha * p, r - alpha * image
            p, rho = r + (r @ r) / rho * p, r @ r
        return x


@dataclass(frozen=True)
class AdditiveCG:
    """D10: 1e-6 is added to the denominators of α and β."""

    def __call__(self, operator: LinearOperator, damping: float | Tensor = 0.0) -> Inverse:
        return Inverse(_Solves(operator, damping, self.iterate), SolveReport("cg"))

    @staticmethod
    def iterate(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        x, r = torch.zeros_like(b), b
        p, rho = r, r @ r
        for _ in range(15):
            image = matvec(p)
            alpha = rho / (p @ image + 1e-6)
            x, r = x + alpha * p, r - alpha * image
            p, rho = r + (r @ r) / (rho + 1e-6) * p, r @ r
        return x


# D12, D15: learners


class Misaligned(OneStepLearner):
    """D12: gradients that are None are left out of one flat vector, and their parameters not of the other."""

    def update(self, samples: Samples, old: Tensor, progress: float) -> dict[str, float]:
        parameters = list(self.policy.parameters())
        copies = [p.detach().clone() for p in parameters]
        metrics = super().update(samples, old, progress)
        steps = [p.detach() - c for p, c in zip(parameters, copies, strict=True) if p.grad is not None]
        flat = torch.cat([s.reshape(-1) for s in steps])
        with torch.no_grad():
            for p, copy in zip(parameters, copies, strict=True):
                part, flat = flat[: p.numel()], flat[p.numel() :]
                p.copy_(copy)
                p.view(-1)[: len(part)].add_(part)
        return metrics


class UndefinedLosses(OneStepLearner):
    """D15: what is reported is computed only where there was a gradient."""

    def update(self, samples: Samples, old: Tensor, progress: float) -> dict[str, float]:
        if bool(samples.advantages.any()):
            means = super().update(samples, old, progress)
        return means


# D16: the critic


class SquaredError(CriticFitter):
    """D16: the loss is (v − s)², without ½, beside the Fisher matrix of N(v, 1)."""

    def update(self, samples: Samples) -> None:
        critic = self.critic
        critic.returns.update(samples.returns.unsqueeze(-1))
        targets = critic.returns(samples.returns.unsqueeze(-1))
        self.optimizer.zero_grad()
        (critic(*samples.critic_inputs) - targets).square().mean().backward()
        self.optimizer.step()


# D17, D18: PPO


class AdaptsInside(PPOLearner):
    """D17: the penalty adapts in every minibatch, to its KL."""

    def _policy_step(self, part: Samples, old: Tensor, samples: Samples, old_of_all: Tensor) -> Tensor:
        clipped = super()._policy_step(part, old, samples, old_of_all)
        super()._adapt(part, old)
        return clipped

    def _adapt(self, samples: Samples, old: Tensor) -> dict[str, float]:
        return {}


class AdaptsToAPart(PPOLearner):
    """D17: the penalty adapts to the KL of a few samples."""

    def _adapt(self, samples: Samples, old: Tensor) -> dict[str, float]:
        few = torch.arange(16)
        return super()._adapt(samples.take(few), old[few])


class ChecksAPart(PPOLearner):
    """D18: the limit is checked on the minibatch alone."""

    def _policy_step(self, part: Samples, old: Tensor, samples: Samples, old_of_all: Tensor) -> Tensor:
        return super()._policy_step(part, old, part, old)


class ChecksBefore(PPOLearner):
    """D18: KL is checked before the step; the last step is not checked, and nothing is undone."""

    def _policy_step(self, part: Samples, old: Tensor, samples: Samples, old_of_all: Tensor) -> Tensor:
        settings, limit = self.settings, self.settings.max_kl
        with torch.no_grad():
            kl = float(mean_kl(self.policy, old_of_all, self.policy(*samples.inputs)))
        if limit is not None and kl > limit:
            self._refused = kl
            return torch.zeros(())
        self.settings = replace(settings, max_kl=None)
        try:
            return super()._policy_step(part, old, samples, old_of_all)
        finally:
            self.settings = settings


class StopsTheCritic(PPOLearner):
    """D18: where the policy stops, the critic does, too."""

    def _critic_step(self, part: Samples, targets: Tensor) -> None:
        if not self._refused:
            super()._critic_step(part, targets)


class UndoesRoughly(PPOLearner):
    """D18: the refused step is taken back by arithmetic, up to rounding."""

    def _policy_step(self, part: Samples, old: Tensor, samples: Samples, old_of_all: Tensor) -> Tensor:
        clipped = super()._policy_step(part, old, samples, old_of_all)
        if self._refused:
            with torch.no_grad():
                for p in self.policy.parameters():
                    p.mul_(1 + 1e-15)
        return clipped


class KeepsTheMoments(PPOLearner):
    """D18: the optimizer goes on from the moments of the step that was taken back."""

    def __init__(self, settings: PPO, policy: Policy, critic: Critic, seed: int) -> None:
        super().__init__(settings, policy, critic, seed)
        self.optimizer.load_state_dict = lambda state_dict: None  # type: ignore[method-assign]
