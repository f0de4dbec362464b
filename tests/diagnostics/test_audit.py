"""The audit against dense matrices: structures that are exact, approximate, and wrong on purpose."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.diagnostics import AuditReport
from natgrad.errors import NatgradError, NonFiniteError
from natgrad.testing import families, oracles
from support import Problem, problem

DOUBLE = torch.float64
DAMPING = 1e-3
ROUNDING = 1e-8  # directions come from conjugate gradients with a tolerance of 1e-6


@pytest.fixture
def mlp() -> Problem:
    return problem("mlp", "categorical")


def quiet_audit(problem: Problem, structure: Any, **options: Any) -> AuditReport:
    options = {"estimate": ng.Exact(), "damping": DAMPING, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return ng.audit(problem.model, problem.likelihood, problem.x, problem.y, structure=structure, **options)


def gradient(problem: Problem) -> Tensor:
    """Of the mean negative log-likelihood, from the family's own score and the Jacobian."""
    score = problem.pair.family.score(problem.f, problem.y)
    return torch.einsum("nc,ncp->p", score, problem.jacobian) / len(score)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


# Exact structures pass.


@pytest.mark.parametrize("structure", [ng.Dense(), ng.Gram(), ng.MatrixFree()], ids=lambda s: s.name)
@pytest.mark.parametrize("model", ["mlp", "conv2d", "layer_norm"])
def test_the_whole_matrix_agrees_with_itself(model: str, structure: Any) -> None:
    report = quiet_audit(problem(model, "categorical"), structure)
    (row,) = report.blocks
    assert row.trace_ratio == pytest.approx(1.0, rel=1e-9)
    assert row.direction_cosine == pytest.approx(1.0, abs=1e-6)
    assert row.direction_scale == pytest.approx(1.0, rel=1e-4)
    assert report.direction_cosine == pytest.approx(1.0, abs=1e-6)
    assert report.kl_predicted == pytest.approx(report.kl_exact, rel=1e-9) == 1e-4
    assert report.messages == ()


@pytest.mark.parametrize("structure", [ng.Diagonal(), ng.BlockDiagonal(), ng.EigenKronecker()], ids=lambda s: s.name)
@pytest.mark.parametrize("model", ["mlp", "conv2d", "residual"])
def test_exact_traces_have_ratio_one(model: str, structure: Any) -> None:
    report = quiet_audit(problem(model, "categorical"), structure)
    for row in report.blocks:
        assert row.trace_ratio == pytest.approx(1.0, rel=1e-9), row.name


def test_blocks_of_the_exact_matrix_give_exact_directions_of_their_own(mlp: Problem) -> None:
    report = quiet_audit(mlp, ng.BlockDiagonal())
    assert len(report.blocks) == 2
    for row in report.blocks:
        assert row.direction_cosine == pytest.approx(1.0, abs=1e-6)
        assert row.direction_scale == pytest.approx(1.0, rel=1e-4)
    assert report.direction_cosine < 0.999  # the curvature between layers is missing


# Every number of an approximation, against dense linear algebra.


@pytest.mark.parametrize("structure", [ng.Diagonal(), ng.Kronecker()], ids=lambda s: s.name)
@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_every_number_is_that_of_dense_linear_algebra(mlp: Problem, structure: Any, damping: float) -> None:
    report = quiet_audit(mlp, structure, damping=damping, step_kl=1e-5)
    operator = mlp.fisher("exact", structure)
    approximate, g = operator.to_dense(), gradient(mlp)
    eye = torch.eye(mlp.size, dtype=DOUBLE)
    direction = torch.linalg.solve(approximate + damping * eye, g)
    wanted = torch.linalg.solve(mlp.exact + damping * eye, g)
    assert report.direction_cosine == pytest.approx(cosine(direction, wanted), abs=1e-5)
    s = math.sqrt(2 * 1e-5 / float(direction @ mlp.exact @ direction))
    assert report.kl_exact == pytest.approx(1e-5)
    assert report.kl_predicted == pytest.approx(0.5 * s * s * float(direction @ approximate @ direction), rel=1e-6)
    start = 0
    slices = oracles.parameter_slices(mlp.model)
    assert report.structure == structure.name and report.damping == damping
    for row in report.blocks:
        own = [s for name, s in slices.items() if f"{name}.".startswith(f"{row.name}.")]
        part = torch.cat([torch.arange(s.start, s.stop) for s in own])
        start += len(part)
        block, exact = approximate[part][:, part], mlp.exact[part][:, part]
        d, w = (torch.linalg.solve(m + damping * torch.eye(len(part), dtype=DOUBLE), g[part]) for m in (block, exact))
        assert row.size == len(part)
        assert row.trace == pytest.approx(float(block.trace()), rel=1e-9)
        assert row.trace_exact == pytest.approx(float(exact.trace()), rel=1e-9)
        assert row.trace_ratio == pytest.approx(float(block.trace() / exact.trace()), rel=1e-9)
        assert row.direction_cosine == pytest.approx(cosine(d, w), abs=1e-5)
        assert row.direction_scale == pytest.approx(float(d.norm() / w.norm()), rel=1e-4)
        assert row.gradient_cosine == pytest.approx(cosine(d, g[part]), abs=1e-6)
    assert start == mlp.size


def test_measured_kl_is_that_of_the_moved_model(mlp: Problem) -> None:
    direction = torch.linalg.solve(mlp.exact + DAMPING * torch.eye(mlp.size, dtype=DOUBLE), gradient(mlp))
    for step_kl in (1e-2, 1e-6):
        report = quiet_audit(mlp, ng.Dense(), step_kl=step_kl)
        s = math.sqrt(2 * step_kl / float(direction @ mlp.exact @ direction))
        moved = copy.deepcopy(mlp.model)
        with torch.no_grad():
            for (_, p), part in zip(
                moved.named_parameters(), oracles.parameter_slices(mlp.model).values(), strict=True
            ):
                p.sub_(s * direction[part].reshape(p.shape))
        wanted = float(mlp.pair.family.kl(mlp.f, oracles.network_output(moved, mlp.x)).mean())
        assert report.kl_measured == pytest.approx(wanted, rel=1e-4)


def test_measured_kl_approaches_the_exact_quadratic_for_small_steps(mlp: Problem) -> None:
    """The error of the quadratic model is of third order in the step: ten times smaller for a hundredth of the KL."""
    errors = {}
    for step_kl in (1e-4, 1e-6):
        for structure in (ng.Dense(), ng.Kronecker()):
            report = quiet_audit(mlp, structure, step_kl=step_kl)
            errors[structure.name, step_kl] = abs(report.kl_measured / report.kl_exact - 1)
    for name in ("Dense", "Kronecker"):
        assert errors[name, 1e-6] < 0.02
        assert 3 < errors[name, 1e-4] / errors[name, 1e-6] < 33


# Wrong structures do not pass.


@dataclass(frozen=True)
class Misscaled(ng.Kronecker):
    """K-FAC as it shipped more than once: the second factor lacks its division by the batch size."""

    factor: float = 8.0

    def operators(self, partition: Any, means: Mapping[str, Mapping[str, Tensor]], bases: Any) -> dict[str, Any]:
        return {name: self.factor * operator for name, operator in super().operators(partition, means, bases).items()}


def test_a_scale_error_is_flagged(mlp: Problem) -> None:
    right = quiet_audit(mlp, ng.Kronecker())
    assert not any("trace" in message for message in right.messages)
    with pytest.warns(UserWarning, match=r"trace of .* differs from the exact Fisher's by more than 5 times"):
        wrong = ng.audit(
            mlp.model, mlp.likelihood, mlp.x, mlp.y, structure=Misscaled(), estimate=ng.Exact(), damping=DAMPING
        )
    for row, good in zip(wrong.blocks, right.blocks, strict=True):
        assert row.trace_ratio == pytest.approx(8 * good.trace_ratio, rel=1e-9)
        assert row.trace_exact == pytest.approx(good.trace_exact, rel=1e-12)
        assert row.name in " ".join(wrong.messages)
    with pytest.warns(UserWarning, match="differs"):
        small = ng.audit(
            mlp.model, mlp.likelihood, mlp.x, mlp.y, structure=Misscaled(factor=0.1), estimate=ng.Exact(), damping=0.1
        )
    assert all(row.trace_ratio < 0.2 for row in small.blocks)


@dataclass(frozen=True)
class Blind(ng.Dense):
    """Knows the trace and nothing else."""

    def operators(self, partition: Any, means: Mapping[str, Mapping[str, Tensor]], bases: Any) -> dict[str, Any]:
        found = super().operators(partition, means, bases)
        return {n: ng.linalg.DiagonalMatrix(op.diagonal().mean().expand(op.shape[0])) for n, op in found.items()}


def test_a_structure_without_information_is_plain_gradient_descent(mlp: Problem) -> None:
    with pytest.warns(UserWarning, match="plain gradient descent"):
        report = ng.audit(
            mlp.model, mlp.likelihood, mlp.x, mlp.y, structure=Blind(), estimate=ng.Exact(), damping=DAMPING
        )
    (row,) = report.blocks
    assert row.trace_ratio == pytest.approx(1.0, rel=1e-9)  # its scale is right, its direction is not
    assert row.gradient_cosine == pytest.approx(1.0, abs=1e-12)
    assert report.direction_cosine < 0.99
    assert len(report.messages) == 1


@pytest.mark.parametrize("structure", [ng.Dense(), ng.Diagonal(), ng.Kronecker(), ng.Gram()], ids=lambda s: s.name)
def test_damping_above_all_curvature_is_flagged(mlp: Problem, structure: Any) -> None:
    with pytest.warns(UserWarning, match=r"plain gradient descent.*damping 1000 is far above"):
        report = ng.audit(
            mlp.model, mlp.likelihood, mlp.x, mlp.y, structure=structure, estimate=ng.Exact(), damping=1e3
        )
    assert all(row.gradient_cosine > 0.999999 for row in report.blocks)
    assert all(row.name in report.messages[0] for row in report.blocks)
    assert quiet_audit(mlp, structure, damping=1e-3).messages == ()


def test_damping_rules_are_audited_as_they_act(mlp: Problem) -> None:
    """Factored Tikhonov damping is another inverse than (F + λI)⁻¹, and is what the optimizer uses."""
    plain = quiet_audit(mlp, ng.Kronecker(), damping=0.05)
    factored = quiet_audit(mlp, ng.Kronecker(), damping=ng.FactoredTikhonov(0.05))
    assert factored.damping == 0.05
    assert factored.direction_cosine != pytest.approx(plain.direction_cosine, abs=1e-4)
    relative = quiet_audit(mlp, ng.Diagonal(), damping=ng.Proportional(1e-2))
    assert all(0 < row.direction_scale < math.inf for row in relative.blocks)


# Weights, estimates, labels.


def test_weights_count_in_every_number() -> None:
    """Repeating an example and giving it weight two are the same; weight zero is absence, whatever stands there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1, 2])
    likelihood = ng.Weighted(ng.Categorical())
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 0.0], dtype=DOUBLE)
    index = torch.tensor([0, 1, 1, 3, 4])
    options: dict[str, Any] = {"estimate": ng.Exact(), "damping": 1e-2, "structure": ng.Dense()}
    labels = torch.where(weights == 0, 77, y)
    weighted = ng.audit(model, likelihood, x, (labels, weights), **options)
    repeated = ng.audit(model, ng.Categorical(), x[index], y[index], **options)
    for a, b in zip(weighted.blocks, repeated.blocks, strict=True):
        assert a.trace == pytest.approx(b.trace, rel=1e-10)
        assert a.trace_exact == pytest.approx(b.trace_exact, rel=1e-10)
        assert a.gradient_cosine == pytest.approx(b.gradient_cosine, rel=1e-9)
        assert a.trace_ratio == pytest.approx(1.0, rel=1e-9)
    assert weighted.kl_measured == pytest.approx(repeated.kl_measured, rel=1e-6)
    assert weighted.kl_predicted == pytest.approx(weighted.kl_exact, rel=1e-9)
    jacobian = oracles.jacobian(model, x[index])
    exact = oracles.exact_fisher(jacobian, families.categorical().fisher(oracles.network_output(model, x[index])))
    assert weighted.blocks[0].trace_exact == pytest.approx(float(exact.trace()), rel=1e-10)


def test_ignored_labels_and_sequences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    x = torch.tensor([[0, 1, 2, 3], [4, 3, 0, 0]])
    y = torch.tensor([[1, 2, 3, 4], [3, 0, -100, -100]])
    report = ng.audit(
        model,
        ng.Weighted(ng.Categorical(), ignore_index=-100),
        x,
        y,
        structure=ng.Dense(),
        estimate=ng.Exact(),
        damping=1e-3,
    )
    flat = x.flatten()[:6]
    jacobian = oracles.jacobian(model, flat)
    exact = oracles.exact_fisher(jacobian, families.categorical().fisher(oracles.network_output(model, flat)))
    assert report.blocks[0].trace_exact == pytest.approx(float(exact.trace()), rel=1e-10)
    assert report.blocks[0].trace_ratio == pytest.approx(1.0, rel=1e-9)
    assert report.kl_measured == pytest.approx(report.kl_exact, rel=0.1)


def test_estimates_are_judged_beside_the_exact_matrix(mlp: Problem) -> None:
    exact = quiet_audit(mlp, ng.Dense())
    noisy = quiet_audit(mlp, ng.Dense(), estimate=ng.MonteCarlo(1), generator=torch.Generator().manual_seed(1))
    many = quiet_audit(mlp, ng.Dense(), estimate=ng.MonteCarlo(3000))
    assert noisy.blocks[0].trace_exact == pytest.approx(exact.blocks[0].trace_exact, rel=1e-12)
    assert abs(many.blocks[0].trace_ratio - 1) < 0.05 < abs(noisy.blocks[0].trace_ratio - 1)
    empirical = quiet_audit(mlp, ng.Dense(), estimate=ng.Empirical())
    wanted = float(mlp.empirical.trace() / mlp.exact.trace())
    assert empirical.blocks[0].trace_ratio == pytest.approx(wanted, rel=1e-9)


def test_labels_are_drawn_from_the_model_where_none_are_given(mlp: Problem) -> None:
    reports = [
        ng.audit(mlp.model, mlp.likelihood, mlp.x, structure=ng.Dense(), estimate=ng.Exact(), damping=DAMPING)
        for _ in range(2)
    ]
    assert reports[0] == reports[1]
    assert reports[0].blocks[0].trace_ratio == pytest.approx(1.0, rel=1e-9)
    with pytest.raises(NatgradError, match=r"target|labels"):
        ng.audit(mlp.model, mlp.likelihood, mlp.x, structure=ng.Dense(), estimate=ng.Empirical())


# A user's tool.


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 3, dtype=DOUBLE), torch.randint(0, 3, (8,))
    state, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for structure in (ng.Kronecker(), ng.MatrixFree()):
            ng.audit(model, ng.Categorical(), x, y, structure=structure)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_report_reads_as_a_table(mlp: Problem) -> None:
    report = quiet_audit(mlp, Misscaled())
    text = str(report)
    lines = text.splitlines()
    assert lines[0] == "audit of Misscaled with damping 0.001"
    assert [line.split()[0] for line in lines[2:4]] == [row.name for row in report.blocks]
    for line, row in zip(lines[2:4], report.blocks, strict=True):
        assert float(line.split()[2]) == pytest.approx(row.trace_ratio, rel=1e-3)
    assert any(line.startswith("! The trace of") for line in lines)


def test_blocks_without_curvature_are_shown_without_nonsense() -> None:
    """A unit whose output is multiplied by zero has neither gradient nor curvature."""

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alive, self.dead = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.alive(x) + 0.0 * self.dead(x)

    report = ng.audit(
        Dead().double(), ng.Categorical(), torch.randn(5, 3, dtype=DOUBLE), torch.zeros(5, dtype=torch.long),
        structure=ng.BlockDiagonal(), estimate=ng.Exact(), damping=DAMPING,
    )  # fmt: skip
    alive, dead = report.blocks
    assert alive.trace_ratio == pytest.approx(1.0, rel=1e-9)
    assert dead.trace == dead.trace_exact == 0.0 and math.isnan(dead.trace_ratio)
    assert report.direction_cosine == pytest.approx(1.0, abs=1e-6)
    assert "nan" in str(report)


def test_output_that_is_not_finite_is_refused(mlp: Problem) -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        ng.audit(mlp.model, mlp.likelihood, mlp.x * math.inf, mlp.y, structure=ng.Dense())
