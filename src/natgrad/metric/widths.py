"""What a side of a Kronecker product is where a square factor would be too large: blocks, or a diagonal.

The factor of a side of width n takes n² numbers, twice (average and inverse), and n³ operations to invert. Blocks of
width b on its diagonal take nb and nb²; a diagonal takes n. Blocks of the exact factor, and its diagonal, are computed
as such: nothing of size n × n is formed.

Moments of a side are told apart by their shapes. With a leading axis of groups (which a table of embeddings has not):
``[groups, n, n]``, ``[1, k, b, b]`` with what is left over as a moment ``…_rest`` of its own, or ``[1, n]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.linalg import BlockStacks, DiagonalMatrix, found_in
from natgrad.linalg.products import gram

Treatment = Literal["full", "blocks", "diagonal", "identity"]
Side = Literal["input", "output"]

SIDES: tuple[Side, Side] = ("input", "output")
REST = "_rest"
"""Ends the name of the moment with the last, narrower block of a side."""
_ALIGNED = 16


@dataclass(frozen=True)
class WidthLimits:
    """How wide a side of a Kronecker product may be for a square factor, and what wider ones get.

    The limits are those at which a factor stops being affordable beside its layer: at 8192 a float32 factor and its
    inverse take 0.5 GB and 10¹² operations; blocks of 1024 cost about what a layer with 1024 numbers on its other side
    does itself; and beyond 32768, the sizes of vocabularies, output gradients of a softmax are so nearly uncorrelated
    (``diag(p) − ppᵀ``) that a diagonal loses little.

    Args:
        full: sides up to this width (and a bias) have a square factor.
        blocks: wider ones up to this width (and a bias) have blocks on the diagonal, of nearly equal size.
        block: the largest width of a block.
        beyond: what is left gets: ``"diagonal"``, or ``"identity"`` times the mean of the diagonal, so that only the
            other side is preconditioned (one-sided).

    Raises:
        ArgumentError: a width below 1, or another word for ``beyond``.
    """

    full: int = 8192
    blocks: int = 32768
    block: int = 1024
    beyond: Literal["diagonal", "identity"] = "diagonal"

    def __post_init__(self) -> None:
        for name in ("full", "blocks", "block"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (name == "block"):
                raise ArgumentError(f"WidthLimits({name}={value!r}) was given; a width is a whole number, block ≥ 1.")
        if self.beyond not in ("diagonal", "identity"):
            raise ArgumentError(f"WidthLimits(beyond={self.beyond!r}) was given; use 'diagonal' or 'identity'.")

    def treatment(self, width: int) -> Treatment:
        """What a side of ``width`` numbers (a bias's one included) gets."""
        if width <= self.full + 1:
            return "full"
        return "blocks" if width <= self.blocks + 1 else self.beyond

    def block_width(self, width: int) -> int:
        """Width of the blocks of a side; the last one has what is left over."""
        even = -(-width // -(-width // self.block))
        return min(self.block, -(-even // _ALIGNED) * _ALIGNED)

    def second_moments(self, side: Side, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """``xᵀ y`` of a side as it is kept, by kind, for ``[*groups, N, n]``.

        Args:
            side: which one.
            x: its vectors.
            y: x (None), or x with its rows weighted.
        """
        n, treatment = x.shape[-1], self.treatment(x.shape[-1])
        y = x if y is None else y
        if treatment == "full" or (x.dim() == 3 and x.shape[0] > 1):
            return {side: gram(x, None if y is x else y)}
        if treatment == "blocks":
            b = self.block_width(n)
            whole = n // b * b
            parts = {side: _blocks(x[..., :whole], y[..., :whole], b)}
            return parts if whole == n else parts | {side + REST: _blocks(x[..., whole:], y[..., whole:], n - whole)}
        diagonal = torch.linalg.vecdot(x, y, dim=-2)
        return {side: diagonal if treatment == "diagonal" else _mean(diagonal)}

    def reason(self, side: Side, width: int) -> str:
        """How a wide side is treated and what a square factor would take; empty where it has one."""
        treatment = self.treatment(width)
        if treatment == "full":
            return ""
        blocks = f"blocks of {self.block_width(width)}"
        words = {"blocks": blocks, "diagonal": "diagonal", "identity": "one-sided (identity)"}[treatment]
        gigabytes = 2 * 4 * width**2 / 1e9
        return f"{side}: {words} ({width} wide; a square factor and its inverse would take {gigabytes:.3g} GB)"


def named_side(kinds: Mapping[str, Tensor], side: Side, name: str) -> dict[str, Tensor]:
    """A side as the tensors of a Kronecker product's factor ``name``, from what is kept of it (folded or not)."""
    t, rest = kinds[side], kinds.get(side + REST)
    if not is_table(kinds):
        if t.dim() == 3:
            return {name: t[0] if t.shape[0] == 1 else t}
        t, rest = t[0], None if rest is None else rest[0]
    if t.dim() < 3:
        return {name: t}
    return {f"{name}_{i}": stack for i, stack in enumerate((t, rest)) if stack is not None}


def factor_of(kinds: Mapping[str, Tensor], side: Side) -> Tensor | DiagonalMatrix | BlockStacks:
    """A side as a factor of a Kronecker product, from what is kept of it."""
    factor = found_in(named_side(kinds, side, side), side)
    assert factor is not None
    return DiagonalMatrix(factor) if isinstance(factor, Tensor) and factor.ndim == 1 else factor


def is_table(kinds: Mapping[str, Tensor]) -> bool:
    """Whether the moments are of a table of embeddings, whose rows are inputs."""
    return kinds["input"].dim() == 1


def _blocks(x: Tensor, y: Tensor, b: int) -> Tensor:
    """``[*groups, N, k b]`` -> ``[*groups, k, b, b]``."""
    x, y = (t.unflatten(-1, (-1, b)).movedim(-2, -3) for t in (x, y))
    return x.mT @ y


def _mean(diagonal: Tensor) -> Tensor:
    return diagonal.mean(-1, keepdim=True).expand_as(diagonal).clone()
