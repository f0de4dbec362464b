"""curvlinops, an independent implementation, where its conventions and natgrad's can be translated into each other.

Conventions of curvlinops (3.0): matrices belong to the loss as torch reduces it. `MSELoss` has no ½ and, like
`BCEWithLogitsLoss`, divides by the number of outputs C as well: its GGN is 2/C times natgrad's for a unit Gaussian, 1/C
for Bernoulli. Sequences must be flattened to [N·T, C]. K-FAC of `MSELoss` is scaled without the C. Its K-FAC is not
compared where it is another matrix by its own documentation (reused layers, grouped convolutions) or where positions of
one row interact (its type-2 columns are shared by the positions).
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from support import Problem, assert_close, distance, problem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    curvlinops = pytest.importorskip("curvlinops")


class Flattened(nn.Module):
    """Sequence outputs as rows of their own, which is what the peer's losses read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, 1)


def peer(kind: str, p: Problem, loss: nn.Module, **options: Any) -> Tensor:
    """The peer's matrix over all parameters, dense."""
    model, y = p.model, p.y
    if p.f.dim() == 3:
        model, y = Flattened(model), y.flatten()
        options["batch_size_fn"] = len
    parameters = [q for q in p.model.parameters() if q.requires_grad]
    operator = getattr(curvlinops, f"{kind}LinearOperator")(model, loss, parameters, [(p.x, y)], **options)
    return operator @ torch.eye(p.size, dtype=torch.float64)


MODELS = [
    "mlp",
    "inplace",
    "conv1d",
    "conv2d_groups",
    "residual",
    "layer_norm",
    "reused",
    "tied_head",
    "mixer",
    "attention",
]


@pytest.mark.parametrize("model", MODELS)
def test_ggn_hessian_and_empirical_fisher_of_cross_entropy(model):
    p, loss = problem(model, "categorical"), nn.CrossEntropyLoss()
    assert_close(p.fisher("exact", ng.Dense()).to_dense(), peer("GGN", p, loss))
    if model != "layer_norm":  # nested torch.func differentiates LayerNorm wrongly (see oracles.nll_hessian)
        assert_close(ng.hessian(p.model, p.likelihood, p.x, p.y).to_dense(), peer("Hessian", p, loss))
    if p.f.dim() == 2:  # for sequences the peer's unit is the token, natgrad's is the row
        assert_close(p.fisher("empirical", ng.Dense()).to_dense(), peer("EF", p, loss))


def test_squared_error_and_binary_cross_entropy():
    p, outputs = problem("mlp", "gaussian"), 2
    unit, mse = ng.Gaussian(), ng.Gaussian.of_mse_loss()
    exact = ng.fisher(p.model, unit, p.x).to_dense()
    assert_close(2 / outputs * exact, peer("GGN", p, nn.MSELoss()))
    assert_close(ng.fisher(p.model, mse, p.x).to_dense() / outputs, peer("GGN", p, nn.MSELoss()))
    assert_close(ng.hessian(p.model, mse, p.x, p.y).to_dense() / outputs, peer("Hessian", p, nn.MSELoss()))
    empirical = ng.fisher(p.model, mse, p.x, p.y, estimate=ng.Empirical()).to_dense()
    assert_close(empirical / outputs, peer("EF", p, nn.MSELoss()))
    b = problem("mlp", "bernoulli")
    assert_close(b.exact / outputs, peer("GGN", b, nn.BCEWithLogitsLoss()))
    assert_close(b.fisher("exact", ng.Dense()).to_dense() / outputs, peer("GGN", b, nn.BCEWithLogitsLoss()))


def test_monte_carlo_fisher_in_distribution():
    """Equal means, and equal size of the noise: neither side hides a factor in the number of samples."""
    p, loss, repeats, samples = problem("mlp", "categorical"), nn.CrossEntropyLoss(), 60, 5
    theirs = torch.stack([peer("FisherMC", p, loss, mc_samples=samples, seed=s) for s in range(repeats)])
    seeds = torch.Generator().manual_seed(0)
    options = {"estimate": ng.MonteCarlo(samples), "generator": seeds}
    ours = torch.stack([ng.fisher(p.model, p.likelihood, p.x, **options).to_dense() for _ in range(repeats)])
    noise = [float((m - p.exact).flatten(1).norm(dim=1).square().mean().sqrt()) for m in (ours, theirs)]
    assert noise[0] == pytest.approx(noise[1], rel=0.2)
    assert float((ours.mean(0) - theirs.mean(0)).norm()) < 2.5 * noise[0] * (2 / repeats) ** 0.5


KFAC_MODELS = ["mlp", "deep_linear", "bias_free", "inplace", "conv2d", "conv2d_same", "mean_pooled_linear"]
TYPES = {"exact": "type-2", "empirical": "empirical"}


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("estimate", TYPES)
@pytest.mark.parametrize("model", KFAC_MODELS)
def test_kfac(model, estimate, approximation):
    p = problem(model, "categorical")
    options = {"fisher_type": TYPES[estimate], "kfac_approx": approximation, "separate_weight_and_bias": False}
    theirs = peer("KFAC", p, nn.CrossEntropyLoss(), **options)
    assert_close(p.fisher(estimate, ng.Kronecker(approximation)).to_dense(), theirs)


@pytest.mark.parametrize("estimate", TYPES)
@pytest.mark.parametrize("model", KFAC_MODELS)
def test_ekfac(model, estimate):
    p = problem(model, "categorical")
    options = {"fisher_type": TYPES[estimate], "separate_weight_and_bias": False}
    theirs = peer("EKFAC", p, nn.CrossEntropyLoss(), **options)
    assert_close(p.fisher(estimate, ng.EigenKronecker()).to_dense(), theirs)


def test_kfac_of_squared_error():
    p = problem("mlp", "gaussian")
    theirs = peer("KFAC", p, nn.MSELoss(), fisher_type="type-2", separate_weight_and_bias=False)
    assert_close(ng.fisher(p.model, ng.Gaussian(), p.x, structure=ng.Kronecker()).to_dense(), theirs)


def test_frozen_biases_are_blocks_of_the_weights_alone():
    """With `separate_weight_and_bias` the peer's weight blocks are those of layers whose bias is frozen."""
    p = problem("frozen_bias", "categorical")
    theirs = peer("KFAC", p, nn.CrossEntropyLoss(), fisher_type="type-2", separate_weight_and_bias=True)
    part = slice(0, 12)
    assert_close(p.fisher("exact", ng.Kronecker()).to_dense()[part, part], theirs[part, part])


def test_masked_labels():
    """The peer's exact GGN knows ignore_index; its sampled and factored matrices, when measured, were 4× too large."""
    p = problem("mlp", "categorical")
    y = p.y.clone()
    y[:3] = -100
    masked = Problem(p.case, p.pair)
    object.__setattr__(masked, "y", y)
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    ours = ng.fisher(p.model, likelihood, p.x, y).to_dense()
    assert_close(ours, peer("GGN", masked, nn.CrossEntropyLoss(ignore_index=-100), check_deterministic=False))
    assert distance(ours, p.exact) > 0.05
