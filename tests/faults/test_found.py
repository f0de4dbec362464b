"""What the fuzz found, each as the shortest program that shows it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import NatgradError

EXACT = ng.Fisher(ng.Exact(), ng.Dense())


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    return nn.Linear(3, 3).to(dtype), x.to(dtype), y


def step(model: nn.Module, optimizer: ng.NaturalGradient, x: Tensor, y: Tensor, fill: float | None = None) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x).float(), y).backward()
    for p in model.parameters():
        if fill is not None:
            p.grad.fill_(fill)
    optimizer.step()


def finite(tensors) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def test_an_infinite_lr_and_weight_decay():
    """A step (decayed by the length that was taken) or an error; not parameters of −∞."""
    model, x, y = problem()
    try:
        optimizer = ng.NaturalGradient(
            model, ng.Categorical(), lr=math.inf, weight_decay=0.01, search=ng.KLClip(0.01), metric=EXACT
        )
        step(model, optimizer, x, y)
    except NatgradError as error:
        assert "lr" in str(error) and "weight_decay" in str(error)
    assert finite(model.parameters())


def test_a_gradient_of_nan_becomes_zero_in_precondition_where_no_pass_is_of_use():
    model, x, y = problem()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=EXACT)
    F.cross_entropy(model(x * math.inf), y).backward()
    optimizer.precondition_()
    assert all(not bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize(
    "structure",
    [
        ng.Dense(),
        ng.Kronecker(),
        ng.MatrixFree(),
        ng.Gram(),
    ],
    ids=str,
)
def test_a_batch_whose_labels_are_all_ignored_is_skipped(structure):
    """Torch's loss is then 0/0, its gradient zero; there is nothing to learn and nothing wrong with the numbers."""
    model, x, y = problem()
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    optimizer = ng.NaturalGradient(
        model, likelihood, metric=ng.Fisher(ng.Exact(), structure), damping=0.1, lr=0.1, refresh=ng.Refresh(1, 1)
    )
    for labels in (torch.full_like(y, -100), y):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        output = model(x)
        optimizer.observe(output, labels)
        F.cross_entropy(output, labels).backward()
        optimizer.step()
        assert torch.equal(model.weight, before) == (labels is not y)


@pytest.mark.parametrize("metric", [ng.Euclidean(), EXACT], ids=["euclidean", "fisher"])
@pytest.mark.parametrize(
    ("search", "dtype"),
    [
        (ng.LearningRate(), torch.float32),
        (ng.KLClip(0.01), torch.float32),
        (ng.QuadraticFit(), torch.float32),
        (ng.TrustRegion(0.01), torch.float32),
        (ng.KLClip(0.01), torch.float16),
        (ng.TrustRegion(0.01), torch.float16),
    ],
    ids=lambda v: str(v).split("(")[0],
)
def test_steps_near_the_largest_number_stay_finite(metric, search, dtype):
    model, x, y = problem(dtype)
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=metric, damping=1.0, lr=1.0, search=search)
    for _ in range(4):
        step(model, optimizer, x, y, 0.6 * torch.finfo(dtype).max)
        assert finite(model.parameters()), optimizer.last


@pytest.mark.parametrize(
    ("search", "dtype", "metric"),
    [
        (ng.LearningRate(predict=False), torch.float32, ng.Euclidean()),
        (ng.LearningRate(predict=False), torch.float32, EXACT),
        (ng.LearningRate(), torch.float16, ng.Euclidean()),
    ],
    ids=["sgd", "fisher", "half"],
)
def test_sums_that_overflow_do_not_reach_the_parameters(search, dtype, metric):
    model, x, y = problem(dtype)
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=metric, damping=1.0, lr=1.0, search=search)
    for _ in range(4):
        step(model, optimizer, x, y, 0.6 * torch.finfo(dtype).max)
        assert finite(model.parameters())


def test_momentum_that_overflows_is_not_kept():
    """Else it is infinite for ever, and no later step is ever taken."""
    model, x, y = problem()
    optimizer = ng.NaturalGradient(
        model, ng.Categorical(), metric=ng.Euclidean(), momentum=0.9, lr=1e-3, search=ng.LearningRate(predict=False)
    )
    step(model, optimizer, x, y)
    for _ in range(3):
        step(model, optimizer, x, y, 3e38)
    assert finite(slot["momentum"] for slot in optimizer.state.values())
    before = model.weight.detach().clone()
    step(model, optimizer, x, y)
    assert not torch.equal(model.weight, before)


def test_batch_norm_in_evaluation_mode_with_bfloat16_averages():
    """Statistics are taken in float32, and torch's batch norm wants its averages in the precision of the input."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).bfloat16()
    model[1].eval()
    _, x, y = problem(torch.bfloat16)
    optimizer = ng.KFAC(model, ng.Categorical())
    before = model[1].weight.detach().clone()
    step(model, optimizer, x, y)
    assert finite(model.parameters()) and not torch.equal(model[1].weight, before)
