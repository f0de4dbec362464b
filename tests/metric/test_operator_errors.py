"""ng.fisher, ng.hessian and natural_gradient: what they refuse, and that they leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError, NotObservedError, ShapeError
from natgrad.testing import oracles, zoo
from support import assert_close, problem

STRUCTURES = [ng.Dense(), ng.Diagonal(), ng.BlockDiagonal(), ng.Kronecker(), ng.EigenKronecker(), ng.Gram()]
every_structure = pytest.mark.parametrize("structure", [*STRUCTURES, ng.MatrixFree()], ids=lambda s: s.name)


@every_structure
def test_labels_are_asked_for_and_checked(structure):
    p = problem("mlp", "categorical")
    with pytest.raises(NotObservedError, match="Empirical needs the target"):
        ng.fisher(p.model, p.likelihood, p.x, structure=structure, estimate=ng.Empirical())
    with pytest.raises(ArgumentError, match="7"):
        ng.fisher(p.model, p.likelihood, p.x, torch.full((5,), 7), structure=structure, estimate=ng.Empirical())
    with pytest.raises(ShapeError, match="4"):
        ng.fisher(p.model, p.likelihood, p.x, p.y[:4], structure=structure, estimate=ng.Empirical())


@every_structure
def test_a_model_without_trainable_parameters(structure):
    model = zoo.case("mlp").model.requires_grad_(False)
    with pytest.raises(ArgumentError, match="no parameter that requires a gradient"):
        ng.fisher(model, ng.Categorical(), torch.zeros(2, 3).double(), structure=structure)


@every_structure
def test_a_pass_that_raises_leaves_no_hook(structure):
    case = zoo.case("mlp")
    hooks = [len(m._forward_hooks) for m in case.model.modules()]
    with pytest.raises(RuntimeError, match="shapes"):
        ng.fisher(case.model, ng.Categorical(), torch.zeros(2, 5).double(), structure=structure)
    assert [len(m._forward_hooks) for m in case.model.modules()] == hooks


def test_no_grad_around_the_call_does_not_matter():
    p = problem("mlp", "categorical")
    for structure in (ng.Dense(), ng.MatrixFree()):
        with torch.no_grad():
            operator = ng.fisher(p.model, p.likelihood, p.x, structure=structure)
            assert_close(operator.to_dense(), p.exact)


def test_an_operator_does_not_change_with_the_model():
    """Matrix-free products belong to the parameters at which they were asked for."""
    p = problem("mlp", "categorical")
    operators = [ng.fisher(p.model, p.likelihood, p.x, structure=s) for s in (ng.Dense(), ng.Gram(), ng.MatrixFree())]
    kept = {n: q.detach().clone() for n, q in p.model.named_parameters()}
    v = torch.ones(p.size, dtype=torch.float64)
    before = p.exact @ v
    try:
        with torch.no_grad():
            for q in p.model.parameters():
                q.data = q.data + 1.0
        for operator in operators:
            assert_close(operator @ v, before)
    finally:
        with torch.no_grad():
            for n, q in p.model.named_parameters():
                q.data = kept[n]


@pytest.mark.parametrize("solver", [None, ng.linalg.CG(tolerance=1e-13)])
def test_the_natural_gradient_in_one_call(solver):
    p = problem("mlp", "categorical")
    before = {n: q.detach().clone() for n, q in p.model.named_parameters()}
    direction, fisher = ng.natural_gradient(p.model, p.likelihood, p.x, p.y, damping=1e-2, solver=solver)
    gradient = oracles.flat_gradient(p.model, F.cross_entropy(p.case(), p.y))
    assert_close(direction, oracles.damped_inverse(p.exact, 1e-2) @ gradient, 1e-9)
    assert_close(fisher.to_dense(), p.exact)
    assert all(torch.equal(q, before[n]) and q.grad is None for n, q in p.model.named_parameters())


def test_per_block_damping():
    p = problem("mlp", "categorical")
    operator = ng.fisher(p.model, p.likelihood, p.x, structure=ng.BlockDiagonal())
    damping = {name: 0.1 * (i + 1) for i, name in enumerate(operator.blocks.blocks)}
    v = torch.randn(p.size, dtype=torch.float64)
    slices = oracles.parameter_slices(p.model)
    added = torch.zeros(p.size, dtype=torch.float64)
    for name, where in slices.items():
        added[where] = damping[name.rpartition(".")[0]]
    expected = torch.linalg.solve(operator.to_dense() + torch.diag(added), v)
    assert_close(operator.solve(v, damping=damping), expected)


def test_an_unused_module_gets_the_zero_matrix():
    case = zoo.case("unused")
    for structure in STRUCTURES:
        operator = ng.fisher(case.model, ng.Categorical(), case.x, structure=structure)
        where = oracles.parameter_slices(case.model)["expert.weight"]
        assert not operator.to_dense()[where].any() and operator.to_dense().any()


def test_the_sizes_that_a_dense_matrix_refuses():
    with pytest.raises(ArgumentError, match="20100 × 20100"):
        ng.fisher(nn.Linear(200, 100), ng.Categorical(), torch.zeros(1, 200))
