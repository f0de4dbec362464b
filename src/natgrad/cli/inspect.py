"""``natgrad inspect``: what an optimizer would do with each layer of a model, why, and at what cost."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from natgrad.cli.console import clear_errors, errors, output

if TYPE_CHECKING:
    from natgrad.planning import Inspection, LayerRow

NOT_COVERED = 1
_MANY = 40  # layers beyond which equal ones of a stack are shown as one
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

Model = Annotated[
    str,
    typer.Argument(help="module:function, module:Class or file.py:function that makes the model; or a built-in task."),
]
Batch = Annotated[int | None, typer.Option(help="Examples of a batch. Default: the task's, or 1.")]
Tokens = Annotated[int | None, typer.Option(help="Positions of each example that share weights. Default: 1.")]
Input = Annotated[
    str | None, typer.Option("--input", help="Shape of one example, 3x32x32, or ids:128 for token indices.")
]
Meta = Annotated[bool, typer.Option("--meta", help="Build the model without memory, under torch.device('meta').")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def inspect(
    model: Model,
    structure: Annotated[
        str, typer.Option("--structure", "-s", help="kfac, ekfac, diagonal, block, gram, dense or matrix-free.")
    ] = "kfac",
    batch: Batch = None,
    tokens: Tokens = None,
    given: Input = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 where a layer has no rule of its own.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="A line for every layer, also of long stacks.")] = False,
    meta: Meta = False,
    as_json: AsJson = False,
) -> None:
    """Show what every layer of a model gets, why, and what it costs.

    With a task's data, or --input, the layers are found by running the model once; a model with memory is then also
    compared with autograd, which finds weights that are used past their module.
    """
    with clear_errors():
        import natgrad.planning
        from natgrad.cli.models import load_model
        from natgrad.planning.methods import method_of

        method_of(structure)  # before the model, which may take long
        made, seen, _ = load_model(model, batch, tokens, given, meta, real=True)
        found = natgrad.planning.inspect(made, structure, **seen)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        _show(model, found, every)
    if strict and found.uncovered:
        names = "; ".join(f"{row.name} ({row.reason})" for row in found.uncovered)
        errors().print(f"[bold red]Not covered:[/] {escape(names)}", soft_wrap=True)
        raise typer.Exit(NOT_COVERED)


def _show(name: str, found: Inspection, every: bool) -> None:
    console = output()
    where = f"{found.structure}, batch of {found.batch}" + (f", {found.tokens} positions" if found.tokens > 1 else "")
    table = Table(
        title=escape(f"{name} ({found.model}): {where}"), title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("layer", style="bold", no_wrap=True, overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("gets", no_wrap=True)
    table.add_column("factors")
    for column in ("parameters", "rows", "state", "statistics", "refresh", "apply"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = [(row, 1) for row in found.layers] if every or len(found.layers) <= _MANY else stacked(found.layers)
    for row, count in shown:
        times = f" [dim]({count})[/]" if count > 1 else ""
        table.add_row(escape(row.name) + times, escape(row.type), _treatment(row), row.factors, *_numbers(row))
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for row, _ in shown:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.name)
    for reason, names in reasons.items():
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        console.print(f"  [dim]{escape(some)}: {escape(reason)}[/]", soft_wrap=True)
    console.print(_totals(found), soft_wrap=True)


def _treatment(row: LayerRow) -> str:
    return row.treatment if row.covered else f"[yellow]{row.treatment}[/]"


def _numbers(row: LayerRow) -> tuple[str, ...]:
    from natgrad.planning.sizes import size_text

    work = (row.statistics, row.refresh, row.application)
    return f"{row.parameters:,}", f"{row.rows:,}", size_text(row.state), *(flops_text(f) for f in work)


def _totals(found: Inspection) -> str:
    from natgrad.planning.sizes import size_text

    work = [sum(getattr(row, kind) for row in found.layers) for kind in ("statistics", "refresh", "application")]
    text = (
        f"{found.parameters:,} parameters in {len(found.layers)} layers; {size_text(found.state)} of curvature; "
        f"statistics {flops_text(work[0])}, refresh {flops_text(work[1])}, application {flops_text(work[2])}."
    )
    if found.frozen:
        text += f" {found.frozen:,} parameters are frozen."
    if found.uncovered:
        text += f" [yellow]{len(found.uncovered)} without a layer rule.[/]"
    if not found.seen:
        text += " [dim]Rows: batch × tokens for every layer; --input runs the model.[/]"
    return text


def stacked(rows: tuple[LayerRow, ...]) -> list[tuple[LayerRow, int]]:
    """Rows that differ in a number of their names alone, as one with a star in its place, and how many they are."""
    found: dict[LayerRow, list[LayerRow]] = {}
    for row in rows:
        found.setdefault(replace(row, name=_NUMBER.sub("*", row.name, count=1)), []).append(row)
    return [(like if len(same) > 1 else same[0], len(same)) for like, same in found.items()]


def flops_text(count: float) -> str:
    """``3.2 GF``: operations."""
    for unit in ("F", "kF", "MF", "GF", "TF"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count else "0"
        count /= 1000
    return f"{count:.3g} PF"
