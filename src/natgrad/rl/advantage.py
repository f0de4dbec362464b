"""Generalised advantage estimation (Schulman et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor


def advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    lam: float,
) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V(s_{t+1}) − V(s_t), within one episode.

    A terminated episode has no future: V(s_{t+1}) counts as 0. A truncated one has: V(s_{t+1}) is that of the state
    where it was cut off. The sum ends at both.

    Args:
        rewards, values: [T, N].
        next_values: [T, N] V(s_{t+1}) of the state that the action led to, before any reset.
        terminated, truncated: [T, N] bool.
        gamma: discount γ in [0, 1].
        lam: λ in [0, 1]; 1 is the Monte-Carlo return minus the value, 0 the one-step error.

    Returns:
        [T, N]; plus ``values`` it is the λ-return, the critic's target.
    """
    deltas = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    goes_on = torch.where(terminated | truncated, torch.zeros_like(deltas), gamma * lam)  # not rounded to float32
    result = torch.empty_like(deltas)
    following = torch.zeros_like(deltas[0])
    for t in range(len(deltas) - 1, -1, -1):
        following = deltas[t] + goes_on[t] * following
        result[t] = following
    return result
