"""Blocks of equal shape that are inverted and applied side by side: each as if alone, against NumPy in float64."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.linalg import DiagonalMatrix, KroneckerProduct
from natgrad.optim.stacks import Stacks, inverted_together

LAMBDA = 1e-3
# Two groups, one without a like, and one with a diagonal side.
SHAPES = {"a": (3, 4), "b": (2, 4), "c": (3, 4), "d": (5, 5), "e": (3, 4), "f": (2, 4), "table": (6, 4)}
RULE = ng.FactoredTikhonov(LAMBDA)


def factor(n: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(n, n + 2, generator=generator, dtype=torch.float64)
    return root @ root.mT


def operators() -> dict[str, KroneckerProduct]:
    generator = torch.Generator().manual_seed(0)
    found = {name: KroneckerProduct(factor(p, generator), factor(q, generator)) for name, (p, q) in SHAPES.items()}
    found["table"] = KroneckerProduct(DiagonalMatrix(torch.arange(1.0, 7.0).double()), factor(4, generator))
    return found


def dense_inverse(operator: KroneckerProduct) -> np.ndarray:
    """(G + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹ of Martens & Grosse 2015, written out."""
    left, right = (
        f.numpy() if isinstance(f, Tensor) else f.diag.diag().numpy() for f in (operator.left, operator.right)
    )
    pi = math.sqrt((np.trace(right) / len(right)) / (np.trace(left) / len(left)))
    g = np.linalg.inv(left + math.sqrt(LAMBDA) / pi * np.eye(len(left)))
    return np.kron(g, np.linalg.inv(right + pi * math.sqrt(LAMBDA) * np.eye(len(right))))


def test_inverses_found_together_are_those_of_each():
    blocks = operators()
    found = inverted_together(list(blocks), dict.fromkeys(blocks, RULE), blocks)
    assert found.keys() == {"a", "b", "c", "e", "f"}  # "d" has no like, the table a diagonal
    for name, inverse in found.items():
        np.testing.assert_allclose(inverse.to_dense().numpy(), dense_inverse(blocks[name]), rtol=1e-9, atol=1e-12)


def test_blocks_under_other_rules_are_not_mixed():
    blocks = operators()
    other = ng.FactoredTikhonov(10.0)
    rules = {**dict.fromkeys(blocks, RULE), "b": other, "c": other, "f": ng.Constant(LAMBDA)}
    assert inverted_together(list(blocks), rules, blocks).keys() == {"a", "e"}
    rules = dict.fromkeys(blocks, ng.LevenbergMarquardt(RULE))
    assert inverted_together(["a", "c", "d"], rules, blocks).keys() == {"a", "c"}


@pytest.mark.parametrize("damage", [lambda g: g.fill_(math.nan), lambda g: g.sub_(1e3 * torch.eye(3).double())])
def test_one_that_cannot_be_inverted_leaves_its_group_to_be_inverted_one_by_one(damage):
    blocks = operators()
    damage(blocks["c"].left)
    assert inverted_together(list(blocks), dict.fromkeys(blocks, RULE), blocks).keys() == {"b", "f"}


def test_products_with_stacks_are_those_with_each():
    blocks, generator = operators(), torch.Generator().manual_seed(1)
    vectors = {n: torch.randn(p * q, generator=generator, dtype=torch.float64) for n, (p, q) in SHAPES.items()}
    stacks = Stacks()
    for _ in range(2):
        found = stacks.matvec(blocks, vectors)
        assert list(found) == list(vectors)
        for name, block in blocks.items():
            np.testing.assert_allclose(
                found[name].numpy(), block.to_dense().numpy() @ vectors[name].numpy(), rtol=1e-10, atol=1e-12
            )
        blocks["e"] = KroneckerProduct(*(2 * f for f in (blocks["e"].left, blocks["e"].right)))  # renewed alone
    some = {name: vectors[name] for name in ("a", "d", "f")}  # blocks without gradient are missing
    for name, product in stacks.matvec(blocks, some).items():
        torch.testing.assert_close(product, blocks[name].matvec(some[name]), rtol=1e-12, atol=1e-12)


def test_vectors_of_low_precision_keep_their_dtype():
    blocks = {n: KroneckerProduct(o.left.float(), o.right.float()) for n, o in operators().items() if n in "ac"}
    vectors = {name: torch.ones(12, dtype=torch.bfloat16) for name in blocks}
    for name, product in Stacks().matvec(blocks, vectors).items():
        assert product.dtype == torch.bfloat16
        assert torch.equal(product, blocks[name].matvec(vectors[name]).bfloat16())


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def step(model: nn.Module, optimizer: ng.KFAC, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.randint(4, (16,), generator=generator)).backward()
    optimizer.step()


@pytest.mark.parametrize("refresh", [ng.Refresh(1, 3), ng.Staggered(1, 2)], ids=str)
def test_the_step_of_a_model_of_equal_layers_and_its_resumption(refresh):
    """Directions are those of the averaged factors in the state; a resumed run goes on bit for bit."""

    def optimizer_of(model: nn.Module) -> ng.KFAC:
        return ng.KFAC(model, ng.Categorical(), lr=0.1, search=ng.LearningRate(predict=False), refresh=refresh)

    model = deep()
    optimizer = optimizer_of(model)
    for seed in range(2):
        step(model, optimizer, seed)
    for layer in (m for m in model if isinstance(m, nn.Linear)):
        # Step 1 renewed all inverses, and nothing has changed since.
        slot = optimizer.state[layer.weight]
        inverse = np.kron(slot["inverse.kronecker.left"].numpy(), slot["inverse.kronecker.right"].numpy())
        block = KroneckerProduct(slot["average.output"][0], slot["average.input"][0])
        np.testing.assert_allclose(inverse, dense_inverse(block), rtol=1e-6, atol=1e-9)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = deep()
    again.load_state_dict(model.state_dict())
    resumed = optimizer_of(again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(2, 9):
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer, seed)
        step(again, resumed, seed)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
        for layer, w, b in zip((m for m in model if isinstance(m, nn.Linear)), before[::2], before[1::2], strict=True):
            slot = optimizer.state[layer.weight]
            g = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).numpy()
            move = -0.1 * slot["inverse.kronecker.left"].numpy() @ g @ slot["inverse.kronecker.right"].numpy()
            moved = torch.cat([layer.weight.detach() - w, (layer.bias.detach() - b)[:, None]], 1)
            np.testing.assert_allclose(moved.numpy(), move, rtol=1e-8, atol=1e-12)


def test_a_layer_that_cannot_be_inverted_keeps_its_last_inverse_and_the_others_get_new_ones():
    model = deep()
    optimizer = ng.KFAC(model, ng.Categorical(), lr=0.1, refresh=ng.Refresh(1, 1))
    step(model, optimizer, 0)
    slot = optimizer.state[model[2].weight]
    old = {n: optimizer.state[model[n].weight]["inverse.kronecker.left"].clone() for n in (0, 2, 4)}
    slot["average.output"].sub_(torch.eye(5, dtype=torch.float64))  # indefinite beyond repair
    with pytest.warns(RuntimeWarning, match=r"curvature of 2 could not be inverted"):
        step(model, optimizer, 1)
    new = {n: optimizer.state[model[n].weight]["inverse.kronecker.left"] for n in (0, 2, 4)}
    assert torch.equal(new[2], old[2]) and not torch.equal(new[0], old[0]) and not torch.equal(new[4], old[4])
