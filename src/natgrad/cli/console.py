"""Where the commands write, and how errors end them: one line on stderr and exit code 2, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from natgrad.errors import NatgradError

BAD_INPUT = 2
_WIDTH_OF_FILES = 140  # a pipe or a log has no width; tables should not be squeezed into 80 columns


def output() -> Console:
    """stdout, made anew on every call so that redirections hold."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_FILES)


def errors() -> Console:
    """stderr."""
    return Console(stderr=True, highlight=False)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns a NatgradError into one line on stderr and exit code 2."""
    try:
        yield
    except NatgradError as error:
        errors().print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from error
