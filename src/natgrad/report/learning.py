"""The report of ``natgrad rl``: one HTML file without outside resources, and a JSON file of every record."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from natgrad.report import learning_pictures, page, series, theme
from natgrad.report.learned import Episodes, Learning, SeedRun
from natgrad.report.learning_pictures import kl_sentence, refused
from natgrad.report.svg import grouped, number

HTML_NAME, JSON_NAME = "report.html", "learning.json"
EMBEDDED = 4_000_000  # bytes; a larger animation stays beside the page


def write_learning(learning: Learning, out_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``learning.json`` into ``out_dir``, where the film's files are; returns the page.

    Raises:
        MissingExtraError: without the ``report`` extra.
        ArgumentError: the folder cannot be written.
    """
    folder = Path(out_dir)
    text = render(learning, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        learning.save(folder / JSON_NAME)
    except OSError as error:
        raise page.unwritable(folder, error) from error
    return page.write(text, folder, HTML_NAME)


def render(learning: Learning, folder: Path) -> str:
    """The page as text; the film's files are read from ``folder``."""
    film = learning.film
    look = theme.styles([learning.algorithm])[learning.algorithm]
    return (
        page.environment()
        .get_template("learning.html.j2")
        .render(
            learning=learning,
            css=theme.variables() + theme.drawing_css(),
            key=page.key(look),
            summary=summary(learning),
            columns=COLUMNS,
            rows=rows(learning),
            figures=learning_pictures.pictures(learning),
            film_words="" if film is None else film_sentence(learning),
            strip="" if film is None else _embedded(folder / film.strip),
            animation="" if film is None else _embedded(folder / film.animation),
            failures=[run for run in learning.runs if run.failure],
            facts=facts(learning),
            json_name=JSON_NAME,
        )
    )


def _embedded(path: Path) -> str:
    """The file as a data URI; empty where it is missing or too large."""
    if not path.is_file() or path.stat().st_size > EMBEDDED:
        return ""
    return f"data:image/{path.suffix[1:].lower()};base64,{base64.b64encode(path.read_bytes()).decode()}"


def summary(learning: Learning) -> list[str]:
    """What was reached, whether the radius held, and what failed."""
    kl = series.finite([v for run in learning.runs for v in run.column("kl")])
    found = [_reached(learning)]
    if len(kl) and learning.radius is not None:
        found.append(kl_sentence(kl, learning.radius.value, learning.radius.hard))
    failed = [run for run in learning.runs if run.failure]
    if failed:
        found.append(f"{len(failed)} of {len(learning.seeds)} seeds failed; the reasons are below.")
    if len(learning.seeds) == 1:
        found.append("There is one seed only: another may do much better or worse.")
    if learning.interrupted:
        found.append("The run was interrupted; the same command goes on where it stopped.")
    return found


def _reached(learning: Learning) -> str:
    evaluated = learning.evaluated()
    if not evaluated:
        return "No seed was evaluated."
    means = [run.evaluation.mean for run in evaluated if run.evaluation is not None]
    first = evaluated[0].evaluation
    episodes = len(first.returns) if first is not None else 0
    steps = grouped(max(int(run.column("steps")[-1]) for run in evaluated))
    played = f"{episodes} episodes" if episodes > 1 else "one episode"
    how = f"over {played} that training never saw, taking the most probable action"
    if len(means) == 1:
        return f"After {steps} steps the policy of seed {evaluated[0].seed} returns {number(means[0])} {how}."
    if number(min(means)) == number(max(means)):
        return f"After {steps} steps all {len(means)} seeds return {number(means[0])}, each {how}."
    return (
        f"After {steps} steps the median of {len(means)} seeds returns {number(float(np.median(means)))} "
        f"({number(min(means))} to {number(max(means))}), each {how}."
    )


@dataclass(frozen=True)
class Column:
    """A column of the evaluation table, with its tooltip."""

    label: str
    help: str


COLUMNS = (
    Column("return", "Mean of the evaluation's episodes ± their standard deviation"),
    Column("median", "Median of the evaluation's episodes"),
    Column("worst", "Worst episode of the evaluation"),
    Column("best", "Best episode of the evaluation"),
    Column("length", "Mean length of the evaluation's episodes"),
    Column("while learning", "Mean return of the last 20 episodes of training, with sampled actions"),
    Column("steps", "Steps of all environments together"),
    Column("updates", "Updates of the policy"),
    Column("largest KL", "Largest measured KL(old ‖ new) of an update, nats per action"),
    Column("refused", "Updates that were refused, or of which a step was taken back"),
    Column("steps/s", "Steps per second of acting and learning together"),
)


def rows(learning: Learning) -> list[tuple[str, list[str]]]:
    """(name, cells in the order of COLUMNS) of every seed, and of their median when there are several."""
    found = [(f"seed {run.seed}", _row(run)) for run in learning.runs]
    evaluated = [run.evaluation for run in learning.evaluated() if run.evaluation is not None]
    if len(evaluated) > 1:
        found.append(("median of seeds", _median(evaluated)))
    return found


def _row(run: SeedRun) -> list[str]:
    evaluation, last = run.evaluation, run.records[-1] if run.records else {}
    played = ["–"] * 5
    if evaluation is not None:
        played = [f"{number(evaluation.mean, 4)} ± {number(evaluation.std, 3)}", *_spread(evaluation)]
    kl = series.finite(run.column("kl"))
    seconds = last.get("seconds", math.nan)
    return [
        *played,
        number(last.get("return"), 4),
        grouped(int(last.get("steps", 0))),
        grouped(len(run.records)),
        number(float(kl.max())) if len(kl) else "–",
        grouped(int(sum(map(refused, run.records)))),
        grouped(round(last["steps"] / seconds)) if seconds > 0 else "–",
    ]


def _spread(evaluation: Episodes) -> list[str]:
    returns = evaluation.returns
    values = (float(np.median(returns)), min(returns), max(returns), float(np.mean(evaluation.lengths)))
    return [number(value, 4) for value in values]


def _median(evaluated: Sequence[Episodes]) -> list[str]:
    def over(values: list[float]) -> str:
        return number(float(np.median(values)), 4)

    return [
        over([e.mean for e in evaluated]),
        over([float(np.median(e.returns)) for e in evaluated]),
        over([min(e.returns) for e in evaluated]),
        over([max(e.returns) for e in evaluated]),
        over([float(np.mean(e.lengths)) for e in evaluated]),
        *[""] * (len(COLUMNS) - 5),
    ]


def film_sentence(learning: Learning) -> str:
    """What the strip of frames shows."""
    film = learning.film
    if film is None:
        return learning.no_film
    seeds = len(learning.evaluated())
    which = f"seed {film.seed}, the median of the evaluations" if seeds > 1 else f"seed {film.seed}"
    end = "the episode ended" if film.ended else "the film stops, but the episode goes on"
    return (
        f"The final policy of {which}, in the first episode of the evaluation: after {grouped(film.steps)} steps {end} "
        f"with a return of {number(film.episode_return, 4)}."
    )


def facts(learning: Learning) -> list[tuple[str, list[tuple[str, str]]]]:
    """Run, settings, set-up and machine as titled lists of (name, value)."""
    radius = learning.radius
    held = "no bound on the KL"
    if radius is not None:
        held = f"{radius.name} {radius.value:g} ({'never exceeded' if radius.hard else 'aimed at'})"
    return [
        (
            "Run",
            [
                ("environment", learning.environment),
                ("algorithm", learning.algorithm),
                ("steps per seed", grouped(learning.steps)),
                ("seeds", ", ".join(map(str, learning.seeds))),
                ("radius of an update", held),
                ("settings", learning.settings_source),
            ],
        ),
        (learning.algorithm.upper(), list(learning.algorithm_settings)),
        ("Acting and networks", list(learning.setup)),
        ("Machine", page.machine_facts(learning.machine)),
    ]
