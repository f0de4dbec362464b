"""Parameter groups: their options, which parameters share curvature, and learning rates that differ inside one step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.network import Partition
from natgrad.step import Damping, LevenbergMarquardt, Search

Group = dict[str, Any]
DIVISION = "division"
OPTIONS = ("lr", "momentum", "weight_decay", "damping", "max_kl", "maximize")
_DIVIDING = tuple(name for name in OPTIONS if name != "weight_decay")
_SCALARS = ("lr", "weight_decay", "damping", "max_kl")


def check_group(group: Mapping[str, Any], search: Search) -> None:
    """Raises ArgumentError for an option out of range, naming it."""
    for name in _SCALARS:
        value = group[name]
        if value is None and name == "max_kl":
            continue
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ArgumentError(f"Tensor {name} must be 1-element, but has shape {tuple(value.shape)}.")
        if not isinstance(value, Real | Tensor):
            raise ArgumentError(f"{name}={value!r} was given in a parameter group; it must be a number.")
        if isinstance(value, Tensor) and not float(value) >= 0:
            raise ArgumentError(f"{name}={float(value)} was given in a parameter group; it must be at least 0.")
    if not isinstance(group["maximize"], bool):
        raise ArgumentError(f"maximize={group['maximize']!r} was given in a parameter group; it must be True or False.")
    check_values(group)
    if group["weight_decay"] and math.isinf(float(group["lr"])) and not search.needs_probe:
        raise ArgumentError(
            f"lr={float(group['lr'])} was given together with weight_decay={group['weight_decay']}, which multiplies "
            "parameters by 1 − lr·weight_decay. Give a finite lr, or a search that measures: TrustRegion, QuadraticFit."
        )
    if group["max_kl"] is not None and not hasattr(search, "max_kl"):
        raise ArgumentError(
            f"max_kl={group['max_kl']} was given in a parameter group, but {type(search).__name__} has no radius. Use "
            "search=ng.KLClip(...), ng.TrustRegion(...) or ng.QuadraticFit(...)."
        )
    if group["max_kl"] is not None and not float(group["max_kl"]) > 0:
        raise ArgumentError(f"max_kl={float(group['max_kl'])} was given in a parameter group; it must be above 0.")


def check_values(group: Mapping[str, Any]) -> None:
    """Raises ArgumentError for a plain number out of range, as a schedule may have left it; waits for no device."""
    for name in _SCALARS:
        value = group[name]
        if isinstance(value, Real) and not float(value) >= 0:
            hint = " Schedules multiply lr: give a finite one, where it is inf." if math.isnan(float(value)) else ""
            raise ArgumentError(f"{name}={value} was given in a parameter group; it must be at least 0.{hint}")
    momentum = group["momentum"]
    if not isinstance(momentum, Real) or not 0 <= float(momentum) < 1:
        raise ArgumentError(f"momentum={momentum!r} was given in a parameter group; it must be at least 0 and below 1.")


def set_division(groups: Sequence[Group], new: Group) -> None:
    """Say with which earlier groups ``new`` shares blocks: with those that differ from it in weight decay at most.

    Noted once, when the group is added: what a scheduler changes later divides nothing.
    """
    for group in groups:
        if all(_same(group[name], new[name]) for name in _DIVIDING):
            new[DIVISION] = group[DIVISION]
            return
    new[DIVISION] = 1 + max((group[DIVISION] for group in groups), default=-1)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return a is not None and b is not None and float(a) == float(b)


def group_of(groups: Iterable[Group], named: Mapping[str, Tensor]) -> dict[str, Group]:
    """The group of each named parameter."""
    owner = {id(p): group for group in groups for p in group["params"]}
    return {name: owner[id(p)] for name, p in named.items() if id(p) in owner}


def divisions(of: Mapping[str, Group]) -> list[frozenset[str]] | None:
    """Names of the parameters that share blocks; None where all do."""
    kinds = sorted({group[DIVISION] for group in of.values()})
    if len(kinds) <= 1:
        return None
    return [frozenset(name for name, group in of.items() if group[DIVISION] == kind) for kind in kinds]


def together(
    partition: Partition, direction: Mapping[str, Tensor], of: Mapping[str, Group], measured: bool
) -> list[dict[str, str]]:
    """Blocks whose steps are found together, each with one of its parameters: all where the step is ``measured``."""
    first = {b.name: b.parameters[0] for b in partition.blocks if b.name in direction}
    if measured:
        return [first]
    kinds = sorted({of[name][DIVISION] for name in first.values()})
    return [{b: n for b, n in first.items() if of[n][DIVISION] == kind} for kind in kinds]


def reference_rate(groups: Sequence[Group]) -> float | Tensor:
    """The learning rate of a step that ``groups`` take together: the largest of theirs."""
    first = groups[0]["lr"]
    if all(group["lr"] is first or _plain_equal(group["lr"], first) for group in groups):
        return first
    return max(float(group["lr"]) for group in groups)


def _plain_equal(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def rate_ratio(group: Group, reference: float | Tensor) -> float:
    """What the group's parameters move relative to the reference rate."""
    lr = group["lr"]
    if lr is reference or _plain_equal(lr, reference):
        return 1.0
    top = float(reference)
    if math.isinf(top):
        raise ArgumentError(f"Groups with lr={float(lr)} and lr={top} take one step together: give finite rates.")
    return float(lr) / top if top else 0.0


def damping_of(group: Group, rule: Damping) -> Damping:
    """The damping rule with the value that the group has."""
    value = float(group["damping"])
    if value == rule.value:
        return rule
    if isinstance(rule, LevenbergMarquardt):
        return rule.restored({**rule.state(), "value": value})
    return replace(rule, value=value)  # type: ignore[type-var]


def search_of(group: Group, search: Search) -> Search:
    """The search with the radius that the group has."""
    if group["max_kl"] is None or group["max_kl"] == search.max_kl:  # type: ignore[attr-defined]
        return search
    return replace(search, max_kl=float(group["max_kl"]))  # type: ignore[type-var]


def common(groups: Sequence[Group], option: str, why: str) -> Any:
    """The value of an option that all groups must share.

    Raises:
        ArgumentError: they do not.
    """
    values = [group[option] for group in groups]
    if not all(_same(value, values[0]) for value in values):
        raise ArgumentError(f"Groups with {option} {values} cannot take one step together: {why}")
    return values[0]
