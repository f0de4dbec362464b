"""``natgrad compare``: the main job."""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from natgrad.cli.console import clear_errors, errors, output
from natgrad.errors import ArgumentError

if TYPE_CHECKING:
    from natgrad.tasks.compare import Plan
    from natgrad.tasks.results import Comparison

INTERRUPTED, ALL_FAILED = 130, 1
_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0}


def compare(
    task: Annotated[str, typer.Argument(help="A built-in task (see `natgrad tasks`), or your own as module:function.")],
    optimizers: Annotated[
        str | None, typer.Option("--optimizers", "-o", help="Names, separated by commas. Default: see `natgrad tasks`.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs per optimizer, each with its own weights and data order.")] = 3,
    budget: Annotated[
        str | None, typer.Option(help="Training time of one run: 60s, 2m, … Default 10s. Evaluation is not counted.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of one run, instead of --budget.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try the same grid for every optimizer first: six full runs each.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of the files that mnist and fashion-mnist read.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. Default: runs/TASK.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch. One is best for small models. Default: torch's own choice.")
    ] = None,
) -> None:
    """Train one task with several optimizers under equal conditions, and write a report.

    Nothing is tuned unless you say --tune; then every optimizer gets the same grid. Ctrl-C keeps what is done.
    """
    with clear_errors():
        plan = make_plan(optimizers, seeds, budget, steps, tune)
        folder = out if out is not None else Path("runs") / re.sub(r"[^\w.-]+", "-", task)
        set_threads(threads)
        check_device(device)
        check_writable(folder)
        from natgrad.report import write_comparison  # before training, so that a missing extra costs nothing

        comparison = _run(task, data, plan, device)
        # The numbers first: they must survive whatever happens to the page.
        comparison.save(folder / "comparison.json")
        page = write_comparison(comparison, folder)
    _finish(comparison, page)


def make_plan(optimizers: str | None, seeds: int, budget: str | None, steps: int | None, tune: bool) -> Plan:
    """The plan of the options; ArgumentError for what they cannot mean."""
    from natgrad.tasks.compare import DEFAULT_LIMIT, Plan
    from natgrad.tasks.optimizers import DEFAULT
    from natgrad.tasks.train import Limit

    if budget is not None and steps is not None:
        raise ArgumentError("Give either --budget or --steps, not both.")
    if seeds < 1:
        raise ArgumentError(f"--seeds must be at least 1, got {seeds}.")
    names = DEFAULT if optimizers is None else tuple(name.strip() for name in optimizers.split(",") if name.strip())
    limit = DEFAULT_LIMIT
    if budget is not None:
        limit = Limit(seconds=parse_seconds(budget))
    elif steps is not None:
        limit = Limit(steps=steps)
    command = shlex.join(["natgrad", *sys.argv[1:]])
    return Plan(names, tuple(range(seeds)), limit, limit if tune else None, command=command)


def parse_seconds(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``1.5m``, ``2min``, ``1h`` or ``500ms``; ArgumentError for anything else."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ArgumentError(f"--budget {text!r} is not a time; write for example 60s, 2m or 1h.")
    return float(match[1]) * _UNITS[match[2]]


def set_threads(threads: int | None) -> None:
    """Sets torch's threads for this process; None leaves them."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise ArgumentError(f"--threads must be at least 1, got {threads}.")
    torch.set_num_threads(threads)


def check_device(device: str) -> None:
    """ArgumentError unless torch can use the device."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def check_writable(folder: Path) -> None:
    """Makes the folder and writes a file into it, so that an hour of training does not end in an error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(
            f"The report cannot be written to {folder}: {error.strerror or error}. Name another folder with --out."
        ) from error


def _run(name: str, data: Path | None, plan: Plan, device: str) -> Comparison:
    from natgrad.cli.display import Display
    from natgrad.tasks.compare import compare as run_comparison
    from natgrad.tasks.registry import load_task

    console = output()
    task = load_task(name, data)
    console.print(f"[bold]{escape(task.name)}[/]: {escape(task.description)}")
    with Display(console, plan) as display:
        return run_comparison(task, plan, device=device, on_progress=display.progress, on_run=display.run_done)


def _finish(comparison: Comparison, page: Path) -> None:
    """The table, the failures, the report's path and the exit code."""
    from natgrad.cli.display import failures, table

    console = output()
    if comparison.runs:
        console.print(table(comparison, console.width))
    if any(info.knob == "max_kl" for info in comparison.optimizers):
        console.print(
            "max_kl: KL of a step in nats per prediction, measured by trust-region, else predicted; lr: learning rate."
        )
    if comparison.settings.tuning is not None:
        factors = ", ".join(f"{factor:g}" for factor in comparison.settings.tuning.factors)
        console.print(f"† the best of the default setting times {factors}, in full runs on the first seed.")
    for line in failures(comparison):
        console.print(line, soft_wrap=True)
    if comparison.target is not None:
        target = comparison.target
        console.print(f"Target: training loss {target.train_loss:.5g} ({escape(target.source)}).")
    console.print(f"Report: {escape(str(page))}", soft_wrap=True)
    if comparison.interrupted:
        errors().print("Interrupted: the table and the report hold what was done until then.")
        raise typer.Exit(INTERRUPTED)
    if comparison.runs and all(run.failure is not None for run in comparison.runs):
        errors().print("Every run failed; the reasons are above.")
        raise typer.Exit(ALL_FAILED)
