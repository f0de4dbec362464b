"""The exact Fisher matrix of a fit, taken on a part of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import natgrad as ng
from natgrad.errors import ArgumentError
from natgrad.metric.running import Refresh
from natgrad.metric.sampling import Picks


def _model(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 3)).double()


def _batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


def _step(opt: ng.NaturalGradient, model: nn.Module, x: Tensor, y: Tensor, likelihood: Any = None) -> None:
    opt.zero_grad()
    output = model(x)
    if likelihood is None:
        F.cross_entropy(output, y).backward()
    else:
        target = (y, torch.arange(1.0, 9.0, dtype=x.dtype))
        opt.observe(output, target)
        (likelihood.nll(output, target).sum() / target[1].sum()).backward()
    opt.step()


def _first_step(monkeypatch: pytest.MonkeyPatch, model: nn.Module, likelihood: Any = None) -> tuple[Tensor, Tensor]:
    """(gradient, change) of a first step that fits on the examples 1, 3 and 6."""
    index = torch.tensor([1, 3, 6])
    monkeypatch.setattr(Picks, "of", lambda self, n, device: index if self.fraction < 1 else None)
    x, y = _batch()
    opt = ng.KFAC(model, likelihood or ng.Categorical(), damping=0.1, search=ng.QuadraticFit(fraction=3 / 8, least=1))
    before = parameters_to_vector(model.parameters()).detach()
    _step(opt, model, x, y, likelihood)
    gradient = parameters_to_vector([p.grad for p in model.parameters()])
    return gradient, parameters_to_vector(model.parameters()).detach() - before


def _exact(model: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    """Σ w J'ΛJ / Σ w, written out."""
    names = [n for n, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    jacobians = torch.autograd.functional.jacobian(run, values)
    j = torch.cat([part.flatten(2) for part in jacobians], 2)
    p = run(*values).softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("n,nci,ncd,ndj->ij", weights / weights.sum(), j, middle, j)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_length_minimises_the_quadratic_model_of_the_part_with_the_slope_of_the_whole(monkeypatch, weighted):
    likelihood = ng.Weighted(ng.Categorical()) if weighted else None
    x, _ = _batch()
    index = torch.tensor([1, 3, 6])
    weights = torch.arange(1.0, 9.0, dtype=x.dtype)[index] if weighted else torch.ones(3, dtype=x.dtype)
    fisher = _exact(_model(), x[index], weights)
    gradient, change = _first_step(monkeypatch, _model(), likelihood)
    damped = fisher + 0.1 * torch.eye(len(fisher), dtype=x.dtype)
    assert change.norm() > 1e-3
    torch.testing.assert_close(change @ damped @ change, -gradient @ change, rtol=1e-8, atol=0)


def test_a_model_that_couples_its_batch_is_fitted_on_all_of_it(monkeypatch):
    sizes: list[int] = []
    model = _model(nn.BatchNorm1d(4))
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    _first_step(monkeypatch, model)
    assert set(sizes) == {8}


def test_other_examples_at_every_step_and_the_same_ones_in_a_resumed_run(monkeypatch):
    picked: list[list[int]] = []
    of = Picks.of

    def watched(self: Picks, n: int, device: torch.device) -> Tensor | None:
        index = of(self, n, device)
        if index is not None:
            picked.append(index.tolist())
        return index

    monkeypatch.setattr(Picks, "of", watched)

    def make(model: nn.Module) -> ng.KFAC:
        return ng.KFAC(
            model, ng.Categorical(), damping=0.1, search=ng.QuadraticFit(fraction=0.5, least=1), refresh=Refresh(4, 4)
        )

    model = _model()
    opt = make(model)
    for seed in range(3):
        _step(opt, model, *_batch(seed))
    other = _model()
    other.load_state_dict(model.state_dict())
    resumed = make(other)
    resumed.load_state_dict(opt.state_dict())
    assert len({tuple(p) for p in picked}) > 1
    for seed in range(3, 6):
        for o, m in ((opt, model), (resumed, other)):
            _step(o, m, *_batch(seed))
    assert picked[3::2] == picked[4::2] and len(picked) == 9
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ArgumentError, match="fraction"):
        ng.QuadraticFit(fraction=fraction)


def test_only_the_steps_that_are_judged_are_measured():
    model = _model()
    rule = ng.LevenbergMarquardt(0.1, every=3)
    opt = ng.KFAC(model, ng.Categorical(), damping=rule, search=ng.QuadraticFit())
    measured = []
    for seed in range(7):
        x, y = _batch(seed)
        opt.zero_grad()
        output = model(x)
        opt.observe(output, y)
        F.cross_entropy(output, y).backward()
        opt.step()
        assert opt.last is not None
        measured.append(opt.last.loss_change_measured is not None)
    assert measured == [False, False, True, False, False, True, False]
    assert opt.damping.value != 0.1


def test_a_part_of_a_small_batch_is_all_of_it():
    picks = ng.Sampling(1 / 4, least=6).picks(torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    found = [picks.of(n, cpu) for n in (5, 6, 8, 24, 40)]
    assert found[:2] == [None, None]
    assert [len(index) for index in found[2:] if index is not None] == [6, 6, 10]


@pytest.mark.parametrize("least", [0, 1.5])
def test_a_least_number_out_of_range_is_refused(least):
    with pytest.raises(ArgumentError, match="least"):
        ng.QuadraticFit(least=least)
    with pytest.raises(ArgumentError, match="least"):
        ng.SubBatch(0.5, least=least)
