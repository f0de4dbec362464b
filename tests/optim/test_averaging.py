"""The average of the iterates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import natgrad as ng
from natgrad.errors import ArgumentError


def _iterates(model: nn.Module, averaged: AveragedModel, seeds: range) -> list[torch.Tensor]:
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        averaged.update_parameters(model)
        found.append(next(iter(model.parameters())).detach().clone())
    return found


@pytest.mark.parametrize(("decay", "n"), [(0.75, 3), (0.75, 9), (0.0, 4), (0.99, 20)])
def test_a_plain_mean_at_first_and_an_exponential_one_later(decay, n):
    model = nn.Linear(3, 2).double()
    averaged = AveragedModel(model, multi_avg_fn=ng.iterate_average(decay))
    iterates = _iterates(model, averaged, range(n))
    expected = torch.zeros_like(iterates[0])
    for k, value in enumerate(iterates, 1):
        beta = min(1 - 1 / k, decay)
        expected = beta * expected + (1 - beta) * value
    torch.testing.assert_close(averaged.module.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    if n <= 1 / (1 - decay):
        torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(iterates).mean(0))


def test_a_resumed_average_goes_on_bit_for_bit():
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    averages = [AveragedModel(m, multi_avg_fn=ng.iterate_average(0.75)) for m in models]
    _iterates(models[0], averages[0], range(3))
    averages[1].load_state_dict(averages[0].state_dict())
    for model, averaged in zip(models, averages, strict=True):
        _iterates(model, averaged, range(3, 6))
    assert torch.equal(averages[0].module.weight, averages[1].module.weight)


def test_beside_an_optimizer_it_sees_the_iterates_and_leaves_no_trace_in_training():
    def train(average: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        opt = ng.KFAC(model, ng.Categorical())
        averaged = AveragedModel(model, multi_avg_fn=ng.iterate_average(0.5), use_buffers=True) if average else None
        for _ in range(4):
            x, y = torch.randn(8, 3), torch.randint(2, (8,))
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            if averaged is not None:
                averaged.update_parameters(model)
                averaged.eval()(x)
        last = model[0].weight.detach()
        return last, last if averaged is None else averaged.module[0].weight.detach()

    (plain, _), (watched, mean) = train(False), train(True)
    assert torch.equal(plain, watched) and not torch.equal(watched, mean)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan"), "0.9"])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ArgumentError, match="decay"):
        ng.iterate_average(decay)
