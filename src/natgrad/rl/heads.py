"""Policy heads: what a policy network's output means as a distribution over an environment's actions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.errors import UnsupportedError
from natgrad.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, MultiCategorical

_MASKED = -1e8  # finite, so that gradients of masked logits are zero and not NaN; its probability is exactly zero


class Head(ABC):
    """The distribution over actions given f [*batch, outputs], and what its actions are to the environment.

    Attributes:
        likelihood: p(a | f). Its actions are the policy's own: the Gaussian ones are not yet clipped or squashed, so
            that KL and ratios are those of a bijection, and exact.
        outputs: C, the columns of f.
    """

    likelihood: Likelihood
    outputs: int

    @abstractmethod
    def mode(self, f: Tensor) -> Tensor:
        """The most probable action, which a deterministic policy takes."""

    @abstractmethod
    def to_environment(self, actions: Tensor) -> np.ndarray:
        """Actions [N, …] as the environment takes them."""

    def entropy(self, f: Tensor) -> Tensor:
        """Entropy of the action, [*batch], in nats; differentiable in f."""
        return self.likelihood.distribution(f).entropy()

    def masked(self, f: Tensor, mask: Tensor | None) -> Tensor:
        """``f`` with the logits of the actions that ``mask`` (bool, like f) excludes moved to probability zero.

        Raises:
            UnsupportedError: the actions cannot be masked.
        """
        if mask is None:
            return f
        raise UnsupportedError(f"{type(self).__name__} has no action masks; discrete actions have.")


@dataclass(frozen=True)
class CategoricalHead(Head):
    """One of n actions; the environment's first is ``start``."""

    n: int
    start: int = 0
    likelihood: Likelihood = field(default=Categorical(), init=False)

    @property
    def outputs(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.n

    def mode(self, f: Tensor) -> Tensor:
        return f.argmax(-1)

    def to_environment(self, actions: Tensor) -> np.ndarray:
        return actions.cpu().numpy() + self.start

    def masked(self, f: Tensor, mask: Tensor | None) -> Tensor:
        return f if mask is None else torch.where(mask, f, _MASKED)


@dataclass(frozen=True)
class MultiCategoricalHead(Head):
    """Several decisions, each one of ``classes[k]`` from ``start[k]`` on; the environment's array has ``shape``."""

    classes: tuple[int, ...]
    start: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    @property
    def likelihood(self) -> Likelihood:  # pyright: ignore[reportIncompatibleVariableOverride]
        return MultiCategorical(self.classes)

    @property
    def outputs(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sum(self.classes)

    def mode(self, f: Tensor) -> Tensor:
        return torch.stack([part.argmax(-1) for part in f.split(list(self.classes), -1)], -1)

    def to_environment(self, actions: Tensor) -> np.ndarray:
        found = actions.cpu().numpy() + np.asarray(self.start or 0)
        return found.reshape(-1, *(self.shape or (len(self.classes),)))

    def masked(self, f: Tensor, mask: Tensor | None) -> Tensor:
        return f if mask is None else torch.where(mask, f, _MASKED)


@dataclass(frozen=True)
class BernoulliHead(Head):
    """Independent yes/no decisions; the environment's array has ``shape``."""

    shape: tuple[int, ...]
    likelihood: Likelihood = field(default=Bernoulli(), init=False)

    @property
    def outputs(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return math.prod(self.shape)

    def mode(self, f: Tensor) -> Tensor:
        return (f > 0).to(f.dtype)

    def to_environment(self, actions: Tensor) -> np.ndarray:
        return actions.cpu().numpy().astype(np.int8).reshape(-1, *self.shape)


@dataclass(frozen=True)
class GaussianHead(Head):
    """Diagonal Gaussian, f = [mean, log σ], in units where a bounded action runs from −1 to 1.

    The environment gets the action clipped to its bounds; log-probabilities and KL are of the action before that.

    Args:
        low, high: bounds of each component; where one is infinite, the component is passed on as it is.
        shape: of the environment's array.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"
    likelihood: Likelihood = field(default=Gaussian.learned(), init=False)

    @property
    def outputs(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 2 * len(self.low)

    def mode(self, f: Tensor) -> Tensor:
        return f.chunk(2, -1)[0]

    def with_noise(self, f: Tensor, z: Tensor) -> Tensor:
        """The action mean + σ z."""
        mean, log_scale = f.chunk(2, -1)
        return mean + log_scale.exp() * z.to(mean)

    def bounded(self, actions: np.ndarray) -> np.ndarray:
        """Actions within [−1, 1]."""
        return actions.clip(-1.0, 1.0)

    def to_environment(self, actions: Tensor) -> np.ndarray:
        given = actions.cpu().numpy()
        low, high, middle, half, finite = self._bounds
        scaled = np.where(finite, middle + half * self.bounded(given), given)
        return np.clip(scaled, low, high).astype(self.dtype).reshape(-1, *self.shape)

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, ...]:
        low, high = np.array(self.low), np.array(self.high)
        finite = np.isfinite(low) & np.isfinite(high)
        inner_low, inner_high = np.where(finite, low, 0.0), np.where(finite, high, 0.0)
        return low, high, 0.5 * (inner_low + inner_high), 0.5 * (inner_high - inner_low), finite


@dataclass(frozen=True)
class SquashedHead(GaussianHead):
    """tanh of a diagonal Gaussian, scaled to the bounds, all of which must be finite.

    The policy's own action is the Gaussian's, before tanh: a bijection changes neither KL nor ratios. The entropy is
    that of the squashed action, in units where it runs from −1 to 1: H = H_Gaussian + E log(1 − tanh²u), by the
    trapezoidal rule over ``nodes`` points within 8.5 σ, which converges exponentially for such an integrand.
    """

    nodes: int = 64

    def __post_init__(self) -> None:
        if not np.isfinite([*self.low, *self.high]).all():
            raise UnsupportedError(
                f"A squashed Gaussian needs finite bounds of the actions, but they are {self.low} to {self.high}. Use "
                "the plain Gaussian head."
            )

    def bounded(self, actions: np.ndarray) -> np.ndarray:
        return np.tanh(actions)

    def entropy(self, f: Tensor) -> Tensor:
        mean, log_scale = f.chunk(2, -1)
        z = torch.linspace(-8.5, 8.5, self.nodes, dtype=f.dtype, device=f.device)
        w = torch.softmax(-0.5 * z.square(), -1)
        u = mean.unsqueeze(-1) + log_scale.exp().unsqueeze(-1) * z
        # log(1 − tanh²u) = 2 (log 2 − |u| − log(1 + e^{−2|u|})), without cancellation
        jacobian = 2 * (math.log(2) - u.abs() - F.softplus(-2 * u.abs()))
        return super().entropy(f) + (jacobian * w).sum((-1, -2))

    def log_prob(self, f: Tensor, actions: Tensor) -> Tensor:
        """Log-density of the squashed action tanh(u), u the policy's own action, [*batch]."""
        jacobian = 2 * (math.log(2) - actions.abs() - F.softplus(-2 * actions.abs()))
        return -self.likelihood.nll(f, actions) - jacobian.sum(-1)
