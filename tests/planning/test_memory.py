"""Predicted bytes of state are those that the optimizer holds after its first steps: to the byte."""

from __future__ import annotations

import pytest
import torch
from planned import PRESETS, held, single, stepped, wide
from torch import nn

import natgrad as ng
from natgrad.planning import plan
from natgrad.planning.planner import predict
from natgrad.planning.profile import Profile
from natgrad.planning.shapes import block_shapes, geometries, on_meta
from natgrad.testing.zoo import Case, case

RATES = {"16": 1e-4, "1024": 1e-2}
PROFILE = Profile(
    "a test", "0", {"float32": {"32,32": 5e10, "512,512": 1e11}}, RATES, RATES, RATES, {"65536": 1e10}, 1e-6
)
MODELS = (
    "mlp", "deep_linear", "frozen_bias", "frozen_weight", "raw_parameter", "conv2d", "conv2d_groups",
    "conv2d_depthwise", "conv3d", "layer_norm", "group_norm", "batch_norm_train", "reused", "embedding_bag", "mixer",
    "attention", "flattened", "lstm", "heads",
)  # fmt: skip


@pytest.mark.parametrize("structure", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_state(name, structure):
    found = single(name)
    predicted = plan(found.model, inputs=found.x, profile=PROFILE)[structure]
    optimizer = PRESETS[structure](found.model, ng.Categorical())
    stepped(found, optimizer)
    assert predicted.state == held(optimizer)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
def test_bytes_of_state_where_gram_matrices_are_padded(structure):
    """Symmetric products wider than 512 are computed in storage with padded rows, which no state may keep."""
    x = torch.randn(6, 530)
    model = wide(530, 20) if structure != "block" else wide(30, 20)
    found = Case("wide", model, x if structure != "block" else x[:, :30])
    predicted = plan(model, batch=6, profile=PROFILE)[structure]
    optimizer = PRESETS[structure](model, ng.Categorical())
    stepped(found, optimizer)
    assert predicted.state == held(optimizer)


def test_search_without_the_step_before_holds_less():
    found = single("mlp")
    limited = plan(found.model, batch=5, profile=PROFILE, max_memory="1 GB")["gram"]
    plain = ng.GramNGD(found.model, ng.Categorical(), search=ng.KLClip(1e-3))
    stepped(found, plain)
    parameters = sum(p.numel() for p in found.model.parameters())
    assert limited.state - held(plain) == 4 * parameters


def test_half_precision_holds_curvature_in_float32():
    model = wide().bfloat16()
    found = Case("half", model, torch.randn(6, 96).bfloat16())
    predicted = plan(model, batch=6, profile=PROFILE)
    for name in ("kfac", "diagonal"):
        optimizer = PRESETS[name](model, ng.Categorical())
        stepped(found, optimizer)
        assert predicted[name].state == held(optimizer), name


def test_nothing_is_allocated_for_shapes():
    model = wide()
    meta = on_meta(model)
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    assert not any(p.is_meta for p in model.parameters())
    with torch.device("meta"):
        huge = nn.Sequential(nn.Linear(10**5, 10**5), nn.Linear(10**5, 10))
    assert on_meta(huge) is huge
    (first, second) = block_shapes(huge, ng.Kronecker(widths=ng.WidthLimits(full=10**6)))
    assert first.bytes == 4 * (2 * ((10**5 + 1) ** 2 + 10**10) + 2)
    assert second.bytes == 4 * (2 * ((10**5 + 1) ** 2 + 100) + 2)
    (first, second) = block_shapes(huge, ng.Kronecker())
    assert first.bytes == 4 * (2 * (10**5 + 1 + 10**5) + 2)
    assert second.bytes == 4 * (2 * (10**5 + 1 + 100) + 2)


LIMITS = {
    "blocks": ng.WidthLimits(full=2, blocks=100, block=2),
    "diagonal": ng.WidthLimits(full=3, blocks=0),
    "identity": ng.WidthLimits(full=3, blocks=0, beyond="identity"),
    "some": ng.WidthLimits(full=2, blocks=4, block=3),
}


@pytest.mark.parametrize("structure", [ng.Kronecker, ng.EigenKronecker, ng.Kronecker.reduce])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("name", ["mlp", "conv2d_groups", "embedding_bag", "attention", "tied_embedding", "lstm"])
def test_bytes_of_wide_sides(name, limits, structure):
    found = single(name)
    method = structure(widths=limits)
    predicted = predict(found.model, method, inputs=found.x, profile=PROFILE)
    optimizer = PRESETS[predicted.name](found.model, ng.Categorical(), structure=method)
    stepped(found, optimizer)
    assert predicted.state == held(optimizer)


STORAGES = {"packed": ng.Packed(least=2), "bfloat16": ng.Packed(torch.bfloat16, least=3)}


@pytest.mark.parametrize("structure", [ng.Kronecker, ng.EigenKronecker, ng.Kronecker.reduce])
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize(
    "name", ["mlp", "conv2d_groups", "embedding_bag", "attention", "tied_embedding", "layer_norm", "raw_parameter"]
)
def test_bytes_of_packed_matrices(name, storage, structure):
    for limits in (ng.WidthLimits(), LIMITS["blocks"]):
        found = single(name)
        method = structure(storage=storage, widths=limits)
        predicted = predict(found.model, method, inputs=found.x, profile=PROFILE)
        optimizer = PRESETS[predicted.name](found.model, ng.Categorical(), structure=method)
        stepped(found, optimizer)
        assert predicted.state == held(optimizer)


def test_bytes_of_packed_matrices_by_hand():
    (kept,) = block_shapes(on_meta(nn.Linear(199, 300)), ng.Kronecker(storage=ng.Packed(torch.bfloat16)))
    assert kept.bytes == (4 + 2) * (200 * 201 + 300 * 301) // 2 + 2 * 4


def test_frozen_and_tied_parameters_are_shared_and_left_out_on_meta():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    meta = on_meta(model)
    assert meta[1].weight is meta[0].weight and not meta[1].bias.requires_grad
    assert sum(g.cell.size for g in geometries(meta)) == 9 + 3


def test_geometry_is_that_of_the_weights():
    found = {g.cell.name: g for g in geometries(on_meta(case("conv2d_groups").model))}
    conv, head = found["0"], next(g for name, g in found.items() if name != "0")
    assert (conv.groups, conv.outputs, conv.inputs) == (2, 3, 2 * 2 * 2 + 1)
    assert (head.groups, head.outputs, head.inputs) == (1, 3, 7)


def test_lazy_and_frozen_models_are_refused():
    with pytest.raises(ValueError, match="lazy"):
        plan(nn.Sequential(nn.LazyLinear(3)), batch=2, profile=PROFILE)
    with pytest.raises(ValueError, match="no trainable parameters"):
        plan(wide().requires_grad_(False), batch=2, profile=PROFILE)
