"""What a task is: a model, a likelihood, data and a metric, as one frozen value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError, NatgradError, ShapeError

Rows: TypeAlias = Tensor | tuple[Tensor, ...]
"""Data whose first axis counts rows: one tensor, or a tuple of tensors with equally many rows."""
Data: TypeAlias = tuple[Rows, Rows]
"""(inputs, targets). A tuple of inputs becomes the model's positional arguments; a tuple of targets is given to the
likelihood as it is (a weighted likelihood takes targets with weights)."""

_CHUNK = 4096  # rows looked at together
_MISFITS = (NatgradError, RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True)
class Metric:
    """A number for people, beside the loss: ``function(output, target)`` returns its mean over the rows given."""

    name: str
    function: Callable[[Tensor, Any], Tensor]
    higher_is_better: bool = False


@dataclass(frozen=True)
class Task:
    """Everything that a comparison of optimizers needs to know.

    Args:
        name: short name, also of the report's folder.
        description: one or two sentences: data, its size, model.
        model: seed -> a new model with initial weights that depend on the seed alone.
        likelihood: a natgrad likelihood p(y | output); the training loss is its mean nll per prediction.
        train, test: (inputs, targets), rows on the first axis.
        batch_size: rows per training step (at most all of them).
        metric: reported on the test set; None reports the test loss under the name ``nll``.
        target_loss: the training loss to count steps and seconds to; None takes a reference optimizer's final loss.

    Raises:
        ArgumentError, ShapeError: when the parts do not fit together (see :func:`validate`, which runs the model).
    """

    name: str
    description: str
    model: Callable[[int], nn.Module]
    likelihood: Any
    train: Data
    test: Data
    batch_size: int = 128
    metric: Metric | None = None
    target_loss: float | None = None

    def __post_init__(self) -> None:
        for label, data in (("train", self.train), ("test", self.test)):
            if not isinstance(data, tuple) or len(data) != 2:
                raise ArgumentError(
                    f"Task {self.name!r}: {label} must be a pair (inputs, targets), got {_describe(data)}. "
                    "Return e.g. train=(x, y) with rows on the first axis of both."
                )
            inputs, targets = row_count(data[0], f"{label} inputs"), row_count(data[1], f"{label} targets")
            if inputs != targets:
                raise ShapeError(
                    f"Task {self.name!r}: {label} has {inputs} input rows but {targets} target rows; "
                    "the first axis of both counts examples."
                )
            if inputs == 0:
                raise ArgumentError(f"Task {self.name!r}: {label} has no rows. Give at least one example.")
        if self.batch_size < 1:
            raise ArgumentError(f"Task {self.name!r}: batch_size must be at least 1, got {self.batch_size}.")

    @property
    def train_rows(self) -> int:
        return row_count(self.train[0], "train inputs")

    @property
    def test_rows(self) -> int:
        return row_count(self.test[0], "test inputs")

    def to(self, device: torch.device | str) -> Task:
        """The same task with its data, and the models it makes, on ``device``."""
        build = self.model
        return Task(
            self.name,
            self.description,
            lambda seed: build(seed).to(device),
            self.likelihood,
            (_map(self.train[0], device), _map(self.train[1], device)),
            (_map(self.test[0], device), _map(self.test[1], device)),
            self.batch_size,
            self.metric,
            self.target_loss,
        )


def row_count(rows: Any, label: str) -> int:
    """Rows on the first axis, the same for every tensor of a tuple; ArgumentError / ShapeError otherwise."""
    tensors = rows if isinstance(rows, tuple) else (rows,)
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in tensors):
        raise ArgumentError(
            f"{label} must be a tensor, or a tuple of tensors, with rows on the first axis; got {_describe(rows)}. "
            "Convert arrays with torch.as_tensor."
        )
    counts = {tensor.shape[0] for tensor in tensors}
    if len(counts) > 1:
        raise ShapeError(f"{label}: the tensors of the tuple have different numbers of rows: {sorted(counts)}.")
    return counts.pop()


def take(rows: Rows, index: Tensor | slice) -> Rows:
    """The rows that ``index`` picks, of one tensor or of each tensor of a tuple."""
    return tuple(tensor[index] for tensor in rows) if isinstance(rows, tuple) else rows[index]


def forward(model: nn.Module, inputs: Rows) -> Tensor:
    """The model's output; a tuple of inputs is spread over positional arguments."""
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def mean_nll(likelihood: Any, output: Tensor, target: Rows) -> Tensor:
    """Mean negative log-likelihood per prediction, Σ w·nll / Σ w where the likelihood weighs predictions. 0-d."""
    nll = likelihood.nll(output, target)
    weights = likelihood.weights(output, target)
    return nll.mean() if weights is None else nll.sum() / weights.sum()


def mean_kl(likelihood: Any, old: Tensor, new: Tensor, target: Rows) -> Tensor:
    """Mean KL(p_old ‖ p_new) per prediction, weighted as the loss is. 0-d."""
    kl = likelihood.kl(old, new)
    weights = likelihood.weights(old, target)
    return kl.mean() if weights is None else (weights * kl).sum() / weights.sum()


def validate(task: Task) -> None:
    """Runs the model on a few rows and looks at all data; the data stay as they are.

    Raises ArgumentError when model, likelihood, data and metric do not fit together, when an input or a target is NaN
    or infinite, and when a target is impossible under the likelihood.
    """
    model = task.model(0)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"Task {task.name!r}: model(seed) must return a torch.nn.Module, got {_describe(model)}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError(f"Task {task.name!r}: the model has no trainable parameter; there is nothing to optimize.")
    for label, (inputs, targets) in (("train", task.train), ("test", task.test)):
        index = slice(0, 4)
        try:
            with torch.no_grad():
                output = forward(model.eval(), take(inputs, index))
                if hasattr(task.likelihood, "check_output"):  # a user's own likelihood may lack it
                    task.likelihood.check_output(output)
                loss = mean_nll(task.likelihood, output, take(targets, index))
                if task.metric is not None:
                    task.metric.function(output, take(targets, index))
        except _MISFITS as error:
            raise ArgumentError(
                f"Task {task.name!r}: model, likelihood and {label} data do not fit together "
                f"(inputs {_describe(inputs)}, targets {_describe(targets)}): {type(error).__name__}: {error}"
            ) from error
        _check_finite(task.name, f"{label} inputs", inputs)
        _check_targets(task, label, output, targets)
        if not torch.isfinite(loss):
            raise ArgumentError(
                f"Task {task.name!r}: the {label} loss of the untrained model is {float(loss)} on the first rows. "
                "All inputs and targets are finite, so the model's output is not, or is too large: scale the inputs."
            )


def _check_finite(task: str, label: str, rows: Rows) -> None:
    """ArgumentError naming the first row with a NaN or infinite entry."""
    for start in range(0, row_count(rows, label), _CHUNK):
        _raise_for_rows(task, label, start, _finite_rows(take(rows, slice(start, start + _CHUNK))))


def _finite_rows(rows: Rows) -> Tensor:
    """[rows] bool: no entry of the row is NaN or infinite; integers and booleans never are."""
    tensors = rows if isinstance(rows, tuple) else (rows,)
    return torch.stack([torch.isfinite(tensor).reshape(len(tensor), -1).all(1) for tensor in tensors]).all(0)


def _raise_for_rows(task: str, label: str, start: int, good: Tensor) -> None:
    if not bool(good.all()):
        raise ArgumentError(
            f"Task {task!r}: {label} have a NaN or infinite entry, first in row {start + int((~good).nonzero()[0])}. "
            "Remove such rows or fill them in before training."
        )


def _check_targets(task: Task, label: str, output: Tensor, targets: Rows) -> None:
    """Every target finite, unless a weight of zero masks it, and possible by the likelihood's own check.

    ``output`` is that of a few rows; its first row stands in for the others, as its shape is what matters.
    """
    check = getattr(task.likelihood, "check_target", None)  # a user's own likelihood may lack it
    count = row_count(targets, f"{label} targets")
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        some, stand_in = take(targets, slice(start, stop)), output[:1].expand(stop - start, *output.shape[1:])
        good = _finite_rows(some)
        if not bool(good.all()):
            with contextlib.suppress(*_MISFITS):  # impossible besides: the rows stay as bad as they are
                good |= _finite_rows(task.likelihood.nll(stand_in, some))
        _raise_for_rows(task.name, f"{label} targets", start, good)
        try:
            if check is not None:
                check(stand_in, some)
        except _MISFITS as error:
            raise ArgumentError(f"Task {task.name!r}: {label} targets, rows {start} to {stop - 1}: {error}") from error


def _map(rows: Rows, device: torch.device | str) -> Rows:
    return tuple(tensor.to(device) for tensor in rows) if isinstance(rows, tuple) else rows.to(device)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_describe(item) for item in value) + ")"
    return type(value).__name__
