"""What ``natgrad rl`` found: frozen values that travel between the command, the page and a JSON file.

A number that was not measured, or that overflowed, is NaN here and ``null`` in JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from natgrad.errors import ArgumentError
from natgrad.tasks.results import Machine, decode, encode

FORMAT = 1
Record = Mapping[str, float]


@dataclass(frozen=True)
class Episodes:
    """Returns and lengths of the evaluation's episodes, in order; every seed's policy meets the same episodes."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(np.std(self.returns))


@dataclass(frozen=True)
class SeedRun:
    """One seed: a record per update, as :class:`natgrad.rl.Training` describes them.

    ``evaluation`` is None where the run did not reach its end; ``failure`` then says why in one line, unless it was
    interrupted.
    """

    seed: int
    records: tuple[Record, ...] = ()
    evaluation: Episodes | None = None
    failure: str | None = None

    def column(self, name: str) -> list[float]:
        """One entry of every record; NaN where a record lacks it."""
        return [float(record.get(name, math.nan)) for record in self.records]


@dataclass(frozen=True)
class Radius:
    """What an update's KL is held to: ``hard`` where it may never exceed ``value``, else it is aimed at."""

    name: str
    value: float
    hard: bool


@dataclass(frozen=True)
class Film:
    """Files of the film of one policy, beside the page, and what they show."""

    seed: int
    strip: str
    animation: str
    steps: int
    episode_return: float
    ended: bool


@dataclass(frozen=True)
class Learning:
    """Everything that ``natgrad rl`` measured.

    ``algorithm_settings`` and ``setup`` are (name, value) as text; ``film`` is None where ``no_film`` says why.
    """

    environment: str
    algorithm: str
    steps: int
    seeds: tuple[int, ...]
    runs: tuple[SeedRun, ...]
    machine: Machine
    command: str
    algorithm_settings: tuple[tuple[str, str], ...] = ()
    setup: tuple[tuple[str, str], ...] = ()
    settings_source: str = ""
    radius: Radius | None = None
    film: Film | None = None
    no_film: str = ""
    interrupted: bool = False
    format: int = field(default=FORMAT)

    def evaluated(self) -> list[SeedRun]:
        """The runs that were evaluated, the worst mean return first."""
        return sorted((r for r in self.runs if r.evaluation is not None), key=_mean_return)

    def to_json(self) -> dict[str, Any]:
        """A tree of dicts, lists, strings, numbers, booleans and None."""
        data = encode(self)
        for run, values in zip(self.runs, data["runs"], strict=True):
            values["records"] = [{name: encode(value) for name, value in record.items()} for record in run.records]
        for name in ("algorithm_settings", "setup"):
            data[name] = dict(getattr(self, name))
        return data

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON file; returns its path."""
        target = Path(path)
        target.write_text(json.dumps(self.to_json(), allow_nan=False), encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Learning:
        """Read a file that :meth:`save` wrote.

        Raises:
            ArgumentError: the file is of another kind or version, or lacks a field.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        found = data.get("format") if isinstance(data, dict) and "algorithm" in data else None
        if found != FORMAT:
            raise ArgumentError(
                f"{path} does not hold records that this version can read: its format is {found!r}, expected {FORMAT}. "
                "Give it the learning.json that `natgrad rl` wrote, or write it anew with this version."
            )
        plain = {name: value for name, value in data.items() if name in _PLAIN}
        return cls(
            **plain,
            seeds=tuple(data["seeds"]),
            runs=tuple(_run(run) for run in data["runs"]),
            machine=decode(Machine, data["machine"]),
            algorithm_settings=tuple(data["algorithm_settings"].items()),
            setup=tuple(data["setup"].items()),
            radius=None if data["radius"] is None else decode(Radius, data["radius"]),
            film=None if data["film"] is None else decode(Film, data["film"]),
        )


_PLAIN = ("environment", "algorithm", "steps", "command", "settings_source", "no_film", "interrupted")


def _run(data: Mapping[str, Any]) -> SeedRun:
    records: Sequence[Mapping[str, Any]] = data["records"]
    return SeedRun(
        data["seed"],
        tuple({n: math.nan if v is None else float(v) for n, v in record.items()} for record in records),
        None if data["evaluation"] is None else decode(Episodes, data["evaluation"]),
        data["failure"],
    )


def _mean_return(run: SeedRun) -> float:
    return run.evaluation.mean if run.evaluation is not None else -math.inf
