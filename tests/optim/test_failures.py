"""Failures of linear algebra: the last good inverse stays in use, and repeated failure is one clear error."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from optim_problems import batch, flat, make
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import NonFiniteError, NotObservedError, NotPositiveDefiniteError
from natgrad.linalg import psd
from natgrad.optim import curvature as curvature_module

OPTIONS = {"refresh": ng.Refresh(1, 1), "lr": 0.05, "damping": 1e-2}


class Failing:
    """Stands in for a damping's inverse and fails on chosen calls."""

    def __init__(self, monkeypatch, error: type[Exception] = NotPositiveDefiniteError) -> None:
        self.failing, self.error = False, error
        original = ng.Constant.inverse

        def inverse(this, operator, solver=None):
            if self.failing:
                raise self.error("injected")
            return original(this, operator, solver)

        monkeypatch.setattr(ng.Constant, "inverse", inverse)


def step(model, optimizer, seed: int = 0) -> torch.Tensor:
    before = flat(model)
    optimizer.zero_grad()
    x, y = batch(seed)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return flat(model) - before


def inverses(optimizer) -> list[torch.Tensor]:
    return [inverse.to_dense().clone() for inverse in optimizer._curvature.inverses.values()]


@pytest.mark.parametrize("error", [NotPositiveDefiniteError, NonFiniteError])
@pytest.mark.parametrize("structure", [ng.Kronecker(), ng.EigenKronecker(), ng.Dense(), ng.Diagonal()], ids=str)
def test_the_last_good_inverse_stays_then_an_error(monkeypatch, structure, error):
    model = make()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=ng.Fisher(structure=structure), **OPTIONS)
    failing = Failing(monkeypatch, error)
    step(model, optimizer, 0)
    good = inverses(optimizer)
    failing.failing = True
    for seed in range(3):
        with pytest.warns(RuntimeWarning, match=rf"could not be inverted.*\({seed + 1} of at most 3"):
            assert step(model, optimizer, seed + 1).any()
        assert all(torch.equal(a, b) for a, b in zip(good, inverses(optimizer), strict=True))
    before = flat(model)
    with pytest.raises(error, match="injected"):
        step(model, optimizer, 9)
    assert torch.equal(flat(model), before)


def test_a_success_starts_the_count_anew(monkeypatch):
    model = make()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), **OPTIONS)
    failing = Failing(monkeypatch)
    step(model, optimizer)
    for _ in range(3):
        failing.failing = True
        for seed in range(3):
            with pytest.warns(RuntimeWarning, match=f"{seed + 1} of at most 3"):
                step(model, optimizer)
        failing.failing = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(model, optimizer)


def test_without_any_good_inverse_the_error_comes_at_once(monkeypatch):
    model = make()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), **OPTIONS)
    Failing(monkeypatch).failing = True
    before = flat(model)
    with pytest.raises(NotPositiveDefiniteError, match="injected"):
        step(model, optimizer)
    assert torch.equal(flat(model), before)


def test_only_the_block_that_fails_keeps_its_old_inverse(monkeypatch):
    model = make()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), **OPTIONS)
    step(model, optimizer, 0)
    good = dict(zip(optimizer._curvature.inverses, inverses(optimizer), strict=True))
    original = ng.Constant.inverse

    def inverse(this, operator, solver=None):
        if operator.shape[0] == 16:  # the first layer
            raise NotPositiveDefiniteError("injected")
        return original(this, operator, solver)

    monkeypatch.setattr(ng.Constant, "inverse", inverse)
    with pytest.warns(RuntimeWarning, match="curvature of 0 could not"):
        step(model, optimizer, 1)
    new = dict(zip(optimizer._curvature.inverses, inverses(optimizer), strict=True))
    assert torch.equal(new["0"], good["0"]) and not torch.equal(new["3"], good["3"])


def test_a_cholesky_factorisation_that_fails_is_met_by_the_ladder(monkeypatch):
    """torch.linalg.cholesky_ex reports failure for float32; float64 then does it, and the step is the same."""
    moves = []
    original = torch.linalg.cholesky_ex
    for broken in (False, True):
        model = make().float()

        def cholesky_ex(a, *args, broken=broken, **kwargs):
            factor, info = original(a, *args, **kwargs)
            if broken and a.dtype == torch.float32:
                return torch.full_like(factor, math.nan), torch.ones_like(info)
            return factor, info

        monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)
        optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=ng.Fisher(structure=ng.Dense()), **OPTIONS)
        x, y = batch()
        before = flat(model)
        F.cross_entropy(model(x.float()), y).backward()
        optimizer.step()
        moves.append(flat(model) - before)
    assert moves[0].any()
    torch.testing.assert_close(moves[1], moves[0], rtol=1e-3, atol=1e-6)


def test_every_rung_failing_is_an_error_that_says_what_to_do(monkeypatch):
    def cholesky_ex(a, *args, **kwargs):
        return torch.full_like(a, math.nan), torch.ones(a.shape[:-2], dtype=torch.int32)

    model = make()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=ng.Fisher(structure=ng.Dense()), **OPTIONS)
    step(model, optimizer, 0)
    good, before = inverses(optimizer), flat(model)
    monkeypatch.setattr(psd.torch.linalg, "cholesky_ex", cholesky_ex)
    with pytest.warns(RuntimeWarning, match="damping"):
        step(model, optimizer, 1)
    assert torch.equal(good[0], inverses(optimizer)[0]) and not torch.equal(before, flat(model))


def test_a_batch_of_nan_does_not_enter_the_averages_even_when_it_is_the_first():
    """Also the question which layers are covered is not answered by NaN: it waits for a finite pass."""
    model, reference = make(), make()
    optimizer = ng.NaturalGradient(model, ng.Categorical(), **OPTIONS)
    expected = ng.NaturalGradient(reference, ng.Categorical(), **OPTIONS)
    x, y = batch()
    for bad in (math.nan, math.inf):
        poisoned = x.clone()
        poisoned[0, 0] = bad
        optimizer.zero_grad()
        F.cross_entropy(model(poisoned), y).backward()
        if any(not torch.isfinite(p.grad).all() for p in model.parameters()):
            optimizer.step()
        assert not optimizer.state
    optimizer.zero_grad()
    assert optimizer.last is not None and not optimizer.last.accepted and "finite" in optimizer.last.reason
    for seed in range(3):
        torch.testing.assert_close(step(model, optimizer, seed), step(reference, expected, seed), rtol=1e-9, atol=0)


def test_step_without_a_pass_is_an_error_and_zero_gradients_are_not():
    model = make()
    optimizer = ng.KFAC(model, ng.Categorical())
    optimizer.step()  # no gradients
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # as torch.distributed.checkpoint initialises an optimizer
    before = flat(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(NotObservedError, match=r"no training pass.*closure"):
        optimizer.step()
    assert torch.equal(flat(model), before)


def test_the_tolerated_number_of_failures_is_what_the_tests_assume():
    assert curvature_module._TOLERATED_FAILURES == 3
