"""The tape of a batch without examples: what gives a structure's statistics their shapes before any data is seen."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natgrad.network.partition import Cell
from natgrad.network.rows import DenseRows, EmbeddingRows, LinearRows, Rows
from natgrad.network.tape import Tape
from natgrad.network.tied import TiedRows


class EmptyTape(Tape):
    """Serves rows of zero examples, for the cells of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(weakref.ref(model))
        self._parameters = dict(model.named_parameters())

    def rows(self, cell_list: Sequence[Cell], columns: Tensor) -> dict[str, Rows]:
        return {cell.name: self._rows(cell) for cell in cell_list if cell.module is not None}

    def backward(self, targets: Sequence[Tensor | object], columns: Tensor) -> list[Tensor | None]:
        return [t.new_zeros(1, *t.shape) if isinstance(t, Tensor) else None for t in targets]

    def _rows(self, cell: Cell) -> Rows:
        like = self._parameters[cell.parameters[0]].detach()
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        if not cell.groups:
            return DenseRows(like.new_zeros(1, 0, cell.size))
        outputs, groups, inputs = cell.outputs, cell.groups, cell.size // cell.outputs
        if cell.layout.table:
            index = torch.zeros(0, 1, dtype=torch.long, device=like.device)
            rows = EmbeddingRows(index, like.new_zeros(1, 0, 1, inputs), outputs)
            return TiedRows((rows,)) if cell.layout.mixed else rows
        return LinearRows(like.new_zeros(groups, 0, 1, inputs), like.new_zeros(1, groups, 0, 1, outputs // groups))
