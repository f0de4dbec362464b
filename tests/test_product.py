"""The product likelihood × estimate × structure × solver against dense oracles, over the zoo of models.

Every expected matrix is built in `natgrad.testing.oracles` from torch.func Jacobians and written-out formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

import natgrad as ng
from natgrad.linalg import CG, Cholesky, Eigh, NewtonSchulz, Woodbury
from natgrad.testing import families, oracles, zoo
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


def restricted(model: torch.nn.Module, whole: Tensor, structure: str) -> Tensor:
    """What the structure keeps of a matrix over all parameters."""
    if structure == "diagonal":
        return torch.diag(whole.diagonal())
    if structure == "blocks":
        slices = oracles.parameter_slices(model)
        return oracles.restrict(whole, [[slices[n] for n in g] for g in oracles.module_groups(model).values()])
    return whole


def expected_matrix(p: Problem | WeightedProblem, estimate: str, structure: str) -> Tensor:
    """The whole matrix, restricted to what the structure keeps."""
    return restricted(p.model, p.matrix(estimate), structure)


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
    "tied_head": {"embedding.weight"},
    "cross_attention": {"attention.bias_k", "attention.bias_v"},
    "experts": {f"experts.{i}.{n}" for i in range(2) for n in ("weight", "bias")},  # rows of single tokens
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


def unpadded(batch: torch.Size) -> Tensor:
    """A mask [*batch]: sequences of 1, 2, …, T, 1, … positions; where there are none, every third row is left out."""
    rows = torch.arange(batch[0])
    return rows % 3 != 1 if len(batch) == 1 else torch.arange(batch[1]) <= (rows % batch[1])[:, None]


def by_example(batch: torch.Size) -> Tensor:
    """Sample weights [*batch], the same for all positions of a row."""
    weights = torch.linspace(0.3, 2.5, batch[0], dtype=torch.float64)
    return weights.reshape(-1, *[1] * (len(batch) - 1)).expand(batch)


def smoothed(y: Tensor, table: Tensor | None = None) -> Tensor:
    """(1 − ε) e_y + ε/C for ε = 0.3; with one weight per class each entry times its class's."""
    soft = 0.7 * torch.nn.functional.one_hot(y, 3).double() + 0.1
    return soft if table is None else soft * table


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


@dataclass(frozen=True)
class Weighting:
    """A weighted likelihood and what it stands for, by hand; every function takes labels y and the shape [*batch].

    target: y as the likelihood is given it.
    weights: c_b, how often prediction b counts.
    soft: t [*batch, C] of unit sum, where the loss of one prediction is −Σ_k t_k log p_k and not that of y.
    total: M, where it is not Σ c_b.
    """

    pair: str
    make: Callable[[], Any]
    target: Callable[[Tensor, torch.Size], Any]
    weights: Callable[[Tensor, torch.Size], Tensor]
    soft: Callable[[Tensor], Tensor] | None = None
    total: Callable[[Tensor, torch.Size], Tensor] | None = None


WEIGHTINGS = {
    "ignore_index": Weighting(
        "categorical",
        lambda: ng.Weighted(ng.Categorical(), ignore_index=-100),
        lambda y, batch: y.masked_fill(~unpadded(batch), -100),
        lambda y, batch: unpadded(batch).double(),
    ),
    # Labels drawn from the model may be the ignored one, and count where the true label is another.
    "ignored_class": Weighting(
        "categorical",
        lambda: ng.Weighted(ng.Categorical(), ignore_index=0),
        lambda y, batch: y,
        lambda y, batch: (y != 0).double(),
    ),
    "sample_weights": Weighting(
        "gaussian_learned",
        lambda: ng.Weighted(ng.Gaussian.learned()),
        lambda y, batch: (y, by_example(batch)),
        lambda y, batch: by_example(batch),
    ),
    "class_weights": Weighting(
        "categorical",
        lambda: ng.Weighted(ng.Categorical(), class_weights=CLASS_WEIGHTS),
        lambda y, batch: y,
        lambda y, batch: CLASS_WEIGHTS[y],
    ),
    "label_smoothing": Weighting(
        "categorical",
        lambda: ng.Weighted(ng.Categorical(), label_smoothing=0.3),
        lambda y, batch: y,
        lambda y, batch: torch.ones(batch, dtype=torch.float64),
        soft=smoothed,
    ),
    "padding_mask": Weighting(
        "bernoulli",
        lambda: ng.Weighted(ng.Bernoulli()),
        lambda y, batch: (y.masked_fill(~unpadded(batch)[..., None], torch.nan), unpadded(batch)),
        lambda y, batch: unpadded(batch).double(),
    ),
    "missing_labels": Weighting(
        "gamma",
        lambda: ng.Weighted(PAIRS["gamma"].make()),
        lambda y, batch: (y.masked_fill(~unpadded(batch), torch.nan), unpadded(batch) * by_example(batch)),
        lambda y, batch: unpadded(batch) * by_example(batch),
    ),
    "function_of_labels": Weighting(
        "poisson",
        lambda: ng.Weighted(ng.Poisson(), weights=lambda y: (-y).exp()[..., 0]),
        lambda y, batch: y,
        lambda y, batch: (-y).exp()[..., 0],
    ),
    # torch divides by the number of predictions where targets are probabilities.
    "weighted_soft_targets": Weighting(
        "categorical",
        lambda: ng.Weighted(ng.Categorical(), class_weights=CLASS_WEIGHTS),
        lambda y, batch: smoothed(y),
        lambda y, batch: smoothed(y, CLASS_WEIGHTS).sum(-1),
        soft=lambda y: smoothed(y, CLASS_WEIGHTS) / smoothed(y, CLASS_WEIGHTS).sum(-1, keepdim=True),
        total=lambda y, batch: torch.tensor(float(batch.numel()), dtype=torch.float64),
    ),
    # The loss smooths the weights of classes too, its normaliser does not.
    "all_at_once": Weighting(
        "categorical",
        lambda: ng.Weighted(ng.Categorical(), ignore_index=-1, class_weights=CLASS_WEIGHTS, label_smoothing=0.3),
        lambda y, batch: (y.masked_fill(~unpadded(batch), -1), by_example(batch)),
        lambda y, batch: unpadded(batch) * by_example(batch) * smoothed(y, CLASS_WEIGHTS).sum(-1),
        soft=lambda y: smoothed(y, CLASS_WEIGHTS) / smoothed(y, CLASS_WEIGHTS).sum(-1, keepdim=True),
        total=lambda y, batch: (unpadded(batch) * by_example(batch) * CLASS_WEIGHTS[y]).sum(),
    ),
}
SAMPLES, SEED = 3, 5


@dataclass(frozen=True)
class WeightedProblem:
    """A problem of the zoo under a weighting; weights multiply rows of the torch.func Jacobian, one by one."""

    plain: Problem
    weighting: Weighting

    @property
    def model(self) -> torch.nn.Module:
        return self.plain.model

    @property
    def batch(self) -> torch.Size:
        return self.plain.f.shape[:-1]

    @cached_property
    def target(self) -> Any:
        return self.weighting.target(self.plain.y, self.batch)

    @cached_property
    def weights(self) -> Tensor:
        return self.weighting.weights(self.plain.y, self.batch)

    @cached_property
    def total(self) -> Tensor:
        own = self.weighting.total
        return self.weights.sum() if own is None else own(self.plain.y, self.batch)

    @cached_property
    def family(self) -> families.Family:
        """The distribution, with the loss of one prediction before it is weighted."""
        if self.weighting.soft is None:
            return self.plain.pair.family
        soft = self.weighting.soft(self.plain.y)
        return replace(self.plain.pair.family, nll=lambda f, y: torch.logsumexp(f, -1) - (soft * f).sum(-1))

    @cached_property
    def exact(self) -> Tensor:
        """Σ_b c_b J_bᵀ Λ_b J_b / M."""
        f, J = self.plain.f, self.plain.jacobian
        J, fisher = J.reshape(-1, *J.shape[-2:]), self.plain.pair.family.fisher(f).reshape(-1, *2 * f.shape[-1:])
        return torch.einsum("b,bip,bij,bjq->pq", self.weights.reshape(-1), J, fisher, J) / self.total

    def from_scores(self, scores: Tensor) -> Tensor:
        """(1/M) Σ_n r_n r_nᵀ with r_n = Σ_t √c_nt J_ntᵀ s_nt: a weight of two is two copies."""
        n, J = len(scores), self.plain.jacobian
        columns = self.weights.sqrt()[..., None] * scores
        rows = torch.einsum("nip,ni->np", J.reshape(n, -1, J.shape[-1]), columns.reshape(n, -1))
        return rows.T @ rows / self.total

    @cached_property
    def empirical(self) -> Tensor:
        return self.from_scores(self.family.score(self.plain.f, self.plain.y))

    @cached_property
    def monte_carlo(self) -> Tensor:
        """Labels come from the model, in the order in which an unweighted likelihood draws them."""
        f, law = self.plain.f, self.plain.pair
        drawn = law.make().sample(f, SAMPLES, generator=torch.Generator().manual_seed(SEED))
        return torch.stack([self.from_scores(law.family.score(f, y)) for y in drawn]).mean(0)

    def matrix(self, estimate: str) -> Tensor:
        return getattr(self, estimate)

    def fisher(self, estimate: str | ng.Signed, structure: Any, seed: int = SEED) -> Any:
        """natgrad's operator for the same problem."""
        named = {"exact": ng.Exact(), "empirical": ng.Empirical(), "monte_carlo": ng.MonteCarlo(SAMPLES)}
        options = {"structure": structure, "generator": torch.Generator().manual_seed(seed)}
        chosen = named[estimate] if isinstance(estimate, str) else estimate
        return ng.fisher(self.model, self.weighting.make(), self.plain.x, self.target, estimate=chosen, **options)


@cache
def weighted_problem(model: str, weighting: str) -> WeightedProblem:
    chosen = WEIGHTINGS[weighting]
    return WeightedProblem(problem(model, chosen.pair), chosen)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimate", [*ESTIMATES, "monte_carlo"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("model", ["mlp", "mixer"])
def test_every_weighting_estimate_structure_and_solver(model, weighting, estimate, structure, generator):
    p = weighted_problem(model, weighting)
    operator, expected = p.fisher(estimate, STRUCTURES[structure]), expected_matrix(p, estimate, structure)
    v = torch.randn(len(expected), dtype=torch.float64, generator=generator)
    assert_close(operator.to_dense(), expected)
    assert_close(operator @ v, expected @ v)
    want = oracles.damped_inverse(expected, DAMPING) @ v
    for name, solver in SOLVERS.items():
        tolerance = 1e-7 if (structure, name) == ("matrix_free", "default") else 1e-9
        assert_close(operator.solve(v, damping=DAMPING, solver=solver), want, tolerance)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("model", SEQUENCES)
def test_weights_reach_every_position_of_a_sequence(model, estimate, structure):
    p = weighted_problem(model, "all_at_once")
    assert_close(p.fisher(estimate, STRUCTURES[structure]).to_dense(), expected_matrix(p, estimate, structure))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("model", ["mlp", "mixer"])
def test_hessian_of_every_weighted_loss(model, weighting):
    p = weighted_problem(model, weighting)
    got = ng.hessian(p.model, p.weighting.make(), p.plain.x, p.target).to_dense()
    mean = oracles.nll_hessian(p.model, p.family, p.plain.x, p.plain.y, p.weights)
    assert_close(got, mean * p.weights.sum() / p.total)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("model", ["mlp", "mixer"])
def test_weightings_matter(model, weighting):
    """The control: weights, and the smoothing, that change nothing could be dropped unseen."""
    p = weighted_problem(model, weighting)
    assert distance(p.empirical, p.plain.empirical) > 0.1
    if weighting == "label_smoothing":
        assert distance(p.exact, p.plain.exact) < 1e-12
    else:
        assert distance(p.exact, p.plain.exact) > 0.1
    assert (p.weights > 0).sum() > 1


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("model", ["mlp", "mixer"])
def test_signed_estimate_of_every_weighting(model, weighting):
    """Unbiased as a dense matrix, and every other structure keeps parts of the same draw."""
    p = weighted_problem(model, weighting)
    draws = [p.fisher(ng.Signed(64), ng.Dense(), seed).to_dense() for seed in range(12)]
    single = torch.stack([d - p.exact for d in draws]).norm(dim=(1, 2)).square().mean().sqrt() / p.exact.norm()
    assert 0 < single < 0.5
    assert distance(torch.stack(draws).mean(0), p.exact) < 2.5 * single / len(draws) ** 0.5
    whole = p.fisher(ng.Signed(SAMPLES), ng.Dense()).to_dense()
    for name, structure in STRUCTURES.items():
        assert_close(p.fisher(ng.Signed(SAMPLES), structure).to_dense(), restricted(p.model, whole, name))


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

    assert_close(draw(STRUCTURES[structure]), restricted(p.model, draw(ng.Dense()), structure))


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
