"""From a name on the command line to a model: a function or class of the user's own, or a built-in task's."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError
from natgrad.tasks import Task
from natgrad.tasks.registry import as_task, call_user, load_task
from natgrad.tasks.task import take


def load_model(
    reference: str, batch: int | None, tokens: int | None, given: str | None, meta: bool, real: bool = False
) -> tuple[nn.Module, dict[str, Any], str]:
    """The model; ``batch=`` and ``tokens=``, or ``inputs=``, for :func:`natgrad.planning.plan`; a task's likelihood, as
    code.

    Args:
        reference: ``module:function``, ``module:Class`` or ``file.py:function`` of the current folder, called without
            arguments; what it returns is a module, or a task as for ``natgrad compare``. Or a built-in task's name.
        batch, tokens: as given; a task has its own batch size, and its data say the rest.
        given: shape of one example, ``3x32x32``, or ``ids:128`` for so many token indices.
        meta: whether to build the model under ``torch.device("meta")``.
        real: whether a batch of the shape ``given`` has memory, so that the model can be run on it.

    Raises:
        ArgumentError: there is no such thing, it fails, or it returns no model.
    """
    with torch.device("meta") if meta else contextlib.nullcontext():
        made = _made(reference)
    if isinstance(made, nn.Module):
        model, rows, likelihood = made, None, ""
    else:
        model, rows = made.model(0), take(made.train[0], slice(0, batch or made.batch_size))
        likelihood = _code(made.likelihood)
    if given is not None:
        rows = _example(given, batch or 1, real and not any(p.is_meta for p in model.parameters()))
    if rows is None:
        return model, {"batch": batch, "tokens": tokens}, likelihood
    if tokens is not None:
        raise ArgumentError(
            "--tokens is for models without inputs: the task's data, or --input, say how many there are."
        )
    return model, {"inputs": rows}, likelihood


def _code(likelihood: Any) -> str:
    """``ng.Gaussian(scale=None)``; empty where it does not print as it is written."""
    text = repr(likelihood)
    return "" if "<" in text else re.sub(r"\b([A-Z]\w*)\(", r"ng.\1(", text)


def _made(reference: str) -> nn.Module | Task:
    if ":" not in reference:
        return load_task(reference)
    function, made = call_user(reference)
    if isinstance(made, nn.Module):
        return made
    if isinstance(made, (Task, tuple)):
        return as_task(reference, function, made)
    raise ArgumentError(f"{reference} returned {type(made).__name__}; it must return a torch.nn.Module, or a task.")


def _example(given: str, batch: int, real: bool) -> Tensor:
    """A batch of the shape: without memory, or noise (token indices: zeros)."""
    match = re.fullmatch(r"(ids:)?([1-9]\d*(?:x[1-9]\d*)*)", given)
    if not match:
        raise ArgumentError(f"--input {given!r} is not the shape of an example such as 3x32x32, 784 or ids:128.")
    shape = (batch, *(int(n) for n in match[2].split("x")))
    if match[1]:
        return torch.zeros(shape, dtype=torch.long, device=None if real else "meta")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) if real else torch.empty(shape, device="meta")
