"""Passive observation: a hook on the root module sees every training pass and keeps what the optimizer will need."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils import _pytree as pytree

from natgrad.errors import ArgumentError, StaleTapeError
from natgrad.likelihood.base import Target
from natgrad.metric import Statistics
from natgrad.network import Pass, Recorder, Tape, is_compiled, is_reentrant, is_replaying, output_tensor
from natgrad.optim.axes import Axes, in_order, inverse, moved, moved_axes
from natgrad.optim.capture import Capture
from natgrad.optim.discarding import Gradients, after_backward


class _Life:
    """Lives as long as the graph of one output: the hook on that output alone holds it."""


@dataclass(eq=False)
class Observation:
    """One training pass of the model. Keeps the pass's graph alive no longer than the user does.

    Attributes:
        due: whether statistics are to be taken of it; no longer once they are.
        tape: what the layers saw; None where none is due, or where the pass must be run again for it because it
            ran compiled or with reentrant activation checkpointing.
        observed: how to run the pass again.
        leaves: weak references to the tensors that the model returned, None for what is not a tensor.
        source: weak reference to the tensor that the likelihood reads; None until it is known.
        output: its value, detached.
        target: the labels, where they were given.
        statistics: what the metric keeps of the pass, once computed.
        reached: whether a backward pass reached the output.
        accumulated: whether that pass left gradients in the parameters.
        explicit: whether the user observed the output explicitly.
        skipped: whether the pass is left out, because its output is not finite.
        axes: the order in which the likelihood reads the axes of the source; None as they are.
        capture: what waits for the loss's own backward pass to take statistics of it.
    """

    due: bool
    tape: Tape | None
    observed: Pass
    leaves: list[weakref.ref[Tensor] | None]
    source: weakref.ref[Tensor] | None = None
    output: Tensor | None = None
    target: Target | None = None
    statistics: Statistics | None = None
    reached: bool = False
    accumulated: bool = False
    explicit: bool = False
    skipped: bool = False
    axes: Axes | None = None
    capture: Capture | None = None
    _own: bool = False
    _life: weakref.ref[_Life] | None = None

    @property
    def used(self) -> bool:
        """Whether the pass counts for the next step."""
        return self.reached or self.explicit

    @property
    def alive(self) -> bool:
        """Whether the pass counts, or may yet: the user still holds its output or the graph behind it."""
        if self.used or any(leaf is not None and leaf() is not None for leaf in self.leaves):
            return True
        # A tape keeps the graph alive by itself, and is of no use without the output.
        return self.tape is None and self._life is not None and self._life() is not None

    def complete(self, output: Tensor, on_gradient: weakref.WeakMethod[Any]) -> None:
        """Take ``output`` as what the likelihood reads, and notice when a backward pass reaches it."""
        state, life = weakref.ref(self), _Life()
        self.source, self._life = weakref.ref(output), weakref.ref(life)
        self.output = moved(output.detach(), self.axes)

        def reached(gradient: Tensor | None, life: _Life = life) -> None:
            seen = state()
            if seen is not None and not seen._own:
                seen.reached = True
                tell = on_gradient()
                if tell is not None:
                    tell(seen, gradient)

        node, index = before_conversions(output)
        if node is output.grad_fn or node is None:
            output.register_hook(lambda gradient: reached(gradient))
        else:  # the loss may be made of what was converted, as where accelerate returns float32 from a bfloat16 pass
            node.register_prehook(lambda gradients: reached(gradients[index]) if gradients[index] is not None else None)

    @contextmanager
    def differentiating(self, output: Tensor) -> Iterator[Tape]:
        """The tape with its output, for backward passes of natgrad's own, which do not count as the user's.

        A pass that ran compiled is run again here, and the tape's output is that of the second run.
        """
        if self.tape is None:
            with self.observed.again() as tape:
                yield tape
            return
        tape, self._own = self.tape, True
        tape.output = output
        try:
            yield tape
        finally:
            tape.output, self._own = None, False

    def reordered(self, axes: Axes | None) -> None:
        """Let the likelihood read the axes of the source in another order; statistics of the old one are dropped."""
        if axes != self.axes:
            back, self.axes = inverse(self.axes), axes
            select = self.observed.select
            self.observed = replace(self.observed, select=lambda raw: in_order(select(raw), back, axes))
            if self.output is not None:
                self.output = in_order(self.output, back, axes)
            if self.statistics is not None:
                self.statistics, self.due = None, True
            if self.capture is not None:
                self.capture.close()
                self.capture = None

    def record(self, statistics: Statistics) -> None:
        """Keep the statistics, and let go of the layers' inputs, which are no longer needed."""
        self.statistics, self.tape, self.due, self.capture = statistics, None, False, None


def before_conversions(output: Tensor) -> tuple[Any, int]:
    """The node of the graph that made ``output``, but for conversions of its dtype, and which of its outputs it is."""
    node, index = output.grad_fn, output.output_nr
    while node is not None and node.name() == "ToCopyBackward0":
        node, index = node.next_functions[0]
    return node, index


def unwrapped(output: Tensor) -> Tensor:
    """What the network itself returned where a wrapper around it returned ``output``."""
    return getattr(output, "_natgrad_inner", output)


class _Hook:
    """A hook that holds its observer weakly, and serves no module but the observer's own.

    Copies of the model (an EMA, a target network, a pickled file) carry the hook along, without an observer. Where the
    call of the module itself is compiled, the compiler ends a graph at the hook, which runs between two of them.
    """

    def __init__(self, observer: Observer | None, when: str) -> None:
        self._observer, self._when = None if observer is None else weakref.ref(observer), when

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if not torch.compiler.is_compiling():
            self.run(module, args, kwargs, output)
        elif self._observer is not None and torch.is_grad_enabled() and module.training:
            from natgrad.optim.between_graphs import run  # there is a compiler; to import it costs a second

            run(self, module, args, kwargs, output)

    def run(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, compiled: bool = False
    ) -> None:
        """Tell the observer; ``compiled``: the layers that run between the hooks are in a graph."""
        observer = None if self._observer is None else self._observer()
        if observer is None:
            return
        if self._when == "wrapper":
            if module is observer.wrapper:
                observer._link(output)
        elif module is observer.model:
            if self._when == "before":
                observer._start(module, args, kwargs, compiled)
            else:
                observer._finish(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._when)


@dataclass(eq=False)
class Observer:
    """Hooks of one optimizer on one model.

    Args:
        model: the network.
        is_due: whether statistics are to be taken of the next pass.
        on_pass: called with each finished observation whose output is known, and with that output.
        wrapper: a module around the network that may return other tensors than the network did; None without one.
        on_gradient: called with the loss's first gradient at an output, its axes in the order in which they are read;
            again with the next one where it raises an error.
    """

    model: nn.Module
    is_due: Callable[[], bool]
    on_pass: Callable[[Observation, Tensor], None]
    wrapper: nn.Module | None = None
    on_gradient: Callable[[Tensor], None] | None = None
    observations: list[Observation] = field(default_factory=list)
    _recorder: Recorder | None = None
    _pass: Pass | None = None
    _due: bool = False
    _depth: int = 0
    _forced: bool = False
    _paused: bool = False
    _returned: Any = None
    _axes: Axes | None = None

    def __post_init__(self) -> None:
        self._gradients = Gradients(self.model)
        self._handles = [
            self.model.register_forward_pre_hook(_Hook(self, "before"), with_kwargs=True),
            self.model.register_forward_hook(_Hook(self, "after"), with_kwargs=True, always_call=True),
        ]
        if self.wrapper is not None:
            self._handles.append(self.wrapper.register_forward_hook(_Hook(self, "wrapper"), with_kwargs=True))

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
            and _functorch.peek_interpreter_stack() is None
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        )

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool = False) -> None:
        self._depth += 1
        if self._depth > 1 or not self._watching(module):
            return
        self._forget_discarded()
        self._pass = Pass.begin(module, args, kwargs)
        self._due = self.is_due()
        # No layer's hook fires inside a compiled graph, and one that is traced into it would only be compiled again.
        self._recorder = Recorder(module) if self._due and not (compiled or is_compiled(module)) else None

    def _finish(self, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth > 0:
            return
        recorder, self._recorder = self._recorder, None
        observed, self._pass = self._pass, None
        if recorder is not None:
            recorder.stop()
        if observed is None or output is None:  # not watching, or the pass raised an error
            return
        tape = recorder.tape if recorder is not None else None
        found = output_tensor(output)
        leaves = [weakref.ref(leaf) if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(output)]
        observation = Observation(self._due, tape, observed, leaves)
        observation.reordered(self._axes)
        self.observations = [o for o in self.observations if o.alive]
        self.observations.append(observation)
        if self.wrapper is not None:
            self._returned = output
        if found is not None:
            self._complete(observation, found)

    def _link(self, output: Any) -> None:
        """Let the tensors that the wrapper returned lead to those that the network returned to it."""
        returned, self._returned = self._returned, None
        inner, outer = pytree.tree_leaves(returned), pytree.tree_leaves(output)
        if returned is not None and len(inner) == len(outer):
            for mine, given in zip(inner, outer, strict=True):
                if isinstance(given, Tensor) and given is not mine:
                    given._natgrad_inner = mine  # type: ignore[attr-defined]  # lives no longer than the user's tensor

    def _complete(self, observation: Observation, output: Tensor) -> None:
        if output.dim() and output.shape[0] == 0:
            self.observations.remove(observation)
            raise ArgumentError(
                f"The batch is empty: the model's output has shape {tuple(output.shape)}. Skip empty batches."
            )
        if output.requires_grad:
            if observation.tape is not None and observation.tape.hidden and is_reentrant(output):
                observation.tape = None
            observation.complete(output, weakref.WeakMethod(self._gradient))
            self.on_pass(observation, moved(output, observation.axes))

    def find(self, output: Tensor) -> Observation:
        """The observation that ``output`` belongs to, completed with it where it was not known yet.

        ``output`` may be what a pass returned with its axes moved; the likelihood then reads those of later passes in
        the same order.

        Raises:
            StaleTapeError: no recorded pass produced it.
        """
        output, self._axes = self._as_returned(unwrapped(output))
        for observation in reversed(self.observations):
            if observation.source is not None and observation.source() is output:
                observation.reordered(self._axes)
                return observation
            for i, leaf in enumerate(observation.leaves):
                if leaf is not None and leaf() is output:
                    previous = observation.observed
                    observation.observed = replace(previous, select=lambda raw, i=i: pytree.tree_leaves(raw)[i])
                    observation.due = observation.due or observation.statistics is not None
                    observation.statistics = observation.axes = None
                    observation.reordered(self._axes)
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

    def _gradient(self, observation: Observation, gradient: Tensor | None) -> None:
        self._forget_discarded(observation)
        after_backward(self._note_gradients)
        if observation.capture is not None and gradient is not None:
            observation.capture.begin(moved(gradient, observation.axes))
        if self.on_gradient is not None and gradient is not None:  # a compiled graph may hold the loss as well
            self.on_gradient(moved(gradient, observation.axes))
            self.on_gradient = None

    def _note_gradients(self) -> None:
        found = self._gradients.note()
        for observation in self.observations:
            observation.accumulated = observation.accumulated or (observation.reached and found)

    def _forget_discarded(self, but: Observation | None = None) -> None:
        """Forget the passes whose gradients the parameters held, and hold no longer."""
        if any(o.accumulated and o is not but for o in self.observations) and self._gradients.discarded():
            self.observations = [o for o in self.observations if o is but or not o.accumulated]

    def _as_returned(self, output: Tensor) -> tuple[Tensor, Axes | None]:
        """What the module returned where ``output`` is that with its axes moved, and their order."""
        leaves = [leaf() for o in self.observations for leaf in o.leaves if leaf is not None]
        if not any(leaf is output for leaf in leaves):
            for leaf in leaves:
                axes = None if leaf is None else moved_axes(leaf, output)
                if leaf is not None and axes is not None:
                    return leaf, axes if list(axes) != sorted(axes) else None
        return output, None

    def keep(self, observation: Observation) -> None:
        """Forget every other pass."""
        self.observations = [observation]

    def reached(self, output: Tensor) -> bool:
        """Whether a backward pass has already gone through ``output`` of a recorded pass."""
        output, _ = self._as_returned(unwrapped(output))
        return any(o.reached and o.source is not None and o.source() is output for o in self.observations)

    def forget_reached(self) -> None:
        """Forget the passes whose gradients are being discarded; those that no backward pass reached yet stay."""
        self.observations = [o for o in self.observations if not o.reached]

    @property
    def unknown(self) -> bool:
        """Whether a pass was seen whose output could not be told from what the model returned."""
        return any(o.source is None for o in self.observations)

    def take(self) -> list[Observation]:
        """The observations that count for this step; all are forgotten."""
        used = [o for o in self.observations if o.used]
        self.observations = []
        return used
