"""Rows of every layer rule against the gradient of one example at a time, by ordinary backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from natgrad.network import Tape, cells, record
from natgrad.network.rows import DenseRows, EmbeddingRows, LinearRows, Rows
from support import assert_close

N, K = 4, 3


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(3))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


LAYERS = {
    "linear": (nn.Linear(3, 2), normal(N, 3)),
    "linear_no_bias": (nn.Linear(3, 2, bias=False), normal(N, 3)),
    "linear_positions": (nn.Linear(3, 2), normal(N, 5, 3)),
    "linear_grid": (nn.Linear(3, 2), normal(N, 2, 3, 3)),
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), normal(N, 2, 9)),
    "conv1d_same": (nn.Conv1d(2, 3, 4, padding="same"), normal(N, 2, 5)),
    "conv2d": (nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0)), normal(N, 2, 4, 5)),
    "conv2d_groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), normal(N, 4, 4, 3)),
    "conv2d_depthwise": (nn.Conv2d(3, 6, 2, groups=3, bias=False), normal(N, 3, 3, 3)),
    "conv2d_reflect": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), normal(N, 2, 3, 4)),
    "conv2d_replicate": (nn.Conv2d(2, 2, 3, padding=2, padding_mode="replicate"), normal(N, 2, 3, 4)),
    "conv2d_circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", dilation=1), normal(N, 2, 3, 4)),
    "conv2d_ragged": (nn.Conv2d(1, 2, 2, stride=3), normal(N, 1, 6, 7)),
    "conv3d": (nn.Conv3d(2, 2, (1, 2, 2), padding=(1, 0, 1), stride=(1, 2, 1)), normal(N, 2, 2, 4, 3)),
    "embedding": (nn.Embedding(6, 3), tokens(N, 5)),
    "embedding_one_token": (nn.Embedding(6, 3), tokens(N)),
    "embedding_padding": (nn.Embedding(6, 3, padding_idx=2), tokens(N, 5)),
    "layer_norm": (nn.LayerNorm(3), normal(N, 5, 3)),
    "layer_norm_two_axes": (nn.LayerNorm((5, 3)), normal(N, 5, 3)),
    "layer_norm_no_bias": (nn.LayerNorm(3, bias=False), normal(N, 3)),
    "rms_norm": (nn.RMSNorm(3), normal(N, 5, 3)),
    "group_norm": (nn.GroupNorm(2, 4), normal(N, 4, 3, 2)),
    "instance_like_group_norm": (nn.GroupNorm(4, 4), normal(N, 4, 3)),
    "batch_norm1d": (nn.BatchNorm1d(3).eval(), normal(N, 3)),
    "batch_norm1d_positions": (nn.BatchNorm1d(3).eval(), normal(N, 3, 5)),
    "batch_norm2d": (nn.BatchNorm2d(3).eval(), normal(N, 3, 2, 2)),
    "batch_norm3d": (nn.BatchNorm3d(3).eval(), normal(N, 3, 2, 1, 2)),
}
FREEZE = {"all": (), "weight only": ("bias",), "bias only": ("weight",)}


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    layer, x = LAYERS[name]
    layer = layer.double().requires_grad_(True)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(torch.linspace(-1, 1.5, p.numel()).reshape(p.shape) + 0.1 * i)
        if getattr(layer, "running_var", None) is not None:
            layer.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
            layer.running_var.copy_(torch.tensor([0.5, 2.0, 1.5]))
        layer.zero_grad()
    return layer, x


def rows_of(layer: nn.Module, x: Tensor) -> tuple[Rows, Tensor, Tape]:
    model = nn.Sequential(layer)  # the layer's name is "0"
    tape = record(model, x)
    assert tape.output is not None
    generator = torch.Generator().manual_seed(5)
    columns = torch.randn(K, *tape.output.shape, dtype=torch.float64, generator=generator)
    (cell,) = cells(model)
    assert cell.module == "0"
    return tape.rows([cell], columns)[cell.name], columns, tape


def example_gradients(layer: nn.Module, x: Tensor, columns: Tensor) -> Tensor:
    """[K, N, p]: the gradient of ⟨column k, output⟩ for one example at a time, each weight row with its bias."""
    out = []
    for column in columns:
        for n in range(len(x)):
            layer.zero_grad()
            # Frozen statistics or per-example norms: one example alone gives what it gives in the batch.
            (layer(x[n : n + 1]) * column[n : n + 1]).sum().backward()
            parts = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
            if len(parts) == 2 and not isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
                flat = torch.cat([parts["weight"].flatten(1), parts["bias"][:, None]], 1)
                out.append(flat.flatten())
            else:
                out.append(torch.cat([g.flatten() for g in parts.values()]))
    return torch.stack(out).reshape(len(columns), len(x), -1)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("frozen", FREEZE)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_the_gradients_of_single_examples(name, frozen):
    layer, x = prepared(name)
    names = dict(layer.named_parameters())
    if frozen != "all" and len(names) < 2:
        pytest.skip("the layer has one parameter")
    for n in FREEZE[frozen]:
        names[n].requires_grad_(False)
    rows, columns, _ = rows_of(layer, x)
    expected = example_gradients(layer, x, columns)
    assert_close(rows.dense(), expected, 1e-12)
    check_products(rows, expected)


def check_products(rows: Rows, dense: Tensor) -> None:
    """Everything that the form of the rows saves computing, against the dense matrix."""
    k, n, p = dense.shape
    assert rows.shape == (k, n, p)
    flat = dense.flatten(0, 1)
    generator = torch.Generator().manual_seed(7)
    v = torch.randn(2, p, dtype=torch.float64, generator=generator)
    u = torch.randn(2, k * n, dtype=torch.float64, generator=generator)
    assert_close(rows.total(), dense.sum(1), 1e-12)
    assert_close(rows.squared_sum(), dense.square().sum((0, 1)), 1e-12)
    assert_close(rows.gram(), flat @ flat.T, 1e-12)
    assert_close(rows.matvec(v), v @ flat.T, 1e-12)
    assert_close(rows.matvec(v[0]), flat @ v[0], 1e-12)
    assert_close(rows.rmatvec(u), u @ flat, 1e-12)
    assert_close(rows.rmatvec(u[0]), flat.T @ u[0], 1e-12)
    assert_close(rows.scaled(-0.5).dense(), -0.5 * dense, 1e-12)
    joined, stacked = rows.joined(rows.scaled(2.0)), rows.stacked(rows.scaled(2.0))
    assert_close(joined.dense(), 3.0 * dense, 1e-12)
    assert_close(joined.gram(), 9.0 * flat @ flat.T, 1e-12)
    assert_close(stacked.dense(), torch.cat([dense, 2.0 * dense], 1), 1e-12)
    assert_close(rows.joined(DenseRows(dense)).dense(), 2.0 * dense, 1e-12)
    assert_close(rows.stacked(DenseRows(dense)).dense(), torch.cat([dense, dense], 1), 1e-12)


def test_batch_norm_in_training_mode_adds_up_to_the_gradient():
    """Its examples depend on each other through the batch's statistics: rows follow the parameters alone."""
    layer, x = prepared("batch_norm2d")
    layer.train()
    before = {n: b.clone() for n, b in layer.named_buffers()}
    rows, columns, _ = rows_of(layer, x)
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())
    for k in range(K):
        layer.zero_grad()
        (layer(x) * columns[k]).sum().backward()
        assert_close(rows.total()[k], torch.cat([p.grad for p in layer.parameters()]), 1e-12)


@pytest.mark.parametrize("positions", [1, 2, 40])
def test_the_gram_matrix_does_not_depend_on_the_route(positions):
    """Few positions: through inner products of positions; many: through the rows themselves."""
    a, g = normal(2, N, positions, 6), normal(K, 2, N, positions, 5)
    rows = LinearRows(a, g)
    dense = torch.einsum("kgnso,gnsi->kngoi", g, a).flatten(2)
    check_products(rows, dense)


def test_rows_of_embeddings_with_repeated_tokens():
    index = torch.tensor([[1, 1, 1], [0, 1, 0]])
    g = normal(K, 2, 3, 2)
    dense = torch.zeros(K, 2, 4, 2, dtype=torch.float64)
    for n in range(2):
        for s in range(3):
            dense[:, n, index[n, s]] += g[:, n, s]
    check_products(EmbeddingRows(index, g, 4), dense.flatten(2))


def test_a_layer_without_batch_axis_is_a_clear_error():
    from natgrad.errors import ShapeError

    model = nn.Sequential(nn.Linear(3, 2)).double()
    tape = record(model, normal(3))
    with pytest.raises(ShapeError, match="no batch axis"):
        tape.rows(list(cells(model)), normal(1, 2))
