"""Policies and critics: networks with a head, a normaliser and, where they have one, a memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError, NonFiniteError, ShapeError
from natgrad.rl.heads import GaussianHead, Head
from natgrad.rl.networks import Recurrent, perceptron
from natgrad.rl.normalise import RunningMoments, Unchanged


class Network(nn.Module):
    """A network behind a normaliser: what policies and critics share.

    Args:
        body: from normalised observations [B, D] to outputs [B, C]; or a module with ``start`` and ``forward`` of
            :class:`natgrad.rl.networks.Recurrent`, which then runs over sequences.
        normaliser: of the observations; policy and critic may share one.
    """

    normaliser: RunningMoments | Unchanged

    def __init__(self, body: nn.Module, normaliser: RunningMoments | Unchanged) -> None:
        super().__init__()
        self.body = body
        self.normaliser = normaliser

    @property
    def recurrent(self) -> bool:
        """Whether there is a memory."""
        return hasattr(self.body, "start")

    def start(self, n: int) -> Tensor | None:
        """The empty memory of n sequences, or None."""
        return self.body.start(n) if self.recurrent else None  # pyright: ignore[reportCallIssue]

    def run(self, observations: Tensor, starts: Tensor | None, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Outputs, and the memory after each step: [B, D] → [B, C]; with a memory [N, T, D] → [N, T, C]."""
        x = self.normaliser(observations)
        if self.recurrent:
            return self.body(x, starts, memory)
        return self.body(x), None


class Policy(Network):
    """π(a | s): the parameters of its head's distribution, for observations.

    The σ of a Gaussian head that does not depend on the state is a parameter of its own, ``log_scale``.

    Args:
        body: gives f, or only the means where ``log_scale`` is given.
        head: what f means.
        normaliser: of the observations.
        log_scale: the first log σ of a scale that does not depend on the state; None where ``body`` gives all of f.
    """

    def __init__(
        self, body: nn.Module, head: Head, normaliser: RunningMoments | Unchanged, log_scale: float | None = None
    ) -> None:
        super().__init__(body, normaliser)
        self.head = head
        if log_scale is not None:
            self.log_scale = nn.Parameter(torch.full((head.outputs // 2,), float(log_scale)))
        else:
            self.register_parameter("log_scale", None)

    def forward(
        self,
        observations: Tensor,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """f for observations [B, D], or for sequences [N, T, D] with ``starts`` [N, T] and ``memory`` [N, H]."""
        return self.parameters_of(*self.run(observations, starts, memory)[:1], mask)

    def parameters_of(self, outputs: Tensor, mask: Tensor | None) -> Tensor:
        """f from the body's outputs."""
        if self.log_scale is not None:
            outputs = torch.cat([outputs, self.log_scale.expand(*outputs.shape[:-1], -1)], -1)
        if outputs.shape[-1] != self.head.outputs:
            raise ShapeError(
                f"The policy's body gives {outputs.shape[-1]} outputs, but {type(self.head).__name__} needs "
                f"{self.head.outputs}. Give it a last layer of that size."
            )
        return self.head.masked(outputs, mask)

    @torch.no_grad()
    def act(
        self,
        observations: Tensor,
        mask: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        starts: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step for n environments: actions, f and the memory afterwards.

        Args:
            observations: [n, D].
            mask: [n, C] of bool: which actions are allowed.
            memory, starts: [n, H] before the step, and [n], one where an episode begins.
            generator: samples actions; None takes the mode.
            noise: [n, d]: standard normal noise that a Gaussian head is to use instead.

        Raises:
            NonFiniteError: f is not finite.
        """
        if self.recurrent:
            assert starts is not None
            outputs, memories = self.run(observations.unsqueeze(1), starts.unsqueeze(1), memory)
            assert memories is not None
            f, memory = self.parameters_of(outputs[:, 0], mask), memories[:, 0]
        else:
            f = self.parameters_of(self.run(observations, None, None)[0], mask)
        if not math.isfinite(float(f.sum())):
            raise NonFiniteError("The policy's output is not finite: its parameters are NaN or too large.")
        if noise is not None and isinstance(self.head, GaussianHead):
            return self.head.with_noise(f, noise), f, memory
        actions = self.head.mode(f) if generator is None else self.head.likelihood.sample(f, generator=generator)[0]
        return actions, f, memory


class Critic(Network):
    """V(s), in the units in which returns have mean 0 and variance 1 (``returns`` holds their moments)."""

    def __init__(self, body: nn.Module, normaliser: RunningMoments | Unchanged) -> None:
        super().__init__(body, normaliser)
        self.returns = RunningMoments(1, limit=float("inf"))

    def forward(self, observations: Tensor, starts: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """Normalised values [*, 1]."""
        return self.run(observations, starts, memory)[0]

    def values(self, normalised: Tensor) -> Tensor:
        """Values in units of the reward, from normalised ones."""
        return normalised * self.returns.scale.to(normalised) + self.returns.mean.to(normalised)


def check_apart(policy: Policy, critic: Critic) -> None:
    """Raise ArgumentError where ``policy`` and ``critic`` share a parameter: fitting one would move the other."""
    owned = {id(p): name for name, p in policy.named_parameters()}
    shared = [owned[id(p)] for p in critic.parameters() if id(p) in owned and p.requires_grad]
    if shared:
        raise ArgumentError(
            f"Policy and critic share {len(shared)} parameters, {shared[0]} among them, so that each fit of the critic "
            "would change the policy after its step was measured. Give the critic a copy (copy.deepcopy), or freeze "
            "what is shared (requires_grad_(False))."
        )


def build(
    size: int,
    head: Head,
    *,
    hidden: tuple[int, ...] = (64, 64),
    recurrent: bool = False,
    normalise: bool = True,
    state_dependent_scale: bool = False,
    log_scale: float = 0.0,
) -> tuple[Policy, Critic]:
    """A policy and a critic of the same shape, which share the normaliser of observations.

    Args:
        size: entries of an observation.
        head: the policy's.
        hidden: widths; with ``recurrent`` the last is that of the memory.
        recurrent: whether they have a memory.
        normalise: whether observations are normalised by their running moments.
        state_dependent_scale: whether σ of a Gaussian head is given by the network.
        log_scale: the first log σ.

    Raises:
        ArgumentError: ``state_dependent_scale`` for a head that has no σ.
    """
    normaliser = RunningMoments(size) if normalise else Unchanged()
    gaussian = isinstance(head, GaussianHead)
    if state_dependent_scale and not gaussian:
        raise ArgumentError(
            f"state_dependent_scale is about σ of continuous actions, and {type(head).__name__} has none: leave it out."
        )
    free = gaussian and not state_dependent_scale
    outputs = head.outputs // 2 if free else head.outputs
    make: Callable[..., Any] = perceptron
    if recurrent:
        make = _recurrent
    body = make(size, hidden, outputs, last=0.01)
    if gaussian and not free:
        with torch.no_grad():
            last = body.output if recurrent else body[-1]
            last.bias[head.outputs // 2 :] = log_scale
    policy = Policy(body, head, normaliser, log_scale if free else None)
    return policy, Critic(make(size, hidden, 1, last=1.0), normaliser)


def _recurrent(size: int, hidden: tuple[int, ...], outputs: int, *, last: float) -> Recurrent:
    return Recurrent(size, hidden[-1], outputs, last=last)
