"""What every structure takes of memory and time on a device, and which one to use under given limits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from natgrad.errors import ArgumentError
from natgrad.metric import Kronecker, Structure
from natgrad.planning.costs import Costs, costs_of
from natgrad.planning.inspection import examined, passes_of
from natgrad.planning.layers import Passes
from natgrad.planning.methods import METHODS, Method, method_of
from natgrad.planning.profile import Profile, profile_of
from natgrad.planning.shapes import BlockShapes, block_shapes
from natgrad.planning.work import memory

FIT, CLIP, RADIUS = "QuadraticFit", "KLClip", "TrustRegion"
_INTERVALS = (1, 2, 5, 10, 20, 50, 100)
_SGD_PASSES = 5  # with momentum: gradient, buffer twice, parameter twice
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Choice:
    """One structure with a schedule.

    Attributes:
        name: of the structure.
        preset: the optimizer that uses it.
        search: ``"QuadraticFit"`` (measures the step), ``"KLClip"`` (predicts it from the metric), ``"TrustRegion"``.
        statistics, inverse: intervals in steps, as in ``Refresh``.
        fraction: part of the rows that statistics are taken of.
        state: bytes of the optimizer's state: exact.
        transient: bytes held during a step beyond state, gradients and autograd's own: an estimate.
        seconds: of a step on average.
        ratio: mean step over one of SGD with momentum.
        worst: the slowest step over one of SGD, with all inverses renewed at once.
        staggered: the slowest step where the renewals of different layers are spread over the interval.
        problem: why the structure cannot be used, or which limit it breaks; empty where it fits.
    """

    name: str
    preset: str
    search: str = ""
    statistics: int = 1
    inverse: int = 1
    fraction: float = 1.0
    state: int = 0
    transient: int = 0
    seconds: float = math.inf
    ratio: float = math.inf
    worst: float = math.inf
    staggered: float = math.inf
    problem: str = ""

    @property
    def overhead(self) -> float:
        """Time beyond SGD, as a part of SGD's."""
        return self.ratio - 1.0

    @property
    def code(self) -> str:
        """The optimizer as one would write it."""
        method = METHODS[self.name]
        parts = ["model", "likelihood"]
        if method.fitted and self.search != FIT:
            parts += ["lr=0.1", *(["momentum=0.9"] if method.scheduled else []), "search=ng.KLClip(1e-3)"]
        if self.fraction != 1.0:
            parts.append(f"structure=ng.{type(method.structure).__name__}(sampling=ng.Sampling({self.fraction:g}))")
        if method.scheduled and (self.statistics, self.inverse) != (1, 10):
            parts.append(f"refresh=ng.Refresh({self.statistics}, {self.inverse})")
        return f"ng.{self.preset}({', '.join(parts)})"


@dataclass(frozen=True)
class Plan:
    """Every structure on one model, batch and device.

    Attributes:
        model: class of the model.
        parameters: trainable numbers.
        batch, tokens: examples of a batch, and the most positions of one that share weights.
        device: what the profile was measured on.
        sgd: seconds of a step of SGD with momentum, predicted.
        adam: bytes of Adam's state, to compare with.
        choices: one per structure.
        recommended: name of the structure to use; None where none keeps the limits.
        reason: why, in a sentence.
        seen: whether the passes were found by running the model on the meta device.
    """

    model: str
    parameters: int
    batch: int
    tokens: int
    device: str
    sgd: float
    adam: int
    choices: tuple[Choice, ...]
    recommended: str | None
    reason: str
    seen: bool

    def __getitem__(self, name: str) -> Choice:
        """The choice of that structure."""
        for choice in self.choices:
            if choice.name == name:
                return choice
        raise KeyError(name)

    @property
    def best(self) -> Choice | None:
        """The recommended choice."""
        return None if self.recommended is None else self[self.recommended]

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not known is None."""
        found = asdict(self)
        for choice, made in zip(found["choices"], self.choices, strict=True):
            choice["code"] = made.code
            choice.update({k: None for k, v in choice.items() if isinstance(v, float) and not math.isfinite(v)})
        return found


def plan(
    model: nn.Module,
    *,
    batch: int | None = None,
    tokens: int | None = None,
    inputs: Any = None,
    max_overhead: float | None = None,
    max_memory: int | str | None = None,
    profile: Profile | str | Path | None = None,
) -> Plan:
    """Memory and step time of every structure on ``model``, before running any of them, and which one to use.

    State bytes are exact. Times come from operation counts and a profile of the device, measured once and cached.
    Nothing is allocated: the model may be on the meta device and far larger than this machine's memory.

    Args:
        model: the network.
        batch, tokens: examples of a batch, and positions of each that share weights; every layer then counts their
            product (products of attention, and other numbers of positions, need ``inputs``).
        inputs: a batch, as the model takes it, instead of batch and tokens. Where model and inputs have memory, the
            layers are also compared with autograd in one pass, as :func:`inspect` does.
        max_overhead: mean time of a step beyond SGD's, as a part of it: 0.1 allows a tenth.
        max_memory: bytes of optimizer state: a number, or a text such as ``"4 GB"`` or ``"2x-adam"``.
        profile: the device; a file that holds one; None: the cached one of the model's device, measured where missing.

    Raises:
        ArgumentError: an argument that cannot be meant.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={type(model).__name__} was given; it must be a torch.nn.Module.")
    if max_overhead is not None and not (isinstance(max_overhead, (int, float)) and 0 < max_overhead < math.inf):
        raise ArgumentError(f"max_overhead={max_overhead!r} was given; it must be a number above 0: 0.1 is a tenth.")
    meta, passes = passes_of(model, batch, tokens, inputs)
    parameters = [p for p in meta.parameters() if p.requires_grad]
    size, adam = sum(p.numel() for p in parameters), 2 * sum(p.numel() * p.element_size() for p in parameters)
    limit = None if max_memory is None else memory_limit(max_memory, adam)
    timing = _Timing.of_model(model, meta, passes, profile)
    choices = tuple(
        _choice(meta, method, timing, max_overhead, limit, examined(model, method.structure, inputs))
        for method in METHODS.values()
    )
    recommended, reason = _recommend(choices, max_overhead, limit)
    most = max(layer.positions for layer in passes.layers)
    return Plan(
        type(model).__name__, size, passes.layers[0].examples, most, timing.profile.device, timing.sgd, adam, choices,
        recommended, reason, passes.seen,
    )  # fmt: skip


def predict(
    model: nn.Module,
    structure: Structure | str,
    *,
    statistics: int = 1,
    inverse: int = 10,
    search: str | None = None,
    batch: int | None = None,
    tokens: int | None = None,
    inputs: Any = None,
    profile: Profile | str | Path | None = None,
) -> Choice:
    """Memory and time of one structure with a schedule of one's own; see :func:`plan` for the other arguments.

    Args:
        statistics, inverse: intervals in steps, as in ``Refresh``; both 1 where a structure renews all at every step.
        search: ``"QuadraticFit"``, ``"KLClip"`` or ``"TrustRegion"``; None: the preset's own.
    """
    method = method_of(structure)
    meta, passes = passes_of(model, batch, tokens, inputs)
    shapes = block_shapes(meta, method.structure, examined(model, method.structure, inputs))
    timing = _Timing.of_model(model, meta, passes, profile)
    search = search or _searches(method)[0]
    base = Choice(method.name, method.preset, search, state=state_bytes(meta, method, search, shapes))
    intervals = (statistics, inverse) if method.scheduled else (1, 1)
    return _rates(base, method, timing, shapes, 1.0).at(base, *intervals)


def memory_limit(given: int | float | str, adam: int) -> int:
    """Bytes from a number, ``"4 GB"``, ``"512MiB"`` or a multiple of Adam's state, ``"2x-adam"``.

    Raises:
        ArgumentError: the text is none of these, or the number is not above 0.
    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(?:(x-adam)|([kmgt]?i?)b?)\s*", given.lower())
        if match and match[3] in (None, *_UNITS) and float(match[1]) > 0:
            return int(float(match[1]) * (adam if match[2] else _UNITS[match[3]]))
    elif not isinstance(given, bool) and 0 < given < math.inf:
        return int(given)
    raise ArgumentError(f"max_memory={given!r} was given; use bytes, or a text such as '4 GB', '512MiB' or '2x-adam'.")


@dataclass(frozen=True)
class _Timing:
    """Seconds of passes and of what a structure adds to them."""

    passes: Passes
    profile: Profile
    dtype: torch.dtype
    size: int

    @staticmethod
    def of_model(model: nn.Module, meta: nn.Module, passes: Passes, profile: Profile | str | Path | None) -> _Timing:
        parameters = [p for p in meta.parameters() if p.requires_grad]
        if not isinstance(profile, Profile):
            device = next(model.parameters()).device
            profile = profile_of(device, None if profile is None else Path(profile))
        return _Timing(passes, profile, parameters[0].dtype, sum(p.numel() for p in parameters))

    @property
    def sgd(self) -> float:
        """A step of SGD with momentum."""
        update = memory(self.size, _SGD_PASSES, itemsize=self.dtype.itemsize)
        return self.profile.seconds((*self.passes.forward, *self.passes.backward, update), self.dtype)

    def of(self, costs: Costs) -> tuple[float, tuple[float, ...], float]:
        """Seconds of statistics, of each block's refresh, and of each step."""
        refresh = tuple(self.profile.seconds(part) for part in costs.refresh)
        return self.profile.seconds(costs.statistics, self.dtype), refresh, self.profile.seconds(costs.each, self.dtype)


def state_bytes(meta: nn.Module, method: Method, search: str, shapes: Sequence[BlockShapes]) -> int:
    """Bytes of the optimizer's state after a step: curvature, the step before or the momentum, and counters."""
    parameters = [p for p in meta.parameters() if p.requires_grad]
    kept = method.momentum or search == FIT or (method.fitted and method.scheduled)
    vectors = sum(p.numel() * p.element_size() for p in parameters) if kept else 0
    return sum(s.bytes for s in shapes) + vectors + 4 * len(parameters)


def _choice(
    meta: nn.Module,
    method: Method,
    timing: _Timing,
    overhead: float | None,
    limit: int | None,
    uncovered: Mapping[str, str],
) -> Choice:
    """The structure with the freshest schedule that keeps the limits; with the cheapest where none does."""
    try:
        shapes = block_shapes(meta, method.structure, uncovered)
    except ArgumentError as error:
        return Choice(method.name, method.preset, problem=str(error).partition(". ")[0] + ".")
    found = None
    for search in _searches(method):
        state = state_bytes(meta, method, search, shapes)
        base = Choice(method.name, method.preset, search, state=state)
        for choice in _schedules(base, method, timing, shapes):
            if overhead is None or choice.overhead <= overhead:
                return replace(choice, problem=_broken(choice, None, limit))
            found = choice if found is None or choice.ratio < found.ratio else found
    assert found is not None
    return replace(found, problem=_broken(found, overhead, limit))


def _searches(method: Method) -> tuple[str, ...]:
    if method.name == "matrix-free":
        return (RADIUS,)
    return (FIT, CLIP) if method.fitted else (CLIP,)


def _schedules(base: Choice, method: Method, timing: _Timing, shapes: Sequence[BlockShapes]) -> Iterator[Choice]:
    """The structure with every schedule, from the freshest to the most seldom."""
    fractions = (1.0, 0.25, 0.0625) if isinstance(method.structure, Kronecker) and fraction_field() else (1.0,)
    rates = {f: _rates(base, method, timing, shapes, f) for f in fractions}
    for statistics, inverse, fraction in _grid(method, fractions):
        yield rates[fraction].at(replace(base, fraction=fraction), statistics, inverse)


@dataclass(frozen=True)
class _Rates:
    """Seconds of a step of SGD, of statistics, of each block's refresh and of what every step does; bytes meanwhile."""

    sgd: float
    statistics: float
    refresh: tuple[float, ...]
    each: float
    transient: int

    def at(self, base: Choice, statistics: int, inverse: int) -> Choice:
        """``base`` with these intervals."""
        always, renewed = self.sgd + self.each, sum(self.refresh)
        mean = always + self.statistics / statistics + renewed / inverse
        share = max([*self.refresh, renewed / inverse], default=0.0)  # the largest layer is not divided
        return replace(
            base, statistics=statistics, inverse=inverse, transient=self.transient, seconds=mean,
            ratio=mean / self.sgd, worst=(always + self.statistics + renewed) / self.sgd,
            staggered=(always + self.statistics + share) / self.sgd,
        )  # fmt: skip


def _rates(base: Choice, method: Method, timing: _Timing, shapes: Sequence[BlockShapes], fraction: float) -> _Rates:
    costs = costs_of(
        timing.passes, shapes, method.structure, fraction=fraction, iterations=method.iterations,
        fitted=base.search == FIT,
    )  # fmt: skip
    return _Rates(timing.sgd, *timing.of(costs), costs.transient)


def _grid(method: Method, fractions: tuple[float, ...]) -> list[tuple[int, int, float]]:
    """Intervals and fractions, from the freshest on: each doubling of an interval counts as much, inverses from 10."""
    if not method.scheduled:
        return [(1, 1, 1.0)]
    least = 1 if method.name == "diagonal" else 10
    inverses = _INTERVALS if least == 1 else [i for i in _INTERVALS if i >= least]
    grid = [(s, i, f) for s in _INTERVALS for i in inverses for f in fractions if i % s == 0 or s == i]
    return sorted(grid, key=lambda g: (math.log2(g[0]) + math.log2(g[1] / least) - 0.5 * math.log2(g[2]), g[0]))


def fraction_field() -> str | None:
    """The name of the Kronecker structures' setting for a part of the rows; None where they have none."""
    return "sampling" if "sampling" in {f.name for f in fields(Kronecker)} else None


def _broken(choice: Choice, overhead: float | None, limit: int | None) -> str:
    problems = []
    if overhead is not None and choice.overhead > overhead:
        problems.append(f"{choice.overhead:.0%} over SGD where {overhead:.0%} is allowed")
    if limit is not None and choice.state > limit:
        problems.append(f"{size_text(choice.state)} of state where {size_text(limit)} is allowed")
    return "; ".join(problems)


def _recommend(choices: Sequence[Choice], overhead: float | None, limit: int | None) -> tuple[str | None, str]:
    """The structure to use and why: exact where it is no dearer than K-FAC, then K-FAC, then what still fits."""
    by = {c.name: c for c in choices}
    fits = {c.name: c for c in choices if not c.problem}
    kfac = by["kfac"]
    for name, exact in (("dense", "The whole matrix"), ("gram", "The Gram matrix of the batch's rows")):
        if name in fits and fits[name].ratio <= kfac.ratio:
            return name, (
                f"{exact} is exact, and a step takes {fits[name].ratio:.2f} of SGD's time where K-FAC takes "
                f"{kfac.ratio:.2f}."
            )
    for name in ("kfac", "ekfac", "block", "gram", "dense", "diagonal", "matrix-free"):
        if name in fits:
            c = fits[name]
            why = f"{c.preset} takes {c.ratio:.2f} of SGD's time and {size_text(c.state)} of state"
            if name not in ("kfac",) and kfac.problem:
                why += f", and K-FAC does not fit: {kfac.problem}"
            elif METHODS[name].scheduled and (overhead is not None or limit is not None):
                why += ", with the freshest statistics and inverses that keep the limits"
            return name, why + "."
    nearest = min(
        (c for c in choices if math.isfinite(c.ratio)), key=lambda c: (bool(limit and c.state > limit), c.ratio)
    )
    return None, f"No structure keeps the limits. The nearest is {nearest.name}: {nearest.problem}."


def size_text(count: float) -> str:
    """``12.4 MB``; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
