"""Which part of a batch the Kronecker factors are estimated from: positions (tokens, pixels), or whole examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.likelihood.base import Target
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
        least: so many are picked at least, or all: a part of a small batch would be too few.

    Raises:
        ArgumentError: a fraction out of range, or ``least`` below 1.
    """

    fraction: float = 1.0
    least: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.fraction, (int, float)) and 0.0 < self.fraction <= 1.0):
            raise ArgumentError(
                f"{type(self).__name__}(fraction={self.fraction!r}) was given; a fraction of the batch lies in (0, 1]: "
                "1/16 picks a sixteenth of it, 1 takes all."
            )

        if not isinstance(self.least, int) or self.least < 1:
            raise ArgumentError(
                f"{type(self).__name__}(least={self.least!r}) was given; it is a whole number of picks ≥ 1."
            )

    def picks(self, generator: torch.Generator | None = None) -> Picks:
        """The picks of one batch; layers with as many positions share theirs."""
        return Picks(self.fraction, generator, self.least)


@dataclass(frozen=True)
class SubBatch(Sampling):
    """Whole examples, picked at random, run through the model by themselves: nothing is done to the others.

    The k-th of ``m = fraction · N`` examples is drawn evenly from the k-th of m equal stretches of the batch. They are
    run forward and, with the columns of the estimate, backward once more, at ``fraction`` of the cost of both, and the
    sums over them count ``N/m`` times: unbiased, divided by the normaliser of the whole batch. Dropout draws masks of
    its own for them.

    A model that couples the examples of a batch (BatchNorm in training mode, routing with a capacity) cannot be run on
    a part of it. This is found out at the first pass; the coverage table then says so by name, and positions are picked
    as by ``Sampling``.
    """


@dataclass(frozen=True)
class Share:
    """What a part of a batch stands for.

    Args:
        index: of its m examples, ``[m]``.
        output: of the whole batch, ``[N, *positions, C]``.
    """

    index: Tensor
    output: Tensor

    @property
    def copies(self) -> float:
        """How many examples of the batch each one stands for."""
        return len(self.output) / len(self.index)

    def target(self, whole: Target | None) -> Target | None:
        """The labels (and weights) of the part."""
        if whole is None or isinstance(whole, Tensor):
            return None if whole is None else whole.index_select(0, self.index.to(whole.device))
        return tuple(t.index_select(0, self.index.to(t.device)) for t in whole)  # type: ignore[return-value]


@dataclass(frozen=True)
class Picks:
    """Positions picked in one batch.

    Args:
        fraction: of the positions.
        generator: source of the draws, on the device of the batch.
        least: number of picks.
    """

    fraction: float
    generator: torch.Generator | None = None
    least: int = 1
    _found: dict[int, Tensor] = field(default_factory=dict)

    def of(self, count: int, device: torch.device) -> Tensor | None:
        """Indices ``[m]`` into ``count`` positions, in ascending order; None where all are taken."""
        number = max(self.least, round(self.fraction * count))
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
