"""CURVES: a function of the seed, and pictures of curves."""

from __future__ import annotations

import pytest
import torch

from natgrad.errors import ArgumentError
from natgrad.tasks.curves import SIZE, curves


def test_images_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = curves(5, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = curves(5, seed=3)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random stream moved"
    assert not torch.equal(first, curves(5, seed=4))


def test_shape_range_and_ink():
    images = curves(200, seed=0)
    assert images.shape == (200, SIZE * SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    # Every image has a stroke, most pixels stay blank, and the border of two pixels is nearly white.
    assert (images.max(1).values > 0.5).all()
    assert (images > 0.5).float().mean() < 0.2
    square = images.reshape(-1, SIZE, SIZE)
    assert square[:, :2].mean() < square[:, 13:15].mean() / 5


def test_a_curve_passes_through_its_three_points():
    generator = torch.Generator().manual_seed(11)
    points = 4.0 + (SIZE - 1 - 8.0) * torch.rand(50, 3, 2, generator=generator)
    images = curves(50, seed=11).reshape(-1, SIZE, SIZE)
    middle = points[:, 1].round().long()  # (x, y) of the point at time ½
    ink = images[torch.arange(50), middle[:, 1], middle[:, 0]]
    assert (ink > 0.25).all()


def test_chunks_do_not_matter():
    assert torch.equal(curves(2100, seed=0)[:10], curves(2100, seed=0)[:10])
    assert curves(2100, seed=0).shape[0] == 2100


def test_count_must_be_positive():
    with pytest.raises(ArgumentError, match="at least 1"):
        curves(0)
