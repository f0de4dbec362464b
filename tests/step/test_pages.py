"""The pages of docs/ that speak of this algebra keep their word."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

import torch

import natgrad as ng

DOCS = Path(__file__).parents[2] / "docs"
DOUBLE = torch.float64


def test_the_example_of_the_empirical_fisher_page_prints_what_the_page_says():
    page = (DOCS / "empirical-fisher-is-not-the-fisher.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.S)
    printed = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        exec(code, {})
    rows = [line.split() for line in printed.getvalue().splitlines()]
    expected = [line.split() for line in shown.splitlines()]
    assert [row[:2] for row in rows] == [row[:2] for row in expected] and len(rows) == 8
    for row, wanted in zip(rows, expected, strict=True):
        for i in (3, 6):
            assert math.isclose(float(row[i]), float(wanted[i]), rel_tol=1e-3, abs_tol=1e-3), (row, wanted)


def test_permuting_labels_changes_the_empirical_fisher_only():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 2, generator=generator, dtype=DOUBLE)
    y = torch.randint(3, (16,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()

    def matrix(y, estimate):
        return ng.fisher(model, ng.Categorical(), x, y, estimate=estimate).to_dense()

    for estimate in (ng.Exact(), ng.MonteCarlo(), ng.Signed()):
        torch.testing.assert_close(matrix(y, estimate), matrix(y.flip(0), estimate), rtol=0, atol=0)
    assert (matrix(y, ng.Empirical()) - matrix(y.flip(0), ng.Empirical())).norm() > 0.1 * matrix(
        y, ng.Empirical()
    ).norm()


def test_factored_damping_is_never_weaker_and_pi_minimises_the_trace_of_what_it_adds():
    generator = torch.Generator().manual_seed(0)
    g, a = (torch.randn(n, n, generator=generator, dtype=DOUBLE) for n in (2, 3))
    g, a, damping = g @ g.T, 30 * a @ a.T, 0.1

    def damped(pi):
        left, right = (torch.eye(n, dtype=DOUBLE) for n in (2, 3))
        return torch.kron(g + math.sqrt(damping) / pi * left, a + math.sqrt(damping) * pi * right)

    pi = math.sqrt((a.trace() / 3) / (g.trace() / 2))
    extra = damped(pi) - torch.kron(g, a) - damping * torch.eye(6, dtype=DOUBLE)
    assert torch.linalg.eigvalsh(extra).min() > -1e-10
    for other in (0.9 * pi, 1.1 * pi):
        assert damped(other).trace() > damped(pi).trace()
    product = ng.linalg.KroneckerProduct(g, a).damped_factors(damping)
    torch.testing.assert_close(product.to_dense(), damped(pi))
