"""The product likelihood × estimate × structure × solver against dense oracles, over the zoo of models.

Every expected matrix is built in `natgrad.testing.oracles` from torch.func Jacobians and written-out formulas.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import natgrad as ng
from natgrad.linalg import CG, Cholesky, Eigh, NewtonSchulz, Woodbury
from natgrad.testing import oracles, zoo
from support import PAIRS, Problem, assert_close, distance, problem, slope

DAMPING = 1e-2
WHOLE = {"dense": ng.Dense(), "gram": ng.Gram(), "matrix_free": ng.MatrixFree()}
PARTIAL = {"diagonal": ng.Diagonal(), "blocks": ng.BlockDiagonal()}
STRUCTURES = WHOLE | PARTIAL
# The default tolerance of CG is for training, not for comparing nine digits.
ITERATIVE = {"matrix_free": CG(tolerance=1e-13, max_iterations=500)}
ESTIMATES = ["exact", "empirical"]
# Rows that see each other through batch statistics have no per-row form; test_pitfalls.py says what holds for them.
UNCOUPLED = [name for name in zoo.NAMES if "coupled" not in zoo.case(name).tags]
SEQUENCES = [name for name in UNCOUPLED if "sequence" in zoo.case(name).tags]


def expected_matrix(p: Problem, estimate: str, structure: str) -> Tensor:
    """The whole matrix, restricted to what the structure keeps."""
    whole = p.matrix(estimate)
    if structure == "diagonal":
        return torch.diag(whole.diagonal())
    if structure == "blocks":
        slices = oracles.parameter_slices(p.model)
        return oracles.restrict(whole, [[slices[n] for n in g] for g in oracles.module_groups(p.model).values()])
    return whole


def check_operator(operator: Any, expected: Tensor, generator: torch.Generator, solver: Any = None) -> None:
    """Every operation of the algebra against dense linear algebra."""
    size = len(expected)
    v = torch.randn(size, dtype=torch.float64, generator=generator)
    several = torch.randn(size, 3, dtype=torch.float64, generator=generator)
    damped = expected + DAMPING * torch.eye(size, dtype=torch.float64)
    assert tuple(operator.shape) == (size, size)
    assert_close(operator.to_dense(), expected)
    assert_close(operator @ v, expected @ v)
    assert_close(operator @ several, expected @ several)
    assert_close(operator.diagonal(), expected.diagonal())
    assert_close(operator.trace(), expected.trace())
    assert_close(operator.quad(v), v @ expected @ v)
    assert_close(operator.solve(v, damping=DAMPING, solver=solver), torch.linalg.solve(damped, v))
    assert_close(operator.solve(several, damping=DAMPING, solver=solver), torch.linalg.solve(damped, several))
    dense = Cholesky() if isinstance(solver, CG) else None
    assert_close(operator.logdet(damping=DAMPING, solver=dense), torch.linalg.slogdet(damped)[1])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("likelihood", PAIRS)
@pytest.mark.parametrize("model", ["mlp", "mixer"])
def test_every_likelihood_estimate_and_structure(model, likelihood, estimate, structure, generator):
    p = problem(model, likelihood)
    operator = p.fisher(estimate, STRUCTURES[structure])
    check_operator(operator, expected_matrix(p, estimate, structure), generator, ITERATIVE.get(structure))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("model", UNCOUPLED)
def test_every_model(model, estimate, structure, generator):
    p = problem(model, "categorical")
    operator = p.fisher(estimate, STRUCTURES[structure])
    expected = expected_matrix(p, estimate, structure)
    v = torch.randn(p.size, dtype=torch.float64, generator=generator)
    assert_close(operator.to_dense(), expected)
    assert_close(operator @ v, expected @ v)
    assert_close(operator.trace(), expected.trace())
    solved = operator.solve(v, damping=DAMPING, solver=ITERATIVE.get(structure))
    assert_close(solved, oracles.damped_inverse(expected, DAMPING) @ v)


# Parameters that no layer rule can serve: everything else must be served by one, or large models become slow.
WITHOUT_RULE = {
    "raw_parameter": {"gain", "temperature"},
    "shared_parameter": {"first.weight", "first.bias", "second.bias"},
    "multihead": {f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")},
    "encoder_layer": {
        f"0.self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    },
    "lstm": {f"lstm.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    "tied_head": {"embedding.weight"},
    "positional": {"position.weight"},
    "time_first": {"stem.weight", "stem.bias", "head.weight", "head.bias"},
}


@pytest.mark.parametrize("model", UNCOUPLED)
def test_layer_rules_serve_every_parameter_that_they_can(model):
    partition = problem(model, "categorical").fisher("exact", ng.Dense()).partition
    without = {name for cell in partition.cells if cell.module is None for name in cell.parameters}
    assert without <= WITHOUT_RULE.get(model, set())


SOLVERS = {
    "default": None,
    "cholesky": Cholesky(),
    "eigh": Eigh(),
    "cg": CG(tolerance=1e-13, max_iterations=500),
    "newton_schulz": NewtonSchulz(),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("structure", [*STRUCTURES, "kronecker", "eigen_kronecker"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_every_solver_on_every_structure(likelihood, structure, solver, generator):
    kept = {**STRUCTURES, "kronecker": ng.Kronecker(), "eigen_kronecker": ng.EigenKronecker()}[structure]
    p = problem("mlp", likelihood)
    operator = p.fisher("exact", kept)
    # K-FAC's own matrix is tested in test_kfac_exactness.py; here only that every solver inverts it.
    expected = expected_matrix(p, "exact", structure) if structure in STRUCTURES else operator.to_dense()
    v = torch.randn(p.size, dtype=torch.float64, generator=generator)
    want = oracles.damped_inverse(expected, DAMPING) @ v
    tolerance = 1e-7 if (structure, solver) == ("matrix_free", "default") else 1e-9
    assert_close(operator.solve(v, damping=DAMPING, solver=SOLVERS[solver]), want, tolerance)


def test_woodbury_solves_in_the_space_of_rows(generator):
    p = problem("attention", "categorical")  # 27 rows of rank at most 18, 90 parameters
    operator = p.fisher("exact", ng.Gram())
    v = torch.randn(p.size, dtype=torch.float64, generator=generator)
    for damping in (1e-6, 1e-2, 10.0):
        solved = operator.solve(v, damping=damping, solver=Woodbury())
        assert_close(solved, oracles.damped_inverse(p.exact, damping) @ v, 1e-8 if damping < 1e-4 else 1e-9)


@pytest.mark.parametrize(
    "model", ["mlp", "attention", "layer_norm", "batch_norm_train", "lstm", "tied_head", "conv2d_groups"]
)
@pytest.mark.parametrize("structure", ["dense", "matrix_free", "diagonal", "blocks"])
def test_hessian_of_the_mean_loss(model, structure, generator):
    p = problem(model, "categorical")
    operator = ng.hessian(p.model, p.likelihood, p.x, p.y, structure=STRUCTURES[structure])
    whole = oracles.nll_hessian(p.model, p.pair.family, p.x, p.y)
    slices = oracles.parameter_slices(p.model)
    groups = [[s] for s in slices.values()]
    if structure == "blocks":
        groups = [[slices[n] for n in g] for g in oracles.module_groups(p.model).values()]
    expected = whole if structure in WHOLE else oracles.restrict(whole, groups)
    if structure == "diagonal":
        expected = torch.diag(whole.diagonal())
    v = torch.randn(p.size, dtype=torch.float64, generator=generator)
    assert_close(operator.to_dense(), expected)
    assert_close(operator @ v, expected @ v)


@pytest.mark.parametrize("likelihood", PAIRS)
def test_hessian_of_every_likelihood(likelihood):
    p = problem("mlp", likelihood)
    operator = ng.hessian(p.model, p.likelihood, p.x, p.y)
    assert_close(operator.to_dense(), oracles.nll_hessian(p.model, p.pair.family, p.x, p.y))


def test_hessian_is_the_fisher_at_a_perfect_fit_and_indefinite_elsewhere():
    p = problem("mlp", "gaussian")
    fitted = ng.hessian(p.model, p.likelihood, p.x, p.f)
    assert_close(fitted.to_dense(), p.exact)
    values = torch.linalg.eigvalsh(ng.hessian(p.model, p.likelihood, p.x, p.f + 5.0).to_dense())
    assert values[0] < -1e-3 * values[-1]


RANDOM = {"monte_carlo": ng.MonteCarlo, "signed": ng.Signed}


def mean_matrix(p: Problem, estimate: object, structure: object, repeats: int) -> tuple[Tensor, float]:
    """Mean over repeats of an estimated matrix, and the root mean square of one repeat's relative error."""
    seeds = torch.Generator().manual_seed(3)
    options = {"estimate": estimate, "structure": structure, "generator": seeds}
    matrices = [ng.fisher(p.model, p.likelihood, p.x, p.y, **options).to_dense() for _ in range(repeats)]
    errors = torch.stack([(m - p.exact).norm() / p.exact.norm() for m in matrices])
    return torch.stack(matrices).mean(0), float(errors.square().mean().sqrt())


@pytest.mark.parametrize("likelihood", PAIRS)
@pytest.mark.parametrize("estimate", RANDOM)
@pytest.mark.parametrize("model", ["mlp", "mixer"])
def test_random_estimates_are_unbiased_for_every_likelihood(model, estimate, likelihood):
    p = problem(model, likelihood)
    repeats, samples = 24, 64
    mean, single = mean_matrix(p, RANDOM[estimate](samples), ng.Dense(), repeats)
    # The mean of n independent matrices is √n times closer; 2.5 leaves room for the tail of its distribution.
    assert 0 < single < 1
    assert distance(mean, p.exact) < 2.5 * single / repeats**0.5
    assert abs(float(mean.trace() / p.exact.trace()) - 1) < 2.5 * single / repeats**0.5


@pytest.mark.parametrize("estimate", RANDOM)
@pytest.mark.parametrize("model", ["mlp", "mixer"])
def test_random_estimates_converge_at_the_rate_of_one_over_root_samples(model, estimate):
    p = problem(model, "categorical")
    errors = {n: mean_matrix(p, RANDOM[estimate](n), ng.Dense(), 30)[1] for n in (4, 16, 64, 256)}
    assert abs(slope(errors) + 0.5) < 0.06, errors


def test_signed_estimate_has_the_variance_of_independent_signs():
    """Var of (Σ_k ε_k r_k)(…)ᵀ is known in closed form. Gaussian: the columns of S are unit vectors over σ."""
    p = problem("mlp", "gaussian")
    gradients = oracles.unit_gradients(p.jacobian, p.exact_columns) / p.total**0.5  # [R, N, P]
    gram = torch.einsum("rnp,snp->nrs", gradients, gradients)
    # E‖Σ_r≠s ε_r ε_s g_r g_sᵀ‖² summed over independent rows, for one sample.
    pairs = (
        torch.einsum("nrr,nss->n", gram, gram) + gram.square().sum((1, 2)) - 2 * gram.diagonal(0, 1, 2).square().sum(1)
    )
    expected = float((pairs.sum() / 16).sqrt() / p.exact.norm())
    _, measured = mean_matrix(p, ng.Signed(16), ng.Dense(), 60)
    assert measured == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("structure", [*WHOLE, *PARTIAL, "kronecker", "eigen_kronecker"])
@pytest.mark.parametrize("estimate", RANDOM)
def test_random_estimates_are_reproducible_and_use_no_other_stream(estimate, structure):
    kept = {**STRUCTURES, "kronecker": ng.Kronecker(), "eigen_kronecker": ng.EigenKronecker()}[structure]
    p = problem("mlp", "categorical")

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"estimate": RANDOM[estimate](3), "structure": kept, "generator": generator}
        return ng.fisher(p.model, p.likelihood, p.x, **options).to_dense()

    state = torch.get_rng_state()
    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("structure", [*WHOLE, *PARTIAL])
def test_random_matrix_structures_agree_given_the_same_stream(structure):
    """The same draws give the same columns: every structure then keeps parts of one matrix."""
    p = problem("mixer", "categorical")

    def draw(kept: object) -> Tensor:
        options = {"estimate": ng.MonteCarlo(2), "structure": kept, "generator": torch.Generator().manual_seed(5)}
        return ng.fisher(p.model, p.likelihood, p.x, **options).to_dense()

    whole = draw(ng.Dense())
    if structure == "diagonal":
        whole = torch.diag(whole.diagonal())
    if structure == "blocks":
        slices = oracles.parameter_slices(p.model)
        whole = oracles.restrict(whole, [[slices[n] for n in g] for g in oracles.module_groups(p.model).values()])
    assert_close(draw(STRUCTURES[structure]), whole)


@pytest.mark.parametrize("structure", [*STRUCTURES, "kronecker", "eigen_kronecker"])
@pytest.mark.parametrize("model", ["mlp", "inplace", "batch_norm_train", "attention", "structured"])
def test_asking_for_curvature_changes_nothing_else(model, structure):
    kept = {**STRUCTURES, "kronecker": ng.Kronecker(), "eigen_kronecker": ng.EigenKronecker()}[structure]
    case = zoo.case(model)
    state = {k: v.clone() for k, v in case.model.state_dict().items()}
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    hooks = [len(m._forward_hooks) for m in case.model.modules()]
    options = {"estimate": ng.MonteCarlo(), "generator": torch.Generator().manual_seed(0)}
    operator = ng.fisher(case.model, ng.Categorical(), case.x, structure=kept, **options)
    operator @ torch.ones(operator.shape[1], dtype=torch.float64)
    assert all(torch.equal(v, state[k]) for k, v in case.model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in case.model.parameters())
    assert [len(m._forward_hooks) for m in case.model.modules()] == hooks
    assert case.model.training
