"""The averages of moments in an optimizer's state, updated in place; small ones of equal shape side by side, as one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from natgrad.metric.running import Average

AVERAGE, WEIGHT = "average.", "weight."

# Beyond this many numbers an update is bound by memory, not by the overhead of its operations.
_SMALL = 256**2

Place: TypeAlias = "tuple[str, str]"
"""Block and kind of a moment."""


@dataclass(frozen=True)
class _Group:
    """Averages that are updated together: the tensors of the state are views of these."""

    places: tuple[Place, ...]
    average: Average
    values: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]

    @staticmethod
    def of(places: tuple[Place, ...], average: Average) -> _Group:
        return _Group(places, average, average.value.unbind(), average.weight.unbind())


class Averages:
    """Averages in the slots of blocks, as plain tensors: ``average.KIND`` with its ``weight.KIND``.

    How they are grouped depends only on which there are, so that a run that is resumed goes on bit for bit.

    Args:
        slots: the state of each block's first parameter, by block.
    """

    def __init__(self, slots: Mapping[str, MutableMapping[Any, Any]]) -> None:
        self._slots = slots
        self._groups: list[_Group] = []

    def means(self) -> dict[str, dict[str, Tensor]]:
        """The averages by block and kind; blocks without any are left out."""
        found = {name: {kind: slot[AVERAGE + kind] for kind in _kinds(slot)} for name, slot in self._slots.items()}
        return {name: kinds for name, kinds in found.items() if kinds}

    def update(self, means: Mapping[str, Mapping[str, Tensor]], decay: float, valid: Tensor | None = None) -> bool:
        """Take in the means of one step; whether tensors of the state were replaced, and not only changed in place.

        Args:
            means: by block and kind. A mean that is not finite is left out.
            decay: weight of the past.
            valid: 0-d bool; nothing is taken in where it is false.
        """
        found = {(name, kind): mean for name, kinds in means.items() for kind, mean in kinds.items()}
        replaced = not self._intact(found)
        if replaced:
            self._lay_out(means)
        for group in self._groups:
            here = [i for i, place in enumerate(group.places) if place in found]
            if len(here) == len(group.places):
                x = [found[place] for place in group.places]
                group.average.update_(x[0][None] if len(x) == 1 else torch.stack(x), decay, valid)
            else:
                for i in here:
                    group.average.member(i).update_(found[group.places[i]][None], decay, valid)
        return replaced

    def _intact(self, found: Mapping[Place, Tensor]) -> bool:
        """Whether every moment has its place in a group, and the state holds the groups' own tensors."""
        known: set[Place] = set()
        for group in self._groups:
            if not self._holds(group):
                return False
            known.update(group.places)
        return found.keys() <= known

    def _holds(self, group: _Group) -> bool:
        return all(
            self._slots[name].get(AVERAGE + kind) is value and self._slots[name].get(WEIGHT + kind) is weight
            for (name, kind), value, weight in zip(group.places, group.values, group.weights, strict=True)
        )

    def _lay_out(self, means: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Group all averages that there are, and those that begin now, anew."""
        kept = {group.places: group for group in self._groups if self._holds(group)}
        alike: dict[tuple[Any, ...], list[Place]] = {}
        for name, slot in self._slots.items():
            begun = means.get(name, {})
            for kind in sorted({*_kinds(slot), *begun}):
                t = slot[AVERAGE + kind] if AVERAGE + kind in slot else begun[kind]
                alone = (name, kind) if t.numel() > _SMALL else None
                alike.setdefault((t.shape, t.dtype, t.device, alone), []).append((name, kind))
        self._groups = []
        for places in map(tuple, alike.values()):
            group = kept.get(places)
            if group is None:
                group = _Group.of(places, self._gathered(places, means))
                for (name, kind), value, weight in zip(places, group.values, group.weights, strict=True):
                    self._slots[name][AVERAGE + kind], self._slots[name][WEIGHT + kind] = value, weight
            self._groups.append(group)

    def _gathered(self, places: tuple[Place, ...], means: Mapping[str, Mapping[str, Tensor]]) -> Average:
        """What the state holds at these places, copied into one tensor; nothing taken in where it holds nothing."""
        values, weights = [], []
        for name, kind in places:
            slot = self._slots[name]
            value, weight = slot.get(AVERAGE + kind), slot.get(WEIGHT + kind)
            if value is None or weight is None:
                weight = means[name][kind].new_zeros(())
                value = weight.expand(means[name][kind].shape)
            values.append(value)
            weights.append(weight.to(value.device))
        return Average(torch.stack(values), torch.stack(weights))


def _kinds(slot: Mapping[Any, Any]) -> list[str]:
    return [key[len(AVERAGE) :] for key in slot if isinstance(key, str) and key.startswith(AVERAGE)]


def unpaired(slot: Mapping[Any, Any]) -> list[str]:
    """Averages without their weights and weights without their averages, which a state must not have."""
    keys = {key for key in slot if isinstance(key, str)}
    pairs = ((AVERAGE, WEIGHT), (WEIGHT, AVERAGE))
    return sorted(b + k[len(a) :] for a, b in pairs for k in keys if k.startswith(a) and b + k[len(a) :] not in keys)
