"""Wide products take other routes than narrow ones; each must give the plain product."""

from __future__ import annotations

import pytest
import torch

from natgrad.linalg.products import gram, product


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(5, 3), (130, 513), (130, 528), (2, 130, 513)])
def test_product_is_the_product(shape):
    x, y = normal(*shape[:-1], 6), normal(*shape[:-2], 6, shape[-1])
    expected = torch.einsum("...mk,...kn->...mn", x, y)
    torch.testing.assert_close(product(x, y), expected, rtol=1e-12, atol=1e-12)


def test_a_wide_product_can_be_mapped_and_differentiated():
    x, y = normal(3, 130, 6), normal(6, 513)
    torch.testing.assert_close(torch.vmap(product, (0, None))(x, y), torch.einsum("bmk,kn->bmn", x, y))
    tangent = torch.func.jvp(lambda y: product(x[0], y), (y,), (y,))[1]  # pyright: ignore
    torch.testing.assert_close(tangent, torch.einsum("mk,kn->mn", x[0], y))


@pytest.mark.parametrize("shape", [(7, 3), (1, 7, 3), (2, 7, 3), (7, 511), (7, 513), (1, 7, 785), (9, 1024), (0, 600)])
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_is_the_sum_of_outer_products(shape, weighted):
    x = normal(*shape)
    w = torch.arange(shape[-2], dtype=x.dtype)[:, None] if weighted else torch.ones(shape[-2], 1, dtype=x.dtype)
    found = gram(x, x * w if weighted else None)
    torch.testing.assert_close(found, torch.einsum("...ki,...kj,kl->...ij", x, x, w), rtol=1e-12, atol=1e-12)


def test_gram_can_be_differentiated_where_it_is_wide():
    x = normal(4, 520).requires_grad_()
    (found,) = torch.autograd.grad(gram(x).diagonal().sum(), x)
    torch.testing.assert_close(found, 2 * x.detach())
