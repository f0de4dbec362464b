"""Limits on mean time, on memory and on the slowest steps: who keeps them, what is said where nobody does, and that the
recommended program is one."""

from __future__ import annotations

import math

import pytest
import torch
from planned import PRESETS, held, wide
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.cli.plan import program
from natgrad.errors import ArgumentError
from natgrad.metric import Fisher
from natgrad.planning import Choice, Profile, plan, predict
from natgrad.planning.limits import Limits
from natgrad.planning.shapes import block_shapes, on_meta
from natgrad.planning.timing import Rates, renewal_cost

RATES = {"16": 1e-4, "1024": 1e-1}
MADE_UP = Profile(
    "a made-up device", "0", {"float32": {"8,8": 1e11, "1024,1024": 1e11}}, RATES, RATES, RATES, {"65536": 1e11}, 1e-7
)
BASE = Choice("kfac", "KFAC")


def deep() -> nn.Module:
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(128, 128), nn.Tanh())], nn.Linear(128, 10))


def rates(*refresh: float, statistics: float = 2.0) -> Rates:
    return Rates(1.0, statistics, refresh, 0.5, 0, {str(i): t for i, t in enumerate(refresh)})


def test_steps_of_a_period():
    """Of 1.5, statistics 2 at every 2nd step, inverses 3 + 1 at every 4th."""
    found = rates(3.0, 1.0)
    assert found.steps(2, 4, "Refresh") == [7.5, 1.5, 3.5, 1.5]
    assert sorted(found.shares(4)) == [0.0, 0.0, 1.0, 3.0]
    assert sorted(found.steps(1, 4, "Staggered")) == [3.5, 3.5, 4.5, 6.5]
    together, spread = (found.at(BASE, 2, 4, kind) for kind in ("Refresh", "Staggered"))
    assert together.seconds == spread.seconds == together.ratio == 3.5
    assert (together.p99, together.worst) == (7.5 / 2.5, 7.5)
    assert together.staggered == spread.staggered == max(found.steps(2, 4, "Staggered"))
    assert spread.p99 < together.p99


@pytest.mark.parametrize(("inverse", "slowest"), [(10, 4.5), (100, 4.5), (101, 1.5), (200, 1.5)])
def test_fewer_than_one_step_in_a_hundred_may_take_longer(inverse, slowest):
    assert rates(3.0, statistics=0.0).at(BASE, 1, inverse).p99 == pytest.approx(slowest / 1.5)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_shares_are_those_of_the_optimizer(name):
    """Which block is renewed when, as the optimizer divides them: widths of 96, 80, 80 and 10."""
    model, shapes = wide(), block_shapes(on_meta(wide()), ng.Kronecker() if name == "kfac" else ng.EigenKronecker())
    optimizer = PRESETS[name](model, ng.Categorical(), refresh=ng.Staggered(1, 2))
    F.cross_entropy(model(torch.randn(8, 96)), torch.zeros(8, dtype=torch.long)).backward()
    optimizer.step()
    names = [s.block.name for s in shapes]
    found = Rates(1.0, 0.0, (1.0, 10.0, 100.0), 0.0, 0, {s.block.name: renewal_cost(s) for s in shapes}).shares(2)
    for number in (0, 1):
        due = optimizer._curvature.share(number, 2)
        assert found[number] == sum(10.0**i for i, n in enumerate(names) if n in due)


def test_renewals_are_spread_where_the_slowest_steps_are_limited():
    free = plan(deep(), batch=256, profile=MADE_UP)["kfac"]
    assert free.refresh == "Refresh" and free.p99 > 2.0 and "Staggered" not in free.code
    even = plan(deep(), batch=256, max_p99=2.0, profile=MADE_UP)["kfac"]
    assert even.refresh == "Staggered" and even.p99 <= 2.0 and not even.problem
    assert f"refresh=ng.Staggered({even.statistics}, {even.inverse})" in even.code
    assert even.schedule.endswith("spread over the steps")


def test_part_of_the_rows_where_the_mean_time_is_limited():
    found = plan(deep(), batch=8192, max_overhead=0.35, max_p99=1.6, profile=MADE_UP)["kfac"]
    assert not found.problem and found.overhead <= 0.35 and found.p99 <= 1.6
    assert found.fraction < 1 and f"structure=ng.Kronecker(sampling=ng.{found.sampling}({found.part}))" in found.code


def test_examples_run_by_themselves_only_where_there_are_many_and_none_sees_another():
    def sampled(model: nn.Module, batch: int) -> str:
        return plan(model, batch=batch, max_overhead=0.25, profile=MADE_UP)["kfac"].sampling

    coupled = nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), *deep())
    assert sampled(deep(), 4096) == "SubBatch" and sampled(coupled, 4096) == "Sampling" == sampled(deep(), 32)


def test_wide_factors_get_blocks_where_square_ones_do_not_fit():
    model = nn.Sequential(nn.Linear(1500, 1500, bias=False), nn.Tanh(), nn.Linear(1500, 10))
    whole = plan(model, batch=256, profile=MADE_UP)["kfac"]
    assert whole.block == 0 and "WidthLimits" not in whole.code
    packed = plan(model, batch=256, max_memory=whole.state - 1, profile=MADE_UP)["kfac"]
    assert (packed.block, packed.packed) == (0, True) and packed.state < whole.state and not packed.problem
    found = plan(model, batch=256, max_memory=packed.state - 1, profile=MADE_UP)["kfac"]
    assert found.block == 1024 and found.state < packed.state and not found.problem
    assert "structure=ng.Kronecker(widths=ng.WidthLimits(full=1024, block=1024)" in found.code
    for choice in (packed, found):
        assert (choice.statistics, choice.inverse, choice.fraction) == (1, 10, 1.0)
        optimizer = eval(choice.code, {"ng": ng, "model": model, "likelihood": ng.Categorical()})
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 1500)), torch.zeros(8, dtype=torch.long)).backward()
            optimizer.step()
        assert choice.state == held(optimizer)


def test_each_limit_says_who_keeps_it():
    whole = plan(wide(), batch=512, profile=MADE_UP)
    found = plan(wide(), batch=512, max_overhead=0.01, max_memory=whole["diagonal"].state - 1, profile=MADE_UP)
    assert found.recommended is None and found.nearest is not None
    assert "1.01 × SGD's time is kept by none: the least is" in found.reason
    assert "of state is kept by gram, matrix-free" in found.reason
    assert found[found.nearest].problem in found.reason and found.as_json()["nearest"] == found.nearest
    # The nearest is no further off than any other, both limits together.
    limits = Limits(0.01, whole["diagonal"].state - 1)
    finite = [c for c in found.choices if math.isfinite(c.ratio)]
    assert limits.excess(found[found.nearest]) == min(limits.excess(c) for c in finite)


def test_excess_is_of_all_limits_together():
    choice = Choice("kfac", "KFAC", state=300, ratio=3.0, p99=1.2)
    assert Limits(0.5, 100, 1.0).excess(choice) == pytest.approx(2.0 * 3.0 * 1.2)
    assert Limits(5.0, 1000).excess(choice) == 1.0 and Limits().excess(choice) == 1.0
    assert Limits(0.5, 100).problem(choice) == "3 × SGD's time (limit 1.5); 300 B of state (limit 100 B)"
    assert Limits(p99=1.1).problem(choice) == "slowest steps 1.2 × the median (limit 1.1)"


@pytest.mark.parametrize("p99", [0.9, math.nan, math.inf, True, "1.3"])
def test_limits_on_the_slowest_steps_are_checked(p99):
    with pytest.raises(ArgumentError, match="max_p99="):
        plan(wide(), max_p99=p99, profile=MADE_UP)


BUDGETS = (
    {}, {"max_overhead": 2.0}, {"max_overhead": 0.5}, {"max_overhead": 0.2}, {"max_p99": 1.2},
    {"max_overhead": 0.5, "max_p99": 1.5}, {"max_memory": "100 kB"}, {"max_memory": "2 kB"},
)  # fmt: skip


@pytest.mark.parametrize("batch", [16, 4096])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_program_runs_as_it_is_printed(budget, batch):
    found = plan(wide(), batch=batch, profile=MADE_UP, **budget)
    for choice in found.choices:
        if math.isfinite(choice.ratio):
            check_program(choice)


def check_program(choice: Choice) -> None:
    model = wide(inputs=8, hidden=6, outputs=3)
    names = {"model": model}
    exec(program(choice, ""), names)
    optimizer = names["optimizer"]
    assert type(optimizer).__name__ == choice.preset
    if choice.schedule:
        assert optimizer._refresh == getattr(ng, choice.refresh)(choice.statistics, choice.inverse)
    metric = optimizer._metric
    assert isinstance(metric, Fisher) and type(optimizer._search).__name__ == choice.search
    if choice.name in ("kfac", "ekfac"):
        assert metric.structure.sampling == getattr(ng, choice.sampling)(choice.fraction)
        assert isinstance(metric.structure.storage, ng.Packed) == choice.packed
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(12, 8)), torch.arange(12) % 3).backward()
        optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_predictions_know_of_sampling_and_of_schedules():
    args = dict(batch=4096, search="KLClip", profile=MADE_UP)
    whole = predict(deep(), ng.Kronecker(), **args)
    part = predict(deep(), ng.Kronecker(sampling=ng.Sampling(1 / 16)), **args)
    assert part.fraction == 1 / 16 and part.seconds < whole.seconds
    alone = predict(deep(), ng.Kronecker(sampling=ng.SubBatch(1 / 16)), **args)
    assert alone.sampling == "SubBatch" and alone.seconds < part.seconds and alone.transient < whole.transient
    spread = predict(deep(), ng.Kronecker(), refresh="Staggered", **args)
    assert spread.seconds == pytest.approx(whole.seconds) and spread.p99 < whole.p99
