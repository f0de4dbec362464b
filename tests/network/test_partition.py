"""Parameters to vectors and back, and which layer gets which cell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from natgrad.errors import ShapeError
from natgrad.metric import BlockDiagonal, Dense, Diagonal
from natgrad.network import Block, Partition, cells, trainable_parameters
from natgrad.testing import zoo

STRUCTURES = [Dense(), BlockDiagonal(), Diagonal()]


def partition_of(model: nn.Module, structure) -> Partition:
    return Partition(structure.blocks(cells(model)), tuple(trainable_parameters(model)))


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.name)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_round_trips(name, structure):
    """flat → blocks → flat, tensors → blocks → tensors, with and without leading batch axes; nothing lost or twice."""
    model = zoo.case(name).model
    partition = partition_of(model, structure)
    parameters = trainable_parameters(model)
    size = sum(p.numel() for p in parameters.values())
    assert partition.size == size
    assert sorted(n for c in partition.cells for n in c.parameters) == sorted(parameters)
    for batch in ((), (2,), (2, 3)):
        flat = torch.randn(*batch, size, dtype=torch.float64)
        assert torch.equal(partition.join(partition.split(flat)), flat)
        tensors = {n: torch.randn((*batch, *p.shape), dtype=torch.float64) for n, p in parameters.items()}
        again = partition.unpack(partition.pack(tensors))
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[n], tensors[n]) for n in tensors)
        in_order = torch.cat([tensors[n].reshape(*batch, -1) for n in parameters], -1)
        assert torch.equal(partition.join(partition.pack(tensors)), in_order)


def test_a_cell_is_weight_and_bias_in_homogeneous_rows():
    (cell,) = cells(nn.Sequential(nn.Linear(3, 2)))
    weight, bias = torch.arange(6.0).reshape(2, 3), torch.tensor([10.0, 20.0])
    packed = cell.pack({"0.weight": weight, "0.bias": bias})
    assert packed.tolist() == [0, 1, 2, 10, 3, 4, 5, 20]


@pytest.mark.parametrize(("frozen", "sizes"), [("weight", [2]), ("bias", [6]), (None, [8])])
def test_frozen_parameters_have_no_cell(frozen, sizes):
    layer = nn.Linear(3, 2)
    if frozen:
        layer.get_parameter(frozen).requires_grad_(False)
    assert [c.size for c in cells(nn.Sequential(layer))] == sizes


@pytest.mark.parametrize("name", ["raw_parameter", "tied_head"])
def test_what_no_rule_can_serve_is_a_cell_of_its_own_with_a_reason(name):
    """By types alone; what only a real pass shows (tied_head) is found by the coverage check."""
    found = {c.name: c for c in cells(zoo.case(name).model)}
    reasons = {n: c.reason for n, c in found.items() if c.module is None}
    expected = {
        "raw_parameter": {"gain": "RawParameter", "temperature": "RawParameter"},
        "tied_head": {},
    }[name]
    for parameter, reason in expected.items():
        assert reason in reasons[parameter]
    assert bool(reasons) == bool(expected)


def test_parametrised_layers_are_not_taken_for_plain_ones():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert all(c.module is None and c.reason for c in cells(model))


def test_a_vector_of_the_wrong_length_is_one_clear_error():
    partition = partition_of(nn.Linear(3, 2), Dense())
    with pytest.raises(ShapeError, match=r"length 7 .* 8 trainable"):
        partition.split(torch.zeros(7))


def test_cells_are_packed_side_by_side_as_one_after_the_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)
    )
    found = cells(model)
    assert len(found) == 4
    block = Block("all", tuple(found))
    tensors = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    expected = torch.cat([cell.pack(tensors) for cell in found])
    with torch.no_grad():
        at_once = block.pack(tensors)
        transposed = {n: t.mT.contiguous().mT if t.dim() == 2 else t for n, t in tensors.items()}
        assert torch.equal(block.pack(transposed), expected)
        mixed = {n: t.double() if n == "0.bias" else t for n, t in tensors.items()}
        assert block.pack(mixed).dtype == torch.float64
    assert torch.equal(at_once, expected)
    for name, t in block.unpack(at_once).items():
        assert torch.equal(t, tensors[name])
