"""Gradients cleared behind the optimizer's back, by ``model.zero_grad()``: the passes they came from do not count."""

from __future__ import annotations

import gc

import pytest
import torch
from optim_problems import batch, flat, make
from torch.nn import functional as F

import natgrad as ng
from support import assert_close

PRESETS = {"kfac": ng.KFAC, "gram": ng.GramNGD, "trust region": ng.TrustRegionNGD}
OPTIONS = {"kfac": {"estimate": ng.Exact()}, "gram": {"estimate": ng.Exact()}, "trust region": {}}
CLEAR = {
    "none": lambda model: model.zero_grad(),
    "zeros": lambda model: model.zero_grad(set_to_none=False),
    "by hand": lambda model: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
}


def loss(model, seed: int):
    x, y = batch(seed)
    return F.cross_entropy(model(x), y)


def made(name: str):
    model = make()
    return model, PRESETS[name](model, ng.Categorical(), **OPTIONS[name])


@pytest.mark.parametrize("order", ["before the forward pass", "before the backward pass"])
@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("name", PRESETS)
def test_a_discarded_pass_leaves_no_trace_in_the_step(name, clear, order):
    model, optimizer = made(name)
    twin, other = made(name)
    for seed in range(2):
        (100 * loss(model, 7 + seed)).backward()
        if order == "before the forward pass":
            CLEAR[clear](model)
            value = loss(model, seed)
        else:
            value = loss(model, seed)
            CLEAR[clear](model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss(twin, seed).backward()
        other.step()
        other.zero_grad()
    assert_close(flat(model), flat(twin), 1e-12)


@pytest.mark.parametrize("between", ["nothing", "clipping", "one parameter None", "another backward pass"])
@pytest.mark.parametrize("name", PRESETS)
def test_micro_batches_still_are_one_batch(name, between):
    """Whatever a loop does to the gradients between them, short of discarding all."""
    model, optimizer = made(name)
    for seed in range(3):
        loss(model, seed).backward()
        if between == "clipping":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if between == "one parameter None":
            model[0].weight.grad = None
        if between == "another backward pass":
            sum(p.square().sum() for p in model.parameters()).backward()
        assert len(optimizer._observer.observations) == seed + 1
    optimizer.step()
    assert optimizer.last.accepted


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_that_are_set_by_hand_and_zero_gradients_count(name):
    model, optimizer = made(name)
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for seed in range(2):
        for t, g in zip(total, torch.autograd.grad(loss(model, seed), parameters), strict=True):
            t += g
    assert len(optimizer._observer.observations) == 2
    for p, t in zip(parameters, total, strict=True):
        p.grad = t
    optimizer.step()
    optimizer.zero_grad()
    for seed in range(2):
        (0.0 * loss(model, seed)).backward()
    assert len(optimizer._observer.observations) == 2


@pytest.mark.parametrize("name", PRESETS)
def test_passes_without_a_step_do_not_fill_the_memory(name):
    model, optimizer = made(name)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def passes(count: int) -> int:
        for _ in range(count):
            model.zero_grad()
            loss(model, 0).backward()
        return tensors()

    loss(model, 0).backward()
    optimizer.step()
    few = passes(3)
    assert passes(30) <= few


def test_a_batch_that_the_scaler_skips_leaves_no_trace():
    figures = []
    for skipped in (True, False):
        model, optimizer = made("kfac")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, backoff_factor=1.0 - 2**-20)
        for seed in range(4):
            if seed == 2 and not skipped:
                continue
            model.zero_grad()
            scaler.scale(loss(model, seed)).backward()
            if seed == 2:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        figures.append(flat(model))
    assert_close(figures[0], figures[1], 1e-6)
