"""Curvature follows the passes: layers that are no longer called, other modules around the parameters, resuming."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optim_problems import batch, flat
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from support import assert_close

STRUCTURES: dict[str, Any] = {
    "kfac": ng.Kronecker(),
    "ekfac": ng.EigenKronecker(),
    "block": ng.BlockDiagonal(),
    "diagonal": ng.Diagonal(),
    "dense": ng.Dense(),
    "gram": ng.Gram(),
}
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
# No memory of earlier batches: the step is that of this batch alone.
FORGETFUL = {"average": 0.0, "refresh": ng.Refresh(1, 1), "lr": 0.1, "damping": 1e-2}


class Switch(nn.Module):
    """Calls its first layer, or uses that layer's parameters without calling it."""

    def __init__(self, bypass: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        features = batch(0)[0].shape[1]
        self.a, self.b = nn.Linear(features, 5), nn.Linear(5, 3)
        self.bypass = bypass
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.a.weight, self.a.bias) if self.bypass else self.a(x)
        return self.b(torch.tanh(h))


class Around(nn.Module):
    """Another module around the parameters of a :class:`Switch`, which bypasses the first layer, or does so as well."""

    def __init__(self, inner: Switch, as_well: bool) -> None:
        super().__init__()
        self.inner, self.as_well = inner, as_well

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.inner.a.weight, self.inner.a.bias)
        return self.inner.b(torch.tanh(h + self.inner.a(x) if self.as_well else h))


def optimizer_of(model: nn.Module, structure: Any, **options: Any) -> ng.NaturalGradient:
    return ng.NaturalGradient(model, ng.Categorical(), metric=ng.Fisher(ng.Exact(), structure), **options)


def train(model: Any, optimizer: ng.NaturalGradient, seeds: Any) -> None:
    for seed in seeds:
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()


def treatments(optimizer: ng.NaturalGradient) -> dict[str, str]:
    return {row.parameter.rpartition("inner.")[2]: row.treatment for row in optimizer.coverage()}


def afresh(model: nn.Module, structure: Any, steps: int) -> ng.NaturalGradient:
    """An optimizer that has seen nothing, and draws the signs of the step after ``steps`` others."""
    optimizer = optimizer_of(model, structure, **FORGETFUL)
    optimizer._steps = steps
    return optimizer


def assert_as_afresh(model: nn.Module, fresh: nn.Module, structure: Any) -> None:
    # A layer that is called as before keeps its eigenbasis, which one seen for the first time has from its batch.
    if not isinstance(structure, ng.EigenKronecker):
        assert_close(flat(model), flat(fresh), 1e-9)


@each_structure
def test_a_layer_that_is_no_longer_called_is_examined_again(structure):
    """The step after the change is that of an optimizer made afresh."""
    model = Switch()
    optimizer = optimizer_of(model, structure, **FORGETFUL)
    train(model, optimizer, range(3))
    model.bypass = True
    fresh = copy.deepcopy(model)
    reference = afresh(fresh, structure, 3)
    train(model, optimizer, [3])
    train(fresh, reference, [3])
    assert treatments(optimizer) == treatments(reference)
    assert_as_afresh(model, fresh, structure)


@each_structure
def test_a_layer_that_takes_no_part_is_left_alone(structure, monkeypatch):
    """An expert that a batch does not need is no reason to look again: what is known of it stays."""

    class Expert(Switch):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.b(h) if self.bypass else h[:, :3]

    model = Expert(bypass=True)
    optimizer = optimizer_of(model, structure, lr=0.1, damping=1e-2)
    train(model, optimizer, range(3))
    before, model.bypass = treatments(optimizer), False
    kept = {k: v.clone() for k, v in optimizer.state[model.b.weight].items() if k.startswith("average.")}
    looked: list[int] = []
    monkeypatch.setattr(ng.Fisher, "examine", lambda *_: looked.append(1) or {})
    train(model, optimizer, range(3, 5))
    assert not looked
    assert treatments(optimizer) == before
    if not isinstance(structure, ng.Dense | ng.Gram):  # b is a block of its own
        assert all(torch.equal(optimizer.state[model.b.weight][k], v) for k, v in kept.items() if "eigen" not in k)


@each_structure
@pytest.mark.parametrize("as_well", [False, True])
def test_another_module_around_the_parameters_is_examined(structure, as_well):
    model = Switch()
    optimizer = optimizer_of(model, structure, **FORGETFUL)
    train(model, optimizer, range(3))
    around = Around(model, as_well)
    twin = Around(copy.deepcopy(model), as_well)
    optimizer.attach(around)
    reference = afresh(twin, structure, 3)
    for seed in (3, 4):
        train(around, optimizer, [seed])
        train(twin, reference, [seed])
    assert treatments(optimizer) == treatments(reference)
    assert_as_afresh(around, twin, structure)


class Same(nn.Module):
    """Calls the network as it is, under another name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@each_structure
@pytest.mark.parametrize("how", ["attach", "detach"])
def test_averages_go_along_with_the_parameters(structure, how):
    """What is called as before keeps its averages: to the bit the run without the change."""
    model, twin = Switch(), Switch()
    optimizer, reference = (optimizer_of(m, structure, lr=0.1, damping=1e-2) for m in (model, twin))
    train(model, optimizer, range(3))
    train(twin, reference, range(6))
    if how == "detach":
        optimizer.detach()
    called: nn.Module = Same(model) if how == "attach" else model
    optimizer.attach(called)
    train(called, optimizer, range(3, 6))
    assert torch.equal(flat(model), flat(twin))


class Norms(Switch):
    """Has parameters that no layer rule serves, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__(bypass=True)
        self.shift, self.norm = nn.Parameter(torch.ones(5, dtype=torch.float64)), nn.LayerNorm(5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(torch.tanh(F.linear(x, self.a.weight, self.a.bias)) + self.shift))


@pytest.fixture
def compiler() -> Iterator[Any]:
    torch.compiler.reset()
    yield lambda model: torch.compile(model, backend="aot_eager")
    torch.compiler.reset()


@each_structure
@pytest.mark.parametrize("to", ["eager", "compiled"])
@pytest.mark.parametrize("late", [False, True], ids=["attached", "attached late"])
def test_checkpoints_pass_between_compiled_and_plain_models(structure, to, late, compiler):
    """Names differ by what the compiler adds; parameters and what is known of them are matched all the same."""
    model, again = Norms(), Norms()
    compiled, plain = (model, again) if to == "eager" else (again, model)
    wrapped = compiler(compiled)
    source, target = (wrapped, plain) if to == "eager" else (plain, wrapped)
    optimizer = optimizer_of(source, structure, lr=0.1, damping=1e-2, momentum=0.9)
    train(source, optimizer, range(3))
    again.load_state_dict(model.state_dict())
    resumed = optimizer_of(again.parameters() if late else target, structure, lr=0.1, damping=1e-2, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if late:
        resumed.attach(target)
    assert [row.treatment for row in resumed.coverage()] == [row.treatment for row in optimizer.coverage()]
    train(source, optimizer, range(3, 6))
    train(target, resumed, range(3, 6))
    assert_close(flat(again), flat(model), 1e-12)
