"""What is timed on a workload: torch's optimizers, natgrad's presets step by step, and single operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks.harness import Action, Row
from benchmarks.workloads import Flops, Workload, flops_of
from natgrad.metric import Fisher, Structure
from natgrad.metric.sampling import Share
from natgrad.network import Pass, Tape, division_of, recording, uncovered_parameters

SGD, ADAMW, GRADIENT, GEMM = "sgd", "adamw", "gradient", "matrix product"
CG_ITERATIONS = 10

Loop = Literal["plain", "labels", "closure"]


class Schedule:
    """A refresh schedule that is told what is due, so that each kind of step can be timed by itself.

    Stands in for ``ng.Refresh``; a true schedule mixes the kinds in fixed proportions.
    """

    def __init__(self) -> None:
        self.statistics = self.inverse = True

    def statistics_due(self, step: int) -> bool:
        return self.statistics

    def inverse_due(self, step: int) -> bool:
        return self.inverse


@dataclass(frozen=True)
class Preset:
    """A natgrad optimizer as it is timed.

    Args:
        build: makes it from model, likelihood and (where it has one) the refresh schedule.
        refreshes: the ``(statistics, inverse)`` intervals to report; empty where every step is alike.
        loop: how it is used: ``"plain"``, ``"labels"`` (given by ``observe``) or ``"closure"`` (measures the loss).
        flops: what ``(statistics, inverse, each step)`` need beyond the gradient.
        note: shown with its rows.
    """

    build: Callable[[nn.Module, Any, Any], torch.optim.Optimizer]
    refreshes: tuple[tuple[int, int], ...] = ()
    loop: Loop = "plain"
    flops: Callable[[Flops, Workload], tuple[float, float, float]] | None = None
    note: str = ""


def _kfac_flops(flops: Flops, workload: Workload) -> tuple[float, float, float]:
    return flops.inputs + flops.factors, flops.inverses, flops.precondition


def _fitted_kfac_flops(flops: Flops, workload: Workload) -> tuple[float, float, float]:
    statistics, inverse, each = _kfac_flops(flops, workload)
    return statistics, inverse, each + flops.fit


def _gram_flops(flops: Flops, workload: Workload) -> tuple[float, float, float]:
    return flops.inputs, 0.0, flops.gram(workload.x.shape[0]) + flops.fit


def _cg_flops(flops: Flops, workload: Workload) -> tuple[float, float, float]:
    # A forward pass and its pullback to linearise, then one product an iteration.
    return flops.gradient, 0.0, CG_ITERATIONS * flops.product


def _cg(iterations: int = CG_ITERATIONS) -> ng.linalg.CG:
    return ng.linalg.CG(tolerance=1e-30, max_iterations=iterations)


_CG_NOTE = f"{CG_ITERATIONS} CG iterations"


def _clipped(model: Any, likelihood: Any, refresh: Any, structure: Structure) -> ng.KFAC:
    """K-FAC whose step is clipped, without the fit."""
    return ng.KFAC(
        model, likelihood, lr=0.1, momentum=0.9, search=ng.KLClip(1e-3), refresh=refresh, structure=structure
    )


PRESETS: dict[str, Preset] = {
    "ngd": Preset(lambda m, p, r: ng.NGD(m, p)),
    "block": Preset(lambda m, p, r: ng.BlockNGD(m, p, refresh=r), ((1, 10),)),
    "gauss-newton": Preset(lambda m, p, r: ng.GaussNewton(m, p), loop="closure"),
    # Damped so that the Hessian is positive definite whatever the weights, and short: only its time is of interest.
    "newton": Preset(lambda m, p, r: ng.Newton(m, p, damping=10.0, lr=1e-3), loop="labels"),
    "kfac": Preset(lambda m, p, r: ng.KFAC(m, p, refresh=r), ((1, 10), (10, 10)), flops=_fitted_kfac_flops),
    "kfac-klclip": Preset(
        lambda m, p, r: _clipped(m, p, r, ng.Kronecker()),
        ((1, 10), (10, 10)),
        flops=_kfac_flops,
        note="length from the metric alone: no pass to measure it",
    ),
    "kfac-no-clip": Preset(
        lambda m, p, r: ng.KFAC(m, p, lr=1e-3, search=ng.LearningRate(predict=False), refresh=r),
        ((1, 10), (10, 10)),
        flops=_kfac_flops,
        note="nothing predicted: no product with the metric",
    ),
    "kfac-reduce": Preset(
        lambda m, p, r: ng.KFAC(m, p, structure=ng.Kronecker.reduce(), refresh=r), ((1, 10), (10, 10))
    ),
    "kfac-sampled": Preset(
        lambda m, p, r: _clipped(m, p, r, ng.Kronecker(sampling=ng.Sampling(1 / 16))),
        ((1, 10), (10, 10)),
        note="factors of a sixteenth of the positions",
    ),
    "kfac-sub-batch": Preset(
        lambda m, p, r: _clipped(m, p, r, ng.Kronecker(sampling=ng.SubBatch(1 / 8))),
        ((1, 10), (10, 10)),
        note="factors of an eighth of the examples, run by themselves",
    ),
    "ekfac": Preset(lambda m, p, r: ng.EKFAC(m, p, refresh=r), ((1, 10), (10, 10))),
    "diagonal": Preset(lambda m, p, r: ng.DiagonalNGD(m, p)),
    "gram": Preset(lambda m, p, r: ng.GramNGD(m, p), flops=_gram_flops),
    "hessian-free": Preset(
        lambda m, p, r: ng.HessianFree(m, p, solver=_cg()), loop="closure", flops=_cg_flops, note=_CG_NOTE
    ),
    "trust-region": Preset(lambda m, p, r: ng.TrustRegionNGD(m, p, solver=_cg()), flops=_cg_flops, note=_CG_NOTE),
}
TORCH: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    SGD: lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9),
    ADAMW: lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
}


@dataclass(frozen=True)
class Measured:
    """Actions to time together, and the rows to make of them."""

    actions: tuple[Action, ...]
    rows: tuple[Row, ...]

    def __add__(self, other: Measured) -> Measured:
        return Measured(self.actions + other.actions, self.rows + other.rows)


def training(workload: Workload, optimizer: Callable[[nn.Module], Any], loop: Loop = "plain") -> Callable[[], None]:
    """One step of a training loop on the workload's batch, with a model of its own."""
    model = workload.model()
    opt, x, y = optimizer(model), workload.x, workload.y

    def closure() -> tuple[Tensor, Tensor]:
        output = model(x)
        return workload.loss(output, y), output

    def step() -> None:
        opt.zero_grad()
        loss, output = closure()
        if loop == "labels":
            opt.observe(output, y)
        loss.backward()
        opt.step()

    return (lambda: opt.step(closure)) if loop == "closure" else step


def torch_contenders(workload: Workload) -> Measured:
    """SGD with momentum and fused AdamW."""
    gradient = flops_of(workload).gradient
    actions = tuple(Action(name, training(workload, build), gradient) for name, build in TORCH.items())
    return Measured(actions, tuple(Row(a.name, {a.name: 1.0}) for a in actions))


def preset_contender(workload: Workload, name: str) -> Measured:
    """One natgrad preset: an action per kind of step, a row per schedule."""
    preset, flops = PRESETS[name], flops_of(workload)
    schedule = Schedule()
    step = training(workload, lambda m: preset.build(m, workload.likelihood, schedule), preset.loop)
    statistics, inverse, each = preset.flops(flops, workload) if preset.flops is not None else (None, None, None)

    def kind(suffix: str, with_statistics: bool, with_inverse: bool) -> Action:
        def run() -> None:
            schedule.statistics, schedule.inverse = with_statistics, with_inverse
            step()

        needed = None
        if statistics is not None and inverse is not None and each is not None:
            needed = flops.gradient + each + statistics * with_statistics + inverse * with_inverse
        return Action(f"{name}{suffix}", run, needed)

    if not preset.refreshes:
        action = kind("", True, True)
        return Measured((action,), (Row(name, {name: 1.0}, preset.note),))
    # The step that renews everything comes first: it is what an optimizer's first step does.
    both, observe, plain = kind(" renew", True, True), kind(" observe", True, False), kind(" plain", False, False)
    actions = [both, observe] if all(t1 == 1 for t1, _ in preset.refreshes) else [both, observe, plain]
    rows = tuple(Row(f"{name} ({t1}, {t2})", _shares(name, t1, t2), preset.note) for t1, t2 in preset.refreshes)
    return Measured(tuple(actions), rows)


def _shares(name: str, statistics: int, inverse: int) -> dict[str, float]:
    """How often each kind of step happens under ``Refresh(statistics, inverse)``, ``inverse`` a multiple."""
    shares = {f"{name} renew": 1 / inverse, f"{name} observe": 1 / statistics - 1 / inverse}
    shares[f"{name} plain"] = 1 - 1 / statistics
    return {kind: share for kind, share in shares.items() if share > 0}


def cycle_contender(workload: Workload, name: str, interval: int) -> Measured:
    """A whole cycle of ``Refresh(1, interval)`` as the library itself schedules it: checks the sum of kinds."""
    preset = PRESETS[name]
    refresh = ng.Refresh(1, interval)
    step = training(workload, lambda m: preset.build(m, workload.likelihood, refresh), preset.loop)
    for _ in range(interval):
        step()  # beyond the first steps, in which inverses are renewed more often

    def cycle() -> None:
        for _ in range(interval):
            step()

    label = f"{name} cycle"
    return Measured((Action(label, cycle),), (Row(f"{name} (1, {interval}), whole cycle", {label: 1 / interval}),))


def _record(workload: Workload, model: nn.Module, x: Tensor) -> Tape:
    with recording(model) as tape:
        tape.output = model(x)
    return tape


def operations(workload: Workload) -> Measured:
    """One gradient, factor statistics on a recorded tape, and a product with the Gauss-Newton matrix."""
    flops, model = flops_of(workload), workload.model()
    parameters = list(model.parameters())

    def gradient() -> None:
        torch.autograd.grad(workload.loss(model(workload.x), workload.y), parameters)

    tape = _record(workload, model, workload.x)
    generator = torch.Generator().manual_seed(0)
    uncovered = uncovered_parameters(tape, generator)

    def statistics(metric: Fisher, target: Tensor | None) -> Callable[[], object]:
        partition = metric.partition(model, uncovered)
        return lambda: metric.statistics(tape, workload.likelihood, target, partition, generator=generator)

    sampled = statistics(Fisher(ng.MonteCarlo(), ng.Kronecker()), None)
    reduced = statistics(Fisher(ng.MonteCarlo(), ng.Kronecker.reduce()), None)
    operator = ng.fisher(model, workload.likelihood, workload.x, structure=ng.MatrixFree())
    vector = torch.randn(operator.shape[0], generator=generator)
    actions = [
        Action(GRADIENT, gradient, flops.gradient),
        Action("factor statistics", sampled, flops.inputs + flops.factors),
        Action("GGN-vector product", lambda: operator.matvec(vector), flops.product),
    ]
    if flops.attention:
        actions.insert(2, Action("factor statistics, reduce", reduced))
    return Measured(tuple(actions), tuple(Row(a.name, {a.name: 1.0}) for a in actions))


def statistics_alone(workload: Workload, structure: ng.Kronecker) -> Callable[[], object]:
    """Factor statistics on a recorded tape with sampled labels."""
    model, metric = workload.model(), Fisher(ng.MonteCarlo(), structure)
    tape, generator = _record(workload, model, workload.x), torch.Generator().manual_seed(0)
    partition = metric.partition(model, uncovered_parameters(tape, generator))

    def run() -> object:
        assert tape.model is model  # the tape itself holds the model weakly
        return metric.statistics(tape, workload.likelihood, None, partition, generator=generator)

    return run


def part_statistics(workload: Workload, sampling: ng.SubBatch) -> Callable[[], object]:
    """Factor statistics with sampled labels of picked examples, their forward pass included."""
    model, metric = workload.model(), Fisher(ng.MonteCarlo(), ng.Kronecker(sampling=sampling))
    observed, tape = Pass.begin(model, (workload.x,), {}), _record(workload, model, workload.x)
    generator = torch.Generator().manual_seed(0)
    partition, division = metric.partition(model, uncovered_parameters(tape, generator)), division_of(observed, tape)
    assert division is not None and tape.output is not None and not division.whole
    output = tape.output.detach()

    def run() -> object:
        index = sampling.picks(generator).of(len(output), output.device)
        assert index is not None
        part = division.part(observed, len(output), index)
        assert part is not None
        return metric.statistics(
            part.tape(), workload.likelihood, None, partition, generator=generator, share=Share(index, output)
        )

    return run


def gram_solve(workload: Workload) -> Measured:
    """Rows, Gram matrix and damped solve of one gradient on a recorded tape."""
    model, metric = workload.model(), Fisher(ng.MonteCarlo(), ng.Gram())
    tape = _record(workload, model, workload.x)
    generator = torch.Generator().manual_seed(0)
    partition = metric.partition(model)
    vector = torch.randn(partition.size, generator=generator)

    def solve() -> None:
        assert tape.model is model  # the tape itself holds the model weakly
        found = metric.statistics(tape, workload.likelihood, None, partition, generator=generator)
        metric.operators(partition, found)["*"].inverse(damping=1e-2).matvec(vector)

    flops = flops_of(workload)
    action = Action("gram solve alone", solve, flops.inputs + flops.gram(workload.x.shape[0]))
    return Measured((action,), (Row(action.name, {action.name: 1.0}, "sampled labels, Gram matrix, solve"),))


def matrix_product(workload: Workload) -> Action:
    """The workload's typical matrix product; what all else is measured against."""
    rows, inner, columns = workload.gemm
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    return Action(GEMM, lambda: left @ right, 2.0 * rows * inner * columns)


def contenders(workload: Workload, presets: Sequence[str]) -> Measured:
    """Torch's optimizers and the named presets."""
    found = torch_contenders(workload)
    for name in presets:
        found = found + preset_contender(workload, name)
    return found
