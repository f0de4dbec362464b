"""Which backward pass is under way, and whether all that it brings to a network comes through the network's output.

Autograd does not tell a hook what is being differentiated. The call that began it waits in the stack of its thread
meanwhile, with the differentiated tensors at hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

_LEAF = "torch::autograd::AccumulateGrad"


def reachable(nodes: Iterable[Any], but: frozenset[Any] = frozenset()) -> frozenset[Any]:
    """The nodes of the graph from ``nodes`` on, towards the leaves; those in ``but`` and beyond are left out."""
    seen: set[Any] = set()
    waiting = [node for node in nodes if node is not None and node not in but]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [n for n, _ in node.next_functions if n is not None and n not in but]
    return frozenset(seen)


def differentiated() -> list[GradientEdge] | None:
    """What the backward pass that is under way differentiates; None where that cannot be told."""
    run = getattr(torch.autograd.graph, "_engine_run_backward", None)
    if run is None:
        return None
    found: list[Any] = []
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is run.__code__:
                found.append(frame.f_locals.get("t_outputs"))
            frame = frame.f_back
    if len(found) != 1 or found[0] is None:  # several threads, or one backward pass inside another
        return None
    return [get_gradient_edge(t) if isinstance(t, Tensor) else t for t in found[0]]


def only_through(edge: tuple[Any, int], inside: frozenset[Any], roots: Sequence[GradientEdge]) -> bool:
    """Whether what flows from ``roots`` to the nodes ``inside``, those that ``edge`` leads to, all passes ``edge``.

    Leaves do not count: what else reaches a parameter reaches no layer.
    """

    def foreign(node: Any, index: int) -> bool:
        return node in inside and (node is not edge[0] or index != edge[1]) and node.name() != _LEAF

    if any(foreign(root.node, root.output_nr) for root in roots):
        return False
    outside = reachable([root.node for root in roots], inside)
    return not any(foreign(n, i) for node in outside for n, i in node.next_functions if n is not None)
