"""``natgrad rl``: reinforcement learning on a Gymnasium environment."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from natgrad.cli.compare import check_device, check_writable, set_threads
from natgrad.cli.console import clear_errors, errors, output
from natgrad.errors import ArgumentError

if TYPE_CHECKING:
    from natgrad.cli.rl_run import Job
    from natgrad.cli.rl_settings import Chosen
    from natgrad.report.learned import Learning

INTERRUPTED, FAILED = 130, 1


def rl(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="A Gymnasium id, such as CartPole-v1.")],
    algo: Annotated[str, typer.Option("--algo", "-a", help="trpo, npg, acktr or ppo.")] = "trpo",
    steps: Annotated[int, typer.Option(help="Steps of all environments together, per seed.")] = 100_000,
    seeds: Annotated[int, typer.Option(help="Runs, each with weights, actions and episodes of its own.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/ENV-ALGO.")] = None,
    structure: Annotated[
        str | None,
        typer.Option(
            help="Of the policy's Fisher matrix: matrix-free, gram, kronecker, eigen-kronecker, dense, block-diagonal "
            "or diagonal."
        ),
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Radius of an update, nats per action.")] = None,
    environments: Annotated[int | None, typer.Option(help="Copies that act in step.")] = None,
    horizon: Annotated[int | None, typer.Option(help="Steps of each copy per update.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Discount of rewards.")] = None,
    lam: Annotated[float | None, typer.Option(help="Lambda of advantage estimation.")] = None,
    recurrent: Annotated[bool | None, typer.Option("--recurrent/--no-recurrent", help="A memory (GRU).")] = None,
    squashed: Annotated[
        bool | None, typer.Option("--squashed/--no-squashed", help="tanh of the Gaussian instead of clipping.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting: --set damping=0.05 --set critic.epochs=3"),
    ] = None,
    episodes: Annotated[int, typer.Option(help="Held-out episodes of the evaluation; 0: none.")] = 20,
    every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 10,
    mode: Annotated[str, typer.Option(help="sync: copies in this process; async: a process each.")] = "sync",
    import_code: Annotated[
        bool, typer.Option("--import-code", help="Allow ENV of the form module:id, which runs the module's code.")
    ] = False,
    tensorboard: Annotated[
        bool | None,
        typer.Option("--tensorboard/--no-tensorboard", help="Event files. Default: where it is installed."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of torch. One is best for small policies.")] = None,
) -> None:
    """Learn to act by natural gradient; evaluate, film and report.

    Each seed keeps a checkpoint. The same command goes on where it was stopped or killed, bit for bit. Ctrl-C finishes
    the present update and keeps what is done.
    """
    direct: dict[str, Any] = {
        "max_kl": max_kl, "environments": environments, "horizon": horizon, "gamma": gamma, "lam": lam,
        "recurrent": recurrent, "squashed": squashed,
    }  # fmt: skip
    with clear_errors():
        folder = out if out is not None else Path("runs") / re.sub(r"[^\w.-]+", "-", f"{environment}-{algo}")
        chosen, job = _job(
            environment, algo, steps, seeds, folder, structure, direct, set_ or [],
            episodes=episodes, every=every, mode=mode, import_code=import_code, device=device, tensorboard=tensorboard,
        )  # fmt: skip
        set_threads(threads)
        check_device(device)
        _check_environment(job)
        check_writable(folder)
        from natgrad.report import write_learning  # before training, so that a missing extra costs nothing

        learning = _run(job, chosen)
        learning.save(folder / "learning.json")  # the numbers first: they must survive whatever happens to the page
        page = write_learning(learning, folder)
    _finish(learning, page)


def _job(
    environment: str,
    algo: str,
    steps: int,
    seeds: int,
    folder: Path,
    structure: str | None,
    direct: dict[str, Any],
    assignments: list[str],
    *,
    tensorboard: bool | None,
    **rest: Any,
) -> tuple[Chosen, Job]:
    """What the options ask for; ArgumentError for what they cannot mean."""
    from natgrad.cli.rl_run import Job, tensorboard_wanted
    from natgrad.cli.rl_settings import choose

    for name, value, least in (
        ("--steps", steps, 1), ("--seeds", seeds, 1), ("--every", rest["every"], 1), ("--episodes", rest["episodes"], 0)
    ):  # fmt: skip
        if value < least:
            raise ArgumentError(f"{name} must be at least {least}, got {value}.")
    if rest["mode"] not in ("sync", "async"):
        raise ArgumentError(f"--mode must be sync or async, got {rest['mode']!r}.")
    chosen = choose(algo, environment, structure, direct, assignments)
    job = Job(
        environment, algo, chosen.algorithm, chosen.setup, steps, tuple(range(seeds)), folder,
        tensorboard=tensorboard_wanted(tensorboard), **rest,
    )  # fmt: skip
    return chosen, job


def _check_environment(job: Job) -> None:
    """Makes the environment once, so that one that cannot be learned is found before anything is written."""
    from natgrad.rl import head_for, make

    if job.import_code and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # where a user's own module is looked for
    vector = make(job.environment, 1, import_code=job.import_code)
    space = vector.single_action_space
    vector.close()
    head_for(space, squashed=job.setup.squashed)


def _run(job: Job, chosen: Chosen) -> Learning:
    import torch

    from natgrad.cli.rl_display import RLDisplay
    from natgrad.cli.rl_run import Interrupt, make_film, run_seeds
    from natgrad.cli.rl_settings import radius_of, words
    from natgrad.report.learned import Learning
    from natgrad.tasks.measure import machine_facts

    console = output()
    _announce(console, job, chosen)
    interrupt = Interrupt()
    with interrupt.listening():
        with RLDisplay(console, job.seeds, job.steps) as display:
            runs, policies = run_seeds(job, display, interrupt)
        film, no_film = None, "The run was interrupted, so there is no film yet."
        if not interrupt.wanted:
            console.print("[dim]Drawing an episode …[/]")
            film, no_film = make_film(job, runs, policies)
    return Learning(
        job.environment, job.algo, job.steps, job.seeds, tuple(runs), machine_facts(torch.device(job.device)),
        shlex.join(["natgrad", *sys.argv[1:]]), words(job.algorithm), words(job.setup), chosen.source,
        radius_of(job.algorithm), film, no_film, interrupt.wanted,
    )  # fmt: skip


def _announce(console: Console, job: Job, chosen: Chosen) -> None:
    from natgrad.cli.rl_settings import words

    several = f"{len(job.seeds)} seeds" if len(job.seeds) > 1 else "one seed"
    console.print(f"[bold]{job.algo} on {escape(job.environment)}[/]: {job.steps:,} steps, {several}, in {job.folder}")
    listed = ", ".join(f"{name} {value}" for owner in (job.algorithm, job.setup) for name, value in words(owner))
    console.print(f"[dim]Settings ({escape(chosen.source)}): {escape(listed)}[/]", soft_wrap=True)


def _finish(learning: Learning, page: Path) -> None:
    """The table, the paths and the exit code."""
    from natgrad.cli.rl_display import table

    console = output()
    if learning.runs:
        console.print(table(learning))
    if learning.no_film:
        console.print(f"No film: {escape(learning.no_film)}", soft_wrap=True)
    saved = [run.seed for run in learning.runs if (page.parent / f"seed-{run.seed}" / "policy.json").is_file()]
    if saved:
        where = ", ".join(f"seed-{seed}" for seed in saved)
        console.print(f"Policies, for natgrad.rl.load: {escape(str(page.parent))}/{where}", soft_wrap=True)
    console.print(f"Report: {escape(str(page))}", soft_wrap=True)
    if learning.interrupted:
        errors().print("Interrupted: the report holds what was done until then; the same command goes on from there.")
        raise typer.Exit(INTERRUPTED)
    failed = [run.seed for run in learning.runs if run.failure is not None]
    if failed:
        which = "Every seed" if len(failed) == len(learning.runs) else f"Seed {', '.join(map(str, failed))}"
        errors().print(f"{which} failed; the reasons are above.")
        raise typer.Exit(FAILED)
