"""Bytes that tensors take at once, from torch's own record of every allocation: exact, and the same on every run.

What libraries allocate inside an operation without torch (workspaces of LAPACK and of matrix products) does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.workloads import Workload

_WARM_UP = 2


@dataclass(frozen=True)
class Span:
    """Bytes held before a span of a program, at most within it, and after it."""

    before: int
    highest: int
    after: int


def spans(run: Callable[[], object], *names: str) -> dict[str, Span]:
    """The bytes of each ``record_function`` span of ``run``, of those that ``run`` itself allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    results: Any = found.profiler
    events = sorted(results.kineto_results.events(), key=lambda e: e.start_ns())
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    out = {}
    for event in events:
        if event.name() in names:
            start, end = event.start_ns(), event.end_ns()
            before = held = highest = sum(n for t, n in changes if t < start)
            for _, n in ((t, n) for t, n in changes if start <= t <= end):
                held += n
                highest = max(highest, held)
            out[event.name()] = Span(before, highest, held)
    return out


def transient(workload: Workload, build: Callable[[nn.Module], torch.optim.Optimizer]) -> int:
    """Bytes that a step holds beyond its state, the gradients and what autograd holds, where it renews everything.

    The larger of: the pass with the optimizer's observation, at its highest, less what the pass alone leaves to
    autograd; and ``step()`` at its highest, less what is there before the pass. Build it with a schedule under which
    statistics and inverses are renewed at every step.
    """

    def forward(model: nn.Module) -> torch.Tensor:
        return workload.loss(model(workload.x), workload.y)

    def run() -> None:
        plain = workload.model()
        with record_function("alone"):
            loss = forward(plain)
        del loss
        model = workload.model()
        optimizer = build(model)
        for _ in range(_WARM_UP):
            optimizer.zero_grad(set_to_none=False)
            forward(model).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with record_function("pass"):
            loss = forward(model)
        loss.backward()
        del loss
        with record_function("step"):
            optimizer.step()

    found = spans(run, "alone", "pass", "step")
    alone, seen, step = found["alone"], found["pass"], found["step"]
    return max(seen.highest - seen.before - (alone.after - alone.before), step.highest - seen.before)
