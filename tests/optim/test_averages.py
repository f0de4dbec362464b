"""Averages in the state: grouped by shape, and each as if it were alone; against sums written out in NumPy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from natgrad.optim.averages import Averages, unpaired

SHAPES = {
    "a": {"input": (1, 3, 3), "output": (1, 2, 2)},
    "b": {"input": (1, 3, 3), "output": (1, 3, 3)},
    "c": {"diagonal": (4,), "count": ()},
    "d": {"input": (1, 2, 2), "diagonal": (4,)},
    "wide": {"input": (1, 300, 300)},
    "wide too": {"input": (1, 300, 300)},
}
DECAY = 0.8


def drawn(seed: int, leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: {kind: torch.randn(shape, generator=generator, dtype=torch.float64) for kind, shape in kinds.items()}
        for name, kinds in SHAPES.items()
    }
    return {name: kinds for name, kinds in found.items() if name not in leave_out}


def expected(history: list[dict[str, dict[str, Tensor]]], name: str, kind: str) -> tuple[np.ndarray, float]:
    """Σ β^(T−t) x_t / Σ β^(T−t) over the steps at which the moment was there and finite, and its weight."""
    seen = [means[name][kind].numpy() for means in history if name in means]
    seen = [x for x in seen if np.isfinite(x).all()]
    powers = [DECAY ** (len(seen) - 1 - t) for t in range(len(seen))]
    total = sum((w * x for w, x in zip(powers, seen, strict=True)), np.zeros(SHAPES[name][kind]))
    return total / max(math.fsum(powers), 1e-300), (1 - DECAY) * math.fsum(powers)


def check(slots: dict, history: list) -> None:
    for name, kinds in SHAPES.items():
        for kind in kinds:
            value, weight = expected(history, name, kind)
            np.testing.assert_allclose(slots[name][f"average.{kind}"].numpy(), value, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(slots[name][f"weight.{kind}"].numpy(), weight, rtol=1e-12)


def started() -> tuple[dict, Averages]:
    slots: dict = {name: {"step": torch.zeros(())} for name in SHAPES}
    return slots, Averages(slots)


def test_each_is_averaged_as_if_it_were_alone():
    """Also where one is poisoned, and where a step lacks some of a group: an expert that no token reached."""
    slots, averages = started()
    history = [drawn(0), drawn(1), drawn(2, ("b", "c")), drawn(3), drawn(4, ("wide", "a"))]
    history[1]["b"]["input"][0, 1, 1] = math.nan
    history[3]["wide"]["input"][0, 7, 8] = math.inf
    history[4]["d"]["diagonal"][3] = -math.inf
    replaced = [averages.update(means, DECAY) for means in history]
    assert replaced == [True, False, False, False, False]  # in place once they are laid out
    check(slots, history)
    assert averages.means().keys() == SHAPES.keys() and averages.means()["c"].keys() == {"diagonal", "count"}


def test_nothing_is_taken_in_where_the_step_is_not_valid():
    slots, averages = started()
    averages.update(drawn(0), DECAY)
    averages.update(drawn(1), DECAY, torch.tensor(False))
    check(slots, [drawn(0)])


def test_one_that_begins_later_joins_the_others():
    slots, averages = started()
    history = [drawn(0, ("b", "d")), drawn(1, ("b",)), drawn(2)]
    assert [averages.update(means, DECAY) for means in history] == [True, True, True]
    check(slots, history)


@pytest.mark.parametrize("how", ["copied", "other memory", "replaced on the way"])
def test_a_state_that_is_restored_goes_on_bit_for_bit(how):
    slots, averages = started()
    averages.update(drawn(0, ("b",)), DECAY)
    averages.update(drawn(1), DECAY)
    other = (
        copy.deepcopy(slots) if how == "copied" else {n: {k: t.clone() for k, t in s.items()} for n, s in slots.items()}
    )
    given = {name: dict(slot) for name, slot in other.items()}
    again = Averages(other)
    for seed in (2, 3):
        averages.update(drawn(seed, ("c",)), DECAY)
        if how == "replaced on the way" and seed == 3:
            other["a"]["average.input"] = other["a"]["average.input"].clone()
        again.update(drawn(seed, ("c",)), DECAY)
        for name, slot in slots.items():
            for key, value in slot.items():
                assert torch.equal(other[name][key], value), (name, key)
    if how == "other memory":  # what was given is copied, and not written to
        check(given, [drawn(0, ("b",)), drawn(1)])


def test_half_a_pair_is_found():
    assert unpaired({"average.input": 1, "weight.output": 2, "step": 3}) == ["average.output", "weight.input"]
    assert unpaired({"average.input": 1, "weight.input": 2}) == []
