"""Random training set-ups with something wrong in them; a number gives always the same one.

To look at one: ``python tests/faults/fuzz_cases.py NUMBER`` prints what was drawn and what each step did.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import NatgradError
from natgrad.testing import zoo

STEPS = 3


def gamma(f: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Gamma(f[..., 0].exp(), f[..., 1].exp(), validate_args=False)


class Deep(nn.Module):
    """ReLU layers with batch norm and dropout."""

    def __init__(self, outputs: int, norm: bool) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.net = nn.Sequential(
            nn.Linear(3, 6), middle, nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


OWN: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda c: nn.Linear(3, c),
    "relu": lambda c: Deep(c, norm=False),
    "relu_norm": lambda c: Deep(c, norm=True),
    "wide": lambda c: nn.Sequential(nn.Linear(3, 40), nn.GELU(), nn.Linear(40, c)),
}
MODELS = (*zoo.NAMES, *OWN, *OWN)  # the small ones twice

LIKELIHOODS: dict[str, tuple[Callable[[], Any], int, str]] = {  # how to make it, outputs, kind of target
    "categorical": (ng.Categorical, 3, "label"),
    "bernoulli": (ng.Bernoulli, 2, "bit"),
    "gaussian": (lambda: ng.Gaussian(scale=0.7), 2, "real"),
    "gaussian_learned": (ng.Gaussian.learned, 4, "half"),
    "poisson": (ng.Poisson, 2, "count"),
    "gamma": (lambda: ng.FromDistribution(gamma), 2, "positive"),
    "ignoring": (lambda: ng.Weighted(ng.Categorical(), ignore_index=-100), 3, "ignored"),
    "smoothed": (lambda: ng.Weighted(ng.Categorical(), label_smoothing=0.1), 3, "label"),
    "class_weights": (lambda: ng.Weighted(ng.Categorical(), class_weights=torch.tensor([1.0, 0.0, 3.0])), 3, "label"),
    "masked": (lambda: ng.Weighted(ng.Gaussian()), 2, "pair"),
}
ESTIMATES: dict[str, Any] = {
    "exact": ng.Exact(),
    "sampled": ng.MonteCarlo(),
    "two_samples": ng.MonteCarlo(2),
    "empirical": ng.Empirical(),
    "signed": ng.Signed(),
}
STRUCTURES: dict[str, Any] = {
    "dense": ng.Dense(),
    "diagonal": ng.Diagonal(),
    "blocks": ng.BlockDiagonal(),
    "kfac": ng.Kronecker(),
    "kfac_reduce": ng.Kronecker.reduce(),
    "ekfac": ng.EigenKronecker(),
    "gram": ng.Gram(),
    "free": ng.MatrixFree(),
}
METRICS = ("fisher",) * 8 + ("hessian", "euclidean")
SEARCHES: dict[str, Any] = {
    "lr": ng.LearningRate(),
    "lr_blind": ng.LearningRate(predict=False),
    "clip": ng.KLClip(1e-2),
    "trust": ng.TrustRegion(1e-2),
    "armijo": ng.Armijo(),
    "fit": ng.QuadraticFit(),
    "fit_clip": ng.QuadraticFit(max_kl=0.1),
}
DAMPINGS: dict[str, Any] = {
    "usual": 1e-3,
    "tiny": 1e-12,
    "none": 0.0,
    "huge": 1e6,
    "proportional": ng.Proportional(1e-3),
    "factored": ng.FactoredTikhonov(1e-3),
    "marquardt": ng.LevenbergMarquardt(1e-2),
}
PRECISIONS = ("float32", "float32", "float64", "bfloat16", "float16", "autocast", "autocast_half")
FAULTS = (
    *("none",) * 4,
    *("nan input", "inf input", "constant input", "huge input", "enormous input", "tiny input", "half overflow"),
    *("nan target", "all ignored", "duplicated rows", "empty batch"),
    *("nan gradient", "inf gradient", "gradient 1e-20", "gradient 1e-38", "gradient 1e12", "gradient 1e20"),
    *("gradient 1e30", "gradient 1e37", "zero gradient", "missing gradient", "no gradient"),
    *("dead units", "zero head", "huge weights", "frozen layer"),
)
HARMLESS = {"none", "constant input", "tiny input", "duplicated rows", "dead units", "zero head", "frozen layer"}
HARMLESS |= {"zero gradient", "missing gradient", "no gradient", "gradient 1e-20", "gradient 1e-38", "gradient 1e12"}


@dataclass(frozen=True)
class Setup:
    """What was drawn for one number."""

    number: int
    model: str
    likelihood: str
    metric: str
    estimate: str
    structure: str
    search: str
    damping: str
    precision: str
    fault: str
    at: int  # the step at which the fault happens
    how: str  # loop, unobserved (without labels), closure, precondition
    batch: int
    passes: int
    momentum: float
    decay: float
    lr: float
    refresh: ng.Refresh


def draw(number: int) -> Setup:
    """The set-up of this number."""
    r = random.Random(number)
    fault = r.choice(FAULTS)
    likelihood = "ignoring" if fault == "all ignored" else r.choice(list(LIKELIHOODS))
    if fault == "nan target":
        likelihood = r.choice(["gaussian", "gaussian_learned", "poisson", "gamma", "bernoulli", "masked"])
    search = r.choice(list(SEARCHES))
    lr = r.choice([1e-3, 0.1, 1.0, math.inf])
    if lr == math.inf and search not in ("clip", "trust", "fit_clip"):
        lr = 0.5
    model, batch = r.choice(MODELS), r.choice([1, 2, 5, 5, 9, 16])
    if model in ("batch_norm_train", "relu_norm"):
        batch = max(batch, 2)  # torch's own rule
    if model == "attention" and fault == "empty batch":
        model = "linear"  # that one looks at its first example
    metric, estimate, structure = r.choice(METRICS), r.choice(list(ESTIMATES)), r.choice(list(STRUCTURES))
    if metric == "hessian" and r.random() < 0.9:  # now and then one that does not exist
        structure = r.choice(["dense", "diagonal", "blocks", "free"])
    damping = r.choice(list(DAMPINGS))
    if damping == "none" and r.random() < 0.7:  # most metrics of so few rows are singular
        damping = "usual"
    how = r.choice(["loop", "loop", "loop", "unobserved", "closure", "precondition"])
    labels = metric == "hessian" or estimate == "empirical" or search == "armijo" or damping == "marquardt"
    if how == "unobserved" and (labels or LIKELIHOODS[likelihood][2] in ("ignored", "pair")) and r.random() < 0.8:
        how = "loop"  # an error that asks for the labels is seen often enough
    if model == "batch_norm_eval":
        how = "closure"  # nothing else observes a model in evaluation mode
    return Setup(
        number,
        model=model,
        likelihood=likelihood,
        metric=metric,
        estimate=estimate,
        structure=structure,
        search=search,
        damping=damping,
        precision="autocast_half" if fault == "half overflow" else r.choice(PRECISIONS),
        fault=fault,
        at=r.randrange(STEPS),
        how=how,
        batch=batch,
        passes=r.choice([1, 1, 1, 2]),
        momentum=0.0 if search.startswith("fit") else r.choice([0.0, 0.9]),
        decay=r.choice([0.0, 0.0, 0.01]),
        lr=lr,
        refresh=r.choice([ng.Refresh(1, 1), ng.Refresh(1, 10), ng.Refresh(2, 3)]),
    )


class Run:
    """One set-up, ready to be stepped."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.random = setup, torch.Generator().manual_seed(setup.number)
        make, self.outputs, self.kind = LIKELIHOODS[setup.likelihood]
        self.likelihood = make()
        precision = setup.precision
        self.dtype = torch.float32 if precision.startswith("autocast") else getattr(torch, precision)
        self.casting: Any = {"autocast": torch.bfloat16, "autocast_half": torch.float16}.get(precision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.number)
            if setup.model in OWN:
                self.model, self.example, self.select = OWN[setup.model](self.outputs), torch.zeros(1, 3), None
            else:
                case = zoo.case(setup.model, self.outputs, seed=setup.number)
                self.model, self.example, self.select = case.model, case.x, case.select
        self.model.to(self.dtype)
        self._control()
        metric: Any = {
            "fisher": lambda: ng.Fisher(ESTIMATES[setup.estimate], STRUCTURES[setup.structure]),
            "hessian": lambda: ng.Hessian(STRUCTURES[setup.structure]),
            "euclidean": ng.Euclidean,
        }[setup.metric]()
        self.optimizer = ng.NaturalGradient(
            self.model,
            self.likelihood,
            lr=setup.lr,
            damping=DAMPINGS[setup.damping],
            momentum=setup.momentum,
            weight_decay=setup.decay,
            metric=metric,
            search=SEARCHES[setup.search],
            solver=ng.linalg.CG(tolerance=1e-2, max_iterations=8) if setup.structure == "free" else None,
            refresh=setup.refresh,
            seed=setup.number,
        )

    def _control(self) -> None:
        """Half precision only where torch itself can do the pass; otherwise float32."""
        if self.dtype not in (torch.float32, torch.float64) or self.casting is not None:
            try:
                f, y = self.forward(self.inputs(None))
                self.loss(f, y).backward()
            except (RuntimeError, NotImplementedError):
                self.dtype, self.casting = torch.float32, None
                self.model.float()
            self.model.zero_grad()

    # Data

    def inputs(self, fault: str | None) -> Any:
        n = 0 if fault == "empty batch" else self.setup.batch
        if isinstance(self.example, dict):
            return {k: self._tensor(v, n, fault) for k, v in self.example.items()}
        if isinstance(self.example, tuple):
            return tuple(self._tensor(v, n, fault) for v in self.example)
        return self._tensor(self.example, n, fault)

    def _tensor(self, like: Tensor, n: int, fault: str | None) -> Tensor:
        if not like.is_floating_point():
            rows = torch.randint(0, len(like), (n,), generator=self.random)
            return like[torch.zeros_like(rows) if fault == "duplicated rows" else rows]
        x = torch.randn(n, *like.shape[1:], generator=self.random, dtype=torch.float64)
        if fault in ("nan input", "inf input"):
            x.view(-1)[int(torch.randint(x.numel(), (), generator=self.random))] = float(fault[:3])
        scale = {"huge input": 1e10, "enormous input": 1e30, "tiny input": 1e-25, "half overflow": 1e5}
        if fault == "constant input":
            x = torch.full_like(x, float(torch.randint(2, (), generator=self.random)))
        if fault == "duplicated rows":
            x = x[:1].expand_as(x).clone()
        return (x * scale.get(fault or "", 1.0)).to(self.dtype)

    def target(self, f: Tensor, fault: str | None) -> Any:
        g, batch, shape = self.random, f.shape[:-1], f.shape
        if self.kind == "half":
            shape = (*batch, f.shape[-1] // 2)
        if self.kind in ("label", "ignored"):
            y = torch.randint(0, f.shape[-1], batch, generator=g)
            if self.kind == "ignored":
                y = torch.where(torch.rand(batch, generator=g) < 0.3, -100, y)
            y.view(-1)[:1] = 0  # at least one label that counts
            return torch.full_like(y, -100) if fault == "all ignored" else y
        noise = torch.randn(shape, generator=g, dtype=torch.float64)
        y = {
            "bit": lambda: (noise > 0).double(),
            "count": lambda: (3 * noise).abs().floor(),
            "positive": lambda: noise[..., 0].exp(),
        }.get(self.kind, lambda: noise)()
        if fault == "nan target":
            y = torch.where(torch.rand(y.shape, generator=g) < 0.6, math.nan, y)
        y = y.to(torch.promote_types(self.dtype, torch.float32))
        return (y, torch.rand(batch, generator=g)) if self.kind == "pair" else y

    def forward(self, x: Any, fault: str | None = None) -> tuple[Tensor, Any]:
        context = contextlib.nullcontext() if self.casting is None else torch.autocast("cpu", self.casting)
        with context:
            raw = self.model(**x) if isinstance(x, dict) else self.model(*(x if isinstance(x, tuple) else (x,)))
            f = raw if self.select is None else self.select(raw)
        return f, self.target(f, fault)

    def loss(self, f: Tensor, y: Any) -> Tensor:
        """Torch's own losses where there is one."""
        like: Any = self.likelihood
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        if self.kind in ("label", "ignored"):
            weight = getattr(like, "class_weights", None)
            return F.cross_entropy(
                f.flatten(0, -2),
                y.flatten(),
                None if weight is None else weight.to(f.dtype),
                label_smoothing=getattr(like, "label_smoothing", 0.0),
            )
        nll = like.nll(f, y)
        return nll.sum() / y[1].sum() if isinstance(y, tuple) else nll.mean()

    # Steps

    def damage(self, fault: str | None) -> None:
        """What happens to the model itself."""
        parameters = list(self.model.parameters())
        with torch.no_grad():
            if fault == "dead units":
                parameters[0].zero_()
            if fault == "zero head":
                for p in parameters[-2:]:
                    p.zero_()
            if fault == "huge weights":
                parameters[-1].mul_(min(1e15, 1e-3 * torch.finfo(self.dtype).max))
        if fault == "frozen layer":
            parameters[0].requires_grad_(False)
            parameters[0].grad = None

    def hurt_gradients(self, fault: str | None) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        for p in parameters:
            if fault is not None and fault.startswith("gradient"):
                p.grad.mul_(float(fault.split()[1]))
            if fault == "zero gradient":
                p.grad.zero_()
            if fault == "no gradient":
                p.grad = None
        if fault in ("nan gradient", "inf gradient"):
            parameters[-1].grad.view(-1)[0] = float(fault[:3])
        if fault == "missing gradient":
            parameters[0].grad = None

    def step(self, i: int) -> None:
        """One training step, as a user's loop would do it."""
        fault = self.setup.fault if i == self.setup.at else None
        if self.setup.how == "closure":
            x = self.inputs(fault)
            mark = self.random.get_state()

            def closure() -> tuple[Tensor, Tensor, Any]:
                self.random.set_state(mark)
                f, y = self.forward(x, fault)
                return self.loss(f, y) * _factor(fault), f, y

            self.optimizer.step(closure)
            return
        self.optimizer.zero_grad()
        for _ in range(self.setup.passes):
            f, y = self.forward(self.inputs(fault), fault)
            if self.setup.how != "unobserved":
                self.optimizer.observe(f, y)
            (self.loss(f, y) / self.setup.passes).backward()
        self.hurt_gradients(fault)
        grads = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        if self.setup.how == "precondition":
            self.optimizer.precondition_()
            grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            assert all(bool(torch.isfinite(g).all()) for g in grads.values()), "precondition_ left a gradient of NaN"
        else:
            bad = not all(bool(torch.isfinite(g).all()) for g in grads.values())
            before, kept = self.parameters(), self.averages()
            self.optimizer.step()
            after = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            assert _same(after, grads), "step() changed a gradient"
            assert _same(dict(self.model.named_buffers()), buffers), "step() changed a buffer"
            if bad:
                assert _same(self.parameters(), before), "a gradient that is not finite moved the model"
                new = self.averages()
                entered = [n for n, v in new.items() if not torch.equal(v, kept.get(n, torch.zeros_like(v)))]
                assert not entered, f"a gradient that is not finite entered {entered}"

    def parameters(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        names = {p: n for n, p in self.model.named_parameters()}
        return {
            f"{names[p]}|{k}": v.clone()
            for p, slot in self.optimizer.state.items()
            for k, v in slot.items()
            if isinstance(v, Tensor)
        }

    def averages(self) -> dict[str, Tensor]:
        """All but EKFAC's eigenvalues, which are expressed in another basis whenever that is renewed."""
        kinds = ("average.", "weight.", "momentum")
        found = {n: v for n, v in self.state().items() if n.split("|")[1].startswith(kinds)}
        return {n: v for n, v in found.items() if not n.endswith("eigenvalues")}

    def judged(self, i: int) -> str:
        """Step, and hold it to the promises; what became of it."""
        before = None
        try:
            fault = self.setup.fault if i == self.setup.at else None
            self.damage(fault)
            before = self.parameters()
            self.step(i)
            last = self.optimizer.last
            moved = not _same(self.parameters(), before)
            if moved:
                outcome = "stepped"
                assert last is not None and bool(last.accepted), "a step that was not accepted moved the model"
            else:
                outcome = "still" if last is None or bool(last.accepted) else f"rejected: {last.reason}"
        except NatgradError as error:
            outcome = f"{type(error).__name__}: {error}"
            assert len(str(error)) > 30, f"an error without a message: {error!r}"
            assert before is not None and _same(self.parameters(), before), f"an error moved the model: {error}"
        for name, value in {**self.parameters(), **self.state()}.items():
            assert bool(torch.isfinite(value).all()), f"{name} is not finite after step {i} ({outcome})"
        for p in self.model.parameters():
            if self.setup.fault == "frozen layer" and i > self.setup.at:
                p.requires_grad_(True)
        return outcome


def _factor(fault: str | None) -> float:
    if fault is None or "gradient" not in fault:
        return 1.0
    known = {"nan gradient": math.nan, "inf gradient": math.inf, "zero gradient": 0.0}
    return known.get(fault, float(fault.split()[1]) if fault.startswith("gradient") else 1.0)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v.nan_to_num(), b[n].nan_to_num()) for n, v in a.items())


def excused(setup: Setup, error: str) -> bool:
    """Whether a set-up whose numbers are all harmless may end in this error."""
    labels = setup.how == "unobserved" or setup.model == "batch_norm_eval"
    if error.startswith(("NotObservedError", "ArgumentError: Armijo compares")):
        return labels
    if error.startswith("NonFiniteError: The Fisher matrix of Gamma"):
        return True  # a shape of exp(1000): the user's own distribution overflowed
    if setup.metric == "hessian" and "half" in setup.precision and setup.model == "relu_norm":
        # BatchNorm of two nearly equal rows: its second derivative, 1/σ³, is beyond float16.
        return error.startswith(("NonFiniteError", "NotPositiveDefiniteError", "ConvergenceError"))
    if setup.metric == "hessian":  # indefinite, or not defined for the structure
        return error.startswith(("NotPositiveDefiniteError", "UnsupportedError: A Hessian", "ConvergenceError"))
    if setup.damping in ("none", "tiny"):  # fewer rows than parameters
        return error.startswith(("NotPositiveDefinite", "ArgumentError: A matrix of rank", "Convergence", "NonFinite"))
    return False


def run(number: int) -> tuple[Setup, list[str]]:
    """Take the steps of one set-up.

    Raises:
        AssertionError: a promise was broken; the message names the number and the set-up.
    """
    setup = draw(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of half precision and of what it deprecates
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", message="The curvature of .* could not be inverted", category=RuntimeWarning)
        outcomes: list[str] = []
        try:
            try:
                one = Run(setup)
            except NatgradError as error:
                return setup, [f"{type(error).__name__}: {error}"]
            for i in range(STEPS):
                outcomes.append(one.judged(i))
                harmless = setup.fault in HARMLESS or i < setup.at
                error = outcomes[-1].split(":")[0].endswith("Error")
                assert not (harmless and error) or excused(setup, outcomes[-1]), "an error of harmless numbers"
        except Exception as error:
            text = f"case {number}, step {len(outcomes)}: {type(error).__name__}: {error}\n{setup}\nso far: {outcomes}"
            raise AssertionError(text) from error
    return setup, outcomes


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        drawn, became = run(int(argument))
        print(drawn, *became, sep="\n  ")
