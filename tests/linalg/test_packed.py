"""Symmetric matrices by one triangle: what is folded unfolds to itself, and a product of them acts as a whole one."""

from __future__ import annotations

import pytest
import torch
from matrices import close, randn, spd, spd_stack

import natgrad.linalg as la
from natgrad.errors import ShapeError
from natgrad.linalg.packed import PackedKronecker, fold, folded_shape, kronecker_of, unfold, unpacked, width_of
from natgrad.testing import check_operator


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
@pytest.mark.parametrize("n", range(2, 12))
def test_what_is_folded_unfolds_to_itself(n, stack):
    matrix = randn(*stack, n, n)
    matrix = matrix + matrix.mT
    folded = fold(matrix)
    assert folded.shape == folded_shape(matrix.shape) and width_of(folded.shape) == n
    assert folded.numel() == matrix[..., 0, 0].numel() * n * (n + 1) // 2 and folded.is_contiguous()
    assert torch.equal(unfold(folded), matrix)


def test_only_the_lower_triangle_counts():
    lower = randn(7, 7).tril()
    assert torch.equal(fold(lower), fold(lower + lower.tril(-1).mT))
    assert torch.equal(unfold(fold(lower + randn(7, 7).triu(1))), lower + lower.tril(-1).mT)


def test_square_shapes_are_of_no_folded_matrix():
    assert all(width_of((n, n)) is None for n in range(1, 50))
    assert width_of((5,)) is None and width_of((1, 40)) is None
    with pytest.raises(ShapeError, match="folds into"):
        unfold(randn(4, 4))
    with pytest.raises(ShapeError, match="square"):
        fold(randn(4, 5))


@pytest.mark.parametrize("n", [8, 9])
def test_bfloat16_is_off_by_its_rounding_and_computed_with_in_float32(n):
    matrix = spd(n).float()
    found = unfold(fold(matrix, torch.bfloat16))
    assert found.dtype == torch.float32 and torch.equal(found, found.mT)
    error = (found - matrix).abs()
    assert bool((error <= 2.0**-8 * matrix.abs()).all()) and float(error.max()) > 0
    assert torch.equal(found, torch.tril(matrix).bfloat16().float() + torch.tril(matrix, -1).bfloat16().float().mT)


LEFT, RIGHT, STACKS = spd(4), spd(3, 1), (spd_stack(2, 3), spd_stack(1, 2, seed=3))
DIAG = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
BLOCKS = torch.block_diag(*STACKS[0], *STACKS[1])
CASES = {
    "both": ({"left": fold(LEFT), "right": fold(RIGHT)}, torch.kron(LEFT, RIGHT)),
    "left": ({"left": fold(LEFT), "right": RIGHT}, torch.kron(LEFT, RIGHT)),
    "diagonal": ({"left": DIAG, "right": fold(RIGHT)}, torch.kron(torch.diag(DIAG), RIGHT)),
    "blocks": (
        {"left_0": fold(STACKS[0]), "left_1": STACKS[1], "right": fold(RIGHT)},
        torch.kron(BLOCKS, RIGHT),
    ),
    "stack": (
        {"left": fold(spd_stack(2, 4)), "right": fold(spd_stack(2, 3, seed=5))},
        torch.block_diag(*(torch.kron(a, b) for a, b in zip(spd_stack(2, 4), spd_stack(2, 3, seed=5), strict=True))),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_packed_product_acts_as_the_whole_one(name):
    tensors, dense = CASES[name]
    product = kronecker_of(tensors)
    assert isinstance(product, PackedKronecker) and product.kind == "kronecker"
    check_operator(product, dense)
    assert all(product.tensors()[key] is t for key, t in tensors.items())
    assert isinstance(unpacked(product), la.KroneckerProduct)


def test_what_is_not_folded_is_no_packed_product():
    assert isinstance(kronecker_of({"left": LEFT, "right": RIGHT}), la.KroneckerProduct)
    operator = la.DenseMatrix(LEFT, True)
    assert unpacked(operator) is operator


def test_a_bfloat16_factor_beside_a_whole_one():
    product = kronecker_of({"left": fold(LEFT, torch.bfloat16), "right": RIGHT})
    assert product.dtype == torch.float64
    exact = torch.kron(LEFT, RIGHT)
    assert bool(((product.to_dense() - exact).abs() <= 2.0**-8 * exact.abs()).all())
    close(product.trace(), product.to_dense().trace(), 1e-12)
