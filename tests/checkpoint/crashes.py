"""Children that save and are killed, or fail at a chosen call of the operating system."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import natgrad as ng

CALLS = ("open", "link", "replace", "fsync", "unlink", "chmod")
"""What a save asks of the operating system, beside the writing itself."""


class Numbers(nn.Module):
    """A model whose every entry is the number of its generation."""

    def __init__(self, size: int = 100_000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def become(self, generation: int) -> Numbers:
        with torch.no_grad():
            self.weight.fill_(generation)
        return self

    def generation(self) -> int:
        """Its generation; an AssertionError where it is a mixture of several."""
        first = self.weight[0]
        assert bool((self.weight == first).all())
        return int(first)


def save_generation(path: Path, generation: int) -> None:
    ng.save(path, Numbers(50).become(generation), generation=generation)


def loaded_generation(path: Path) -> int:
    model = Numbers(50)
    extras = ng.load(path, model)
    assert extras == {"generation": model.generation()}
    return model.generation()


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a child of this process, without importing anything again; its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns if there are threads
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Of a child, when it has ended; negative numbers are signals."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def failing_at(call: int, failure: Callable[[str], None]) -> Iterator[list[str]]:
    """``failure(name)`` in place of the ``call``-th call of the operating system; gives the names of the calls made."""
    made: list[str] = []
    originals = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable:
        def function(*args, **kwargs):
            made.append(name)
            if len(made) == call:
                failure(name)
            return originals[name](*args, **kwargs)

        return function

    try:
        for name in CALLS:
            setattr(os, name, wrapped(name))
        yield made
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
