"""How long the steps of a schedule take: on average, at worst, and where renewals are spread over the steps."""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from natgrad.distributed import owners
from natgrad.planning.choice import FIT, SPREAD, TOGETHER, Choice
from natgrad.planning.costs import Costs, costs_of
from natgrad.planning.layers import Passes
from natgrad.planning.methods import Method
from natgrad.planning.profile import Profile, profile_of
from natgrad.planning.shapes import BlockShapes
from natgrad.planning.work import memory

_SGD_PASSES = 5  # with momentum: gradient, buffer twice, parameter twice
_RARE = 0.01


@dataclass(frozen=True)
class Timing:
    """Seconds of passes and of what a structure adds to them, on one device.

    Args:
        passes: forward and backward pass.
        profile: the device.
        dtype: of the parameters.
        size: trainable numbers.
        coupled: whether examples of a batch see each other (BatchNorm), so that none can be run by itself.
    """

    passes: Passes
    profile: Profile
    dtype: torch.dtype
    size: int
    coupled: bool = False

    @staticmethod
    def of_model(model: nn.Module, meta: nn.Module, passes: Passes, profile: Profile | str | Path | None) -> Timing:
        parameters = [p for p in meta.parameters() if p.requires_grad]
        if not isinstance(profile, Profile):
            device = next(model.parameters()).device
            profile = profile_of(device, None if profile is None else Path(profile))
        coupled = any(isinstance(m, _BatchNorm) for m in model.modules())
        return Timing(passes, profile, parameters[0].dtype, sum(p.numel() for p in parameters), coupled)

    @property
    def sgd(self) -> float:
        """A step of SGD with momentum."""
        update = memory(self.size, _SGD_PASSES, itemsize=self.dtype.itemsize)
        return self.profile.seconds((*self.passes.forward, *self.passes.backward, update), self.dtype)

    def rates(self, method: Method, shapes: Sequence[BlockShapes], search: str) -> Rates:
        """What a structure takes with this search."""
        costs = costs_of(self.passes, shapes, method.structure, iterations=method.iterations, fitted=search == FIT)
        return Rates(self.sgd, *self._of(costs), costs.transient, {s.block.name: renewal_cost(s) for s in shapes})

    def _of(self, costs: Costs) -> tuple[float, tuple[float, ...], float]:
        refresh = tuple(self.profile.seconds(part) for part in costs.refresh)
        return self.profile.seconds(costs.statistics, self.dtype), refresh, self.profile.seconds(costs.each, self.dtype)


def renewal_cost(shapes: BlockShapes) -> float:
    """What ``Staggered`` divides blocks by: the cube of each square moment, as the optimizer counts it."""
    return float(sum(s.numel() * (s[-1] if len(s) > 1 and s[-2] > 1 else 1) for s in shapes.averages.values()))


@dataclass(frozen=True)
class Rates:
    """What a structure takes.

    Args:
        sgd: seconds of a step of SGD.
        statistics: seconds of one update of statistics.
        refresh: seconds of the renewal of each block.
        each: seconds that every step takes beyond SGD's.
        transient: bytes held meanwhile.
        costs: what each block, in the order of ``refresh``, counts when renewals are divided over steps.
    """

    sgd: float
    statistics: float
    refresh: tuple[float, ...]
    each: float
    transient: int
    costs: Mapping[str, float]
    _shares: dict[int, tuple[float, ...]] = field(default_factory=dict, compare=False)

    def at(self, base: Choice, statistics: int, inverse: int, refresh: str = TOGETHER) -> Choice:
        """``base`` with these intervals."""
        times = sorted(self.steps(statistics, inverse, refresh))
        mean, median = math.fsum(times) / len(times), numbers.median(times)
        together, spread = (
            max(times if refresh == kind else self.steps(statistics, inverse, kind)) for kind in (TOGETHER, SPREAD)
        )
        # The least time that fewer than one step in a hundred exceeds.
        rare = math.ceil(_RARE * len(times)) - 1
        return replace(
            base, statistics=statistics, inverse=inverse, refresh=refresh, transient=self.transient, seconds=mean,
            ratio=mean / self.sgd, p99=times[len(times) - 1 - rare] / median, worst=together / self.sgd,
            staggered=spread / self.sgd,
        )  # fmt: skip

    def steps(self, statistics: int, inverse: int, refresh: str) -> list[float]:
        """Seconds of each step of a period of the schedule."""
        always = self.sgd + self.each
        shares = self.shares(inverse) if refresh == SPREAD else (sum(self.refresh),) + (0.0,) * (inverse - 1)
        return [
            always + (0.0 if k % statistics else self.statistics) + shares[k % inverse]
            for k in range(math.lcm(statistics, inverse))
        ]

    def shares(self, number: int) -> tuple[float, ...]:
        """Seconds of renewal at each of so many steps, as ``Staggered`` divides the blocks."""
        if number not in self._shares:
            times = [0.0] * number
            for seconds, owner in zip(self.refresh, _in_order(self.costs, owners(self.costs, number)), strict=True):
                times[owner] += seconds
            self._shares[number] = tuple(times)
        return self._shares[number]


def _in_order(names: Mapping[str, float], owner: Mapping[str, int]) -> list[int]:
    return [owner[name] for name in names]
