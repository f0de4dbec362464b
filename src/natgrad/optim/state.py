"""What the optimizer's checkpoint holds: plain tensors under parameters, plain values and one text in the groups.

Beside torch's ``state`` and ``param_groups`` stands an inventory: name, shape and dtype of every parameter and which
tensors are under it, by which :mod:`natgrad.optim.loading` finds out whether a state fits and is whole.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError
from natgrad.metric import Metric
from natgrad.optim.examination import Examination
from natgrad.optim.groups import DIVISION, Group
from natgrad.step import Damping

NOTE = "natgrad"
INVENTORY = "parameters"
__all__ = ["DIVISION", "INVENTORY", "NOTE", "Note", "described", "names_of", "note", "parsed", "whole", "without_hooks"]


def note(metric: Metric, steps: int, seed: int, damping: Damping, examination: Examination) -> str:
    """What is not a tensor of a parameter, as a text for the first group: where checkpoints look."""
    own = {"metric": repr(metric), "steps": steps, "seed": seed, "damping": dict(damping.state())}
    return json.dumps({**own, **examination.state()})


@dataclass(frozen=True)
class Note:
    """What :func:`note` wrote, read again; ``damping`` is the rule with the numbers of the note."""

    metric: str
    steps: int
    seed: int
    damping: Damping
    examination: Examination


def parsed(state_dict: dict[str, Any], metric: Metric, damping: Damping) -> Note | None:
    """The note in a state; None where there is none and no tensors either.

    Raises:
        ArgumentError: it is damaged, of another optimizer, metric or damping, or its tensors are missing.
    """
    groups, state = state_dict["param_groups"], state_dict["state"]
    text = groups[0].get(NOTE) if groups else None
    if not text:
        if state:
            raise ArgumentError(
                "The state is not of a natgrad optimizer: it holds tensors, but no note of how they came about. Load "
                "the state_dict() of an optimizer like this one, or start afresh."
            )
        return None
    try:
        own = json.loads(text)
        kind, steps, seed = str(own["metric"]), int(own["steps"]), int(own["seed"])
        examination, numbers = Examination.restored(own), dict(own["damping"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"The note in param_groups[0][{NOTE!r}] of the state is damaged ({type(error).__name__}: {error}). Take an "
            "undamaged checkpoint; ng.save writes them with a checksum."
        ) from error
    if kind != repr(metric):
        raise ArgumentError(
            f"The state is of an optimizer with metric {kind}, and this one has {metric!r}. Their averages do "
            "not fit each other: load it into an optimizer with the same metric, or start afresh."
        )
    if steps and not state:
        raise ArgumentError(
            f"The state is of an optimizer that has taken {steps} steps, but holds no tensors. "
            "torch.distributed.checkpoint loads only what the optimizer already has: take one step before loading."
        )
    try:
        return Note(kind, steps, seed, damping.restored(numbers), examination)
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"The state is of an optimizer whose damping has the numbers {numbers}, which {type(damping).__name__} "
            "does not take. Make the optimizer with the damping rule it was saved with."
        ) from error


def names_of(groups: list[Group], model: nn.Module | None) -> list[list[str | None]]:
    """Names of the parameters of each group: the model's, else those the optimizer was given, else None."""
    known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    found: list[list[str | None]] = []
    for group in groups:
        given = group.get("param_names", ())
        given = given if len(given) == len(group["params"]) else [None] * len(group["params"])
        found.append([known.get(id(p), name) for p, name in zip(group["params"], given, strict=True)])
    return found


def described(state_dict: dict[str, Any], groups: list[Group], model: nn.Module | None) -> dict[str, Any]:
    """The state with its inventory, by the numbers that torch gives the parameters."""
    found: dict[Any, dict[str, Any]] = {}
    for saved, own, names in zip(state_dict["param_groups"], groups, names_of(groups, model), strict=True):
        for i, p, name in zip(saved["params"], own["params"], names, strict=True):
            held = sorted(str(key) for key in state_dict["state"].get(i, {}))
            found[i] = {"name": name, "shape": list(p.shape), "dtype": str(p.dtype), "state": held}
    state_dict[INVENTORY] = found
    return state_dict


def whole(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A shallow copy of a state, with groups of its own, so that loading it changes nothing of the caller's.

    Raises:
        ArgumentError: it is no optimizer's state.
    """
    try:
        groups = [{**group, "params": list(group["params"])} for group in state_dict["param_groups"]]
        return {**state_dict, "state": dict(state_dict["state"]), "param_groups": groups}
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"state_dict is of type {type(state_dict).__name__} and has no 'state' and 'param_groups' of an optimizer. "
            "Give what optimizer.state_dict() returned."
        ) from error


@contextmanager
def without_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The optimizer's hooks on loading are not called inside."""
    names = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    kept = {name: getattr(optimizer, name) for name in names}
    try:
        for name in names:
            setattr(optimizer, name, OrderedDict())
        yield
    finally:
        for name, hooks in kept.items():
            setattr(optimizer, name, hooks)


def put_back(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Put back the saved tensors, which torch's ``load_state_dict`` has cast to their parameters' dtype.

    Only where a parameter has another dtype than when it was saved its tensors are cast, as torch does it: to that of
    the parameter, float32 at least.
    """
    inventory = state_dict.get(INVENTORY, {})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in state_dict["param_groups"] for i in group["params"]]
    for p, i in zip(parameters, order, strict=True):
        other = i in inventory and inventory[i]["dtype"] != str(p.dtype)
        fits = (p.dtype, torch.promote_types(p.dtype, torch.float32))
        for key, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                # A counter stays where it was saved.
                device = p.device if value.dim() else value.device
                cast = other and key != "step" and value.is_floating_point() and value.dtype not in fits
                optimizer.state[p][key] = value.detach().to(
                    device=device, dtype=fits[1] if cast else value.dtype, copy=True
                )
