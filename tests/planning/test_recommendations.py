"""What is recommended, and what the limits do; times are those of a device that is made up."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest
import torch
from planned import wide
from torch import nn

import natgrad as ng
from natgrad.errors import ArgumentError
from natgrad.planning import Profile, plan, predict
from natgrad.planning.sizes import memory_limit, size_text

RATES = {"16": 1e-5, "1024": 1e-2}
MADE_UP = Profile(
    "a made-up device", "0", {"float32": {"8,8": 1e11, "1024,1024": 1e11}}, RATES, {"16": 1e-4, "1024": 1e-1}, RATES,
    {"65536": 1e11}, 1e-7,
)  # fmt: skip


def deep() -> nn.Module:
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(128, 128), nn.Tanh())], nn.Linear(128, 10))


def test_every_structure_is_planned():
    found = plan(deep(), batch=256, profile=MADE_UP)
    assert [c.name for c in found.choices] == ["kfac", "ekfac", "diagonal", "block", "gram", "dense", "matrix-free"]
    assert found.parameters == sum(p.numel() for p in deep().parameters())
    assert found.adam == 8 * found.parameters
    for choice in found.choices:
        if not choice.problem:
            assert choice.ratio > 1 and choice.state > 0 and choice.transient > 0
            assert choice.seconds == pytest.approx(choice.ratio * found.sgd)
            assert choice.worst >= choice.staggered >= choice.ratio - 1e-9


def test_blocks_too_large_are_named():
    found = plan(deep(), batch=256, profile=MADE_UP)
    assert "dense matrix of 67338 × 67338" in found["dense"].problem and math.isinf(found["dense"].ratio)
    assert found.as_json()["choices"][5]["ratio"] is None
    json.dumps(found.as_json(), allow_nan=False)


def test_a_limit_of_time_makes_schedules_seldom_and_is_kept():
    free = plan(deep(), batch=4096, profile=MADE_UP)["kfac"]
    assert (free.statistics, free.inverse, free.search) == (1, 10, "QuadraticFit")
    before = free
    for limit in (1.0, 0.5, 0.2):
        choice = plan(deep(), batch=4096, max_overhead=limit, profile=MADE_UP)["kfac"]
        assert choice.overhead <= limit and not choice.problem
        assert choice.statistics * choice.inverse >= before.statistics * before.inverse
        before = choice
    assert before.fraction < 1 and before.search == "KLClip"


def test_what_cannot_keep_a_limit_of_time_says_by_how_much():
    found = plan(deep(), batch=4096, max_overhead=0.001, profile=MADE_UP)
    assert found.recommended is None and found.best is None
    assert found["kfac"].problem == f"{found['kfac'].ratio:.4g} × SGD's time (limit 1.001)"
    assert found.nearest == min(found.choices, key=lambda c: c.ratio).name
    assert found.reason.startswith("No structure keeps the limit. 1.001 × SGD's time is kept by none: the least is")
    assert f"The nearest is {found.nearest}" in found.reason


def test_a_limit_of_memory_leaves_out_what_is_larger():
    whole = plan(deep(), batch=4096, profile=MADE_UP)
    limit = whole["diagonal"].state
    found = plan(deep(), batch=4096, max_memory=limit, profile=MADE_UP)
    assert "of state (limit" in found["kfac"].problem and "of state (limit" in found["ekfac"].problem
    assert (found["kfac"].statistics, found["kfac"].inverse, found["kfac"].fraction) == (1, 10, 1.0)
    assert found.recommended not in (None, "kfac", "ekfac")
    assert found.best.state <= limit
    exactly = plan(deep(), batch=4096, max_memory=whole["kfac"].state, profile=MADE_UP)
    assert exactly["kfac"].problem == "" and not exactly["kfac"].packed


def test_the_exact_structure_where_it_is_no_dearer():
    small, large = (plan(wide(800, 900), batch=b, profile=MADE_UP) for b in (32, 4096))
    assert small.recommended == "gram" and "exact" in small.reason
    assert small["gram"].ratio <= small["kfac"].ratio
    assert large.recommended == "kfac"


def test_recommended_code_makes_that_optimizer():
    model = deep()
    for limit in (None, 0.3):
        found = plan(model, batch=4096, max_overhead=limit, profile=MADE_UP)
        assert found.best is not None
        made = eval(found.best.code, {"ng": ng, "model": model, "likelihood": ng.Categorical()})
        assert type(made).__name__ == found.best.preset
        assert made._refresh == ng.Refresh(found.best.statistics, found.best.inverse)


def test_intervals_divide_what_they_spread():
    kwargs = dict(batch=512, search="KLClip", profile=MADE_UP)
    one, ten, seldom = (predict(deep(), "kfac", statistics=s, inverse=i, **kwargs) for s, i in
                        ((1, 10), (10, 10), (10, 100)))  # fmt: skip
    sgd = plan(deep(), batch=512, profile=MADE_UP).sgd
    every = predict(deep(), "kfac", statistics=1, inverse=1, **kwargs)
    statistics = (one.seconds - ten.seconds) / 0.9
    inverse = (ten.seconds - seldom.seconds) / 0.09
    assert statistics > 0 and inverse > 0
    assert every.seconds == pytest.approx(one.seconds + 0.9 * inverse)
    assert seldom.worst * sgd == pytest.approx(every.seconds)
    assert seldom.staggered < seldom.worst
    assert every.staggered == pytest.approx(every.worst)


def test_time_comes_from_the_profile():
    slow = dataclasses.replace(
        MADE_UP, gemm={"float32": {"8,8": 1e10, "1024,1024": 1e10}}, bandwidth={"65536": 1e10}, call=1e-6,
        **{kind: {n: 10 * t for n, t in getattr(MADE_UP, kind).items()} for kind in ("inverse", "eigh", "qr")},
    )  # fmt: skip
    fast, tenth = (plan(deep(), batch=256, profile=p) for p in (MADE_UP, slow))
    assert tenth.sgd == pytest.approx(10 * fast.sgd)
    assert tenth["ekfac"].ratio == pytest.approx(fast["ekfac"].ratio)


def test_rows_come_from_inputs_or_from_batch_and_tokens():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10))
    found = ng.inspect(model, inputs=torch.randn(5, 1, 8, 8))
    assert [row.rows for row in found.layers] == [5 * 64, 5] and (found.batch, found.tokens) == (5, 64)
    assumed = ng.inspect(model, batch=5, tokens=7)
    assert [row.rows for row in assumed.layers] == [35, 35] and not assumed.seen


def test_inspection_adds_up():
    found = ng.inspect(deep(), "kfac", batch=64)
    assert sum(row.state for row in found.layers) == found.state
    assert found.parameters == sum(p.numel() for p in deep().parameters())
    first = found.layers[0]
    assert (first.name, first.type, first.treatment, first.factors) == ("0", "Linear", "Kronecker", "129² × 128²")
    assert first.statistics == 2 * 64 * (129**2 + 128**2)
    assert first.refresh == 129**3 + 128**3 and first.application == 2 * 129 * 128 * (129 + 128)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
def test_state_of_layers_is_all_of_it(structure):
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.LSTM(5, 3))
    found = ng.inspect(model, structure)
    assert sum(row.state for row in found.layers) == found.state > 0


def test_what_is_not_covered_is_named_with_its_reason():
    model = nn.Sequential(nn.Linear(6, 5), nn.LSTMCell(5, 3))
    found = ng.inspect(model)
    assert [row.name for row in found.uncovered] == [f"1.{n}" for n, _ in model[1].named_parameters()]
    assert all(row.treatment == "Diagonal" and "LSTM" in row.reason for row in found.uncovered)
    assert found.as_json()["uncovered"] == [row.name for row in found.uncovered]


def test_a_weight_used_past_its_module_is_found_by_running():
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias)))

    assert ng.inspect(Bypass(), batch=5).uncovered == ()
    found = ng.inspect(Bypass(), inputs=torch.randn(5, 4))
    assert {row.name for row in found.uncovered} == {"first.weight", "first.bias"}
    assert "without calling its module" in found.uncovered[0].reason


def test_a_structure_may_be_given_as_itself():
    assert ng.inspect(deep(), ng.Kronecker.reduce(), batch=8).layers[0].treatment == "Kronecker"
    assert predict(deep(), ng.EigenKronecker(), batch=8, profile=MADE_UP).preset == "EKFAC"


def test_wide_sides_are_shown_with_what_a_square_factor_would_take():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(50257, 768), nn.Linear(768, 12288), nn.Linear(12288, 50257, bias=False))
    for structure, times in (("kfac", 1), ("ekfac", 2)):
        table, wide, head = ng.inspect(model, structure, batch=64).layers
        assert [row.factors for row in (table, wide, head)] == [
            "diagonal 50257 × 768²", "769² × 12·1024²", "12·1024² × diagonal 50257",
        ]  # fmt: skip
        assert table.reason == ""
        assert wide.reason == "output: blocks of 1024 (12288 wide; a square factor and its inverse would take 1.21 GB)"
        inputs, outputs = head.reason.split("; output: ")
        assert inputs.startswith("input: blocks of 1024 (12288 wide;")
        assert outputs == "diagonal (50257 wide; a square factor and its inverse would take 20.2 GB)"
        assert wide.application == times * 2 * (769**2 * 12288 + 12 * 1024**2 * 769)
        assert head.application == times * 2 * 12 * 1024**2 * 50257
    kfac = ng.inspect(model, "kfac", batch=64).layers
    assert kfac[2].statistics == 12 * 2 * 64 * 1024**2 * 0.625 and kfac[2].refresh == 12 * 1024**3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ng.inspect(deep(), "kfca"), "did you mean 'kfac'"),
        (lambda: ng.inspect(deep(), 3), "must be a Structure"),
        (lambda: ng.inspect("model"), "must be a torch.nn.Module"),
        (lambda: ng.inspect(deep(), batch=0), "batch=0 was given"),
        (lambda: ng.inspect(deep(), tokens=True), "tokens=True was given"),
        (lambda: ng.inspect(deep(), batch=2, inputs=torch.randn(2, 128)), "not both"),
        (lambda: ng.inspect(deep(), inputs=torch.randn(2, 7)), "does not run on inputs without memory"),
        (lambda: ng.inspect(deep(), "dense"), "dense matrix of 67338"),
        (lambda: plan("model"), "must be a torch.nn.Module"),
        (lambda: plan(deep(), max_overhead=-0.1, profile=MADE_UP), "max_overhead=-0.1 was given"),
        (lambda: plan(deep(), max_overhead=math.nan, profile=MADE_UP), "max_overhead=nan was given"),
        (lambda: plan(deep(), max_memory="much", profile=MADE_UP), "max_memory='much' was given"),
        (lambda: plan(deep(), max_memory=0, profile=MADE_UP), "max_memory=0 was given"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ArgumentError, match=message.replace("(", r"\(")):
        call()


@pytest.mark.parametrize(
    ("text", "count"),
    [("4 GB", 4e9), ("512MiB", 2**29), ("100", 100), ("2x-adam", 80), ("1.5k", 1500), (7, 7), ("2 TB", 2e12)],
)
def test_sizes(text, count):
    assert memory_limit(text, 40) == count


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (5.5e12, "5.5 TB")])
def test_size_texts(count, text):
    assert size_text(count) == text


def test_a_model_without_memory_is_planned_in_seconds():
    """A decoder of 70 billion parameters in 80 layers, whose weights would fill 280 GB."""
    width, inner = 8192, 28672
    with torch.device("meta"):
        layers = [
            m
            for _ in range(80)
            for m in (*(nn.Linear(width, n, bias=False) for n in (width, 1024, 1024, width)),
                      *(nn.Linear(*s, bias=False) for s in ((width, inner), (width, inner), (inner, width))),
                      nn.RMSNorm(width))
        ]  # fmt: skip
        model = nn.ModuleList([nn.Embedding(32000, width), *layers, nn.Linear(width, 32000, bias=False)])
    started = time.perf_counter()
    found = plan(model, batch=8, tokens=4096, profile=MADE_UP)
    assert time.perf_counter() - started < 60  # some seconds; the bound is for busy machines
    assert found.parameters > 6.8e10
    # Sides wider than 8192 have blocks: 28 of 1024 and 31 of 1008, and what is left over of 32000.
    inner_blocks, head_blocks = 28 * 1024**2, 31 * 1008**2 + 752**2
    factors = 80 * (9 * width**2 + 2 * 1024**2 + 3 * inner_blocks) + 32000 + head_blocks + 2 * width**2
    diagonals, tensors = 80 * width, 80 * 8 + 2
    curvature = 4 * (2 * (factors + diagonals) + 2 * tensors - 80 + 1)
    assert found["kfac"].state == curvature + 4 * found.parameters + 4 * tensors
