"""A rejected step says why, and a learning rate that is not a number is named."""

from __future__ import annotations

import math

import pytest
import torch
from optim_problems import batch, flat, make
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError

SEARCHES = [ng.LearningRate(), ng.LearningRate(predict=False), ng.KLClip(0.01), ng.TrustRegion(0.01), ng.QuadraticFit()]


def gradients(model, optimizer) -> None:
    x, y = batch()
    optimizer.zero_grad()
    f = model(x)
    optimizer.observe(f, y)
    F.cross_entropy(f, y).backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_gradient_that_is_not_finite_is_the_reason(search, bad):
    model = make()
    optimizer = ng.KFAC(model, ng.Categorical(), search=search, lr=0.1)
    gradients(model, optimizer)
    optimizer.step()
    assert optimizer.last.accepted and optimizer.last.reason == ""
    start = flat(model)
    gradients(model, optimizer)
    model[0].weight.grad[0, 0] = bad
    optimizer.step()
    assert not optimizer.last.accepted and "finite" in optimizer.last.reason
    assert torch.equal(flat(model), start)


def test_a_step_that_overflows_the_parameters_is_the_reason():
    model = torch.nn.Linear(3, 3).to(torch.float16)
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=ng.Euclidean(), lr=4e4)
    x, _ = batch()
    f = model(x.half())
    f.sum().backward()
    optimizer.step()
    assert not optimizer.last.accepted and "sum with the parameters" in optimizer.last.reason


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("search", [ng.TrustRegion(0.01), ng.QuadraticFit(max_kl=0.01)], ids=str)
def test_a_warmup_from_zero_of_an_infinite_rate_is_named(search, tensor):
    model = make()
    lr = torch.tensor(math.inf) if tensor else math.inf
    optimizer = ng.KFAC(model, ng.Categorical(), lr=lr, search=search)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # inf · 0
    start = flat(model)
    gradients(model, optimizer)
    if tensor:
        optimizer.step()
        assert not optimizer.last.accepted and "inf by 0" in optimizer.last.reason
    else:
        with pytest.raises(ArgumentError, match=r"lr.* inf"):
            optimizer.step()
    assert torch.equal(flat(model), start)
