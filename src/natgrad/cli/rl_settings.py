"""From the options of `natgrad rl` to an algorithm and a set-up, and back to words."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import natgrad as ng
from natgrad.errors import ArgumentError
from natgrad.report.learned import Radius
from natgrad.rl import Algorithm, Setup
from natgrad.rl.presets import DEFAULTS, settings_for

STRUCTURES = {
    "matrix-free": ng.MatrixFree,
    "gram": ng.Gram,
    "kronecker": ng.Kronecker,
    "eigen-kronecker": ng.EigenKronecker,
    "dense": ng.Dense,
    "block-diagonal": ng.BlockDiagonal,
    "diagonal": ng.Diagonal,
}
_WORDS = {"none": None, "true": True, "false": False, "inf": math.inf}


@dataclass(frozen=True)
class Chosen:
    """What the options came to, and where it is from."""

    algorithm: Algorithm
    setup: Setup
    source: str


def choose(
    algo: str, environment: str, structure: str | None, direct: Mapping[str, Any], assignments: Sequence[str]
) -> Chosen:
    """The settings of ``algo`` for ``environment``, with the options in their place.

    Args:
        algo: one of natgrad.rl.presets.DEFAULTS.
        environment: an id.
        structure: one of STRUCTURES, or None for that of the settings.
        direct: fields of the set-up or the algorithm that options of their own give; None where one was not given.
        assignments: ``name=value`` of any other plain field; ``critic.name=value`` for those of the critic's fit.

    Raises:
        ArgumentError: an unknown name, or a value that the field does not take.
    """
    if algo not in DEFAULTS:
        raise ArgumentError(f"There is no algorithm {algo!r}; --algo takes {', '.join(DEFAULTS)}.")
    algorithm, setup, source = _settings(algo, environment)
    given = {name: value for name, value in direct.items() if value is not None}
    if "max_kl" in given and not _has(algorithm, "max_kl"):
        raise ArgumentError(f"{algo} has no hard radius, so --max-kl has no meaning; it aims: --set target_kl=0.01.")
    changed = list(given)
    if structure is not None:
        algorithm = _restructured(algorithm, structure)
        changed.append("structure")
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ArgumentError(f"--set {assignment!r} is not name=value, such as --set lam=0.97.")
        given[name] = _value(name, text)
        changed.append(name)
    algorithm, setup = _replaced(algorithm, setup, given)
    return Chosen(algorithm, setup, f"{source}; from the options: {', '.join(changed)}" if changed else source)


def _settings(algo: str, environment: str) -> tuple[Algorithm, Setup, str]:
    algorithm, setup = settings_for(algo, environment)
    plain = (algorithm, setup) == DEFAULTS[algo]
    return algorithm, setup, f"defaults of {algo}" if plain else f"tuned for {environment}"


def _has(value: Any, name: str) -> bool:
    return name in {f.name for f in fields(value)}


def _restructured(algorithm: Any, structure: str) -> Any:
    if structure not in STRUCTURES:
        raise ArgumentError(f"There is no structure {structure!r}; --structure takes {', '.join(STRUCTURES)}.")
    # A solver that was chosen for one structure need not fit another; None lets each take its own.
    solver = {"solver": None} if _has(algorithm, "solver") else {}
    return replace(algorithm, structure=STRUCTURES[structure](), **solver)


def _replaced(algorithm: Any, setup: Setup, given: Mapping[str, Any]) -> tuple[Any, Setup]:
    """Both with the given fields, all at once: one value may only be allowed beside another."""
    parts: dict[str, dict[str, Any]] = {"algorithm": {}, "setup": {}}
    for name, value in given.items():
        if not _has(setup, name) and not _has(algorithm, name.partition(".")[0]):
            known = sorted([*_plain_names(algorithm), *_plain_names(setup)])
            raise ArgumentError(f"There is no setting {name!r}; --set takes {', '.join(known)}.")
        parts["setup" if _has(setup, name) else "algorithm"][name] = value
    return _with(algorithm, parts["algorithm"]), _with(setup, parts["setup"])


def _with(owner: Any, changes: Mapping[str, Any]) -> Any:
    """``owner`` with fields, perhaps of a part of it, replaced."""
    found: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        field = next((f for f in fields(owner) if f.name == first), None)
        if field is None or (rest and not is_dataclass(getattr(owner, first))):
            raise ArgumentError(f"There is no setting {name!r}; --set takes {', '.join(_plain_names(owner))}.")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            found[first] = _checked(name, value, str(field.type))
    found |= {name: _with(getattr(owner, name), part) for name, part in inner.items()}
    return replace(owner, **found)


def _checked(name: str, value: Any, annotation: str) -> Any:
    kinds = {kind for kind in ("bool", "int", "float", "None", "tuple") if kind in annotation}
    if not kinds - {"None"}:
        raise ArgumentError(f"{name} is no plain value, so --set cannot give it.")
    if type(value).__name__.removesuffix("Type") not in kinds | ({"int"} if "float" in kinds else set()):
        raise ArgumentError(f"{name} takes {' or '.join(sorted(kinds))}, not {value!r}.")
    return value


def _plain_names(owner: Any) -> list[str]:
    names = []
    for f in fields(owner):
        if any(kind in str(f.type) for kind in ("bool", "int", "float", "tuple")):
            names.append(f.name)
        elif f.name == "critic":
            names += [f"critic.{name}" for name in _plain_names(getattr(owner, f.name))]
    return names


def _value(name: str, text: str) -> Any:
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError) as error:
        raise ArgumentError(f"--set {name}={text} is not a number, true, false, none or a tuple of numbers.") from error


def radius_of(algorithm: Any) -> Radius | None:
    """What the algorithm holds the KL of an update to; None where nothing does."""
    if getattr(algorithm, "max_kl", None) is not None:
        return Radius("max_kl", algorithm.max_kl, hard=True)
    aims = _has(algorithm, "target_kl") and (not _has(algorithm, "penalty") or algorithm.penalty is not None)
    return Radius("target_kl", algorithm.target_kl, hard=False) if aims else None


def words(owner: Any) -> tuple[tuple[str, str], ...]:
    """(name, value) of every field, as text."""
    return tuple((f.name, word(getattr(owner, f.name))) for f in fields(owner))


def word(value: Any) -> str:
    """A value as text; of a part only what is not its default."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(map(word, value))
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{f.name} {word(v)}" for f in fields(value) if (v := getattr(value, f.name)) != _default(f))
        return f"{type(value).__name__}({inside})" if inside else type(value).__name__
    return str(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
