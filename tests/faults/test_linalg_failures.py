"""Factorisations that fail in torch itself: whatever fails and however, the model stays finite and the error is clear.

`tests/linalg/test_psd.py` has the ladder of a factorisation, `tests/optim/test_failures.py` a damping rule that fails.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import NatgradError, NonFiniteError, NotPositiveDefiniteError

TOLERATED = 3


def raising(error: type[Exception], text: str):
    def broken(matrix: Tensor, *args, **kwargs):
        raise error(text)

    return broken


def nan_cholesky(matrix: Tensor, *args, **kwargs):
    return torch.full_like(matrix, math.nan), torch.ones(matrix.shape[:-2], dtype=torch.int32)


def nan_eigh(matrix: Tensor, *args, **kwargs):
    return torch.full_like(matrix[..., 0], math.nan), torch.full_like(matrix, math.nan)


LIN_ALG = torch.linalg.LinAlgError
HOW = {
    "raises": lambda name: raising(LIN_ALG, "failed to converge because the input matrix is ill-conditioned"),
    "cusolver": lambda name: raising(RuntimeError, "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"),
    "nan": lambda name: nan_eigh if name == "eigh" else nan_cholesky,
}
# What inverts each metric: the function of torch.linalg it rests on.
METRICS = {
    "dense": ("cholesky_ex", ng.Fisher(ng.Exact(), ng.Dense()), 1e-2),
    "blocks": ("cholesky_ex", ng.Fisher(ng.Exact(), ng.BlockDiagonal()), 1e-2),
    "kfac": ("cholesky_ex", ng.Fisher(), ng.FactoredTikhonov(1e-2)),
    "kfac_eigen": ("eigh", ng.Fisher(), 1e-2),
    "ekfac": ("eigh", ng.Fisher(structure=ng.EigenKronecker()), 1e-2),
}


class Broken:
    """A function of torch.linalg that fails on chosen calls."""

    def __init__(self, monkeypatch, name: str, how: str) -> None:
        self.calls, self.fails = 0, lambda call: False
        original, broken = getattr(torch.linalg, name), HOW[how](name)

        def function(matrix: Tensor, *args, **kwargs):
            self.calls += 1
            return (broken if self.fails(self.calls) else original)(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, function)


def start(metric, damping) -> tuple[nn.Sequential, ng.NaturalGradient]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    options = {"damping": damping, "lr": 0.05, "refresh": ng.Refresh(1, 1)}
    return model, ng.NaturalGradient(model, ng.Categorical(), metric=metric, **options)


def step(model: nn.Module, optimizer: ng.NaturalGradient, seed: int) -> Tensor:
    """The change of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 3, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


def inverses(optimizer: ng.NaturalGradient) -> list[Tensor]:
    return [v.clone() for slot in optimizer.state.values() for k, v in slot.items() if k.startswith("inverse.")]


def finite(model: nn.Module, optimizer: ng.NaturalGradient) -> bool:
    tensors = [*model.parameters(), *(v for slot in optimizer.state.values() for v in slot.values())]
    return all(bool(torch.isfinite(t).all()) for t in tensors if isinstance(t, Tensor))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", METRICS)
def test_a_function_that_keeps_failing(monkeypatch, how, kind):
    """Three steps with the last good inverse and a warning each, then an error; and all is well once torch is."""
    name, metric, damping = METRICS[kind]
    model, optimizer = start(metric, damping)
    broken = Broken(monkeypatch, name, how)
    step(model, optimizer, 0)
    good, calls = inverses(optimizer), broken.calls
    assert good and calls
    broken.fails = lambda call: True
    for seed in range(TOLERATED):
        with pytest.warns(RuntimeWarning, match=rf"last good inverse.*\({seed + 1} of at most {TOLERATED}"):
            assert step(model, optimizer, seed + 1).any()
        assert all(torch.equal(a, b) for a, b in zip(good, inverses(optimizer), strict=True))
        assert finite(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((NotPositiveDefiniteError, NonFiniteError)) as failure:
        step(model, optimizer, 9)
    assert len(str(failure.value)) > 60
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    broken.fails = lambda call: False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(model, optimizer, 10).any()
    assert finite(model, optimizer)
    assert not all(torch.equal(a, b) for a, b in zip(good, inverses(optimizer), strict=True))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", METRICS)
def test_one_failing_call_is_retried_and_leaves_no_trace(monkeypatch, kind, how):
    """Whichever call it is: the ladder's next rung adds at most rounding to the matrix."""
    name, metric, damping = METRICS[kind]
    model, optimizer = start(metric, damping)
    broken = Broken(monkeypatch, name, how)
    expected = [step(model, optimizer, seed) for seed in range(3)]
    calls = broken.calls
    for at in range(1, calls + 1):
        model, optimizer = start(metric, damping)
        broken.calls, broken.fails = 0, lambda call, at=at: call == at
        for seed, move in enumerate(expected):
            torch.testing.assert_close(step(model, optimizer, seed), move, rtol=2e-3, atol=1e-6)
        assert broken.calls > calls  # there was a retry


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("structure", [ng.Gram(), ng.Dense()], ids=str)
def test_without_an_earlier_inverse_the_error_comes_at_once(monkeypatch, structure, how):
    """Gram's matrix is that of the batch: an inverse of another batch is none for it."""
    model, optimizer = start(ng.Fisher(ng.Exact(), structure), 1e-2)
    broken = Broken(monkeypatch, "cholesky_ex", how)
    if isinstance(structure, ng.Gram):
        step(model, optimizer, 0)
    broken.fails = lambda call: True
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NatgradError):
        step(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    broken.fails = lambda call: False
    assert step(model, optimizer, 2).any() and finite(model, optimizer)


@pytest.mark.parametrize("kind", METRICS)
def test_out_of_memory_is_torchs_own_error_and_the_next_step_works(monkeypatch, kind):
    """Not a question of numbers: trainers catch torch's error by its class, and shrink the batch."""
    name, metric, damping = METRICS[kind]
    model, optimizer = start(metric, damping)
    step(model, optimizer, 0)
    good, before = inverses(optimizer), [p.detach().clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, name, raising(torch.OutOfMemoryError, "Tried to allocate 2 GiB"))
        with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
            step(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(good, inverses(optimizer), strict=True))
    assert step(model, optimizer, 2).any() and finite(model, optimizer)
