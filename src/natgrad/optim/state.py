"""The optimizer's checkpoint: plain tensors under parameters, plain values and one text in the groups."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.metric import Metric
from natgrad.optim.examination import Examination
from natgrad.optim.groups import DIVISION
from natgrad.step import Damping

NOTE = "natgrad"
__all__ = ["DIVISION", "NOTE", "check", "copied", "note", "parsed", "restore_tensors", "without_hooks"]


def note(metric: Metric, steps: int, seed: int, damping: Damping, examination: Examination) -> str:
    """What is not a tensor of a parameter, as a text for the first group: where checkpoints look."""
    own = {"metric": repr(metric), "steps": steps, "seed": seed, "damping": dict(damping.state())}
    return json.dumps({**own, **examination.state()})


def parsed(state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """What :func:`note` wrote; None in the state of another optimizer, or of one that has not stepped."""
    groups = state_dict["param_groups"]
    return json.loads((groups[0].get(NOTE) if groups else None) or "null")


def check(own: dict[str, Any] | None, state: dict[Any, Any], metric: Metric) -> None:
    """Raises ArgumentError where the state cannot be that of an optimizer with ``metric``."""
    if own is None:
        return
    if own["metric"] != repr(metric):
        raise ArgumentError(
            f"The state is of an optimizer with metric {own['metric']}, and this one has {metric!r}. Their averages do "
            "not fit each other: load it into an optimizer with the same metric, or start afresh."
        )
    if own["steps"] and not state:
        raise ArgumentError(
            f"The state is of an optimizer that has taken {own['steps']} steps, but holds no tensors. "
            "torch.distributed.checkpoint loads only what the optimizer already has: take one step before loading."
        )


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state with groups of its own, so that loading it changes nothing of the caller's."""
    return {**state_dict, "param_groups": [dict(group) for group in state_dict["param_groups"]]}


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


def restore_tensors(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put back the saved tensors, which torch's ``load_state_dict`` has cast to their parameters' dtype."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in state_dict["param_groups"] for i in group["params"]]
    for p, i in zip(parameters, order, strict=True):
        for key, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                # A counter stays where it was saved.
                device = p.device if value.dim() else value.device
                optimizer.state[p][key] = value.detach().to(device=device, copy=True)
