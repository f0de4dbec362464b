"""What every structure takes of memory and time on a device, and which one to use under given limits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from natgrad.errors import ArgumentError
from natgrad.metric import Structure
from natgrad.planning.choice import Choice
from natgrad.planning.inspection import examined, passes_of
from natgrad.planning.limits import Limits
from natgrad.planning.methods import METHODS, method_of
from natgrad.planning.profile import Profile
from natgrad.planning.recommend import recommend
from natgrad.planning.schedules import described, freshest, searches
from natgrad.planning.shapes import block_shapes, state_bytes
from natgrad.planning.timing import Timing


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
        nearest: name of the structure that comes nearest to the limits, where none keeps them.
        reason: why, in a sentence or two.
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
    nearest: str | None
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
    max_p99: float | None = None,
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
        max_p99: 99th percentile of step times over their median: 1.3 is even enough for most uses.
        profile: the device; a file that holds one; None: the cached one of the model's device, measured where missing.

    Raises:
        ArgumentError: an argument that cannot be meant.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={type(model).__name__} was given; it must be a torch.nn.Module.")
    meta, passes = passes_of(model, batch, tokens, inputs)
    parameters = [p for p in meta.parameters() if p.requires_grad]
    size, adam = sum(p.numel() for p in parameters), 2 * sum(p.numel() * p.element_size() for p in parameters)
    limits = Limits.of(max_overhead, max_memory, max_p99, adam)
    timing = Timing.of_model(model, meta, passes, profile)
    found = [
        freshest(meta, method, timing, limits, examined(model, method.structure, inputs)) for method in METHODS.values()
    ]
    recommended, nearest, reason = recommend(found, limits)
    most = max(layer.positions for layer in passes.layers)
    return Plan(
        type(model).__name__, size, passes.layers[0].examples, most, timing.profile.device, timing.sgd, adam,
        tuple(f.choice for f in found), recommended, nearest, reason, passes.seen,
    )  # fmt: skip


def predict(
    model: nn.Module,
    structure: Structure | str,
    *,
    statistics: int = 1,
    inverse: int = 10,
    refresh: str = "Refresh",
    search: str | None = None,
    batch: int | None = None,
    tokens: int | None = None,
    inputs: Any = None,
    profile: Profile | str | Path | None = None,
) -> Choice:
    """Memory and time of one structure with a schedule of one's own; see :func:`plan` for the other arguments.

    Args:
        structure: a structure, with its sampling, widths and storage, or its short name.
        statistics, inverse: intervals in steps, as in ``Refresh``; both 1 where a structure renews all at every step.
        refresh: ``"Refresh"`` or ``"Staggered"``.
        search: ``"QuadraticFit"``, ``"KLClip"`` or ``"TrustRegion"``; None: the preset's own.
    """
    method = method_of(structure)
    meta, passes = passes_of(model, batch, tokens, inputs)
    shapes = block_shapes(meta, method.structure, examined(model, method.structure, inputs))
    search = search or searches(method)[0]
    rates = Timing.of_model(model, meta, passes, profile).rates(method, shapes, search)
    state = state_bytes(meta, method, search, shapes)
    base = Choice(method.name, method.preset, search, **described(method.structure), state=state)
    intervals = (statistics, inverse) if method.scheduled else (1, 1)
    return rates.at(base, *intervals, refresh)
