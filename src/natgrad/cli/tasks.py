"""``natgrad tasks``: what can be compared, and with what."""

from __future__ import annotations

import inspect

from rich.table import Table

from natgrad.cli.console import output


def tasks() -> None:
    """List the built-in tasks and the optimizers."""
    from natgrad.tasks.builtin import BUILTIN, NEEDS_DATA
    from natgrad.tasks.optimizers import DEFAULT, OPTIMIZERS

    console = output()
    table = Table(title="Tasks", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is")
    for name, build in BUILTIN.items():
        table.add_row(name, (inspect.getdoc(build) or "") + (" Needs files." if name in NEEDS_DATA else ""))
    table.add_row("module:function", "Your own: returns a natgrad.tasks.Task, or (model, likelihood, train, test).")
    console.print(table)
    console.print()
    table = Table(title="Optimizers", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("settings")
    for name, spec in OPTIMIZERS.items():
        rate = "" if spec.default_lr is None else f"; default lr {spec.default_lr:g}"
        table.add_row(name + ("*" if name in DEFAULT else ""), spec.note + rate)
    console.print(table)
    console.print("* compared when --optimizers is not given")
