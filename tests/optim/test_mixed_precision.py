"""Curvature under automatic mixed precision: accumulated and inverted in float32 wherever the calls stand."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad as ng

PRESETS = {
    "ngd": ng.NGD,
    "block": ng.BlockNGD,
    "diagonal": ng.DiagonalNGD,
    "kfac": ng.KFAC,
    "ekfac": ng.EKFAC,
    "gram": ng.GramNGD,
    "trust region": ng.TrustRegionNGD,
}
STRUCTURES = [ng.Dense(), ng.Diagonal(), ng.Kronecker(), ng.EigenKronecker(), ng.Gram(), ng.MatrixFree()]


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def mixed() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_state_stays_in_float32_and_the_step_is_near_that_of_full_precision(name, inside):
    steps = []
    for autocast in (mixed, contextlib.nullcontext):
        model, (x, y) = make(), batch()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = PRESETS[name](model, ng.Categorical())
        with autocast():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        with autocast() if inside else contextlib.nullcontext():
            optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        assert all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    assert torch.linalg.vector_norm(steps[0]) > 0
    # The forward pass differs by bfloat16's rounding, and only by that.
    assert torch.linalg.vector_norm(steps[0] - steps[1]) < 0.1 * torch.linalg.vector_norm(steps[1])


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_operator_is_of_float32(structure):
    model, (x, _) = make(), batch()
    full = ng.fisher(model, ng.Categorical(), x, structure=structure).to_dense()
    with mixed():
        got = ng.fisher(model, ng.Categorical(), x, structure=structure)
        dense = got.to_dense()
    assert got.dtype == dense.dtype == torch.float32
    assert torch.linalg.matrix_norm(dense - full) < 0.03 * torch.linalg.matrix_norm(full)
