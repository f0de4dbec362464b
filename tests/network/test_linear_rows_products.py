"""Products with a linear layer's rows by every route: single position, several, and rows kept by a Gram matrix."""

from __future__ import annotations

import pytest
import torch

from natgrad.network.rows import LinearRows


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize(
    "k, groups, n, s, out, fan_in",
    [
        (1, 1, 4, 1, 3, 5),
        (3, 1, 4, 1, 3, 5),
        (1, 2, 4, 1, 3, 5),
        (2, 2, 4, 9, 3, 2),
        (9, 1, 4, 2, 3, 5),
        (1, 1, 130, 1, 140, 515),
        (1, 1, 530, 1, 3, 2),
        (2, 1, 270, 1, 3, 2),
        (1, 1, 520, 9, 2, 2),
    ],
)
def test_products_are_those_of_the_rows(k, groups, n, s, out, fan_in, batch, kept):
    a, g = normal(groups, n, s, fan_in), normal(k, groups, n, s, out)
    rows = LinearRows(a, g)
    r = torch.zeros(k, n, groups, out, fan_in, dtype=a.dtype)
    for position in range(s):
        r += torch.einsum("kgno,gni->kngoi", g[:, :, :, position], a[:, :, position])
    r = r.reshape(k * n, -1)
    if kept:
        rows.dense()
    if len(batch) == 0:
        torch.testing.assert_close(rows.gram(), r @ r.T)
    v, u = normal(*batch, r.shape[1]), normal(*batch, r.shape[0])
    torch.testing.assert_close(rows.matvec(v), v @ r.T)
    torch.testing.assert_close(rows.rmatvec(u), u @ r)
    if len(batch) == 0:
        b, out = normal(r.shape[1] + 1)[1:], torch.empty_like(v)
        rows.rmatvec_plus(u, b, out)
        torch.testing.assert_close(out, b + u @ r)
    torch.testing.assert_close(rows.scaled(2.0).matvec(v), 2 * (v @ r.T))
    torch.testing.assert_close(rows.scaled(2.0).rmatvec(u), 2 * (u @ r))
