"""Kronecker-factored structures: K-FAC (expand and reduce) and its eigenvalue correction.

For a layer with inputs ``a`` and output gradients ``g``, the block of the Fisher matrix is approximated by ``G ⊗ A``
acting on the row-major vector of ``[W | b]``, shape ``[out, in + 1]``:

* expand (Martens & Grosse 2015; Grosse & Martens 2016): ``A = mean_{n,s} a aᵀ``, ``G = (1/M) Σ_{k,n,s} g gᵀ``;
* reduce (Eschenhagen et al. 2023): ``A = mean_n ā āᵀ`` with ``ā = mean_s a``, ``G = (1/M) Σ_{k,n} ĝ ĝᵀ`` with
  ``ĝ = Σ_s g``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.linalg import DiagonalMatrix, KroneckerEigen, LinearOperator
from natgrad.linalg.packed import kronecker_of
from natgrad.metric.bases import EighBases
from natgrad.metric.eigenbasis import eigenbasis, kept_rows, projected, rotated_eigenvalues
from natgrad.metric.estimate import Factor, random_signs
from natgrad.metric.sampling import Picks, Sampling
from natgrad.metric.statistics import Bases, Moment, Moments
from natgrad.metric.storage import Unpacked
from natgrad.metric.structure import Means, Structure
from natgrad.metric.tied import tied_moments
from natgrad.metric.widths import SIDES, Side, WidthLimits, is_table, named_side
from natgrad.network import Block, Cell, EmbeddingRows, LinearRows, Partition, Rows, Tape, TiedRows, accumulation


@dataclass(frozen=True)
class Common:
    """What the layers of one pass share: the columns, the picked positions, and the input factors of equal inputs."""

    factor: Factor
    picks: Picks
    _inputs: dict[tuple[object, ...], dict[str, Moment]] = field(default_factory=dict)

    def inputs(
        self, rows: LinearRows, moments: Callable[[LinearRows, Factor, Picks], dict[str, Moment]]
    ) -> dict[str, Moment]:
        """``moments`` of the layer's inputs, formed once for layers that read the same memory (query, key, value)."""
        if not rows.origin:
            return moments(rows, self.factor, self.picks)
        key = (rows.a.shape, rows.spans, *rows.origin)
        if key not in self._inputs:
            self._inputs[key] = moments(rows, self.factor, self.picks)
        return self._inputs[key]


@dataclass(frozen=True)
class Kronecker(Structure):
    """K-FAC: one Kronecker product per layer.

    Norm layers get the diagonal of their rows, which is exact where no later layer couples the batch. A parameter that
    no layer rule covers gets a diagonal estimated from batch gradients with random signs per row,
    ``E[(Σ_n ±r_n)²] = Σ_n r_n²``: unbiased, at the cost of its share of one backward pass.

    Args:
        sharing: ``"expand"`` treats every shared position (token, pixel) as an independent example, ``"reduce"``
            aggregates positions first: exact for mean-pooled linear networks, and cheaper.
        sampling: the part of the batch that the factors are estimated from. Averages of other parts go on with it, so
            a checkpoint does not ask for the same one.
        widths: what sides too wide for a square factor get.
        storage: how averaged factors and inverses are kept: ``Unpacked()``, or in half the memory ``Packed()``.
            Checkpoints of one load into the other.
    """

    # K-FAC's usual practice with BatchNorm: what a layer of the coupled batch sees counts as its own.
    by_example: ClassVar[bool] = False

    sharing: Literal["expand", "reduce"] = "expand"
    sampling: Sampling = field(default=Sampling(), repr=False)
    widths: WidthLimits = WidthLimits()
    storage: Unpacked = field(default=Unpacked(), repr=False)

    def __post_init__(self) -> None:
        if self.sharing not in ("expand", "reduce"):
            raise ArgumentError(f"sharing={self.sharing!r} was given; use 'expand' or 'reduce'.")
        if not isinstance(self.sampling, Sampling):
            raise ArgumentError(f"sampling={self.sampling!r} was given; it must be ng.Sampling or ng.SubBatch.")
        if not isinstance(self.widths, WidthLimits):
            raise ArgumentError(f"widths={self.widths!r} was given; it must be ng.WidthLimits(full=…, blocks=…).")
        if not isinstance(self.storage, Unpacked):
            raise ArgumentError(f"storage={self.storage!r} was given; it must be ng.Packed() or ng.Unpacked().")

    def __repr__(self) -> str:
        """Tells metrics apart in checkpoints; limits that nobody chose are not named."""
        widths = "" if self.widths == WidthLimits() else f", widths={self.widths!r}"
        return f"{self.name}(sharing={self.sharing!r}{widths})"

    @classmethod
    def expand(
        cls,
        sampling: Sampling = Sampling(),
        widths: WidthLimits = WidthLimits(),
        storage: Unpacked = Unpacked(),
    ) -> Kronecker:
        """Every shared position is an example of its own."""
        return cls("expand", sampling, widths, storage)

    @classmethod
    def reduce(
        cls,
        sampling: Sampling = Sampling(),
        widths: WidthLimits = WidthLimits(),
        storage: Unpacked = Unpacked(),
    ) -> Kronecker:
        """Shared positions are aggregated before the outer products."""
        return cls("reduce", sampling, widths, storage)

    @property
    def aligned(self) -> bool:
        return self.sharing == "reduce"

    def blocks(self, cells: Sequence[Cell]) -> tuple[Block, ...]:
        return tuple(Block(cell.name, (cell,)) for cell in cells)

    def statistics(
        self,
        tape: Tape,
        factor: Factor,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
    ) -> Moments:
        chunks = self._row_chunks(tape, factor, partition, generator)
        return Moments(self._factor_moments(chunks, self.common(factor, generator)), factor.normaliser)

    def common(self, factor: Factor, generator: torch.Generator | None) -> Common:
        """What the layers of one pass share, with this structure's picks."""
        # Of examples that stand for others all positions are taken.
        return Common(factor, (self.sampling if factor.copies == 1.0 else Sampling()).picks(generator))

    def _factor_moments(
        self, chunks: Iterable[Mapping[str, Rows | Tensor]], common: Common
    ) -> dict[str, dict[str, Moment]]:
        """Moments of every cell, summed over the chunks of columns."""
        values: dict[str, dict[str, Moment]] = {}
        for rows in chunks:
            for name, row in rows.items():
                kinds = values.setdefault(name, {})
                for kind, moment in self._moments(row, common, first="input" not in kinds).items():
                    kinds[kind] = kinds[kind] + moment if kind in kinds else moment
        return values

    def reader(
        self, tape: Tape, factor: Factor, generator: torch.Generator | None, bases: Bases
    ) -> Callable[[str, Rows], Moments]:
        common, zero = self.common(factor, generator), torch.zeros_like(factor.normaliser)
        return lambda name, rows: Moments({name: self._moments(rows, common, first=True)}, zero)

    def _row_chunks(self, tape: Tape, factor: Factor, partition: Partition, generator: torch.Generator | None):
        covered = [c for c in partition.cells if c.module is not None]
        raw = [c for c in partition.cells if c.module is None]
        parameters = dict(tape.model.named_parameters())
        for columns in factor.chunks():
            rows: dict[str, Rows | Tensor] = dict(tape.rows(covered, columns))
            if raw:
                signs = random_signs(columns.shape[:2], columns, generator)
                signed = columns * signs.reshape(*columns.shape[:2], *[1] * (columns.dim() - 2))
                grads = tape.backward([parameters[c.parameters[0]] for c in raw], signed)
                rows.update({c.name: g.reshape(len(g), -1) for c, g in zip(raw, grads, strict=True) if g is not None})
            yield rows

    def _moments(self, rows: Rows | Tensor, common: Common, first: bool) -> dict[str, Moment]:
        """Moments of one cell; ``first`` is false once the inputs, which all columns share, are counted."""
        factor, picks = common.factor, common.picks
        if isinstance(rows, Tensor):
            return {"diagonal": Moment(accumulation(rows).square().sum(0))}
        if isinstance(rows, TiedRows):
            weights = lambda n, spans: _position_weights(factor, n, spans)  # noqa: E731
            return tied_moments(rows, self.sharing, weights, self.widths)
        if isinstance(rows, LinearRows):
            g = rows.g.sum(3, keepdim=True) if self.sharing == "reduce" else rows.g
            groups, out = g.shape[1], g.shape[-1]
            g = picks.scores(g.transpose(0, 1).flatten(2, 3)).reshape(groups, -1, out)
            found = self._side("output", None, g)
            return found | common.inputs(rows, self._input_moment) if first else found
        if isinstance(rows, EmbeddingRows):
            g = rows.g.sum(2, keepdim=True) if self.sharing == "reduce" else rows.g
            g = picks.scores(g.flatten(1, 2)).flatten(0, 1)
            found = self._side("output", None, g)
            return found | {"input": self._token_moment(rows, factor).repeated(factor.copies)} if first else found
        return {"diagonal": Moment(rows.squared_sum())}

    def _side(self, side: Side, count: Tensor | None, x: Tensor, y: Tensor | None = None) -> dict[str, Moment]:
        return {kind: Moment(t, count) for kind, t in self.widths.second_moments(side, x, y).items()}

    def _input_moment(self, rows: LinearRows, factor: Factor, picks: Picks) -> dict[str, Moment]:
        """``Σ w a aᵀ`` over examples and positions."""
        a = rows.a
        groups, n, s, fan_in = a.shape
        w = _position_weights(factor, n, rows.spans or (s,))
        if self.sharing == "expand":
            inputs, w = a.reshape(groups, n * s, fan_in), None if w is None else w.flatten()
        elif w is None:
            inputs = a.mean(2)
        else:
            per_row = w.sum(1)
            inputs = (a * w[..., None]).sum(2) / per_row.clamp_min(torch.finfo(a.dtype).tiny)[:, None]
            w = per_row
        count = inputs.shape[1]
        inputs, w = picks.inputs(inputs, w)
        # Micro-batches of which unequal parts are seen weigh what they do as a whole.
        copies = factor.copies * count / max(1, inputs.shape[1])
        inputs = inputs if copies == 1.0 else inputs * copies**0.5
        if w is None:
            return self._side("input", a.new_full((), copies * inputs.shape[1]), inputs)
        return self._side("input", copies * w.sum(), inputs, inputs * w[:, None])

    def _token_moment(self, rows: EmbeddingRows, factor: Factor) -> Moment:
        """Frequencies of tokens: the diagonal of ``Σ onehot onehotᵀ`` (of the mean one-hot vector for reduce)."""
        n, s = rows.index.shape
        w = _position_weights(factor, n, rows.spans or (s,))
        w = rows.g.new_ones(n, s) if w is None else w
        if rows.padding is not None:
            w = w * (rows.index != rows.padding)
        if self.sharing == "reduce":
            per_row = w.sum(1)
            share = w / per_row.clamp_min(torch.finfo(w.dtype).tiny)[:, None]
            mean = share.new_zeros(n, rows.vocabulary).scatter_add_(1, rows.index, share)
            # A row counts as its share of positions with weight, so that padding makes it no lighter.
            return Moment((mean.square() * per_row[:, None]).sum(0), w.sum())
        frequencies = w.new_zeros(rows.vocabulary).index_add_(0, rows.index.flatten(), w.flatten())
        return Moment(frequencies, w.sum())

    def operators(self, partition: Partition, means: Means, bases: Bases) -> dict[str, LinearOperator]:
        out: dict[str, LinearOperator] = {}
        for name, kinds in means.items():
            if "diagonal" in kinds:
                out[name] = DiagonalMatrix(kinds["diagonal"])
            else:
                out[name] = _product(kinds)
        return out

    def reason(self, cell: Cell) -> tuple[str, str]:
        if cell.module is None:
            return "Diagonal", f"{cell.reason}: diagonal from batch gradients with random signs"
        if cell.groups:
            return self.name, self._wide_sides(cell)
        return "Diagonal", "not a weight matrix (scale and shift of a norm layer): diagonal of its rows"

    def _wide_sides(self, cell: Cell) -> str:
        """What the sides of a layer get that are too wide for a square factor."""
        inputs, outputs = cell.size // cell.outputs, cell.outputs
        if cell.layout.table:  # tokens are rows
            return self.widths.reason("output", inputs)
        found = [self.widths.reason("input", inputs), self.widths.reason("output", outputs)]
        return "; ".join(text for text in found if text) if cell.groups == 1 else ""


def _product(kinds: Mapping[str, Tensor]) -> LinearOperator:
    """``G ⊗ A`` of a linear layer, or ``diag(frequencies) ⊗ G`` of an embedding (its table has tokens as rows)."""
    left, right = SIDES if is_table(kinds) else SIDES[::-1]
    return kronecker_of({**named_side(kinds, left, "left"), **named_side(kinds, right, "right")})


def _position_weights(factor: Factor, n: int, spans: tuple[int, ...]) -> Tensor | None:
    """Weights ``[N, S]`` of a layer's inputs from those of the predictions they feed; None where all count alike.

    ``spans`` are the numbers of positions of each use of the layer; they add up to S.
    """
    weights = factor.weights
    if weights is None or weights.shape[0] != n:
        return None
    flat = weights.reshape(n, -1)
    parts = []
    for span in spans:
        if span % flat.shape[1] == 0:
            # Several positions per token (heads, pixels) lie next to each other.
            parts.append(flat.repeat_interleave(span // flat.shape[1], 1))
        else:
            parts.append(flat.mean(1, keepdim=True).expand(n, span))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass(frozen=True, repr=False)
class EigenKronecker(Kronecker):
    """EKFAC: K-FAC's eigenbasis with the exact second moments of the gradient along it (George et al. 2018).

    Among all matrices diagonal in that basis it is the nearest to the layer's Fisher block in Frobenius norm, and its
    trace is exact.

    The basis of a layer that has none yet is that of the joint factors of all micro-batches of the step, so the rows of
    each (inputs and scores of the layer) are kept until then; with a known basis they are projected at once.

    Args:
        basis: how the basis is renewed: ``EighBases()``, or ``CholeskyQR(tolerance=…)`` from the one before.
            Checkpoints of one load into the other.
    """

    basis: EighBases = field(default=EighBases(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.basis, EighBases):
            raise ArgumentError(f"basis={self.basis!r} was given; it must be ng.EighBases() or ng.CholeskyQR().")

    @property
    def aligned(self) -> bool:
        return True

    def statistics(
        self,
        tape: Tape,
        factor: Factor,
        partition: Partition,
        *,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
    ) -> Moments:
        chunks = list(self._row_chunks(tape, factor, partition, generator))
        common = self.common(factor, generator)
        values = self._factor_moments(chunks, common)
        rows = {
            name: kept_rows((common.picks.examples(c[name]) for c in chunks), tape)
            for name, kinds in values.items()
            if "output" in kinds
        }
        moments = Moments(values, factor.normaliser, rows=rows)
        return projected(moments, {name: basis for name, basis in (bases or {}).items() if name in rows})

    def operators(self, partition: Partition, means: Means, bases: Bases) -> dict[str, LinearOperator]:
        out: dict[str, LinearOperator] = {}
        for name, kinds in means.items():
            if "diagonal" in kinds:
                out[name] = DiagonalMatrix(kinds["diagonal"])
            else:
                left, right = bases[name]
                out[name] = KroneckerEigen(left, right, kinds["eigenvalues"])
        return out

    def reader(
        self, tape: Tape, factor: Factor, generator: torch.Generator | None, bases: Bases
    ) -> Callable[[str, Rows], Moments]:
        common, zero = self.common(factor, generator), torch.zeros_like(factor.normaliser)

        def read(name: str, rows: Rows) -> Moments:
            moments = Moments({name: self._moments(rows, common, first=True)}, zero)
            if "output" in moments.values[name]:
                moments = replace(moments, rows={name: kept_rows([common.picks.examples(rows)], tape)})
            return projected(moments, {name: bases[name]} if name in bases and name in moments.rows else {})

        return read

    def renewed_bases(self, means: Means, bases: Bases) -> tuple[Means, Bases]:
        """New eigenbases from the averaged factors; averaged eigenvalues are carried over to them."""
        out: dict[str, Mapping[str, Tensor]] = {}
        new: Bases = {}
        for name, kinds in means.items():
            if "eigenvalues" not in kinds:
                out[name] = kinds
                continue
            new[name] = eigenbasis(kinds, bases[name], self.basis)
            out[name] = {**kinds, "eigenvalues": rotated_eigenvalues(kinds["eigenvalues"], bases[name], new[name])}
        return out, new
