"""Passive observation: a hook on the root module sees every training pass and keeps what the optimizer will need."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from natgrad.errors import ArgumentError, StaleTapeError
from natgrad.likelihood.base import Target
from natgrad.metric import Statistics
from natgrad.network import Pass, RandomState, Recorder, Tape, is_replaying, output_tensor


@dataclass
class Observation:
    """One training pass of the model.

    Attributes:
        tape: what the layers saw; None where no statistics are due.
        observed: how to run the pass again.
        raw: what the model returned (weakly needed to find an output that is given explicitly).
        output: the tensor that the likelihood reads; None until it is known.
        target: the labels, where they were given.
        statistics: what the metric keeps of the pass, once computed.
        used: whether a backward pass reached the output, or the user observed it explicitly.
    """

    tape: Tape | None
    observed: Pass
    raw: Any
    output: Tensor | None
    target: Target | None = None
    statistics: Statistics | None = None
    used: bool = False


@dataclass(eq=False)
class Observer:
    """Hooks of one optimizer on one model.

    Args:
        model: the network.
        wants_tape: whether the next pass's layers are to be recorded.
        on_pass: called with each finished observation whose output is known.
    """

    model: nn.Module
    wants_tape: Callable[[], bool]
    on_pass: Callable[[Observation], None]
    observations: list[Observation] = field(default_factory=list)
    _recorder: Recorder | None = None
    _random: RandomState | None = None
    _depth: int = 0
    _forced: bool = False
    _paused: bool = False

    def __post_init__(self) -> None:
        owner = weakref.ref(self)

        # Plain functions with a weak reference: a deep copy of the model (an EMA, a target network) carries them
        # along without the optimizer, and they do nothing there.
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observer = owner()
            if observer is not None and module is observer.model:
                observer._start(module)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            observer = owner()
            if observer is not None and module is observer.model:
                observer._finish(args, kwargs, output)

        self._handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Observe passes inside whatever mode the model is in (a closure says by itself that it trains)."""
        before, self._forced = self._forced, True
        try:
            yield
        finally:
            self._forced = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Observe nothing inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _watching(self, module: nn.Module) -> bool:
        return (
            torch.is_grad_enabled()
            and (module.training or self._forced)
            and not self._paused
            and not is_replaying()
            and torch._C._functorch.peek_interpreter_stack() is None
            and not torch.compiler.is_compiling()
        )

    def _start(self, module: nn.Module) -> None:
        self._depth += 1
        if self._depth > 1 or not self._watching(module):
            return
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._random = RandomState.capture(device)
        self._recorder = Recorder(module) if self.wants_tape() else None

    def _finish(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        recorder, self._recorder = self._recorder, None
        random, self._random = self._random, None
        if recorder is not None:
            recorder.stop()
        if random is None or output is None:  # not watching, or the pass raised an error
            return
        tape = recorder.tape if recorder is not None else None
        found = output_tensor(output)
        observation = Observation(tape, Pass(self.model, args, kwargs, random), output, found)
        self.observations.append(observation)
        if found is not None:
            self._complete(observation, found)

    def _complete(self, observation: Observation, output: Tensor) -> None:
        if output.dim() and output.shape[0] == 0:
            self.observations.remove(observation)
            raise ArgumentError(
                f"The batch is empty: the model's output has shape {tuple(output.shape)}. Skip empty batches."
            )
        observation.output = output
        if observation.tape is not None:
            observation.tape.output = output
        if output.requires_grad:
            self.on_pass(observation)
            state = weakref.ref(observation) if hasattr(observation, "__weakref__") else (lambda: observation)

            def reached(gradient: Tensor) -> None:
                seen = state()
                if seen is not None:
                    seen.used = True

            output.register_hook(reached)

    def find(self, output: Tensor) -> Observation:
        """The observation that ``output`` belongs to, completed with it where it was not known yet.

        Raises:
            StaleTapeError: no recorded pass produced it.
        """
        for observation in reversed(self.observations):
            if observation.output is output:
                return observation
            for i, leaf in enumerate(pytree.tree_leaves(observation.raw)):
                if leaf is output:
                    previous = observation.observed
                    observation.observed = Pass(
                        previous.model, previous.args, previous.kwargs, previous.random,
                        lambda raw, i=i: pytree.tree_leaves(raw)[i],
                    )  # fmt: skip
                    observation.statistics = None
                    self._complete(observation, output)
                    return observation
        why = (
            "no training pass of the model has been recorded since the last step (was it run under torch.no_grad, in "
            "eval mode, through a copy, or compiled after the optimizer was made?)"
            if not self.observations
            else "it is not what any pass recorded since the last step returned"
        )
        raise StaleTapeError(
            f"The observed output does not belong to a recorded forward pass: {why}. Give observe() the very tensor "
            "that model(...) returned, in training mode, before the next step."
        )

    def take(self) -> list[Observation]:
        """The observations that count for this step; all are forgotten."""
        used = [o for o in self.observations if o.used]
        self.observations = []
        return used
