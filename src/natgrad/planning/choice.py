"""One structure with a schedule, what it takes, and the program that uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from natgrad.metric import Sampling
from natgrad.metric.running import Refresh, Staggered
from natgrad.planning.methods import METHODS

FIT, CLIP, RADIUS = "QuadraticFit", "KLClip", "TrustRegion"
TOGETHER, SPREAD = Refresh.__name__, Staggered.__name__


@dataclass(frozen=True)
class Choice:
    """One structure with a schedule.

    Attributes:
        name: of the structure.
        preset: the optimizer that uses it.
        search: ``"QuadraticFit"`` (measures the step), ``"KLClip"`` (predicts it from the metric), ``"TrustRegion"``.
        statistics, inverse: intervals in steps, as in ``Refresh``.
        refresh: ``"Refresh"``, or ``"Staggered"`` where the renewals of different layers are spread over the interval.
        fraction: part of the rows that statistics are taken of.
        sampling: how that part is picked: ``"Sampling"`` (positions), or ``"SubBatch"`` (examples, run by themselves).
        packed: whether one triangle is kept of each factor and inverse, as ``Packed()`` does.
        block: widest square factor, and width of the blocks that wider ones are divided into; 0 as ``WidthLimits()``.
        state: bytes of the optimizer's state: exact.
        transient: bytes held during a step beyond state, gradients and autograd's own: an estimate.
        seconds: of a step on average.
        ratio: mean step over one of SGD with momentum.
        p99: 99th percentile of the steps' times over their median: fewer than one step in a hundred takes longer.
        worst: the slowest step over one of SGD, with all inverses renewed at once (``Refresh``).
        staggered: the slowest step over one of SGD, with their renewals spread (``Staggered``).
        problem: why the structure cannot be used, or which limits it breaks; empty where it fits.
    """

    name: str
    preset: str
    search: str = ""
    statistics: int = 1
    inverse: int = 1
    refresh: str = TOGETHER
    fraction: float = 1.0
    sampling: str = Sampling.__name__
    packed: bool = False
    block: int = 0
    state: int = 0
    transient: int = 0
    seconds: float = math.inf
    ratio: float = math.inf
    p99: float = math.inf
    worst: float = math.inf
    staggered: float = math.inf
    problem: str = ""

    @property
    def overhead(self) -> float:
        """Time beyond SGD, as a part of SGD's."""
        return self.ratio - 1.0

    @property
    def schedule(self) -> str:
        """``every 20 steps from 1/16, inverses every 20, spread``: when what is renewed; empty where all always is."""
        if not METHODS[self.name].scheduled:
            return ""
        part = "" if self.fraction == 1.0 else f" from {self.part} of the {self._of}"
        spread = ", spread over the steps" if self.refresh == SPREAD else ""
        packed = ", triangles alone kept" if self.packed else ""
        blocks = f", factors in blocks of at most {self.block}" if self.block else ""
        return f"statistics {_every(self.statistics)}{part}, inverses {_every(self.inverse)}{spread}{blocks}{packed}"

    @property
    def _of(self) -> str:
        return "rows" if self.sampling == Sampling.__name__ else "examples, run by themselves"

    @property
    def part(self) -> str:
        """The fraction, ``1/16``."""
        number = round(1 / self.fraction)
        return f"1/{number}" if math.isclose(number * self.fraction, 1.0) else f"{self.fraction:g}"

    @property
    def code(self) -> str:
        """The optimizer as one would write it, of ``model`` and ``likelihood``."""
        method = METHODS[self.name]
        parts = ["model", "likelihood"]
        if method.fitted and self.search != FIT:
            parts += ["lr=0.1", *(["momentum=0.9"] if method.scheduled else []), "search=ng.KLClip(1e-3)"]
        kept = [
            *([f"sampling=ng.{self.sampling}({self.part})"] if self.fraction != 1.0 else []),
            *([f"widths=ng.WidthLimits(full={self.block}, block={self.block})"] if self.block else []),
            *(["storage=ng.Packed()"] if self.packed else []),
        ]
        if kept:
            parts.append(f"structure=ng.{type(method.structure).__name__}({', '.join(kept)})")
        if method.scheduled and (self.statistics, self.inverse, self.refresh) != (*method.intervals, TOGETHER):
            parts.append(f"refresh=ng.{self.refresh}({self.statistics}, {self.inverse})")
        return f"ng.{self.preset}({', '.join(parts)})"


def _every(interval: int) -> str:
    return "every step" if interval == 1 else f"every {interval} steps"
