"""Averages of the iterates: less of the gradient's noise in the parameters, without a schedule of learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natgrad.errors import ArgumentError

Update = Callable[[Sequence[Tensor], Sequence[Tensor], "Tensor | int"], None]


def iterate_average(decay: float = 0.95) -> Update:
    """The running average of Martens & Grosse 2015, §13, for ``torch.optim.swa_utils.AveragedModel``.

    ``θ̄_k = β_k θ̄_{k−1} + (1 − β_k) θ_k`` with ``β_k = min(1 − 1/k, decay)``: a plain mean of the first iterates, then
    an exponential average of about the last ``1/(1 − decay)``, on which the start does not weigh::

        averaged = AveragedModel(model, multi_avg_fn=ng.iterate_average(), use_buffers=True)
        ...
        opt.step()
        averaged.update_parameters(model)

    Training does not see it: the averaged copy is what is evaluated and saved. ``averaged.state_dict()`` holds k, so
    that a resumed average goes on bit for bit. With ``use_buffers=True`` floating-point buffers (running statistics of
    BatchNorm) are averaged alike; ``torch.optim.swa_utils.update_bn`` computes them anew for the averaged parameters,
    which is exact.

    Args:
        decay: in [0, 1); 0 keeps the last iterate.

    Raises:
        ArgumentError: a decay out of range.
    """
    if not (isinstance(decay, (int, float)) and 0.0 <= decay < 1.0):
        raise ArgumentError(
            f"iterate_average(decay={decay!r}) was given; a decay lies in [0, 1): 0.95 averages about 20."
        )

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        share = max(1.0 / (int(count) + 1), 1.0 - decay)
        for mean, value in zip(averaged, current, strict=True):
            if mean.is_floating_point() or mean.is_complex():
                mean.lerp_(value.to(mean.dtype), share)
            else:
                mean.copy_(value)

    return update
