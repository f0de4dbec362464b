"""Training runs under gradients that were made to hurt, with every step's KL measured here and not by natgrad."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.testing import families

KL = Callable[[Tensor, Tensor], Tensor]
ROWS, HELD_OUT, RENEWED = 8, 64, 25


@dataclass(frozen=True)
class Setting:
    """One run: a model, an output distribution and an optimizer with a hard radius."""

    seed: int
    model: str
    likelihood: str
    structure: str
    max_kl: float
    damping: Any
    momentum: float
    decay: float
    dtype: torch.dtype
    labelled: bool  # whether natgrad is told the labels, without which it knows no loss
    closure: bool  # whether a closure evaluates the model, which natgrad calls again to measure
    mixed: bool  # whether the model runs in bfloat16 by autocast


@dataclass(frozen=True)
class Taken:
    """What one step did: the KL that natgrad reports, and ours on the observed batch and on other rows like it."""

    attack: str
    lr: float
    moved: bool
    accepted: bool
    reported: float
    observed: float
    held_out: float
    setting: Setting

    @property
    def excess(self) -> float:
        """KL on the observed batch, as a multiple of the radius."""
        return self.observed / self.setting.max_kl


LIKELIHOODS: dict[str, tuple[Callable[[], Any], KL]] = {
    "categorical": (ng.Categorical, families.categorical().kl),
    "bernoulli": (ng.Bernoulli, families.bernoulli().kl),
    "gaussian": (lambda: ng.Gaussian(scale=0.5), families.gaussian(0.5).kl),
}
STRUCTURES: dict[str, Any] = {
    "dense": ng.Fisher(ng.Exact(), ng.Dense()),
    "kfac": ng.Fisher(),
    "diagonal": ng.Fisher(ng.MonteCarlo(), ng.Diagonal()),
    "gram": ng.Fisher(ng.Exact(), ng.Gram()),
    "free": ng.Fisher(ng.Exact(), ng.MatrixFree()),
    "euclidean": ng.Euclidean(),
}
DAMPINGS = (1e-12, 1e-6, 1e-3, 0.1, 1e3, 1e9, ng.LevenbergMarquardt(0.1), ng.Proportional(1e-2))
LRS = (1e-3, 0.1, 1.0, 1e6, math.inf, math.inf)
ATTACKS = ("none", "spike", "flip", "flipped spike", "random", "one entry", "noise", "tiny", "scattered")


def settings(count: int) -> list[Setting]:
    """The first ``count`` settings: every structure, model, likelihood and radius in turn, the rest at random."""
    out = []
    for i in range(count):
        r = random.Random(i)
        damping = r.choice(DAMPINGS)
        mixed = i % 5 == 4
        out.append(
            Setting(
                seed=i,
                model=("plain", "dropout", "norm")[i // 6 % 3],
                likelihood=list(LIKELIHOODS)[i // 2 % 3],
                structure=list(STRUCTURES)[i % 6],
                max_kl=(1e-2, 1e-4, 1.0, 1e-3)[i % 4],
                damping=damping,
                momentum=r.choice([0.0, 0.9]),
                decay=r.choice([0.0, 0.1]),
                dtype=torch.float32 if mixed else r.choice([torch.float64, torch.float64, torch.float32]),
                labelled=isinstance(damping, ng.LevenbergMarquardt) or r.random() < 0.2,
                closure=i % 3 == 1 or i % 10 == 9,
                mixed=mixed,
            )
        )
    return out


def build(setting: Setting, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * setting.seed + seed)
        middle: dict[str, nn.Module] = {"dropout": nn.Dropout(0.3), "norm": nn.BatchNorm1d(4), "plain": nn.Identity()}
        return nn.Sequential(nn.Linear(3, 4), middle[setting.model], nn.Tanh(), nn.Linear(4, 3)).to(setting.dtype)


def labels(f: Tensor, kind: str, noise: bool, generator: torch.Generator) -> Tensor:
    """Labels that the first input's sign and the batch's order explain, or pure noise."""
    n, c = f.shape
    if kind == "categorical":
        return torch.randint(c, (n,), generator=generator) if noise else torch.arange(n) % c
    y = torch.randn(n, c, generator=generator, dtype=f.dtype) * (100.0 if noise else 1.0)
    return (y > 0).to(f.dtype) if kind == "bernoulli" else y


def attack(kind: str, parameters: list[nn.Parameter], generator: torch.Generator, first: bool = True) -> None:
    """Change the gradients in place; ``first``: whether those of the model's first parameter are among them."""

    def randn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    for p in parameters:
        assert p.grad is not None
        if kind in ("spike", "flipped spike"):
            p.grad.mul_(-1e12 if "flipped" in kind else 1e12)
        if kind == "flip":
            p.grad.neg_()
        if kind == "random":
            p.grad.copy_(randn(p.grad) * 10.0 ** float(6 * torch.randn((), generator=generator)))
        if kind == "tiny":
            p.grad.mul_(1e-12)
        if kind == "scattered":  # neighbouring entries that are powers of ten apart
            p.grad.mul_(10.0 ** (4 * randn(p.grad)))
    if kind == "one entry" and first:
        parameters[0].grad.view(-1)[0] = 1e12


def run(setting: Setting, steps: int, search: Any = None) -> Iterator[Taken]:
    """Take ``steps`` steps; a new model every so often, so that saturated ones do not fill the run."""
    generator, r = torch.Generator().manual_seed(setting.seed), random.Random(setting.seed)
    make, kl = LIKELIHOODS[setting.likelihood]
    model: Any = None
    optimizer: Any = None
    for i in range(steps):
        if i % RENEWED == 0:
            model = build(setting, i)
            optimizer = ng.NaturalGradient(
                model,
                make(),
                metric=STRUCTURES[setting.structure],
                damping=setting.damping,
                momentum=setting.momentum,
                weight_decay=setting.decay,
                # A closure tells the loss, which most attacks would raise: only the radius is judged there.
                search=search or ng.TrustRegion(setting.max_kl, require_improvement=not setting.closure),
                refresh=ng.Refresh(1, 3),
            )
        kind, lr = r.choice(ATTACKS), r.choice(LRS)
        for group in optimizer.param_groups:
            group["lr"] = lr if search is None else min(lr, 1.0)
        x = torch.randn(ROWS + HELD_OUT, 3, generator=generator, dtype=setting.dtype)
        yield _step(setting, model, optimizer, kl, kind, lr, x, generator)


def _step(
    setting: Setting,
    model: nn.Sequential,
    optimizer: Any,
    kl: KL,
    kind: str,
    lr: float,
    x: Tensor,
    generator: torch.Generator,
) -> Taken:
    seen, others = x[:ROWS], x[ROWS:]
    parameters = list(model.parameters())
    unseen = _evaluated(setting, model, others)
    mark = torch.get_rng_state()
    before = [p.detach().clone() for p in parameters]
    passes: list[tuple[Tensor, Tensor]] = []

    def evaluate() -> tuple[Tensor, ...]:
        with _precision(setting):
            output = model(seen)
        if not passes:
            passes.append((output.detach(), labels(output.detach(), setting.likelihood, kind == "noise", generator)))
        y = passes[0][1]
        loss = optimizer.likelihood.nll(output, y).mean()
        return (loss, output, y) if setting.labelled else (loss, output)

    if setting.closure:
        handles = [
            p.register_post_accumulate_grad_hook(lambda p, first=i == 0: attack(kind, [p], generator, first))
            for i, p in enumerate(parameters)
        ]
        optimizer.step(evaluate)
        for handle in handles:
            handle.remove()
    else:
        loss, output, *y = evaluate()
        if setting.labelled:
            optimizer.observe(output, *y)  # the loss is then known, too, and has to fall
        optimizer.zero_grad()
        loss.backward()
        attack(kind, parameters, generator)
        optimizer.step()
    old = passes[0][0]
    last = optimizer.last
    moved = not all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    return Taken(
        attack=kind,
        lr=lr,
        moved=moved,
        accepted=last is not None and bool(last.accepted),
        reported=float(getattr(last, "kl_measured", None) or 0.0),
        observed=_mean(kl, old, _again(setting, model, seen, mark)),
        held_out=_mean(kl, unseen, _evaluated(setting, model, others)),
        setting=setting,
    )


def _precision(setting: Setting) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=setting.mixed)


def _again(setting: Setting, model: nn.Module, x: Tensor, mark: Tensor) -> Tensor:
    """The same training pass at the present parameters: the same dropout masks, batch norm's averages put back."""
    now, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    torch.set_rng_state(mark)
    with torch.no_grad(), _precision(setting):
        out = model(x)
    torch.set_rng_state(now)
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    return out


def _evaluated(setting: Setting, model: nn.Module, x: Tensor) -> Tensor:
    """In evaluation mode, as a user would run it on new data."""
    model.eval()
    with torch.no_grad(), _precision(setting):
        out = model(x)
    model.train()
    return out


def _mean(kl: KL, old: Tensor, new: Tensor) -> float:
    return float(kl(old.double(), new.double()).mean())
