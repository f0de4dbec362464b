"""Running averages and the refresh schedule, against written-out sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad.errors import ArgumentError
from natgrad.metric.running import Average, Refresh, Staggered
from natgrad.metric.statistics import Moment, Moments, RowStatistics
from natgrad.network import DenseRows
from support import assert_close


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(0.0, 0.999))
def test_the_mean_is_the_weighted_sum_over_the_weights(values, decay):
    average = Average.start(torch.zeros(1, 2, dtype=torch.float64))
    for value in values:
        average.update_(torch.tensor([[value, 1.0]], dtype=torch.float64), decay)
    weights = [(1 - decay) * decay ** (len(values) - 1 - t) for t in range(len(values))]
    expected = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
    assert float(average.value[0, 0]) == pytest.approx(expected, rel=1e-10, abs=1e-10 * max(map(abs, values)))
    assert float(average.value[0, 1]) == pytest.approx(1.0, rel=1e-12)
    assert float(average.total[0, 1]) == pytest.approx(math.fsum(weights), rel=1e-12)


def test_the_first_value_counts_in_full():
    x = torch.tensor([[[2.0, 1.0], [1.0, 3.0]], [[4.0, 0.0], [0.0, 5.0]]], dtype=torch.float64)
    average = Average.start(x)
    average.update_(x, 0.95)
    assert_close(average.value, x, 1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(), (2,), (2, 2)])
def test_what_is_not_finite_is_left_out_alone(bad, first, shape):
    """Of three averages side by side only the poisoned one stays as it was."""
    good = torch.arange(1.0, 1 + 3 * math.prod(shape), dtype=torch.float64).reshape(3, *shape)
    poisoned = good.clone()
    poisoned[1].view(-1)[-1] = bad
    average, undisturbed = Average.start(good), Average.start(good)
    if not first:
        average.update_(good, 0.9)
        undisturbed.update_(good, 0.9)
    before = average.total[1].clone(), average.weight[1].clone()
    average.update_(2 * poisoned, 0.9)
    undisturbed.update_(2 * good, 0.9)
    assert torch.equal(average.total[1], before[0]) and torch.equal(average.weight[1], before[1])
    for i in (0, 2):
        assert torch.equal(average.value[i], undisturbed.value[i])
        assert torch.equal(average.weight[i], undisturbed.weight[i])
    average.update_(good, 0.9)
    assert torch.isfinite(average.value).all()


def test_what_is_declared_invalid_is_left_out():
    x = torch.tensor([[1.0, 2.0]]).double()
    average = Average.start(x)
    average.update_(x, 0.9)
    total, weight = average.total, average.weight.clone()
    average.update_(5 * x, 0.9, torch.tensor(False))
    assert torch.equal(average.total, total) and torch.equal(average.weight, weight)
    average.update_(5 * x, 0.9, torch.tensor(True))
    assert not torch.equal(average.total, total)


def test_a_member_shares_the_memory_and_what_is_taken_in_stays_as_it_was():
    x = torch.ones(3, 2)
    average = Average.start(x)
    average.member(1).update_(2 * x[1:2], 0.5)
    assert torch.equal(average.value, torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))
    assert torch.equal(average.weight, torch.tensor([0.0, 0.5, 0.0])) and torch.equal(x, torch.ones(3, 2))


def test_refresh_is_frequent_at_first():
    refresh = Refresh(3, 10)
    assert [t for t in range(31) if refresh.inverse_due(t)] == [0, 1, 2, 4, 8, 10, 20, 30]
    assert [t for t in range(10) if refresh.statistics_due(t)] == [0, 3, 6, 9]
    assert all(Refresh(1, 1).inverse_due(t) and Refresh(1, 1).statistics_due(t) for t in range(9))


@pytest.mark.parametrize("values", [(0, 1), (1, 0), (-1, 1), (1.5, 1), (1, "2")])
def test_intervals_are_whole_numbers_of_at_least_one(values):
    with pytest.raises(ArgumentError, match="whole number"):
        Refresh(*values)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def moment(total: float, count: float | None = None) -> Moment:
    return Moment(number(total), None if count is None else number(count))


def test_moments_of_micro_batches_add_up():
    """Counts of a moment's own stand for themselves; what one micro-batch did not reach counts as zero there."""
    first = Moments(
        {"a": {"output": moment(3.0), "input": moment(3.0, 1.0)}, "b": {"diagonal": moment(1.0)}}, number(2)
    )
    second = Moments({"a": {"output": moment(9.0), "input": moment(1.0, 1.0)}, "c": {"input": moment(6, 3)}}, number(4))
    means = (first + second).means()
    assert float(means["a"]["output"]) == 2.0 and float(means["a"]["input"]) == 2.0
    assert float(means["b"]["diagonal"]) == 1 / 6 and float(means["c"]["input"]) == 2.0
    assert float(first.means()["a"]["output"]) == 1.5  # the summands are left as they are


def test_a_batch_without_weight_has_moments_of_zero_and_not_nan():
    assert float(moment(0.0).mean(number(0.0))) == 0.0


def test_rows_of_micro_batches_are_stacked_and_missing_ones_are_zero():
    a, b = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double()
    extra = torch.randn(2, 5, 1).double()
    one = torch.tensor(1.0).double()
    joined = RowStatistics({"a": DenseRows(a)}, 3 * one) + RowStatistics(
        {"a": DenseRows(b), "e": DenseRows(extra)}, 5 * one
    )
    assert torch.equal(joined.rows["a"].dense(), torch.cat([a, b], 1)) and float(joined.normaliser) == 8
    assert torch.equal(joined.rows["e"].dense(), torch.cat([torch.zeros(2, 3, 1).double(), extra], 1))


def test_a_burn_in_renews_both_at_every_step():
    refresh = Refresh(3, 4, burn_in=6)
    assert [t for t in range(16) if refresh.inverse_due(t)] == [0, 1, 2, 3, 4, 5, 8, 12]
    assert [t for t in range(13) if refresh.statistics_due(t)] == [0, 1, 2, 3, 4, 5, 6, 9, 12]
    with pytest.raises(ArgumentError, match="burn_in=-1"):
        Refresh(burn_in=-1)


def test_staggered_renews_all_at_first_and_then_one_share_a_step():
    refresh = Staggered(2, 5)
    assert [t for t in range(40) if refresh.inverse_due(t)] == [0, 1, 2, 4]
    assert [refresh.share_due(t) for t in range(5)] == [None] * 5
    assert [refresh.share_due(t) for t in range(5, 16)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert [t for t in range(9) if refresh.statistics_due(t)] == [0, 2, 4, 6, 8]
    assert [t for t in range(40) if Staggered(1, 5, burn_in=7).inverse_due(t)] == list(range(7))
    with pytest.raises(ArgumentError, match=r"Staggered\(inverse=0"):
        Staggered(1, 0)
