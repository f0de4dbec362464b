"""The oracles against each other and against finite differences: with a wrong oracle the other tests mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from natgrad.testing import families, oracles, zoo

FAMILIES = [
    (families.categorical(), 3),
    (families.multi_categorical([2, 3]), 5),
    (families.bernoulli(), 2),
    (families.gaussian(0.7), 2),
    (families.gaussian_learned(), 4),
    (families.poisson(), 2),
    (families.gamma(), 2),
]


@pytest.mark.parametrize(("family", "outputs"), FAMILIES, ids=lambda v: getattr(v, "name", ""))
def test_fisher_matrix_is_the_hessian_of_the_kl_and_the_variance_of_the_score(family, outputs, generator):
    f = torch.randn(2, 3, outputs, dtype=torch.float64, generator=generator)
    fisher = family.fisher(f)
    torch.testing.assert_close(fisher, family.fisher_from_kl(f), rtol=1e-10, atol=1e-12)
    sampled = family.fisher_from_scores(f, 20_000, generator)
    assert torch.linalg.vector_norm(sampled - fisher) < 0.05 * torch.linalg.vector_norm(fisher)
    assert family.kl(f, f).abs().max() < 1e-12
    assert (family.kl(f, f + 0.1) > 0).all() or "categorical" in family.name  # logits shifted together mean the same


@pytest.mark.parametrize("name", zoo.NAMES)
def test_jacobian_agrees_with_ordinary_backward_passes_and_leaves_the_model_alone(name):
    case = zoo.case(name, 2)
    state = {k: v.clone() for k, v in case.model.state_dict().items()}
    jacobian = oracles.jacobian(case.model, case.x, case.select)
    assert all(torch.equal(v, state[k]) for k, v in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())
    f = case()
    rows = torch.stack([oracles.flat_gradient(case.model, v) for v in f.reshape(-1)])
    torch.testing.assert_close(jacobian.reshape(rows.shape), rows, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["mlp", "layer_norm", "batch_norm_train", "encoder_layer", "lstm"])
def test_hessian_agrees_with_finite_differences(name):
    case, family = zoo.case(name, 2), families.gaussian()
    function, theta = oracles.network_function(case.model, case.x, case.select)
    y = torch.zeros_like(function(theta))

    def gradient(at: torch.Tensor) -> torch.Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(family.nll(function(at), y).mean(), at)[0]

    hessian, step = oracles.nll_hessian(case.model, family, case.x, y, select=case.select), 1e-5
    for i in range(0, len(theta), 7):
        shift = torch.zeros_like(theta)
        shift[i] = step
        difference = (gradient(theta + shift) - gradient(theta - shift)) / (2 * step)
        torch.testing.assert_close(hessian[i], difference, rtol=1e-5, atol=1e-7)


def test_column_forms_of_the_fisher_agree(generator):
    case, family = zoo.case("mixer", 3), families.categorical()
    jacobian = oracles.jacobian(case.model, case.x)
    fisher = family.fisher(oracles.network_output(case.model, case.x))
    weights = torch.rand(fisher.shape[:-2], dtype=torch.float64, generator=generator)
    columns = oracles.exact_columns(fisher, weights)
    total = oracles.total_weight(columns, weights)
    expected = oracles.exact_fisher(jacobian, fisher, weights)
    torch.testing.assert_close(oracles.dense_fisher(jacobian, columns, total), expected, rtol=1e-10, atol=1e-13)
    signed = oracles.dense_fisher(jacobian, oracles.signed_columns(columns), total)
    torch.testing.assert_close(signed, expected, rtol=1e-10, atol=1e-13)
    # Positions that share columns give another matrix: this is the mistake that the separate columns avoid.
    shared = oracles.dense_fisher(jacobian, columns.reshape(3, 3, *columns.shape[1:]).sum(0), total)
    assert torch.linalg.matrix_norm(shared - expected) > 0.1 * torch.linalg.matrix_norm(expected)


CONVOLUTIONS = [
    (nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=1), (2, 2, 9)),
    (nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), (2, 2, 4, 5)),
    (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 2, 4, 5)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 4, 5)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate", stride=2), (2, 2, 4, 5)),
    (nn.Conv3d(2, 3, 2, stride=(2, 1, 1), padding="valid"), (2, 2, 4, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v)[:40])
def test_patches_times_weight_is_the_convolution(layer, shape, generator):
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    by_patches = oracles.patches(layer, x) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(by_patches.transpose(1, 2), layer(x).flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["mlp", "inplace", "conv1d", "conv2d_same", "conv3d", "mixer", "mean_pooled_linear", "reused"]
)
def test_recorded_layers_rebuild_the_exact_blocks(name):
    case, family = zoo.case(name, 3), families.categorical()
    jacobian = oracles.jacobian(case.model, case.x)
    columns = oracles.exact_columns(family.fisher(oracles.network_output(case.model, case.x)))
    total = oracles.total_weight(columns)
    whole, slices = oracles.dense_fisher(jacobian, columns, total), oracles.parameter_slices(case.model)
    layers = {n: m for n, m in case.model.named_modules() if hasattr(m, "weight")}
    records = oracles.record_layers(case.model, case.x, list(layers))
    for layer, module in layers.items():
        block = oracles.layer_block(oracles.join_uses(records[layer]), columns, total, bias=True)
        out = module.weight.shape[0]
        block = oracles.to_parameter_order(block, out, module.weight[0].numel(), True)
        part = slice(slices[f"{layer}.weight"].start, slices[f"{layer}.bias"].stop)
        torch.testing.assert_close(block, whole[part, part], rtol=1e-10, atol=1e-14)
