"""Which process inverts which block: each is inverted once, and its owner's result is what all of them use.

Sharing the result does more than save time: eigenvectors are determined only up to sign and rotation, so that copies
computed side by side would drift apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import TypeVar

from natgrad.distributed.replicas import Replicas
from natgrad.errors import NatgradError

T = TypeVar("T")


def owners(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Rank that owns each block: the dearest first, to whoever has least so far (Graham 1969: within 4/3 of the best).

    Args:
        costs: cost of each block, in any unit.
        size: number of processes.
    """
    loads = [(0.0, rank) for rank in range(size)]
    found: dict[str, int] = {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        load, rank = heapq.heappop(loads)
        found[name] = rank
        heapq.heappush(loads, (load + costs[name], rank))
    return found


def computed_by_owners(
    replicas: Replicas, costs: Mapping[str, float], compute: Callable[[str], T]
) -> dict[str, T | NatgradError]:
    """``compute(name)`` of every block by its owner alone, made known to all. A collective.

    Args:
        replicas: the processes.
        costs: cost of each block, the same in every process.
        compute: gives a value that can be pickled (it may hold tensors), or raises a :class:`NatgradError`.

    Returns:
        By block, in the order of ``costs``: the value, or the error that its owner met.
    """
    mine: dict[str, T | NatgradError] = {}
    for name, rank in owners(costs, replicas.size).items():
        if rank == replicas.rank:
            try:
                mine[name] = compute(name)
            except NatgradError as error:
                mine[name] = error
    merged: dict[str, T | NatgradError] = {}
    for found in replicas.gather(mine):
        merged.update(found)
    return {name: merged[name] for name in costs}
