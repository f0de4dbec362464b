"""A block-diagonal matrix whose blocks of equal size lie in one tensor: a side of a Kronecker matrix that is wide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.errors import ShapeError


@dataclass(frozen=True, eq=False)
class BlockStacks:
    """diag(B_1, …, B_k), with blocks that follow each other on the diagonal and are of one size in one stack.

    Args:
        stacks: tensors ``[k_i, b_i, b_i]`` in the order of the diagonal, of one dtype.

    Raises:
        ShapeError: there is no stack, or one is no stack of square matrices.
    """

    stacks: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        shapes = [tuple(s.shape) for s in self.stacks]
        if not shapes or any(len(shape) != 3 or shape[-1] != shape[-2] for shape in shapes):
            raise ShapeError(f"BlockStacks needs stacks of square blocks [k, b, b], but got shapes {shapes}.")

    @property
    def sizes(self) -> list[int]:
        """Rows of each stack."""
        return [s.shape[0] * s.shape[1] for s in self.stacks]

    @property
    def shape(self) -> tuple[int, int]:
        n = sum(self.sizes)
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        return self.stacks[0].dtype

    @property
    def device(self) -> torch.device:
        return self.stacks[0].device

    @property
    def mT(self) -> BlockStacks:
        return self.mapped(lambda s: s.mT)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> BlockStacks:
        """``function`` of every stack."""
        return BlockStacks(tuple(function(s) for s in self.stacks))

    def __matmul__(self, other: BlockStacks) -> BlockStacks:
        """The product with a matrix of the same blocks."""
        return BlockStacks(tuple(a @ b for a, b in zip(self.stacks, other.stacks, strict=True)))

    def square(self) -> BlockStacks:
        """Entries squared."""
        return self.mapped(torch.square)

    def premultiply(self, x: Tensor) -> Tensor:
        """B X for X ``[*batch, n, m]``."""
        parts = [
            torch.einsum("kij,...kjm->...kim", s, part.unflatten(-2, s.shape[:2])).flatten(-3, -2)
            for s, part in zip(self.stacks, x.split(self.sizes, -2), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def postmultiply(self, x: Tensor) -> Tensor:
        """X B for X ``[*batch, m, n]``."""
        parts = [
            torch.einsum("...ki,kij->...kj", part.unflatten(-1, s.shape[:2]), s).flatten(-2)
            for s, part in zip(self.stacks, x.split(self.sizes, -1), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def diagonal(self) -> Tensor:
        """``[n]``."""
        return torch.cat([s.diagonal(dim1=-2, dim2=-1).flatten() for s in self.stacks])

    def to_dense(self) -> Tensor:
        """``[n, n]``."""
        return torch.block_diag(*(block for s in self.stacks for block in s))


def named_tensors(name: str, side: Tensor | BlockStacks | None) -> dict[str, Tensor]:
    """A side of a Kronecker matrix as plain tensors: ``name``, or ``name_0``, ``name_1``, … for stacks of blocks."""
    if isinstance(side, BlockStacks):
        return {f"{name}_{i}": s for i, s in enumerate(side.stacks)}
    return {} if side is None else {name: side}


def found_in(tensors: Mapping[str, Tensor], name: str) -> Tensor | BlockStacks | None:
    """What :func:`named_tensors` named so; None where there is nothing of it."""
    stacks = [tensors[key] for i in range(len(tensors)) if (key := f"{name}_{i}") in tensors]
    return BlockStacks(tuple(stacks)) if stacks else tensors.get(name)
