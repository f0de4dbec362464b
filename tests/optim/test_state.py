"""Checkpoints: what they hold, what they refuse, and other ways of saving than torch.save."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim_problems import batch, flat, make
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError

METRICS = {
    "kfac": ng.Fisher(ng.MonteCarlo(), ng.Kronecker()),
    "ekfac": ng.Fisher(ng.MonteCarlo(), ng.EigenKronecker()),
    "dense": ng.Fisher(ng.MonteCarlo(), ng.Dense()),
    "gram": ng.Fisher(ng.MonteCarlo(), ng.Gram()),
}


def optimizer_of(model, metric, **options) -> ng.NaturalGradient:
    return ng.NaturalGradient(model, ng.Categorical(), metric=metric, lr=0.05, momentum=0.9, damping=1e-2, **options)


def step(model, optimizer, seed: int) -> None:
    x, y = batch(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
    optimizer.step()


def through_file(state) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(optimizer) -> dict[tuple, Tensor]:
    return {
        (i, key): value
        for i, slot in enumerate(optimizer.state_dict()["state"].values())
        for key, value in slot.items()
    }


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_state_is_plain_tensors_under_parameters(metric):
    model = make()
    optimizer = optimizer_of(model, metric)
    assert not optimizer.state  # lazily: nothing before the first step
    step(model, optimizer, 0)
    assert all(p in set(model.parameters()) for p in optimizer.state)
    assert all(isinstance(t, Tensor) and not t.requires_grad for t in tensors(optimizer).values())


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_dtypes_survive_loading_into_a_low_precision_model(metric):
    """torch's own load_state_dict would cast the float32 factors to the parameters' bfloat16."""
    model = make().bfloat16()
    optimizer = optimizer_of(model, metric)
    for seed in range(3):
        step(model, optimizer, seed)
    again = make().bfloat16()
    again.load_state_dict(model.state_dict())
    resumed = optimizer_of(again, metric)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    before, after = tensors(optimizer), tensors(resumed)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key
    curvature = [t for (_, key), t in before.items() if key.startswith(("average", "inverse", "basis"))]
    assert all(t.dtype == torch.float32 for t in curvature)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, resumed, seed)
        assert torch.equal(flat(model), flat(again))


def test_the_state_given_is_not_the_state_kept():
    model = make()
    optimizer = optimizer_of(model, METRICS["kfac"])
    step(model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    other = make()
    resumed = optimizer_of(other, METRICS["kfac"])
    resumed.load_state_dict(saved)
    for seed in range(3):
        step(other, resumed, seed)
    original = optimizer.state_dict()
    for i, slot in saved["state"].items():
        for key, value in slot.items():
            assert torch.equal(value, original["state"][i][key]), key
    assert "natgrad" in saved["param_groups"][0]  # loading takes nothing out of it either


def test_saving_changes_nothing():
    model, other = make(), make()
    first, second = optimizer_of(model, METRICS["ekfac"]), optimizer_of(other, METRICS["ekfac"])
    for seed in range(6):
        first.state_dict()
        step(model, first, seed)
        step(other, second, seed)
    assert torch.equal(flat(model), flat(other))


def test_loading_in_the_middle_of_a_run_replaces_everything():
    """Roll back: ten steps, back to the state after five, five again: the same to the bit."""
    model = make()
    optimizer = optimizer_of(model, METRICS["kfac"], refresh=ng.Refresh(1, 4))
    for seed in range(5):
        step(model, optimizer, seed)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    for seed in range(5, 10):
        step(model, optimizer, seed)
    expected = flat(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for seed in range(5, 10):
        step(model, optimizer, seed)
    assert torch.equal(flat(model), expected)


def test_adapted_damping_is_part_of_the_state():
    model = make()
    options = {"metric": METRICS["kfac"], "damping": ng.LevenbergMarquardt(ng.FactoredTikhonov(1e-2)), "lr": 0.3}
    optimizer = ng.NaturalGradient(model, ng.Categorical(), **options)
    for seed in range(4):
        x, y = batch(seed)
        optimizer.zero_grad()
        f = model(x)
        optimizer.observe(f, y)
        F.cross_entropy(f, y).backward()
        optimizer.step()
    assert optimizer.damping.value != 1e-2
    resumed = ng.NaturalGradient(make(), ng.Categorical(), **options)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert resumed.damping.value == optimizer.damping.value


@pytest.mark.parametrize("other", ["ekfac", "dense", "gram"])
def test_a_checkpoint_of_another_metric_is_refused_by_name(other):
    model = make()
    optimizer = optimizer_of(model, METRICS["kfac"])
    step(model, optimizer, 0)
    with pytest.raises(ArgumentError, match=r"Kronecker.*same metric"):
        optimizer_of(make(), METRICS[other]).load_state_dict(optimizer.state_dict())


def test_a_checkpoint_of_another_model_is_refused():
    model = make()
    optimizer = optimizer_of(model, METRICS["kfac"])
    step(model, optimizer, 0)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer_of(torch.nn.Linear(3, 3).double(), METRICS["kfac"]).load_state_dict(optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_distributed_checkpoint_round_trip(metric, flatten, tmp_path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make()
    optimizer = optimizer_of(model, metric)
    for seed in range(3):
        step(model, optimizer, seed)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    again = make(seed=7)
    resumed = optimizer_of(again, metric)
    step(again, resumed, 0)
    empty = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, resumed, options=options)}
    dcp.load(empty, checkpoint_id=tmp_path, no_dist=True)
    again.load_state_dict(empty["model"])
    set_optimizer_state_dict(again, resumed, empty["optimizer"], options=options)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, resumed, seed)
    assert torch.equal(flat(model), flat(again))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("metric", ["kfac", "ekfac", "dense"])
def test_distributed_checkpoint_into_an_optimizer_that_has_never_stepped(metric, tmp_path):
    """It steps once with zero gradients and loads what is then there: the whole state must be laid out by that."""
    model, again = make(), make(seed=7)
    optimizer, resumed = (optimizer_of(m, METRICS[metric]) for m in (model, again))
    for seed in range(3):
        step(model, optimizer, seed)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    empty = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, resumed)}
    dcp.load(empty, checkpoint_id=tmp_path, no_dist=True)
    again.load_state_dict(empty["model"])
    set_optimizer_state_dict(again, resumed, empty["optimizer"])
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, resumed, seed)
    assert torch.equal(flat(model), flat(again))


def test_steps_are_hooked_and_printed_like_any_optimizer():
    model = make()
    optimizer = optimizer_of(model, METRICS["kfac"])
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    step(model, optimizer, 0)
    assert order == ["pre", "post"]
    assert "lr: 0.05" in repr(optimizer)


def test_parameters_of_another_module_are_refused():
    optimizer = optimizer_of(make(), METRICS["kfac"])
    with pytest.raises(ArgumentError, match="do not belong to the module"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1


def test_metrics_are_numbers():
    model = make()
    optimizer = optimizer_of(model, METRICS["kfac"])
    assert optimizer.metrics() == {}
    step(model, optimizer, 0)
    found = optimizer.metrics()
    assert found["natgrad/accepted"] == 1.0 and found["natgrad/kl_predicted"] > 0
    assert all(type(v) is float for v in found.values())
