"""Metrics for people: each is a mean over the rows given, so chunks can be averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.tasks.task import Metric


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of predictions whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean()


def binary_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of Bernoulli logits on the label's side of zero."""
    return ((logits > 0) == (labels > 0.5)).float().mean()


def reconstruction(logits: Tensor, pixels: Tensor) -> Tensor:
    """Squared error of the Bernoulli means, summed over an image's pixels, as the autoencoder literature reports it."""
    return (logits.sigmoid() - pixels).square().sum(-1).mean()


def gaussian_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of the mean, for outputs [mean, log scale]."""
    return (output.chunk(2, dim=-1)[0] - target).square().mean()


def poisson_deviance(log_rate: Tensor, count: Tensor) -> Tensor:
    """Mean deviance 2 (y log(y/μ) − y + μ)."""
    rate = log_rate.exp()
    return 2 * (torch.special.xlogy(count, count) - count * log_rate - count + rate).mean()


ACCURACY = Metric("accuracy", accuracy, higher_is_better=True)
BINARY_ACCURACY = Metric("accuracy", binary_accuracy, higher_is_better=True)
RECONSTRUCTION = Metric("squared error per image", reconstruction)
MEAN_SQUARED_ERROR = Metric("mean squared error", gaussian_squared_error)
POISSON_DEVIANCE = Metric("deviance", poisson_deviance)
