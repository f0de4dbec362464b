"""What load_state_dict makes of layers unfrozen late, other dtypes and states that do not fit or are not whole."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from optim_problems import batch, flat
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError

METRICS = {
    "kfac": ng.Fisher(ng.MonteCarlo(), ng.Kronecker()),
    "ekfac": ng.Fisher(ng.MonteCarlo(), ng.EigenKronecker()),
    "diagonal": ng.Fisher(ng.MonteCarlo(), ng.Diagonal()),
    "dense": ng.Fisher(ng.MonteCarlo(), ng.Dense()),
}
each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


def net(width: int = 3) -> nn.Sequential:
    """Two layers of equal shapes: what is given to the wrong one of them does not show as an error of shapes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3)).double()


def optimizer_of(model, metric=METRICS["kfac"], parameters=None) -> ng.NaturalGradient:
    return ng.NaturalGradient(
        model if parameters is None else parameters, ng.Categorical(), metric=metric, lr=0.05, momentum=0.9,
        damping=1e-2, refresh=ng.Refresh(1, 5),
    )  # fmt: skip


def train(model, optimizer, *seeds: int) -> None:
    for seed in seeds:
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
        optimizer.step()


def unfrozen_late(metric) -> tuple[nn.Module, ng.NaturalGradient]:
    model = net()
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model, metric)
    train(model, optimizer, 0, 1, 2)
    model[0].requires_grad_(True)
    train(model, optimizer, 3, 4, 5)
    return model, optimizer


@pytest.mark.parametrize("how", ["trainable from the start", "unfrozen before loading", "unfrozen after loading"])
@each_metric
def test_a_layer_unfrozen_late_gets_its_own_state_back(metric, how):
    model, optimizer = unfrozen_late(metric)
    again = net()
    again.load_state_dict(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    again[0].requires_grad_(how == "trainable from the start")
    resumed = optimizer_of(again, metric)
    again[0].requires_grad_(how != "unfrozen after loading")
    resumed.load_state_dict(saved)
    again[0].requires_grad_(True)
    train(model, optimizer, 6, 7, 8)
    train(again, resumed, 6, 7, 8)
    assert torch.equal(flat(model), flat(again))


def test_places_of_an_older_order_do_not_matter():
    """Names decide: the same state with its parameters in another order, as one of a run of another version."""
    model, optimizer = unfrozen_late(METRICS["kfac"])
    saved = copy.deepcopy(optimizer.state_dict())
    number = {2: 0, 3: 1, 0: 2, 1: 3}
    for part in (saved, saved["param_groups"][0]):
        for key in ("state", "parameters"):
            if key in part:
                part[key] = {number[i]: value for i, value in part[key].items()}
    saved["param_groups"][0]["params"] = [number[i] for i in (2, 3, 0, 1)]
    again = copy.deepcopy(model)
    resumed = optimizer_of(again)
    resumed.load_state_dict(saved)
    train(model, optimizer, 6, 7)
    train(again, resumed, 6, 7)
    assert torch.equal(flat(model), flat(again))


@each_metric
def test_a_layer_that_was_frozen_when_it_was_saved_starts_afresh(metric):
    """As in a run that goes on and unfreezes it, which keeps blocks of other layers and drops blocks with this one."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model, metric)
    train(model, optimizer, 0, 1, 2)
    saved, again = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    for m in (model, again):
        m[0].requires_grad_(True)
    resumed = optimizer_of(again, metric)
    resumed.load_state_dict(saved)
    train(model, optimizer, 3, 4, 5)
    train(again, resumed, 3, 4, 5)
    assert torch.equal(flat(model), flat(again))
    assert optimizer.state_dict()["parameters"] == resumed.state_dict()["parameters"]


def test_snapshots_of_a_run_with_a_layer_unfrozen_late(tmp_path):
    model, optimizer = unfrozen_late(METRICS["kfac"])
    ng.save(tmp_path / "run", model, optimizer)
    again = net()
    again[0].requires_grad_(False)
    resumed = optimizer_of(again)
    again[0].requires_grad_(True)
    ng.load(tmp_path / "run", again, resumed)
    train(model, optimizer, 6, 7)
    train(again, resumed, 6, 7)
    assert torch.equal(flat(model), flat(again))


def test_a_state_loaded_by_place_is_checked_by_attach():
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0)
    order = [model[2].weight, model[2].bias, model[0].weight, model[0].bias]
    other = optimizer_of(model, parameters=order)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ArgumentError, match=r"state of 0\.weight went to 2\.weight.*attach\(model\) first"):
        other.attach(model)
    other = optimizer_of(model, parameters=list(model.parameters()))
    other.load_state_dict(optimizer.state_dict())
    other.attach(model)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
@each_metric
def test_a_state_goes_into_a_model_of_another_dtype(metric, dtypes):
    """As a run of the new dtype from the start, to the rounding of the coarser one."""
    source, target = dtypes
    runs = {}
    for dtype in dtypes:
        model = net().to(dtype)
        runs[dtype] = model, optimizer_of(model, metric)
        train(*runs[dtype], 0, 1, 2)
    again = copy.deepcopy(runs[source][0]).to(target)
    resumed = optimizer_of(again, metric)
    resumed.load_state_dict(runs[source][1].state_dict())
    held = [t for s in resumed.state.values() for k, t in s.items() if k != "step"]
    assert held and all(t.dtype == target for t in held)
    train(again, resumed, 3, 4, 5)
    train(*runs[target], 3, 4, 5)
    torch.testing.assert_close(flat(again), flat(runs[target][0]), rtol=1e-4, atol=1e-5)


def lost(start: str):
    def edit(state):
        for slot in state["state"].values():
            for key in [key for key in slot if key.startswith(start)]:
                del slot[key]

    return edit


def noted(**changes):
    def edit(state):
        group = state["param_groups"][0]
        group["natgrad"] = json.dumps({**json.loads(group["natgrad"]), **changes})

    return edit


def set_in(*path, value):
    def edit(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return edit


BROKEN = {
    "averages": (lost("average"), r"lacks 'average\.input', 'average\.output' of parameter 0\.weight"),
    "inverses": (lost("inverse"), r"lacks 'inverse\.[a-z._]+', .* of parameter 0\.weight"),
    "weights": (lost("weight"), r"lacks 'weight\.input'"),
    "momentum": (lost("momentum"), r"lacks 'momentum' of parameter 0\.weight"),
    "one parameter": (lambda state: state["state"].pop(2), r"lacks .* of parameter 2\.weight"),
    "all tensors": (lambda state: state["state"].clear(), "has taken 3 steps, but holds no tensors"),
    "note cut short": (
        lambda state: set_in("param_groups", 0, "natgrad", value=state["param_groups"][0]["natgrad"][:20])(state),
        "is damaged",
    ),
    "note is no table": (set_in("param_groups", 0, "natgrad", value="3"), "is damaged"),
    "note without steps": (noted(steps=None), "is damaged"),
    "damping": (noted(damping={"value": "much"}), "is damaged|does not take"),
    "no note": (set_in("param_groups", 0, "natgrad", value=""), "not of a natgrad optimizer"),
    "shape of momentum": (set_in("state", 0, "momentum", value=torch.zeros(2)), r"'momentum' of parameter 0\.weight"),
    "groups": (lambda state: state["param_groups"].append(dict(state["param_groups"][0])), "2 parameter groups"),
    "no state": (lambda state: state.pop("state"), "'state' and 'param_groups'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_that_is_not_whole_is_refused_and_nothing_is_loaded(case):
    edit, message = BROKEN[case]
    model, other = net(), net()
    options = {"lr": 0.05, "momentum": 0.9, "search": ng.KLClip(1e-2)}
    make = lambda m: ng.KFAC(m, ng.Categorical(), damping=ng.LevenbergMarquardt(1e-2), **options)  # noqa: E731
    optimizer, resumed = make(model), make(other)
    for m, o, seeds in ((model, optimizer, range(3)), (other, resumed, range(10, 12))):
        for seed in seeds:
            x, y = batch(seed)
            o.zero_grad()
            f = m(x)
            o.observe(f, y)
            F.cross_entropy(f, y).backward()
            o.step()
    before, control = copy.deepcopy(resumed.state_dict()), copy.deepcopy((other, resumed))
    state = copy.deepcopy(optimizer.state_dict())
    edit(state)
    with pytest.raises(ArgumentError, match=message):
        resumed.load_state_dict(state)
    after = resumed.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["parameters"] == before["parameters"]
    for i, slot in before["state"].items():
        assert all(torch.equal(value, after["state"][i][key]) for key, value in slot.items())
    for m, o in ((other, resumed), control):
        x, y = batch(20)
        o.zero_grad()
        f = m(x)
        o.observe(f, y)
        F.cross_entropy(f, y).backward()
        o.step()
    assert torch.equal(flat(other), flat(control[0]))


def test_another_layer_size_and_another_network_are_refused_by_name():
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0)
    with pytest.raises(ArgumentError, match=r"0\.weight has shape \(3, 3\) in the state, and \(5, 3\) in this model"):
        optimizer_of(net(5)).load_state_dict(optimizer.state_dict())
    wrapped = nn.ModuleDict({"inner": net()})
    wrapped.forward = lambda x: wrapped["inner"](x)
    with pytest.raises(ArgumentError, match=r"0\.weight is only in the state"):
        optimizer_of(wrapped).load_state_dict(optimizer.state_dict())


def test_the_state_of_adam_is_refused():
    model = net()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, 0)
    with pytest.raises(ArgumentError, match="not of a natgrad optimizer"):
        optimizer_of(model).load_state_dict(adam.state_dict())
