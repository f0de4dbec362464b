"""The command line's root; each command lives in a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from natgrad.cli.compare import compare
from natgrad.cli.doctor import doctor
from natgrad.cli.inspect import inspect
from natgrad.cli.plan import plan
from natgrad.cli.rl import rl
from natgrad.cli.tasks import tasks

app = typer.Typer(
    name="natgrad",
    help="Natural gradient descent for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(compare)
app.command()(tasks)
app.command()(inspect)
app.command()(plan)
app.command()(rl)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        import natgrad

        typer.echo(natgrad.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Natural gradient descent for PyTorch."""
