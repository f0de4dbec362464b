"""Wide sides of Kronecker products: blocks, a diagonal or one side alone, in place of a square factor."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import natgrad as ng
from natgrad.errors import ArgumentError
from natgrad.linalg import BlockStacks, KroneckerProduct
from natgrad.metric.eigenbasis import rotated_eigenvalues
from natgrad.testing import oracles
from support import assert_close, problem

BLOCKS = ng.WidthLimits(full=1, blocks=100, block=3)
DIAGONAL = ng.WidthLimits(full=1, blocks=0)
IDENTITY = ng.WidthLimits(full=1, blocks=0, beyond="identity")
LIMITS = {"blocks": BLOCKS, "diagonal": DIAGONAL, "identity": IDENTITY}
SHARING: tuple[Any, ...] = ("expand", "reduce")
DAMPING = 0.1


def approximated(factor: Tensor, limits: ng.WidthLimits) -> Tensor:
    """The square factor as the limits of these tests leave it, entry by entry."""
    n = len(factor)
    if n <= 2:
        return factor
    if limits is DIAGONAL:
        return torch.diag(factor.diagonal())
    if limits is IDENTITY:
        return torch.eye(n, dtype=factor.dtype) * factor.trace() / n
    return torch.stack([torch.stack([factor[i, j] * (i // 3 == j // 3) for j in range(n)]) for i in range(n)])


def factors_of(p: Any, name: str, sharing: str) -> tuple[Tensor, Tensor]:
    """The oracle's square factors of a layer."""
    record = oracles.join_uses(oracles.record_layers(p.model, p.x, [name])[name])
    bias = p.model.get_submodule(name).bias is not None
    return oracles.kronecker_factors(record, p.exact_columns, p.total, bias=bias, reduce=sharing == "reduce")


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(
    ("model", "layer"), [("mlp", "2"), ("mixer", "stem"), ("attention", "qkv"), ("conv2d", "0"), ("conv2d", "3")]
)
def test_factors_are_the_blocks_and_diagonals_of_the_square_ones(model, layer, sharing, limits):
    p = problem(model, "categorical")
    got = p.fisher("exact", ng.Kronecker(sharing, widths=LIMITS[limits])).blocks.blocks[layer]
    A, G = factors_of(p, layer, sharing)
    expected = [approximated(t, LIMITS[limits]) for t in (G, A)]
    for factor, want in zip((got.left, got.right), expected, strict=True):
        assert_close(factor if isinstance(factor, Tensor) else factor.to_dense(), want, 1e-12)
    assert any(not isinstance(f, Tensor) for f in (got.left, got.right))
    assert_close(got.to_dense(), torch.kron(*expected), 1e-12)
    assert_close(got.trace(), (torch.kron(G, A)).trace(), 1e-12)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(("model", "layer"), [("embedding_bag", "embedding"), ("tied_embedding", "embedding")])
def test_tables_have_a_wide_side_too(model, layer, sharing, limits):
    """The width of an embedding; its vocabulary is diagonal whatever the limits are."""
    p = problem(model, "categorical")
    whole = p.fisher("exact", ng.Kronecker(sharing)).blocks.blocks[layer]
    got = p.fisher("exact", ng.Kronecker(sharing, widths=LIMITS[limits])).blocks.blocks[layer]
    assert_close(got.left.diag, whole.left.diag, 1e-12)
    assert_close(got.right.to_dense(), approximated(whole.right, LIMITS[limits]), 1e-12)


def test_weights_and_ignored_labels_select_what_blocks_are_made_of():
    p = problem("attention", "categorical")
    y = p.y.clone()
    y[0, 1:] = -100
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)

    def operator(widths: ng.WidthLimits) -> Any:
        structure = ng.Kronecker(widths=widths)
        return ng.fisher(p.model, likelihood, p.x, y, structure=structure).blocks.blocks["head"]

    whole = operator(ng.WidthLimits())
    for limits in LIMITS.values():
        got = operator(limits)
        assert_close(got.right.to_dense(), approximated(whole.right, limits), 1e-12)
        assert_close(got.left.to_dense(), approximated(whole.left, limits), 1e-12)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(("model", "layer"), [("mlp", "2"), ("attention", "qkv"), ("embedding_bag", "embedding")])
def test_corrected_eigenvalues_are_second_moments_along_the_basis_of_the_blocks(model, layer, sharing, limits):
    p = problem(model, "categorical")
    got = p.fisher("exact", ng.EigenKronecker(sharing, widths=LIMITS[limits])).blocks.blocks[layer]
    eye = [torch.eye(n, dtype=torch.float64) for n in (got.p, got.q)]
    bases = [
        one if basis is None else (basis if isinstance(basis, Tensor) else basis.to_dense()).contiguous()
        for basis, one in zip((got.left_basis, got.right_basis), eye, strict=True)
    ]
    for basis, one in zip(bases, eye, strict=True):
        assert_close(basis.T @ basis, one, 1e-12)
    basis = torch.kron(*bases)
    start, size = 0, got.shape[0]
    for name, q in p.model.named_parameters():  # of this layer, weight before bias
        if name.startswith(f"{layer}."):
            break
        start += q.numel()
    exact = p.exact[start : start + size, start : start + size]
    if layer == "2":  # [W | b] in rows
        order = oracles.homogeneous_order(3, 4, True)
        exact = exact[order[:, None], order]
    assert_close(got.eigenvalues.reshape(-1), (basis.T @ exact @ basis).diagonal(), 1e-11)
    assert_close(got.trace(), exact.trace(), 1e-11)


@pytest.mark.parametrize("structure", [ng.Kronecker, ng.EigenKronecker])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("damping", [ng.Constant(DAMPING), ng.Proportional(DAMPING), ng.FactoredTikhonov(DAMPING)])
def test_solves_are_those_of_the_assembled_matrix(structure, limits, damping):
    p = problem("attention", "categorical")
    got = p.fisher("exact", structure(widths=LIMITS[limits])).blocks.blocks["qkv"]
    dense, n = got.to_dense(), got.shape[0]
    eye = torch.eye(n, dtype=torch.float64)
    if isinstance(got, KroneckerProduct) and isinstance(damping, ng.FactoredTikhonov):
        left, right = (f if isinstance(f, Tensor) else f.to_dense() for f in (got.left, got.right))
        pi = math.sqrt(float(right.trace() / len(right)) / float(left.trace() / len(left)))
        one, other = (torch.eye(len(f), dtype=torch.float64) for f in (left, right))
        damped = torch.kron(left + math.sqrt(DAMPING) / pi * one, right + math.sqrt(DAMPING) * pi * other)
    else:
        damped = dense + (DAMPING * dense.trace() / n if isinstance(damping, ng.Proportional) else DAMPING) * eye
    b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(damping.inverse(got).matvec(b), torch.linalg.solve(damped, b), 1e-10)
    assert_close(got.logdet(damping=DAMPING), torch.logdet(dense + DAMPING * eye), 1e-10)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = (t for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        self.numbers = max([self.numbers, *(t.untyped_storage().nbytes() // t.element_size() for t in found)])
        return out


HEADS = {"kfac": (ng.Kronecker(), 1008), "ekfac": (ng.EigenKronecker(widths=ng.WidthLimits(block=128)), 128)}


@pytest.mark.parametrize(("structure", "width"), HEADS.values(), ids=HEADS)
def test_a_head_as_wide_as_a_vocabulary_is_trained_without_a_square_factor(structure, width):
    """GPT-2's 50257 outputs, and a hidden layer of 9000: by default, and in blocks and vectors alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 9000, bias=False), nn.Linear(9000, 2), nn.Linear(2, 50257, bias=False))
    opt = ng.NaturalGradient(
        model, ng.Categorical(), metric=ng.Fisher(ng.MonteCarlo(), structure), lr=0.1, search=ng.KLClip(1e-2)
    )
    x, y = torch.randn(4, 2), torch.tensor([0, 7, 50256, 9])
    losses = []
    with Largest() as largest:
        for _ in range(2):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert largest.numbers <= 9000 * 1024 < 9000**2 / 8
    rows = {row.parameter: row.reason for row in opt.coverage()}
    cost = "a square factor and its inverse would take"
    assert rows["0.weight"].startswith(f"output: blocks of {width} (9000 wide; {cost} 0.648 GB")
    assert rows["1.weight"].startswith(f"input: blocks of {width} (9001 wide")
    assert rows["2.weight"].startswith(f"output: diagonal (50257 wide; {cost} 20.2 GB")


def trained(model: nn.Module, opt: ng.NaturalGradient, steps: range) -> None:
    for seed in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        opt.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 7).backward()
        opt.step()


@pytest.mark.parametrize("structure", [ng.Kronecker, ng.EigenKronecker])
@pytest.mark.parametrize("limits", LIMITS)
def test_a_run_resumes_bit_for_bit(structure, limits):
    def made(model: nn.Module) -> ng.NaturalGradient:
        metric = ng.Fisher(ng.MonteCarlo(), structure(widths=LIMITS[limits]))
        return ng.NaturalGradient(
            model, ng.Categorical(), metric=metric, lr=0.1, search=ng.KLClip(1e-2), refresh=ng.Refresh(2, 3)
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7))
    opt = made(model)
    trained(model, opt, range(5))
    file, other = io.BytesIO(), copy.deepcopy(model)
    torch.save(opt.state_dict(), file)
    trained(model, opt, range(5, 10))
    resumed = made(other)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    trained(other, resumed, range(5, 10))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_limits_are_part_of_the_metric_that_a_state_is_of_unless_they_are_the_default():
    assert repr(ng.Kronecker()) == "Kronecker(sharing='expand')"
    assert repr(ng.EigenKronecker.reduce(widths=DIAGONAL)) == (
        "EigenKronecker(sharing='reduce', widths=WidthLimits(full=1, blocks=0, block=1024, beyond='diagonal'))"
    )
    model = nn.Sequential(nn.Linear(5, 7))
    opt = ng.KFAC(model, ng.Categorical(), structure=ng.Kronecker(widths=DIAGONAL))
    trained(model, opt, range(2))
    with pytest.raises(ArgumentError, match="widths"):
        ng.KFAC(model, ng.Categorical()).load_state_dict(opt.state_dict())


def test_the_default_leaves_ordinary_widths_alone():
    limits = ng.WidthLimits()
    assert limits.treatment(8193) == "full" and limits.treatment(8194) == "blocks"  # one for a bias
    assert limits.treatment(32769) == "blocks" and limits.treatment(32770) == "diagonal"


@pytest.mark.parametrize("width", [8194, 11008, 16385, 28672, 32000])
def test_blocks_are_of_nearly_equal_size(width):
    b = ng.WidthLimits().block_width(width)
    rest = width % b or b
    assert b <= 1024 and b % 16 == 0 and rest > b / 2


def test_groups_keep_their_square_factors():
    p = problem("conv2d_groups", "categorical")
    whole, limited = (p.fisher("exact", ng.Kronecker(widths=w)) for w in (ng.WidthLimits(), BLOCKS))
    name = next(iter(whole.blocks.blocks))
    assert_close(limited.blocks.blocks[name].to_dense(), whole.blocks.blocks[name].to_dense(), 1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ng.WidthLimits(full=-1), "full=-1"),
        (lambda: ng.WidthLimits(block=0), "block=0"),
        (lambda: ng.WidthLimits(blocks=1.5), "blocks=1.5"),  # type: ignore[arg-type]
        (lambda: ng.WidthLimits(beyond="low rank"), "beyond='low rank'"),  # type: ignore[arg-type]
        (lambda: ng.Kronecker(widths=8192), "widths=8192"),  # type: ignore[arg-type]
    ],
)
def test_bad_limits_are_named(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_eigenvalues_are_carried_over_to_new_bases_of_blocks():
    """(Q∘Q) s with Q = U'ᵀU of the whole bases, on either side."""

    def basis(seed: int) -> BlockStacks:
        draws = torch.Generator().manual_seed(seed)
        parts = (torch.randn(2, 3, 3, generator=draws).double(), torch.randn(1, 2, 2, generator=draws).double())
        return BlockStacks(tuple(torch.linalg.qr(t).Q for t in parts))

    values = torch.rand(8, 8, generator=torch.Generator().manual_seed(9)).double()
    old, new = (basis(0), basis(1)), (basis(2), basis(3))
    turns = [(n.to_dense().T @ o.to_dense()).square() for o, n in zip(old, new, strict=True)]
    assert_close(rotated_eigenvalues(values, old, new), turns[0] @ values @ turns[1].T, 1e-12)
    assert_close(rotated_eigenvalues(values, (None, old[1]), (None, new[1])), values @ turns[1].T, 1e-12)
    assert_close(rotated_eigenvalues(values, (old[0], None), (new[0], None)), turns[0] @ values, 1e-12)
