"""Which part of a batch's positions (tokens, pixels, examples) the Kronecker factors are estimated from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.network import EmbeddingRows, LinearRows, Rows


@dataclass(frozen=True)
class Sampling:
    """A random part of the batch for K-FAC's factors: unbiased, and cheaper in proportion.

    Sums over the ``n`` positions of a layer are replaced by ``n/m`` times those over ``m = fraction · n`` picked ones.
    The k-th pick is drawn evenly from the k-th of m equal stretches of the batch, so that every position is picked
    ``m/n`` times in expectation, and all parts of the batch are represented. Inputs and output gradients are those of
    the same positions; frequencies of an embedding's tokens are counted over all. Second moments of EKFAC, which belong
    to whole examples, are taken over that fraction of the examples.

    Args:
        fraction: of the positions, in (0, 1]; 1 takes all.

    Raises:
        ArgumentError: a fraction out of range.
    """

    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.fraction, (int, float)) and 0.0 < self.fraction <= 1.0):
            raise ArgumentError(
                f"Sampling(fraction={self.fraction!r}) was given; a fraction of the batch lies in (0, 1]: 1/16 picks "
                "every sixteenth position on average, 1 takes all."
            )

    def picks(self, generator: torch.Generator | None = None) -> Picks:
        """The picks of one batch; layers with as many positions share theirs."""
        return Picks(self.fraction, generator)


@dataclass(frozen=True)
class Picks:
    """Positions picked in one batch.

    Args:
        fraction: of the positions.
        generator: source of the draws, on the device of the batch.
    """

    fraction: float
    generator: torch.Generator | None = None
    _found: dict[int, Tensor] = field(default_factory=dict)

    def of(self, count: int, device: torch.device) -> Tensor | None:
        """Indices ``[m]`` into ``count`` positions, in ascending order; None where all are taken."""
        number = max(1, round(self.fraction * count))
        if self.fraction == 1.0 or number >= count:
            return None
        if count not in self._found:
            # In float64: float32 cannot tell the positions of a batch of more than 16 million tokens apart.
            draws = torch.rand(number, dtype=torch.float64, device=device, generator=self.generator)
            places = (torch.arange(number, dtype=torch.float64, device=device) + draws) * (count / number)
            self._found[count] = places.long().clamp_(max=count - 1)
        return self._found[count]

    def scores(self, g: Tensor) -> Tensor:
        """Output gradients ``[..., n, out]`` at the picked positions, scaled so that ``Σ g gᵀ`` is right on average."""
        index = self.of(g.shape[-2], g.device)
        return g if index is None else g.index_select(-2, index) * math.sqrt(g.shape[-2] / len(index))

    def inputs(self, a: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Inputs ``[..., n, in]`` and their weights ``[n]`` at the picked positions."""
        index = self.of(a.shape[-2], a.device)
        if index is None:
            return a, weights
        return a.index_select(-2, index), None if weights is None else weights.index_select(0, index)

    def examples(self, rows: Rows | Tensor) -> Rows | Tensor:
        """Rows of the picked examples, scaled so that their squares are right on average."""
        if not isinstance(rows, (LinearRows, EmbeddingRows)):
            return rows
        index = self.of(rows.shape[1], rows.g.device)
        if index is None:
            return rows
        scale = math.sqrt(rows.shape[1] / len(index))
        if isinstance(rows, LinearRows):
            return replace(rows, a=rows.a.index_select(1, index), g=rows.g.index_select(2, index) * scale)
        return replace(rows, index=rows.index.index_select(0, index), g=rows.g.index_select(1, index) * scale)
