"""Renewed eigenbases: by eigh, or from the basis before; alone, stacked, in blocks, and in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.errors import ArgumentError, NonFiniteError
from natgrad.linalg import BlockStacks
from natgrad.metric.eigenbasis import eigenbasis, rotated_eigenvalues


def spd(*shape: int, seed: int = 0) -> Tensor:
    """Positive definite matrices ``[*stack, n, n]`` for a shape ``(*stack, n)``."""
    root = torch.randn(*shape, 3 * shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scales = torch.logspace(0, 2, shape[-1], dtype=torch.float64)[:, None]
    return (scales * root) @ (scales * root).mT / root.shape[-1]


def diagonal_part(matrix: Tensor, basis: Tensor) -> Tensor:
    turned = basis.mT @ matrix @ basis
    return turned.diagonal(dim1=-2, dim2=-1).square().sum() / matrix.square().sum()


def test_the_default_is_an_eigendecomposition() -> None:
    assert ng.EigenKronecker().basis == ng.EighBases()
    factor = spd(7)
    assert torch.equal(ng.EighBases().renewed(factor, torch.eye(7, dtype=torch.float64)), torch.linalg.eigh(factor)[1])


@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
def test_bases_of_stacks_are_those_of_their_matrices(stack: tuple[int, ...]) -> None:
    old, new = spd(*stack, 8), spd(*stack, 8, seed=1)
    how, basis = ng.CholeskyQR(tolerance=0.0), ng.EighBases().renewed(old, None)
    found = how.renewed(0.9 * old + 0.1 * new, basis)
    for i, matrix in enumerate((0.9 * old + 0.1 * new).reshape(-1, 8, 8)):
        assert torch.equal(found.reshape(-1, 8, 8)[i], how.renewed(matrix, basis.reshape(-1, 8, 8)[i]))
    assert how.renewed(old, None).equal(basis) and how.renewed(old, torch.eye(3)).equal(basis)
    assert ng.CholeskyQR(tolerance=0.5).renewed(old, basis) is basis


def test_each_factor_that_breaks_down_is_decomposed() -> None:
    deficient = torch.zeros(8, 8, dtype=torch.float64)
    deficient[:3, :3] = spd(3)
    good, basis = spd(8), torch.linalg.qr(spd(8, seed=3)).Q
    factors = torch.stack([deficient, good])
    found = ng.CholeskyQR().renewed(factors, torch.stack([torch.eye(8, dtype=torch.float64), basis]))
    assert torch.equal(found[0], torch.linalg.eigh(deficient)[1])
    assert not torch.equal(found[1], torch.linalg.eigh(good)[1])
    with pytest.raises(NonFiniteError):
        ng.CholeskyQR().renewed(good * float("nan"), basis)


def test_a_side_that_stays_is_the_same_object_and_its_eigenvalues_too() -> None:
    a, g = spd(1, 6), spd(1, 4)
    kinds = {"input": a, "output": g}
    old = eigenbasis(kinds)
    new = eigenbasis({"input": a, "output": spd(1, 4, seed=5)}, old, ng.CholeskyQR())
    assert new[1] is old[1] and new[0] is not old[0]
    values = torch.rand(4, 6, dtype=torch.float64)
    assert rotated_eigenvalues(values, old, old) is values
    turned = rotated_eigenvalues(values, old, new)
    torch.testing.assert_close(turned, (new[0].mT @ old[0]).square() @ values)  # type: ignore[union-attr, operator]


def test_sides_of_blocks_are_followed_block_by_block() -> None:
    kinds = {"input": spd(1, 3, 4), "input_rest": spd(1, 1, 2), "output": spd(1, 5)}
    old = eigenbasis(kinds)
    side = old[1]
    assert isinstance(side, BlockStacks)
    assert eigenbasis(kinds, old, ng.CholeskyQR())[1] is side
    moved = {**kinds, "input": kinds["input"] + 0.3 * spd(1, 3, 4, seed=7)}
    new = eigenbasis(moved, old, ng.CholeskyQR(tolerance=1e-3))[1]
    assert isinstance(new, BlockStacks)
    assert new.stacks[1] is side.stacks[1]
    assert diagonal_part(moved["input"][0], new.stacks[0]) > diagonal_part(moved["input"][0], side.stacks[0])


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan"), "much", True])
def test_a_tolerance_is_a_part(tolerance: Any) -> None:
    with pytest.raises(ArgumentError, match="tolerance"):
        ng.CholeskyQR(tolerance=tolerance)
    with pytest.raises(ArgumentError, match="basis"):
        ng.EigenKronecker(basis="qr")  # type: ignore[arg-type]


def _run(basis: ng.EighBases, steps: int = 12, widths: ng.WidthLimits = ng.WidthLimits(), refresh: Any = None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    opt = ng.EKFAC(
        model, ng.Categorical(), structure=ng.EigenKronecker(basis=basis, widths=widths),
        refresh=refresh or ng.Refresh(1, 2),
    )  # fmt: skip
    x = torch.randn(64, 6, dtype=torch.float64)
    y = (x[:, :3] + x[:, 3:]).argmax(-1)
    return model, opt, [_step(model, opt, x, y) for _ in range(steps)], (x, y)


def _step(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> float:
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    return float(loss.detach())


@pytest.mark.parametrize("refresh", [ng.Refresh(1, 2), ng.Staggered(1, 3)])
@pytest.mark.parametrize("widths", [ng.WidthLimits(), ng.WidthLimits(full=4, block=4)])
def test_training_with_followed_bases_is_as_good(widths: ng.WidthLimits, refresh: Any) -> None:
    by_eigh, followed = (_run(basis, 30, widths, refresh)[2] for basis in (ng.EighBases(), ng.CholeskyQR()))
    assert by_eigh[-1] < 0.5 * by_eigh[0]
    assert followed[-1] < 1.2 * by_eigh[-1]
    assert followed != by_eigh


def test_the_state_is_that_of_the_other_strategy_and_resumes_bit_for_bit() -> None:
    model, opt, _, (x, y) = _run(ng.CholeskyQR(), steps=5)
    state, weights = opt.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.load(_saved(state), weights_only=True)
    for _ in range(5):
        _step(model, opt, x, y)
    again, other, _, _ = _run(ng.CholeskyQR(), steps=0)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    for _ in range(5):
        _step(again, other, x, y)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    _run(ng.EighBases(), steps=0)[1].load_state_dict(state)


def _saved(state: Any) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer
