"""From gradients by name to the damped natural gradient by block."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from natgrad.network import BlockVector, Partition
from natgrad.optim.curvature import Curvature
from natgrad.optim.groups import Group, rate_ratio


def preconditioned(curvature: Curvature, gradients: Mapping[str, Tensor]) -> BlockVector:
    """``(F + λI)⁻¹ g`` of the blocks that have any gradient."""
    return preconditioned_vectors(curvature, gradients, curvature.partition.pack_present(gradients))


def preconditioned_vectors(curvature: Curvature, gradients: Mapping[str, Tensor], vectors: BlockVector) -> BlockVector:
    """As :func:`preconditioned`, where ``gradients`` are packed already: ``vectors``, which stay as they are."""
    partition = curvature.partition
    direction = curvature.preconditioned(vectors)
    found = partition.unpack(direction)
    if len(found) == len(gradients):
        return direction
    # A parameter without gradient stays where it is, even where its block couples it to others.
    return partition.pack_present({n: d for n, d in found.items() if n in gradients})


def at_rates(
    partition: Partition, vectors: BlockVector, groups: Mapping[str, Group], reference: float | Tensor
) -> BlockVector:
    """``vectors``, each parameter's part times its group's learning rate over ``reference``."""
    ratios = {id(group): rate_ratio(group, reference) for group in {id(g): g for g in groups.values()}.values()}
    if all(ratio == 1.0 for ratio in ratios.values()):
        return vectors
    return partition.pack_present({n: v * ratios[id(groups[n])] for n, v in partition.unpack(vectors).items()})
