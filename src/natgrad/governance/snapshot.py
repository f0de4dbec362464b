"""What an update changes, kept so that it can be undone bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def movable(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything an update may move: trainable parameters, all buffers, and what the optimizer holds beside the model.

    Parameters that are frozen and in no group are left out: they may be most of a large model's memory.
    """
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.requires_grad or id(p) in held:
            found[name] = p
            held.pop(id(p), None)
    found.update(model.named_buffers())
    # A name that no parameter of a module can have.
    found.update({f"optimizer[{i}]": p for i, p in enumerate(held.values())})
    return found


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies."""
    return {name: t.detach().clone() for name, t in tensors.items()}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors differ in names, shapes or any value (NaN differs). One wait for the device."""
    if a.keys() != b.keys() or any(t.shape != b[n].shape or t.dtype != b[n].dtype for n, t in a.items()):
        return True
    pairs = [(t, b[n]) for n, t in a.items() if t.numel()]
    if not pairs:
        return False
    device = pairs[0][0].device
    return bool(torch.stack([(t != other).any().to(device) for t, other in pairs]).any())


def between(old: Tensor, new: Tensor, s: float) -> Tensor:
    """old + s (new − old), in float32 or better; what is no floating-point number is ``new``'s."""
    if not new.is_floating_point():
        return new
    wide = torch.promote_types(new.dtype, torch.float32)
    return torch.lerp(old.to(wide), new.to(wide), s).to(new.dtype)


@torch.no_grad()
def assign(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into the tensors of the same names, in place."""
    for name, value in values.items():
        tensors[name].copy_(value)


@dataclass(frozen=True)
class OptimizerSnapshot:
    """The state of an optimizer, to be put back bit for bit.

    Where the optimizer has a ``load_state_dict`` of its own, it knows best what its state is, and is asked; torch's
    would cast every tensor to its parameter's dtype, so the state of all others is copied and put back as it was.
    """

    optimizer: Optimizer
    saved: Any
    own: bool

    @staticmethod
    def take(optimizer: Optimizer) -> OptimizerSnapshot:
        own = type(optimizer).load_state_dict is not Optimizer.load_state_dict
        if own:
            return OptimizerSnapshot(optimizer, copy.deepcopy(optimizer.state_dict()), True)
        state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
        groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return OptimizerSnapshot(optimizer, (state, groups), False)

    def restore(self) -> None:
        if self.own:
            self.optimizer.load_state_dict(self.saved)
            return
        state, groups = self.saved
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            for key in [k for k in group if k != "params" and k not in saved]:
                del group[key]
            group.update(saved)
