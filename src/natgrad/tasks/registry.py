"""From a name on the command line to a Task: the built-in ones, and the user's own as ``module:function``."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from natgrad.errors import ArgumentError
from natgrad.tasks.builtin import BUILTIN, NEEDS_DATA
from natgrad.tasks.task import Task


def load_task(name: str, data: str | Path | None = None) -> Task:
    """The task of that name; ``data`` is the folder that some tasks read their files from.

    Raises ArgumentError for an unknown name, missing files, or a user's function that fails or does not return a task.
    """
    if ":" in name:
        return load_user_task(name)
    if name not in BUILTIN:
        raise ArgumentError(
            f"There is no task {name!r}{close_matches(name, BUILTIN)}. "
            "`natgrad tasks` lists the built-in ones; your own is module:function."
        )
    if name in NEEDS_DATA:
        return BUILTIN[name](None if data is None else Path(data))
    if data is not None:
        raise ArgumentError(f"The task {name!r} reads no files; leave --data out ({', '.join(sorted(NEEDS_DATA))} do).")
    return BUILTIN[name]()


def load_user_task(reference: str) -> Task:
    """The task that ``module:function`` returns, with the current folder on the import path.

    The function takes no arguments and returns a Task, or (model, likelihood, train, test) where model is a module
    (every seed then starts from its weights) or a function seed -> module, and train and test are (inputs, targets).
    """
    return as_task(reference, *call_user(reference))


def call_user(reference: str) -> tuple[Any, Any]:
    """The user's function, and what it returns without arguments; ``file.py:function`` is one of a file."""
    module_name, _, function_name = reference.partition(":")
    function = _find(reference, module_name, function_name)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ArgumentError(f"{reference} must be callable without arguments: {error}.") from error
    except ValueError:  # some built-in callables have no signature; calling tells
        pass
    try:
        return function, function()
    except Exception as error:  # the user's code may raise anything
        detail = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {detail}" if detail else type(error).__name__
        raise ArgumentError(f"{reference} failed{_line_of(error)}: {reason}") from error


def as_task(reference: str, function: Any, made: Any) -> Task:
    """What a user's function returned, as a task."""
    if isinstance(made, Task):
        return made
    if not isinstance(made, tuple) or len(made) != 4:
        found = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise ArgumentError(
            f"{reference} returned {found}; it must return a natgrad.tasks.Task or the four values "
            "(model, likelihood, train, test)."
        )
    model, likelihood, train, test = made
    for method in ("nll", "kl", "weights"):
        if not callable(getattr(likelihood, method, None)):
            raise ArgumentError(
                f"{reference}: the second value must be a natgrad likelihood such as natgrad.Categorical(), "
                f"got {type(likelihood).__name__}."
            )
    description = (inspect.getdoc(function) or f"The task of {reference}.").split("\n\n")[0].replace("\n", " ")
    return Task(reference, description, _factory(reference, model), likelihood, train, test)


def _line_of(error: BaseException) -> str:
    """` at line 7 of file.py`, the innermost place in the traceback; empty when there is none below the caller."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    return f" at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""


def close_matches(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'kfac' or 'ekfac'?)` or an empty string."""
    matches = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


def _find(reference: str, module_name: str, function_name: str) -> Any:
    if not module_name or not function_name:
        raise ArgumentError(
            f"{reference!r} is not module:function, e.g. mymodule:task for `def task()` in mymodule.py."
        )
    here = os.getcwd()
    if module_name.endswith(".py"):
        path = Path(module_name)
        if not path.is_file():
            raise ArgumentError(f"There is no file {module_name!r} in {here}.")
        here, module_name = str(path.resolve().parent), path.stem
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ArgumentError(f"{module_name} needs the module {error.name!r}, which is not installed.") from error
        raise ArgumentError(
            f"There is no module {module_name!r} in {here} or among the installed packages; give its name without .py."
        ) from error
    except Exception as error:
        raise ArgumentError(f"Importing {module_name} failed with {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "is not a function" if function is not None else "does not exist"
        raise ArgumentError(f"{function_name!r} in {module_name} {what}{close_matches(function_name, names)}.")
    return function


def _factory(reference: str, model: Any) -> Any:
    # A module is callable too, so the order of the tests matters.
    if isinstance(model, nn.Module):
        return lambda seed: copy.deepcopy(model)
    if callable(model):
        return model
    raise ArgumentError(
        f"{reference}: the first value must be a torch.nn.Module or a function seed -> module, "
        f"got {type(model).__name__}."
    )
