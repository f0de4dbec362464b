"""Exact natural gradient, learning rate one and no damping, is Fisher scoring: the IRLS iterates of statsmodels."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import natgrad as ng

sm = pytest.importorskip("statsmodels.api")

N, D, STEPS = 60, 4, 6
LINKS = sm.families.links


def gamma_of_log_mean(f: Tensor) -> torch.distributions.Distribution:
    """Gamma of shape 2.5 and mean exp(f); one number per prediction, as a single event."""
    shape = torch.full_like(f, 2.5)
    return torch.distributions.Independent(torch.distributions.Gamma(shape, shape * (-f).exp()), 1)


def probit(f: Tensor) -> torch.distributions.Distribution:
    """Bernoulli with the probit link: not canonical, so Fisher scoring is not Newton's method."""
    p = torch.special.ndtr(f)
    return torch.distributions.Independent(torch.distributions.Bernoulli(probs=p, validate_args=False), 1)


# name: (natgrad likelihood, statsmodels family, labels from the linear predictor)
MODELS: dict[str, tuple[Any, Any, Any]] = {
    "logistic": (ng.Bernoulli(), sm.families.Binomial(), lambda r, eta: r.random(N) < 1 / (1 + np.exp(-eta))),
    "poisson": (ng.Poisson(), sm.families.Poisson(), lambda r, eta: r.poisson(np.exp(eta))),
    "gaussian": (ng.Gaussian(scale=0.7), sm.families.Gaussian(), lambda r, eta: eta + 0.7 * r.standard_normal(N)),
    "gamma": (
        ng.FromDistribution(gamma_of_log_mean),
        sm.families.Gamma(link=LINKS.Log()),
        lambda r, eta: r.gamma(2.5, np.exp(eta) / 2.5),
    ),
    "probit": (
        ng.FromDistribution(probit),
        sm.families.Binomial(link=LINKS.Probit()),
        lambda r, eta: r.random(N) < 1 / (1 + np.exp(-1.7 * eta)),
    ),
}
NAMED = ["logistic", "poisson", "gaussian"]


def data(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design matrix [N, D + 1] with the constant last, labels [N], starting point."""
    rng = np.random.default_rng(7)
    features = rng.standard_normal((N, D))
    truth = np.array([0.6, -0.4, 0.3, 0.2, 0.1])
    design = np.concatenate([features, np.ones((N, 1))], 1)
    labels = np.asarray(MODELS[name][2](rng, design @ truth), dtype=float)
    return design, labels, 0.1 * rng.standard_normal(D + 1)


def irls(name: str, start: np.ndarray, weights: np.ndarray | None = None) -> list[np.ndarray]:
    """statsmodels' iterates, one call per number of iterations so that each is its own reported result."""
    design, labels, _ = data(name)
    iterates = []
    for k in range(1, STEPS + 1):
        model = sm.GLM(labels, design, family=MODELS[name][1], freq_weights=weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "not converged" is the point of stopping early
            result = model.fit(start_params=start, maxiter=k, tol=0.0, method="IRLS")
        iterates.append(np.asarray(result.params))
    return iterates


def linear(start: np.ndarray) -> nn.Linear:
    model = nn.Linear(D, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(start[:D])[None])
        model.bias.copy_(torch.from_numpy(start[D:]))
    return model


def parameters(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()


@pytest.mark.parametrize("structure", [ng.Dense(), ng.BlockDiagonal(), ng.MatrixFree()], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_operator_reproduces_the_iterates(name, structure):
    design, labels, start = data(name)
    x, y = torch.from_numpy(design[:, :D]), torch.from_numpy(labels)[:, None]
    likelihood, model = MODELS[name][0], linear(start)
    solver = ng.linalg.CG(tolerance=1e-14, max_iterations=200) if isinstance(structure, ng.MatrixFree) else None
    for expected in irls(name, start):
        loss = likelihood.nll(model(x), y).mean()
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        step = ng.fisher(model, likelihood, x, structure=structure).solve(gradient, solver=solver)
        with torch.no_grad():
            model.weight -= step[:D][None]
            model.bias -= step[D:]
        np.testing.assert_allclose(parameters(model), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_optimizer_reproduces_the_iterates(name):
    design, labels, start = data(name)
    x, y = torch.from_numpy(design[:, :D]), torch.from_numpy(labels)[:, None]
    likelihood, model = MODELS[name][0], linear(start)
    optimizer = ng.NGD(model, likelihood, lr=1.0, damping=0.0, search=ng.LearningRate())
    for expected in irls(name, start):
        optimizer.zero_grad()
        likelihood.nll(model(x), y).mean().backward()
        optimizer.step()
        np.testing.assert_allclose(parameters(model), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMED)
def test_frequency_weights(name):
    """Weighted natural gradient is IRLS with frequency weights: a row of weight two counts as two rows."""
    design, labels, start = data(name)
    weights = np.random.default_rng(3).integers(0, 4, N).astype(float)
    x, y = torch.from_numpy(design[:, :D]), (torch.from_numpy(labels)[:, None], torch.from_numpy(weights))
    likelihood, model = ng.Weighted(MODELS[name][0]), linear(start)
    for expected in irls(name, start, weights):
        loss = likelihood.nll(model(x), y).sum() / weights.sum()
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        step = ng.fisher(model, likelihood, x, y).solve(gradient)
        with torch.no_grad():
            model.weight -= step[:D][None]
            model.bias -= step[D:]
        np.testing.assert_allclose(parameters(model), expected, rtol=1e-8, atol=1e-8)


def test_gaussian_converges_in_one_step():
    design, labels, start = data("gaussian")
    solution = np.linalg.lstsq(design, labels, rcond=None)[0]
    np.testing.assert_allclose(irls("gaussian", start)[0], solution, rtol=1e-10)


def test_newton_is_another_iteration_where_the_link_is_not_canonical():
    """The control: with the Hessian in place of the Fisher the probit iterates differ, the logistic ones agree."""
    for name, agrees in (("logistic", True), ("probit", False)):
        design, labels, start = data(name)
        x, y = torch.from_numpy(design[:, :D]), torch.from_numpy(labels)[:, None]
        likelihood, model = MODELS[name][0], linear(start)
        loss = likelihood.nll(model(x), y).mean()
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        newton = parameters(model) - ng.hessian(model, likelihood, x, y).solve(gradient, solver=ng.linalg.LU()).numpy()
        assert np.allclose(newton, irls(name, start)[0], rtol=1e-8, atol=1e-8) == agrees
