"""Exploration by noise that lasts: the Gaussian's own noise, correlated from step to step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, UnsupportedError
from natgrad.rl.heads import GaussianHead, Head


class CorrelatedNoise:
    """z_t = ρ z_{t−1} + √(1 − ρ²) ξ_t within an episode, ξ_t ~ N(0, I), so that every z_t is N(0, I) by itself.

    With independent noise a slow system forgets every push before the next; noise that lasts explores it. Ratios and
    KL are those of the policy's Gaussian, the distribution of one action, and leave out that an action says something
    about the next: with ρ > 0 the policy gradient is that of actions drawn independently, which is an approximation
    (Hollenstein et al. 2024).

    Args:
        n: environments.
        head: of the policy; a Gaussian one.
        correlation: ρ in [0, 1).
        generator: of ξ.
    """

    def __init__(self, n: int, head: Head, correlation: float, generator: torch.Generator) -> None:
        if not 0 <= correlation < 1:
            raise ArgumentError(f"noise_correlation must lie in [0, 1), got {correlation}.")
        if not isinstance(head, GaussianHead):
            raise UnsupportedError(
                f"noise_correlation is for continuous actions, but this environment's are of {type(head).__name__}. "
                "Set it to 0."
            )
        self.correlation, self.generator = correlation, generator
        self.z = torch.zeros(n, len(head.low), device=generator.device)

    def draw(self, starts: Tensor) -> Tensor:
        """z_t of every environment, [n, d]; independent of the past where an episode begins."""
        fresh = torch.randn(self.z.shape, device=self.z.device, generator=self.generator)
        lasting = self.correlation * self.z + math.sqrt(1 - self.correlation**2) * fresh
        self.z = torch.where(starts.unsqueeze(-1), fresh, lasting)
        return self.z
