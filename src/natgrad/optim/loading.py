"""Whether a state fits the optimizer it is loaded into, and which of its parameters is whose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError
from natgrad.optim.averages import unpaired
from natgrad.optim.groups import DIVISION, OPTIONS, Group
from natgrad.optim.naming import names_here, renamed_entries
from natgrad.optim.state import INVENTORY, NOTE, names_of, put_back, whole, without_hooks

_SHAPED = ("momentum", "previous")
_SHOWN = 5


@dataclass(frozen=True)
class Match:
    """A state in the order of the optimizer's parameters.

    Attributes:
        state_dict: the state.
        members: the parameters of each group, with those that join because the state has them.
        fresh: names of the parameters that the state does not know: they were frozen when it was saved.
    """

    state_dict: dict[str, Any]
    members: list[list[Tensor]]
    fresh: frozenset[str]


def matched(state_dict: dict[str, Any], groups: list[Group], model: nn.Module | None, follows: bool) -> Match:
    """Match parameters by name where both sides know the names, else by place as torch does.

    Args:
        state_dict: from :func:`natgrad.optim.state.whole`.
        groups: the optimizer's.
        model: the module that it observes; None before ``attach``.
        follows: whether parameters of the module may join the optimizer.

    Raises:
        ArgumentError: groups, names, shapes or tensors do not fit; the message names the first ones.
    """
    inventory: dict[Any, Any] = renamed_entries(state_dict.get(INVENTORY, {}), names_here(model))
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ArgumentError(
            f"The state has {len(saved_groups)} parameter groups, and this optimizer has {len(groups)}. Make the same "
            "groups before loading."
        )
    names = names_of(groups, model)
    members = [list(group["params"]) for group in groups]
    fresh: set[str] = set()
    for k, saved in enumerate(saved_groups):
        known = [inventory.get(i, {}).get("name") for i in saved["params"]]
        own = _known(names[k])
        if own is not None and _known(known) is not None:
            joining = _joining(known, own, members, model) if follows and k == 0 else {}
            new = {n for n in own if n not in known} if follows and k == 0 else set[str]()
            order = [*own, *joining]
            names[k] = [*order]
            _check_names(k, known, order, new)
            fresh |= new
            members[k] += joining.values()
            places = dict(zip(known, saved["params"], strict=True))
            saved["params"] = [places.get(n, f"fresh {n}") for n in order]
        elif len(known) != len(members[k]):
            raise ArgumentError(
                f"Parameter group {k} has {len(known)} parameters in the state, and {len(members[k])} in this "
                "optimizer. Build the model and the optimizer as they were when they were saved."
            )
    for saved, own, labels in zip(saved_groups, members, names, strict=True):
        for i, p, label in zip(saved["params"], own, labels, strict=True):
            _check_tensors(label or f"number {i}", p, state_dict["state"].get(i, {}), inventory.get(i))
    return Match(state_dict, members, frozenset(fresh))


def take_over(optimizer: torch.optim.Optimizer, match: Match) -> None:
    """Give an optimizer the groups and tensors of a state, in torch's own way but for the dtypes, without any hook."""
    optimizer.param_groups = [
        {**group, "params": own} for group, own in zip(optimizer.param_groups, match.members, strict=True)
    ]
    with without_hooks(optimizer):  # they come before and after the whole of it, not of torch's part
        torch.optim.Optimizer.load_state_dict(optimizer, whole(match.state_dict))
    put_back(optimizer, match.state_dict)
    for k, group in enumerate(optimizer.param_groups):
        for name in OPTIONS:  # of a state saved before there were such
            group.setdefault(name, optimizer.defaults[name])
        group.setdefault(DIVISION, k)
        group.setdefault(NOTE, "")


def names_in(state_dict: Mapping[str, Any]) -> list[list[str]] | None:
    """The names of the parameters of each group of a state; None where it does not know them."""
    inventory = state_dict.get(INVENTORY, {})
    found = [_known([inventory.get(i, {}).get("name") for i in g["params"]]) for g in state_dict["param_groups"]]
    return None if None in found else found  # type: ignore[return-value]


def check_places(loaded: list[list[str]] | None, groups: list[Group], model: nn.Module) -> None:
    """Raises ArgumentError unless what was loaded by place has reached the parameters of its names."""
    own, here = names_of(groups, model), names_here(model)
    loaded = None if loaded is None else [[here(name) for name in names] for names in loaded]
    if loaded is not None and loaded != own:
        wrong = [(a, b) for one, other in zip(loaded, own, strict=False) for a, b in zip(one, other, strict=False)]
        first = next(((a, b) for a, b in wrong if a != b), ("more parameters", "fewer"))
        raise ArgumentError(
            f"The loaded state of {first[0]} went to {first[1]}: before attach() parameters are known by their places "
            "alone, which differ here. Call attach(model) first, and then load_state_dict()."
        )


def _known(names: list[Any]) -> list[str] | None:
    return None if None in names else names


def _joining(
    saved: list[str], own: list[str], members: list[list[Tensor]], model: nn.Module | None
) -> dict[str, nn.Parameter]:
    """Parameters of the module that the state knows and the optimizer does not: frozen ones, trained before."""
    if model is None:
        return {}
    taken = {id(p) for group in members for p in group}
    known = dict(model.named_parameters())
    return {n: known[n] for n in saved if n not in own and n in known and id(known[n]) not in taken}


def _check_names(k: int, saved: list[str], own: list[str], new: set[str]) -> None:
    problems = [f"{n} is only in the state" for n in saved if n not in own]
    problems += [f"{n} is only in this optimizer" for n in own if n not in saved and n not in new]
    if len(problems) > _SHOWN:
        problems = [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]
    if problems:
        raise ArgumentError(
            f"The state is of other parameters than those of parameter group {k}: {'; '.join(problems)}. Build the "
            "model and the optimizer's groups as they were when they were saved."
        )


def _check_tensors(label: str, p: Tensor, held: Mapping[Any, Any], entry: Mapping[str, Any] | None) -> None:
    """Raises ArgumentError unless the tensors under one parameter are whole and of its shape."""
    if entry is not None and list(entry["shape"]) != list(p.shape):
        raise ArgumentError(
            f"Parameter {label} has shape {tuple(entry['shape'])} in the state, and {tuple(p.shape)} in this model. "
            "Curvature of another shape means nothing here: load it into the model that it was saved with."
        )
    for key in _SHAPED:
        if isinstance(held.get(key), Tensor) and held[key].shape != p.shape:
            raise ArgumentError(
                f"The tensor {key!r} of parameter {label} has shape {tuple(held[key].shape)} in the state, and the "
                f"parameter {tuple(p.shape)}. Load it into the model that it was saved with."
            )
    # What is frozen now is left out by torch.distributed.checkpoint, and is not needed.
    lost = [] if entry is None or not p.requires_grad else [key for key in entry["state"] if key not in held]
    lost = list(dict.fromkeys(lost + unpaired(held)))
    if lost:
        raise ArgumentError(
            f"The state lacks {', '.join(map(repr, lost[:_SHOWN]))} of parameter {label}, which it was saved with. "
            "Take a whole checkpoint, or start afresh."
        )
