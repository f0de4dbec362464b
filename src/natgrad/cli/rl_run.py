"""The work of `natgrad rl`: train, evaluate and save each seed, and film one of the policies."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from natgrad import rl
from natgrad.cli.rl_display import RLDisplay
from natgrad.errors import ArgumentError, MissingExtraError, NatgradError, SnapshotError, UnsupportedError
from natgrad.report.learned import Episodes, Film, SeedRun
from natgrad.rl import Algorithm, Policy, Setup, Training
from natgrad.rl.render import MOVIE_FRAMES, film, save_animation, save_strip

STRIP, ANIMATION = "film.png", "film.webp"
FILM_STEPS = 1000


@dataclass(frozen=True)
class Job:
    """What is the same for all seeds."""

    environment: str
    algo: str
    algorithm: Algorithm
    setup: Setup
    steps: int
    seeds: tuple[int, ...]
    folder: Path
    every: int
    episodes: int
    mode: Literal["sync", "async"]
    import_code: bool
    device: str
    tensorboard: bool

    def folder_of(self, seed: int) -> Path:
        """Where a seed keeps its checkpoint, policy and events."""
        return self.folder / f"seed-{seed}"


class Interrupt:
    """Ctrl-C: the first lets the present update end, so that a checkpoint can be written; the second does not wait."""

    def __init__(self) -> None:
        self.wanted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT meanwhile."""

        def heard(_number: int, _frame: FrameType | None) -> None:
            if self.wanted:
                raise KeyboardInterrupt
            self.wanted = True

        before = signal.signal(signal.SIGINT, heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def run_seeds(job: Job, display: RLDisplay, interrupt: Interrupt) -> tuple[list[SeedRun], dict[int, Policy]]:
    """All seeds in turn, until done or interrupted: their records, and the policies of those that ended well."""
    runs: list[SeedRun] = []
    policies: dict[int, Policy] = {}
    try:
        for seed in job.seeds:
            if interrupt.wanted:
                break
            runs.append(SeedRun(seed))
            runs[-1] = _run_seed(job, seed, display, interrupt, policies)
            display.done(runs[-1])
    except KeyboardInterrupt:
        interrupt.wanted = True
    return [run for run in runs if run.records or run.failure], policies


def _run_seed(job: Job, seed: int, display: RLDisplay, interrupt: Interrupt, policies: dict[int, Policy]) -> SeedRun:
    try:
        training = Training(
            job.environment,
            job.algorithm,
            steps=job.steps,
            setup=job.setup,
            seed=seed,
            folder=job.folder_of(seed),
            every=job.every,
            mode=job.mode,
            import_code=job.import_code,
            device=job.device,
        )
    except (ArgumentError, SnapshotError, UnsupportedError):
        raise  # these are of the command, not of the seed
    except NatgradError as error:
        return SeedRun(seed, failure=str(error))
    display.begin(seed, training.history[-1] if training.history else None, training.resumed)
    failure, evaluation = None, None
    with _events(job, seed, training) as log:
        try:
            for record in training:
                display.progress(seed, record)
                log(record)
                if interrupt.wanted and training.taken < job.steps:
                    training.save()
                    training.close()
                    break
        except KeyboardInterrupt:  # in the midst of an update: what is kept is the last checkpoint
            interrupt.wanted = True
            return SeedRun(seed, tuple(training.history))
        except NatgradError as error:
            failure = str(error)
        if failure is None:
            about = {"environment": job.environment, "algorithm": job.algo, "steps": training.taken, "seed": seed}
            rl.save(training.policy, job.folder_of(seed), **about)
            if training.taken >= job.steps:
                policies[seed] = training.policy
                evaluation, failure = _evaluate(job, training.policy)
        if evaluation is not None:
            log({"steps": training.taken, "evaluation": evaluation.mean})
    return SeedRun(seed, tuple(training.history), evaluation, failure)


def _evaluate(job: Job, policy: Policy) -> tuple[Episodes | None, str | None]:
    """The evaluation, or why there is none; every seed's policy meets the same episodes."""
    if job.episodes == 0:
        return None, None
    try:
        found = rl.evaluate(policy, job.environment, episodes=job.episodes, import_code=job.import_code)
    except NatgradError as error:
        return None, f"The evaluation failed: {error}"
    return Episodes(found.returns, found.lengths), None


# TensorBoard


def tensorboard_wanted(asked: bool | None) -> bool:
    """Whether event files are written: as asked, or where TensorBoard is installed."""
    there = importlib.util.find_spec("tensorboard") is not None
    if asked and not there:
        raise MissingExtraError("--tensorboard needs TensorBoard: pip install tensorboard.")
    return there if asked is None else asked


@contextmanager
def _events(job: Job, seed: int, training: Training) -> Iterator[Any]:
    """A function that takes a record to the seed's event file, which first gets those of the checkpoint."""
    if not job.tensorboard:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = job.folder_of(seed)
    for old in folder.glob("events.out.tfevents.*"):  # updates after the checkpoint are made again
        old.unlink()
    writer = SummaryWriter(str(folder))

    def log(record: Mapping[str, float]) -> None:
        for name, value in record.items():
            if name != "steps" and math.isfinite(value):
                writer.add_scalar(f"{job.algo}/{name}", value, int(record["steps"]))

    try:
        for record in training.history:
            log(record)
        yield log
    finally:
        writer.close()


# Film


def make_film(job: Job, runs: list[SeedRun], policies: Mapping[int, Policy]) -> tuple[Film | None, str]:
    """The film of the median seed's policy and its files, or why there is none."""
    for old in (STRIP, ANIMATION):
        (job.folder / old).unlink(missing_ok=True)
    ended = [run for run in runs if run.seed in policies]
    if not ended:
        return None, "No seed reached its end, so there is no film."
    ended.sort(key=lambda run: -math.inf if run.evaluation is None else run.evaluation.mean)
    chosen = ended[(len(ended) - 1) // 2]
    length = FILM_STEPS if chosen.evaluation is None else min(chosen.evaluation.lengths[0], FILM_STEPS)
    try:
        with _without_a_screen():
            found = film(
                policies[chosen.seed],
                job.environment,
                limit=FILM_STEPS,
                every=max(1, length // MOVIE_FRAMES),
                import_code=job.import_code,
            )
        save_strip(found, job.folder / STRIP)
        save_animation(found, job.folder / ANIMATION)
    except NatgradError as error:
        return None, str(error)
    return Film(chosen.seed, STRIP, ANIMATION, found.steps, found.episode_return, found.ended), ""


@contextmanager
def _without_a_screen() -> Iterator[None]:
    """Lets pygame draw silently, and MuJoCo through EGL where there is no display, unless the user says otherwise."""
    wanted = {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        wanted["MUJOCO_GL"] = "egl"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
