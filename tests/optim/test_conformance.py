"""check_optimizer on every preset, on metrics, searches and solvers beside them, and on optimizers with defects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import natgrad as ng
from natgrad.linalg import CG, NewtonSchulz
from natgrad.testing import optimizers as laws
from natgrad.testing.optimizers import CLASSIFICATION, REGRESSION, check_optimizer

EXACT_FREE = ng.Fisher(ng.Exact(), ng.MatrixFree())
EXACT_KFAC = ng.Fisher(ng.Exact(), ng.Kronecker())

# name: (class, options, what to tell check_optimizer)
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ngd": (ng.NGD, {"lr": 0.1}, {}),
    "diagonal": (ng.DiagonalNGD, {}, {}),
    "diagonal_exact": (ng.DiagonalNGD, {"estimate": ng.Exact()}, {}),
    "block": (ng.BlockNGD, {}, {}),
    "block_exact": (ng.BlockNGD, {"estimate": ng.Exact()}, {}),
    "kfac": (ng.KFAC, {}, {}),
    "kfac_exact": (ng.KFAC, {"estimate": ng.Exact(), "structure": ng.Kronecker.reduce()}, {}),
    "kfac_empirical": (ng.KFAC, {"estimate": ng.Empirical()}, {"observe": True}),
    "adaptive_kfac": (  # on whole batches: parts that are picked at random do not accumulate to those of the whole
        ng.AdaptiveKFAC,
        {"structure": ng.Kronecker(), "search": ng.QuadraticFit()},
        {"observe": True},
    ),
    "ekfac": (ng.EKFAC, {}, {"sampled": True}),
    "ekfac_exact": (ng.EKFAC, {"estimate": ng.Exact()}, {}),
    "gram": (ng.GramNGD, {}, {}),
    "gram_exact": (ng.GramNGD, {"estimate": ng.Exact()}, {}),
    "hessian_free": (ng.HessianFree, {"solver": CG(tolerance=1e-12, max_iterations=200)}, {"observe": True}),
    "gauss_newton": (ng.GaussNewton, {}, {"observe": True}),
    "newton": (ng.Newton, {"damping": 1e3}, {"observe": True}),
    "trust_region": (ng.TrustRegionNGD, {"lr": 1.0, "solver": CG(tolerance=1e-12, max_iterations=200)}, {}),
    "trust_region_infinite": (ng.TrustRegionNGD, {}, {"scheduled": False, "tolerance": 1e-4}),
    "trust_region_labels": (ng.TrustRegionNGD, {"structure": ng.Gram()}, {"scheduled": False, "observe": True}),
    "quadratic_fit": (
        ng.NaturalGradient,
        {"metric": EXACT_KFAC, "search": ng.QuadraticFit(max_kl=0.1)},
        {},
    ),
    "levenberg_marquardt": (
        ng.NaturalGradient,
        {"metric": EXACT_KFAC, "damping": ng.LevenbergMarquardt(ng.FactoredTikhonov(1e-2)), "lr": 0.3},
        {"observe": True},
    ),
    "proportional": (ng.NaturalGradient, {"metric": EXACT_KFAC, "damping": ng.Proportional(0.1), "lr": 0.1}, {}),
    "rare_refresh": (
        ng.NaturalGradient,
        {"metric": EXACT_KFAC, "refresh": ng.Refresh(3, 5), "lr": 0.1, "momentum": 0.9},
        {},
    ),
    "signed": (ng.NaturalGradient, {"metric": ng.Fisher(ng.Signed(), ng.Dense()), "lr": 0.1}, {"sampled": True}),
    "euclidean": (ng.NaturalGradient, {"metric": ng.Euclidean(), "lr": 0.1, "momentum": 0.9}, {}),
    "cg": (ng.NaturalGradient, {"metric": EXACT_KFAC, "solver": CG(tolerance=1e-13), "lr": 0.1}, {}),
    "newton_schulz": (ng.NaturalGradient, {"metric": EXACT_KFAC, "solver": NewtonSchulz(), "lr": 0.1}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_classification(name):
    kind, options, laws = CASES[name]
    check_optimizer(lambda model: kind(model, ng.Categorical(), **options), problem=CLASSIFICATION, **laws)


@pytest.mark.parametrize("name", ["kfac", "gram_exact", "trust_region_labels"])
def test_regression(name):
    kind, options, laws = CASES[name]
    laws = laws | {"sampled": name == "kfac"}  # torch draws normal numbers of a batch otherwise than of its parts
    check_optimizer(lambda model: kind(model, ng.Gaussian(), **options), problem=REGRESSION, **laws)


class _Broken(ng.NaturalGradient):
    """SGD with one defect."""

    def __init__(self, model: nn.Module, defect: str) -> None:
        self._seen = 0
        super().__init__(model, ng.Categorical(), lr=0.1, metric=ng.Euclidean())
        self._net, self._defect = model, defect
        self._scale = 0.0
        if defect == "counts every pass":
            model.register_forward_hook(lambda *_: self._count())
        if defect == "normalises":  # looks at the gradient of the output, which the loss scale multiplies
            model[-1].register_full_backward_hook(self._look)

    def _look(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._scale = float(outputs[0].norm())

    def _count(self) -> None:
        self._seen += 1

    @torch.no_grad()
    def step(self, closure=None):
        p = next(self._net.parameters())
        if self._defect == "decays":
            p.mul_(0.9)
        if self._defect == "lets NaN through" and p.grad is not None:
            p.sub_(p.grad)
        if self._defect == "draws":
            torch.randn(1)
        if self._defect == "clips in place" and p.grad is not None:
            p.grad.mul_(0.5)
        if self._defect == "runs the model":
            with torch.random.fork_rng():
                self._net(torch.ones(3, 4, dtype=torch.float64))
        if self._defect == "normalises":
            p.mul_(1 - 1e-3 * self._scale)
        if self._defect == "counts every pass as a batch":
            p.grad.mul_(1 + len(self._observer.observations))  # type: ignore[union-attr]
        if self._defect == "takes a fixed step":
            p.sub_(0.1)
        if self._defect == "counts steps" and p.grad is not None:
            self._seen += 1
            p.sub_(0.1 * self._seen * p.grad.nan_to_num(0, 0, 0) * self.param_groups[0]["lr"])
        if self._defect == "counts every pass" and p.grad is not None:
            p.sub_(0.01 * self._seen * p.grad.nan_to_num(0, 0, 0) * self.param_groups[0]["lr"])
        super().step()


DEFECTS = {
    "decays": (laws.check_no_change, "zero gradients"),
    "lets NaN through": (laws.check_bad_numbers, "nan in the gradients"),
    "draws": (laws.check_no_side_effects, "random stream"),
    "clips in place": (laws.check_no_side_effects, ".grad"),
    "runs the model": (laws.check_no_side_effects, "buffers"),
    "counts every pass": (laws.check_ignored_passes, "passes"),
    "counts steps": (laws.check_resume, "to the bit"),
    "normalises": (lambda trial: laws.check_loss_scale(trial, 1e-9), "times a constant"),
    "takes a fixed step": (laws.check_schedulers, "learning rate"),
    "counts every pass as a batch": (lambda trial: laws.check_accumulation(trial, 1e-9), "micro-batches"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_check_finds_defects(defect):
    check, message = DEFECTS[defect]
    with pytest.raises(AssertionError, match=message):
        check(laws._Trial(lambda model: _Broken(model, defect), CLASSIFICATION, observe=False))
