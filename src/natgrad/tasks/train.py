"""One run: one optimizer, one seed, one limit; every number of it recorded, failures included."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError
from natgrad.tasks.measure import synchronise
from natgrad.tasks.optimizers import OptimizerSpec, Stepper
from natgrad.tasks.results import Evaluation, Run
from natgrad.tasks.task import Data, Task, forward, mean_kl, take

_POINTS = 40  # evaluations spread evenly over a run, besides the early ones
_EARLY = frozenset({0, 1, 2, 3, 5, 8, 13, 20, 30, 50, 80})
_CHUNK = 1024


@dataclass(frozen=True)
class Limit:
    """When a run ends: after ``seconds`` of training or after ``steps`` updates; exactly one is given."""

    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ArgumentError("Give either a budget of seconds or a number of steps, not both and not neither.")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ArgumentError(f"The budget must be a positive number of seconds, got {self.seconds}.")
        if self.steps is not None and self.steps < 1:
            raise ArgumentError(f"The number of steps must be at least 1, got {self.steps}.")

    def fraction(self, step: int, seconds: float) -> float:
        """Share of the run that is done, in [0, 1]."""
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        return min(1.0, step / (self.steps or 1))


@dataclass(frozen=True)
class Progress:
    """What a caller may show while a run goes on. ``phase`` is ``tune``, ``measure`` or ``train``."""

    phase: str
    optimizer: str
    seed: int
    lr: float
    step: int
    fraction: float
    train_loss: float


@dataclass
class _Record:
    """The growing lists of one run."""

    seconds_per_step: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    kl_measured: list[float] = field(default_factory=list)
    kl_predicted: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.seconds)

    @property
    def elapsed(self) -> float:
        return self.seconds[-1] if self.seconds else 0.0


class Diverged(Exception):
    """The loss left the finite numbers; ends a run."""


def train(
    task: Task,
    spec: OptimizerSpec,
    lr: float,
    seed: int,
    limit: Limit,
    *,
    evaluation_rows: int = 4096,
    detailed: bool = True,
    phase: str = "train",
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Run, bool]:
    """Trains one model and returns (the run, whether the user interrupted it).

    ``detailed`` False leaves out what a learning-rate trial does not need: KL per update and evaluations before the
    end. Errors of the optimizer and divergence end the run, not the program, and are its ``failure``.
    """
    record, failure, interrupted = _Record(), None, False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = task.model(seed).train()
            stepper = spec.build(model, task.likelihood, lr)
            loop = _Loop(task, model, stepper, record, evaluation_rows, detailed)
            for fraction in loop.run(seed, limit):
                if on_progress is not None:
                    loss = record.train_loss[-1] if record.train_loss else math.nan
                    on_progress(Progress(phase, spec.name, seed, lr, record.step, fraction, loss))
        except KeyboardInterrupt:
            failure, interrupted = f"interrupted after {record.step} steps", True
        except Diverged as error:
            failure = str(error)
        except Exception as error:  # whatever an optimizer raises is a result of the comparison
            failure = f"{type(error).__name__} at step {record.step + 1}: {_first_line(error)}"
    run = Run(
        optimizer=spec.name,
        seed=seed,
        lr=lr,
        tuned=False,
        seconds_per_step=tuple(record.seconds_per_step),
        seconds=tuple(record.seconds),
        train_loss=tuple(record.train_loss),
        kl_measured=tuple(record.kl_measured),
        kl_predicted=tuple(record.kl_predicted),
        evaluations=tuple(record.evaluations),
        failure=failure,
    )
    return run, interrupted


class _Loop:
    def __init__(
        self, task: Task, model: nn.Module, stepper: Stepper, record: _Record, evaluation_rows: int, detailed: bool
    ) -> None:
        self.task, self.model, self.stepper, self.record = task, model, stepper, record
        self.detailed = detailed
        self.device = next(model.parameters()).device
        self.train_rows = evaluation_subset(task.train, task.train_rows, evaluation_rows)
        self.test_rows = evaluation_subset(task.test, task.test_rows, evaluation_rows)
        self.random_forward = has_random_forward(model)

    def run(self, seed: int, limit: Limit) -> Iterator[float]:
        """Makes updates until the limit, yielding the share done after each."""
        batches = batch_indices(self.task.train_rows, self.task.batch_size, seed)
        next_point, fraction = 0.0, 0.0
        while True:
            due = fraction >= next_point or self.record.step in _EARLY
            if (self.detailed and due) or fraction >= 1:
                self.evaluate()
                next_point = (math.floor(fraction * _POINTS) + 1) / _POINTS
            yield fraction
            if fraction >= 1:
                return
            self.update(next(batches).to(self.device))
            fraction = limit.fraction(self.record.step, self.record.elapsed)

    def update(self, index: Tensor) -> None:
        """One timed step, then the measurements, which are not timed."""
        inputs, targets = take(self.task.train[0], index), take(self.task.train[1], index)
        before = self.still_output(inputs) if self.detailed and self.random_forward else None
        synchronise(self.device)
        start = time.perf_counter()
        loss, output = self.stepper.step(inputs, targets)
        value = float(loss)
        synchronise(self.device)
        duration = time.perf_counter() - start
        record = self.record
        record.seconds.append(record.elapsed + duration)
        record.seconds_per_step.append(duration)
        record.train_loss.append(value)
        measured = math.nan
        if self.detailed and math.isfinite(value):
            with torch.no_grad():
                after = self.still_output(inputs) if before is not None else forward(self.model, inputs)
                measured = float(mean_kl(self.task.likelihood, output if before is None else before, after, targets))
        record.kl_measured.append(measured)
        record.kl_predicted.append(self.stepper.kl_predicted())
        if not math.isfinite(value):
            raise Diverged(f"diverged: the training loss became {value} at step {record.step}")

    def still_output(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The output in evaluation mode: where dropout or batch statistics would make two forward passes differ."""
        self.model.eval()
        with torch.no_grad():
            output = forward(self.model, inputs)
        self.model.train()
        return output

    def evaluate(self) -> None:
        """Appends an evaluation; raises Diverged when the model's loss is not finite."""
        train_loss, _ = evaluate(self.task, self.model, self.train_rows, metric=False)
        test_loss, metric = evaluate(self.task, self.model, self.test_rows, metric=True)
        self.record.evaluations.append(Evaluation(self.record.step, self.record.elapsed, train_loss, test_loss, metric))
        if not math.isfinite(train_loss):
            raise Diverged(f"diverged: the training loss became {train_loss} after step {self.record.step}")


def evaluate(task: Task, model: nn.Module, data: Data, *, metric: bool) -> tuple[float, float]:
    """(mean nll per prediction, metric) of ``data`` in evaluation mode, in chunks of rows; metric NaN unless asked."""
    training = model.training
    model.eval()
    loss = value = weight = rows = 0.0
    count = len(data[0][0]) if isinstance(data[0], tuple) else len(data[0])
    with torch.no_grad():
        for start in range(0, count, _CHUNK):
            inputs, targets = take(data[0], slice(start, start + _CHUNK)), take(data[1], slice(start, start + _CHUNK))
            output = forward(model, inputs)
            weights = task.likelihood.weights(output, targets)
            nll = task.likelihood.nll(output, targets)
            total = float(nll.numel() if weights is None else weights.sum())
            loss += float(nll.sum(dtype=torch.float64))
            weight += total
            size = min(_CHUNK, count - start)
            if metric and task.metric is not None:
                value += size * float(task.metric.function(output, targets))
            rows += size
    model.train(training)
    mean = loss / weight
    if not metric:
        return mean, math.nan
    return mean, (mean if task.metric is None else value / rows)


def evaluation_subset(data: Data, rows: int, most: int) -> Data:
    """All rows, or ``most`` of them drawn with a fixed seed, the same for every run."""
    if rows <= most:
        return data
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:most]
    first = data[0][0] if isinstance(data[0], tuple) else data[0]
    index = index.to(first.device)
    return take(data[0], index), take(data[1], index)


def batch_indices(rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of row indices: epoch after epoch in an order that depends on the seed alone.

    Every batch has min(rows, batch_size) rows; what is left of an epoch is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, batch_size)
    while True:
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows - size + 1, size):
            yield order[start : start + size]


def has_random_forward(model: nn.Module) -> bool:
    """Whether training mode computes something else than evaluation mode (dropout, batch statistics)."""
    batch_statistics = (nn.modules.batchnorm._BatchNorm,)
    for module in model.modules():
        dropout = getattr(module, "dropout", 0.0)
        if isinstance(module, (*batch_statistics, nn.modules.dropout._DropoutNd)):
            return True
        if isinstance(dropout, float) and dropout > 0:
            return True
    return False


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text if len(text) <= 300 else text[:297] + "..."
