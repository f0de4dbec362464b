"""Running moments against numpy's of all rows together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import natgrad.rl as rl
from natgrad.rl.normalise import RunningMoments, Unchanged


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    shift=st.sampled_from([0.0, 3.0, -1e4]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_moments_of_batches_are_those_of_all_rows(sizes, shift, scale, seed):
    rng = np.random.default_rng(seed)
    batches = [shift + scale * rng.normal(size=(n, 3)) for n in sizes]
    rows = np.concatenate(batches)
    moments = RunningMoments(3)
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    assert float(moments.count) == len(rows)
    if not len(rows):
        assert torch.equal(moments(torch.ones(2, 3)), torch.ones(2, 3))
        return
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), rtol=1e-11, atol=1e-11 * scale)
    np.testing.assert_allclose(moments.variance.numpy(), rows.var(0), rtol=1e-9, atol=1e-14 * (shift**2 + scale**2))
    if rows.var(0).min() > 1e-9:
        x = rng.normal(size=(4, 3)) * scale + shift
        expected = np.clip((x - rows.mean(0)) / rows.std(0), -10, 10)
        np.testing.assert_allclose(moments(torch.from_numpy(x)).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_rows_of_sequences_count_as_rows():
    values = torch.randn(4, 5, 3, dtype=torch.float64)
    ours, theirs = RunningMoments(3), RunningMoments(3)
    ours.update(values)
    theirs.update(values.reshape(20, 3))
    assert torch.equal(ours.mean, theirs.mean) and float(ours.count) == 20


def test_an_entry_that_never_varies_is_only_centred():
    moments = RunningMoments(2)
    moments.update(torch.tensor([[5.0, 1.0], [5.0, 3.0]]))
    normalised = moments(torch.tensor([[5.5, 3.0]]))
    torch.testing.assert_close(normalised, torch.tensor([[0.5, 1.0]]))
    assert torch.equal(moments(torch.tensor([[1e9, -1e9]])), torch.tensor([[10.0, -10.0]]))


def test_float32_observations_far_from_zero_keep_their_differences():
    """The moments are in float64: in float32, 1e6 + noise has no variance of its own."""
    rng = np.random.default_rng(0)
    rows = (1e6 + rng.integers(0, 8, size=(10_000, 1))).astype(np.float32)
    moments = RunningMoments(1)
    for part in np.split(rows, 100):
        moments.update(torch.from_numpy(part))
    np.testing.assert_allclose(moments.variance.numpy(), rows.astype(np.float64).var(0), rtol=1e-9)


def test_no_normaliser_changes_nothing():
    x = torch.randn(3, 2)
    unchanged = Unchanged()
    unchanged.update(x)
    assert unchanged(x) is x


@pytest.mark.parametrize("algorithm", [rl.TRPO(), rl.PPO(epochs=1)], ids=lambda a: type(a).__name__)
def test_training_normalises_by_what_was_seen_before_the_rollout(algorithm):
    """The policy that is updated is the one that acted: its normaliser takes the observations after the update."""
    setup = rl.Setup(environments=2, horizon=16, hidden=(8,))
    training = rl.Training("Pendulum-v1", algorithm, steps=200, setup=setup)
    seen, collected = [], training.collector.collect

    def watched():
        assert float(training.policy.normaliser.count) == 32 * len(seen)
        rollout = collected()
        seen.append(rollout.observations.reshape(-1, 3).double().numpy())
        return rollout

    training.collector.collect = watched
    training.run()
    rows = np.concatenate(seen)
    np.testing.assert_allclose(training.policy.normaliser.mean.numpy(), rows.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(training.policy.normaliser.variance.numpy(), rows.var(0), rtol=1e-9)
    assert training.critic.normaliser is training.policy.normaliser
