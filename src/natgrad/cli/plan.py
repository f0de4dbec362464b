"""``natgrad plan``: memory and step time of every structure, before running any."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from natgrad.cli.console import clear_errors, output
from natgrad.cli.inspect import AsJson, Batch, Input, Meta, Model, Tokens
from natgrad.errors import ArgumentError

if TYPE_CHECKING:
    from natgrad.planning import Choice, Plan

_NO_STRUCTURE = 1
_LEGEND = (
    "statistics, inverses: renewed every so many steps; of 1/16: from that part of the rows; spread: a share at every "
    "step. transient: bytes held during a step beyond state, gradients and what autograd holds. × SGD: mean step. "
    "p99: slowest steps over the median."
)


def plan(
    model: Model,
    batch: Batch = None,
    tokens: Tokens = None,
    given: Input = None,
    max_overhead: Annotated[
        str | None, typer.Option(help="Mean time of a step beyond SGD's: 10% or 0.1.", metavar="SHARE")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Optimizer state: 4GB, 512MiB, or 2x-adam.", metavar="SIZE")
    ] = None,
    max_p99: Annotated[
        float | None,
        typer.Option(help="Slowest steps (99th percentile) over the median step: 1.3 asks for even steps."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Device profile; measured and written there if it does not exist.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch. Default: torch's own choice.")] = None,
    meta: Meta = False,
    as_json: AsJson = False,
) -> None:
    """Predict memory and step time of every structure, and recommend one with its intervals.

    State is exact; times come from operation counts and a profile of this device, which is measured once (3 s) and
    cached. With --meta a model far larger than this machine's memory is planned. Exit code 1: no structure keeps the
    limits.
    """
    with clear_errors():
        import natgrad.planning
        from natgrad.cli.compare import set_threads
        from natgrad.cli.models import load_model

        overhead = None if max_overhead is None else share(max_overhead)
        set_threads(threads)
        made, seen, likelihood = load_model(model, batch, tokens, given, meta)
        found = natgrad.planning.plan(
            made, **seen, max_overhead=overhead, max_memory=max_memory, max_p99=max_p99, profile=profile
        )
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        _show(model, found, likelihood)
    if found.best is None:
        raise typer.Exit(_NO_STRUCTURE)


def share(text: str) -> float:
    """``10%`` or ``0.1``.

    Raises:
        ArgumentError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    if not match or float(match[1]) == 0:
        raise ArgumentError(f"--max-overhead {text!r} is no share above 0, such as 10% or 0.1.")
    return float(match[1]) / (100 if match[2] else 1)


def _show(name: str, found: Plan, likelihood: str) -> None:
    from natgrad.planning.sizes import size_text

    console = output()
    tokens = f" × {found.tokens} positions" if found.tokens > 1 else ""
    head = f"[bold]{escape(name)}[/] ({escape(found.model)}): {found.parameters:,} parameters"
    console.print(f"{head}, batch {found.batch}{tokens}", soft_wrap=True)
    console.print(
        f"SGD: {seconds_text(found.sgd)} a step on {escape(found.device)}; Adam's state: {size_text(found.adam)}",
        soft_wrap=True,
    )
    console.print()
    console.print(_table(found))
    if found.recommended:
        console.print("[green]*[/] recommended")
    for choice in found.choices:
        if choice.problem:
            console.print(f"[dim]{choice.name}: {escape(choice.problem)}[/]", soft_wrap=True)
    console.print(f"[dim]{_LEGEND}[/]", soft_wrap=True)
    if not found.seen:
        console.print(
            "[dim]Every layer counts batch × tokens rows; products of attention are not counted. --input runs the "
            "model.[/]",
            soft_wrap=True,
        )
    console.print()
    console.print(escape(found.reason), soft_wrap=True)
    used = found.best or found[found.nearest or found.choices[0].name]
    console.print()
    console.print(escape(program(used, likelihood)), soft_wrap=True, highlight=False)


def _table(found: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("structure", style="bold", no_wrap=True)
    table.add_column("search", no_wrap=True)
    for column in ("statistics", "inverses", "state", "transient", "× SGD", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for choice in found.choices:
        mark = " [green]*[/]" if choice.name == found.recommended else ""
        table.add_row(choice.name + mark, *_numbers(choice), style="dim" if choice.problem else "")
    return table


def _numbers(choice: Choice) -> tuple[str, ...]:
    from natgrad.planning.choice import SPREAD
    from natgrad.planning.sizes import size_text

    if not math.isfinite(choice.ratio):
        return ("–",) * 7
    part = "" if choice.fraction == 1 else f" of {choice.part}"
    spread = " spread" if choice.refresh == SPREAD else ""
    return (
        choice.search, f"{choice.statistics}{part}", f"{choice.inverse}{spread}", size_text(choice.state),
        size_text(choice.transient), f"{choice.ratio:.2f}", f"{choice.p99:.2f}",
    )  # fmt: skip


def program(choice: Choice, likelihood: str) -> str:
    """What to write to use the choice with ``model``; ``likelihood``: its code, or nothing where it is not known."""
    told = likelihood or "ng.Categorical()  # what the model's output means: or ng.Bernoulli(), ng.Gaussian(), …"
    return f"import natgrad as ng\n\nlikelihood = {told}\noptimizer = {choice.code}"


def seconds_text(seconds: float) -> str:
    """``12.3 ms``, ``4.56 s``, ``2.5 h``."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 3600:,.3g} h" if seconds < 3.6e6 else f"{seconds / 3600:,.0f} h"
