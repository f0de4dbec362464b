"""With the Euclidean metric the optimizer is SGD.

To the bit: torch.optim.SGD with any momentum and no weight decay. natgrad's weight decay is decoupled, as AdamW's is,
so what must hold with weight decay is SGD after p ← (1 − lr·w) p; without momentum that is SGD's own coupled decay in
exact arithmetic.
"""

from __future__ import annotations

import copy

import pytest
import torch
from optim_problems import batch, make
from torch.nn import functional as F

import natgrad as ng
from support import assert_close


def run(options: dict, oracle_decay: float, sgd: dict, dtype: torch.dtype, steps: int = 6) -> tuple[list, list]:
    ours, theirs = make().to(dtype), make().to(dtype)
    optimizer = ng.NaturalGradient(ours, ng.Categorical(), metric=ng.Euclidean(), **options)
    oracle = torch.optim.SGD(theirs.parameters(), **sgd)
    for seed in range(steps):
        x, y = batch(seed)
        for model, opt in ((ours, optimizer), (theirs, oracle)):
            opt.zero_grad()
            F.cross_entropy(model(x.to(dtype)), y).backward()
            if opt is oracle and oracle_decay:
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1 - sgd["lr"] * oracle_decay)
            opt.step()
    return list(ours.parameters()), list(theirs.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lr", [0.1, 0.0731])
def test_sgd_to_the_bit(lr, momentum, decay, dtype):
    options = {"lr": lr, "momentum": momentum, "weight_decay": decay}
    ours, theirs = run(options, decay, {"lr": lr, "momentum": momentum}, dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_without_momentum_decoupled_decay_is_sgds_own():
    ours, theirs = run({"lr": 0.1, "weight_decay": 0.3}, 0.0, {"lr": 0.1, "weight_decay": 0.3}, torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.detach(), b.detach(), 1e-14)


def test_no_forward_pass_needs_to_be_seen():
    """Gradients from anywhere, as with SGD."""
    model = make()
    expected = copy.deepcopy(model)
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.5, metric=ng.Euclidean())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p, q - 0.5) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def test_damping_and_solver_have_nothing_to_act_on():
    ours, theirs = run({"lr": 0.1, "damping": 7.0}, 0.0, {"lr": 0.1}, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_tensor_learning_rate_is_followed():
    model = make()
    lr = torch.tensor(0.1)
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=lr, metric=ng.Euclidean())
    x, y = batch()
    for value in (0.1, 0.5):
        lr.fill_(value)
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert_close(p.detach() - q.detach(), -float(lr) * p.grad, 1e-12)
