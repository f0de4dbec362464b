"""Names of parameters, where the module that holds them is wrapped or another one than before.

What ``torch.compile`` returns calls the model inside ``_orig_mod``: its parameters are those of the model as written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Renaming = Callable[[str], str]


def as_written(name: str) -> str:
    """A parameter's name without what the compiler adds to it."""
    return name.replace("_orig_mod.", "")


def names_here(model: nn.Module | None) -> Renaming:
    """From a name, saved with or without the compiler, to that of the same parameter in ``model``."""
    own = {} if model is None else {as_written(name): name for name, _ in model.named_parameters()}
    return lambda name: own.get(as_written(name), name)


def names_after(before: nn.Module, after: nn.Module) -> Renaming:
    """From a name in one module to that of the very same parameter in another."""
    places = {id(p): name for name, p in after.named_parameters()}
    found = {name: places[id(p)] for name, p in before.named_parameters() if id(p) in places}
    return lambda name: found.get(name, name)


def renamed_entries(inventory: Mapping[Any, Mapping[str, Any]], name: Renaming) -> dict[Any, dict[str, Any]]:
    """The inventory of a state with parameters called otherwise."""
    return {
        i: {**entry, "name": name(entry["name"]) if isinstance(entry.get("name"), str) else entry.get("name")}
        for i, entry in inventory.items()
    }
