"""A thousand steps leave nothing behind: no memory, no other draw of random numbers, no buffer, no gradient changed."""

from __future__ import annotations

import gc
import sys
import tracemalloc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng

PRESETS = {
    "kfac": (ng.KFAC, {"lr": 0.01, "search": ng.KLClip(0.01)}),
    "fit": (ng.KFAC, {"lr": 0.01}),
    "ekfac": (ng.EKFAC, {"lr": 0.01}),
    "diagonal": (ng.DiagonalNGD, {"lr": 0.01}),
    "gram": (ng.GramNGD, {"lr": 0.01}),
    "dense": (ng.NGD, {"lr": 0.01}),
    "trust": (ng.TrustRegionNGD, {"structure": ng.Kronecker(), "estimate": ng.MonteCarlo()}),
}
every_preset = pytest.mark.parametrize("preset", PRESETS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.stem(x)))))


def make(preset: str) -> tuple[Net, ng.NaturalGradient]:
    torch.manual_seed(0)
    model = Net()
    kind, options = PRESETS[preset]
    return model, kind(model, ng.Categorical(), **options)


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(6, 3, generator=generator), torch.randint(0, 3, (6,), generator=generator)


def backward(model: nn.Module, i: int) -> None:
    x, y = batch(i)
    if i % 50 == 7:  # the passes that are left out must leave nothing either
        x[0, 0] = torch.nan
    F.cross_entropy(model(x), y).backward()


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def containers() -> int:
    """Bytes of all lists, dictionaries, sets and tuples: what a number that is kept at every step must sit in."""
    gc.collect()
    return sum(sys.getsizeof(o) for o in gc.get_objects() if type(o) in (list, dict, set, tuple))


def train(model: nn.Module, optimizer: ng.NaturalGradient, first: int, last: int) -> None:
    for i in range(first, last):
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()
        if i % 10 == 0:
            model(batch(i)[0])  # a pass that no backward pass follows


LONG = [pytest.param(p, 1000, marks=[] if p == "kfac" else [pytest.mark.slow]) for p in PRESETS]
SHORT = [pytest.param(p, 120) for p in PRESETS if p != "kfac"]


@pytest.mark.parametrize(("preset", "steps"), LONG + SHORT)
def test_memory_does_not_grow(preset, steps):
    """Live tensors, the size of all containers, and hooks, against those after 51 steps."""
    model, optimizer = make(preset)
    train(model, optimizer, 0, 51)
    alive, size = tensors(), containers()
    train(model, optimizer, 51, steps + 1)
    assert tensors() == alive
    assert containers() - size < 4 * (steps - 51), "more than half a number is kept at each step"
    assert len(model._forward_hooks) == 1 and len(model._forward_pre_hooks) == 1
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules() if m is not model)


@pytest.mark.slow
def test_python_allocates_no_more_later_than_earlier():
    """By tracemalloc, when the allocator has come to rest: at first, blocks that are used anew count as growth."""
    model, optimizer = make("kfac")
    train(model, optimizer, 0, 20)
    tracemalloc.start()
    try:
        train(model, optimizer, 20, 250)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        train(model, optimizer, 250, 450)
        gc.collect()
        growth = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert growth < 200 * 128, growth  # one tensor kept per step has several hundred bytes on Python's side alone


@every_preset
def test_the_optimizer_is_freed_with_its_model(preset):
    before = tensors()
    model, optimizer = make(preset)
    for i in range(3):
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()
    del model, optimizer
    assert tensors() <= before


@every_preset
def test_a_thousand_steps_touch_neither_buffers_nor_random_streams_nor_gradients(preset):
    """Beside a twin that nobody optimizes: it is given the same parameters before each pass, and nothing else."""
    model, optimizer = make(preset)
    twin = Net()
    twin.load_state_dict(model.state_dict())
    for i in range(1000 if preset == "kfac" else 60):
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        if i % 50 == 8:  # NaN has entered the twin's averages as it has the model's
            for module in (model, twin):
                module.norm.reset_running_stats()
        streams = []
        for module in (twin, model):
            torch.manual_seed(i)
            module.zero_grad()
            backward(module, i)
            torch.rand(3)  # a pass that is run again ends elsewhere in the stream
            if module is model:
                optimizer.step()
            streams.append(torch.get_rng_state())
        assert torch.equal(*streams)
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            assert torch.equal(p.grad.nan_to_num(), q.grad.nan_to_num())
        for a, b in zip(twin.buffers(), model.buffers(), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
    moved = [not torch.equal(p, q) for p, q in zip(Net().parameters(), model.parameters(), strict=True)]
    assert all(moved)


def test_the_counts_see_what_is_kept():
    before, size, kept = tensors(), containers(), [torch.zeros(1)]
    kept_numbers = [0.0] * 500
    assert tensors() == before + len(kept)
    assert containers() - size >= 8 * len(kept_numbers)
