"""CURVES: synthetic images of simple curves, the first autoencoder problem of the K-FAC and Hessian-free papers.

Hinton & Salakhutdinov (2006) describe the data as images of curves generated from three random points in the plane, so
that six numbers explain an image. Here the curve is the parabola that passes through the three points, drawn with a
soft pen on 28 x 28 pixels; images are a function of the seed alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natgrad.errors import ArgumentError

SIZE = 28
_MARGIN = 4.0
_PEN = 0.7  # standard deviation of the pen in pixels
_INK = 1.2  # darkness: 1 - exp(-_INK) on the middle of a straight stroke
_SAMPLES = 96  # points along a curve; at most about half a pixel apart


def curves(count: int, seed: int = 0) -> Tensor:
    """``count`` images [count, 784] float32 in [0, 1], determined by ``seed``."""
    if count < 1:
        raise ArgumentError(f"count must be at least 1, got {count}.")
    generator = torch.Generator().manual_seed(seed)
    points = _MARGIN + (SIZE - 1 - 2 * _MARGIN) * torch.rand(count, 3, 2, generator=generator)
    return torch.cat([_draw(chunk) for chunk in points.split(2048)])


def _draw(points: Tensor) -> Tensor:
    """Images [n, 784] of the parabolas through points [n, 3, 2] at times 0, ½, 1."""
    time = torch.linspace(0, 1, _SAMPLES)
    lagrange = torch.stack([(2 * time - 1) * (time - 1), 4 * time * (1 - time), time * (2 * time - 1)])
    path = torch.einsum("kt,nkd->ntd", lagrange, points)
    steps = (path[:, 1:] - path[:, :-1]).norm(dim=-1)
    middle = 0.5 * (path[:, 1:] + path[:, :-1])
    # The pen is an isotropic Gaussian, hence a product over the axes: ink = Σ_t length_t φ_x φ_y is one matrix product.
    pixels = torch.arange(SIZE, dtype=torch.float32)
    pen = torch.exp(-0.5 * ((pixels - middle.unsqueeze(-1)) / _PEN).square())  # [n, t, axis, pixel]
    ink = torch.einsum("nt,ntx,nty->nyx", steps, pen[:, :, 0], pen[:, :, 1])
    return (1 - torch.exp(-_INK / (_PEN * math.sqrt(2 * math.pi)) * ink)).flatten(1)
