"""What a comparison found: frozen values that travel between the engine, the report and a JSON file.

Losses are mean negative log-likelihoods per prediction, in nats; times are seconds of training (evaluation and
measurements are not counted); memory is in bytes. A number that was not measured, or that overflowed, is NaN here and
``null`` in JSON, so the files are valid JSON and infinities come back as NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union

from natgrad.errors import ArgumentError

FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """Facts about the machine that the timings depend on."""

    natgrad: str
    torch: str
    python: str
    platform: str
    cpu: str
    cores: int
    threads: int
    device: str
    gemm_gflops: float
    """Rate of a square float32 matrix product in the same process, in 1e9 floating point operations a second."""


@dataclass(frozen=True)
class TaskInfo:
    """The task as a reader needs to know it."""

    name: str
    description: str
    likelihood: str
    metric: str
    metric_higher_is_better: bool
    train_rows: int
    test_rows: int
    parameters: int
    batch_size: int


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer of the comparison: ``family`` is ``natgrad`` or ``torch``; ``note`` states its fixed settings.

    ``knob`` names the setting whose value the fields ``default_lr`` and ``lr`` hold, here and in runs, trials and
    summary: the learning rate ``lr``, or ``max_kl``, the radius of a trust region in nats per prediction.
    """

    name: str
    family: str
    default_lr: float
    note: str
    knob: str = "lr"


@dataclass(frozen=True)
class TuningTrial:
    """One short run of the search for a setting; ``train_loss`` is NaN when it failed, ``failure`` then says why."""

    optimizer: str
    lr: float
    seed: int
    steps: int
    train_loss: float
    failure: str | None = None


@dataclass(frozen=True)
class Tuning:
    """The search for a setting: every optimizer tried default_lr × each factor, under the same limit per trial.

    Exactly one of ``budget_seconds`` (training seconds) and ``steps`` limits a trial.
    """

    factors: tuple[float, ...]
    budget_seconds: float | None
    steps: int | None
    trials: tuple[TuningTrial, ...]


@dataclass(frozen=True)
class Settings:
    """How the comparison was run. Exactly one of ``budget_seconds`` and ``steps`` limits a run; ``tuning`` is None
    when every optimizer ran at its default setting. Evaluations use at most ``evaluation_rows`` rows of each set.
    """

    seeds: tuple[int, ...]
    budget_seconds: float | None
    steps: int | None
    evaluation_rows: int
    tuning: Tuning | None
    command: str


@dataclass(frozen=True)
class Evaluation:
    """The model after ``step`` updates and ``seconds`` of training, on the fixed evaluation rows."""

    step: int
    seconds: float
    train_loss: float
    test_loss: float
    test_metric: float


@dataclass(frozen=True)
class Run:
    """One optimizer on one seed. The per-step tuples have one entry per update that was made.

    train_loss[i] is the loss of the batch before update i, seconds[i] the training time up to and including update i,
    kl_measured[i] the mean over predictions of KL(p_old ‖ p_new) on the batch of update i, kl_predicted[i] what the
    optimizer expected of it (NaN for optimizers that predict nothing). ``peak_memory_bytes`` is the most that tensors
    took in a step (parameters, gradients, optimizer state, activations), ``state_bytes`` the optimizer's state.
    ``failure`` is None for a run that reached its limit, else one line that says why it ended.
    """

    optimizer: str
    seed: int
    lr: float
    tuned: bool
    seconds_per_step: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    train_loss: tuple[float, ...] = ()
    kl_measured: tuple[float, ...] = ()
    kl_predicted: tuple[float, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    peak_memory_bytes: int | None = None
    state_bytes: int | None = None
    failure: str | None = None

    @property
    def steps(self) -> int:
        """The number of updates made."""
        return len(self.seconds_per_step)

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation, or None when the run failed before its first."""
        return self.evaluations[-1] if self.evaluations else None


@dataclass(frozen=True)
class Target:
    """The training loss that 'steps to target' and 'seconds to target' count to, and where it comes from."""

    train_loss: float
    source: str


@dataclass(frozen=True)
class SummaryRow:
    """One optimizer over its seeds. Medians are over the seeds whose run did not fail; None where there is no number.

    ``cost_ratio`` is the median step time over that of the comparison's cheapest optimizer. ``steps_to_target`` and
    ``seconds_to_target`` are medians over all seeds, read at evaluation points, a run that never arrived counting as
    infinitely long; None when that median is not finite. ``reached`` counts the seeds that arrived.
    """

    optimizer: str
    lr: float
    tuned: bool
    runs: int
    failed: int
    steps: int
    seconds_per_step: float | None
    cost_ratio: float | None
    train_loss: float | None
    test_loss: float | None
    test_metric: float | None
    reached: int
    steps_to_target: float | None
    seconds_to_target: float | None
    kl_per_update: float | None
    peak_memory_bytes: int | None
    state_bytes: int | None
    failure: str | None = None
    """The first failure's reason, when any run failed."""


@dataclass(frozen=True)
class Comparison:
    """Everything that ``natgrad compare`` measured."""

    task: TaskInfo
    settings: Settings
    machine: Machine
    optimizers: tuple[OptimizerInfo, ...]
    runs: tuple[Run, ...]
    target: Target | None
    summary: tuple[SummaryRow, ...]
    interrupted: bool = False
    format: int = FORMAT

    def runs_of(self, optimizer: str) -> tuple[Run, ...]:
        """All runs of one optimizer, in the order of the seeds."""
        return tuple(run for run in self.runs if run.optimizer == optimizer)

    def knob_of(self, optimizer: str) -> str:
        """The name of the setting that the optimizer's ``lr`` values are of."""
        return next((info.knob for info in self.optimizers if info.name == optimizer), "lr")

    def to_json(self) -> dict[str, Any]:
        """A tree of dicts, lists, strings, numbers, booleans and None; non-finite numbers become None."""
        return encode(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Comparison:
        """The inverse of :meth:`to_json`; raises ArgumentError when a field is missing or the format is unknown."""
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise ArgumentError(
                f"This is not a comparison that this version can read: its format is {found!r}, expected {FORMAT}. "
                "Give it the JSON file written by `natgrad compare`, or write it anew with this version."
            )
        return decode(cls, data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the JSON file and returns its path."""
        target = Path(path)
        target.write_text(json.dumps(self.to_json(), allow_nan=False), encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Reads a file written by :meth:`save`."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


def encode(value: Any) -> Any:
    """Dataclasses, tuples and numbers as JSON values; non-finite floats as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def decode(kind: type[T], value: Any) -> T:
    """The value of type ``kind`` (a dataclass, a tuple[X, ...], an optional or a plain type) that ``encode`` wrote."""
    return typing.cast(T, _decode(kind, value))


def _decode(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        inner = next(option for option in typing.get_args(kind) if option is not type(None))
        return None if value is None else _decode(inner, value)
    if origin is tuple:
        return tuple(_decode(typing.get_args(kind)[0], item) for item in value)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value)
    if kind is float:
        return math.nan if value is None else float(value)
    return value


def _decode_dataclass(kind: Any, value: Any) -> Any:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(value))
    if missing:
        raise ArgumentError(f"{kind.__name__} in this JSON lacks {', '.join(missing)}: the file is damaged or foreign.")
    return kind(**{f.name: _decode(hints[f.name], value[f.name]) for f in fields if f.name in value})
