"""The project's speed targets, each measured and held against its bound: ``python benchmarks/targets.py``.

A target is a number made of the times of actions in one block (all of a group run in every block, in random order).
Printed are its median over blocks with the 95 % bootstrap interval, the bound, and by how much it is missed. K-FAC here
is ``KFAC`` without a search (``LearningRate(predict=False)``): the cost of curvature alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import natgrad as ng
from benchmarks import contenders as c
from benchmarks import memory
from benchmarks.harness import Action, Clock, Plan, measure
from benchmarks.workloads import Workload, autoencoder, transformer
from natgrad.network import recording

Seconds = Mapping[str, float]
_RESAMPLES = 1000
_W1, _W2 = 1 / 4, 1 / 16  # parts of the batch that factors come from


@dataclass(frozen=True)
class Target:
    """A number that must not exceed a bound.

    Args:
        number: of the list in the project's issue.
        what: in words.
        bound: the most it may be.
        value: the number, from the seconds of actions in one block.
    """

    number: int
    what: str
    bound: float
    value: Callable[[Seconds], float]


@dataclass(frozen=True)
class Outcome:
    """A target as measured; without an interval where it is counted and not timed."""

    number: int
    what: str
    bound: float
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        spread = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        excess = f" by {100 * (self.value / self.bound - 1):.0f} %" if self.bound else ""
        verdict = "met" if self.value <= self.bound else f"MISSED{excess}"
        return f"{self.number}. {self.what:<78} {self.value:7.3f}{spread:<15} target {self.bound:g}: {verdict}"


def outcomes(targets: list[Target], actions: list[Action], plan: Plan, seed: int = 0) -> list[Outcome]:
    """Time the actions together, and say what became of the targets."""
    samples = measure(actions, plan, tuple(a.name for a in actions), seed)
    blocks = [{a.name: samples.seconds[a.name][i] for a in actions} for i in range(plan.blocks)]
    draw, found = random.Random(seed), []
    for target in targets:
        values = [target.value(block) for block in blocks]
        medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
        low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]
        found.append(Outcome(target.number, target.what, target.bound, statistics.median(values), low, high))
    return found


def _kfac(
    workload: Workload, name: str, preset: Callable[..., ng.NaturalGradient], structure: object, loop: c.Loop = "plain"
) -> tuple[list[Action], Callable[..., float]]:
    """Steps of each kind, and seconds per step under ``Refresh(statistics, inverse)``."""
    schedule = c.Schedule()
    step = c.training(
        workload,
        lambda m: preset(
            m, workload.likelihood, lr=1e-3, search=ng.LearningRate(predict=False), structure=structure,
            refresh=schedule,
        ),
        loop,
    )  # fmt: skip

    def kind(with_statistics: bool, with_inverse: bool) -> Callable[[], None]:
        def run() -> None:
            schedule.statistics, schedule.inverse = with_statistics, with_inverse
            step()

        return run

    actions = [
        Action(f"{name} renew", kind(True, True)),
        Action(f"{name} observe", kind(True, False)),
        Action(f"{name} plain", kind(False, False)),
    ]

    def seconds(block: Seconds, t1: int, t2: int) -> float:
        return sum(share * block[kind] for kind, share in c._shares(name, t1, t2).items())

    return actions, seconds


def _empirical_kfac(*args: object, **kwargs: object) -> ng.KFAC:
    return ng.KFAC(*args, estimate=ng.Empirical(), **kwargs)  # type: ignore[arg-type]


def autoencoder_targets(quick: bool) -> tuple[list[Target], list[Action]]:
    """1, 3, 5: the autoencoder at batch 1000."""
    workload = autoencoder(width=2, batch=250) if quick else autoencoder()
    kfac, per_step = _kfac(workload, "kfac", ng.KFAC, ng.Kronecker(sampling=ng.Sampling(_W1)))
    part, per_part = _kfac(workload, "part", ng.KFAC, ng.Kronecker(sampling=ng.SubBatch(_W1)))
    loss, per_loss = _kfac(workload, "loss", _empirical_kfac, ng.Kronecker(), "labels")
    whole, per_whole = _kfac(workload, "whole", ng.KFAC, ng.Kronecker())
    model = workload.model()
    operator = ng.fisher(model, workload.likelihood, workload.x, structure=ng.MatrixFree())
    vector = torch.randn(operator.shape[0])
    solver = c._cg()
    cg = Action("cg", lambda: operator.solve(vector, damping=0.1, solver=solver))
    sampled = c.statistics_alone(workload, ng.Kronecker(sampling=ng.Sampling(_W1)))
    part_alone = c.part_statistics(workload, ng.SubBatch(_W1))
    actions = [
        *c.torch_contenders(workload).actions, *kfac, *part, *loss, *whole, *c.operations(workload).actions,
        Action("sampled statistics", sampled), Action("part statistics", part_alone), cg,
    ]  # fmt: skip
    return [
        Target(1, "K-FAC, factors of a quarter at every step, inverses every 10th / SGD (W1)", 2.3,
               lambda s: per_step(s, 1, 10) / s[c.SGD]),
        Target(1, "… with a quarter of the examples, run by themselves", 2.3, lambda s: per_part(s, 1, 10) / s[c.SGD]),
        Target(1, "… of the whole batch, by the empirical estimate", 2.3, lambda s: per_loss(s, 1, 10) / s[c.SGD]),
        Target(1, "… with factors of the whole batch", 2.3, lambda s: per_whole(s, 1, 10) / s[c.SGD]),
        Target(1, "K-FAC (10, 10) / SGD (W1)", 1.75, lambda s: per_step(s, 10, 10) / s[c.SGD]),
        Target(1, "… with factors of the whole batch", 1.75, lambda s: per_whole(s, 10, 10) / s[c.SGD]),
        Target(3, "factor statistics of a quarter, sampled labels / gradient (W1)", 0.6,
               lambda s: s["sampled statistics"] / s[c.GRADIENT]),
        Target(3, "… of a quarter of the examples, run by themselves", 0.6,
               lambda s: s["part statistics"] / s[c.GRADIENT]),
        Target(3, "… of the whole batch, by the empirical estimate (a step's excess over one without)", 0.6,
               lambda s: (s["loss observe"] - s["loss plain"]) / s[c.GRADIENT]),
        Target(3, "… of the whole batch", 0.6, lambda s: s["factor statistics"] / s[c.GRADIENT]),
        Target(5, "product with the GGN / gradient (W1)", 2.0, lambda s: s["GGN-vector product"] / s[c.GRADIENT]),
        Target(5, "ten CG iterations / gradient (W1)", 18.0, lambda s: s["cg"] / s[c.GRADIENT]),
    ], actions  # fmt: skip


def transformer_targets(quick: bool) -> tuple[list[Target], list[Action]]:
    """2: the transformer, a sixteenth of the tokens."""
    workload = transformer(tokens=1024, length=128, width=64, depth=2) if quick else transformer()
    sampling = ng.Sampling(_W2)
    kfac, per_step = _kfac(workload, "kfac", ng.KFAC, ng.Kronecker(sampling=sampling))
    ekfac, per_corrected = _kfac(workload, "ekfac", ng.EKFAC, ng.EigenKronecker(sampling=sampling))
    actions = [*c.torch_contenders(workload).actions, *kfac, *ekfac]
    return [
        Target(2, "K-FAC (10, 10), 1/16 of the tokens / fused AdamW (W2)", 1.15,
               lambda s: per_step(s, 10, 10) / s[c.ADAMW]),
        Target(2, "EKFAC (10, 10), 1/16 of the tokens / fused AdamW (W2)", 1.25,
               lambda s: per_corrected(s, 10, 10) / s[c.ADAMW]),
    ], actions  # fmt: skip


def gram_targets(quick: bool) -> tuple[list[Target], list[Action]]:
    """4: the exact natural gradient at batch 512."""
    workload = autoencoder(width=2, batch=128) if quick else autoencoder(batch=512)
    step = c.training(
        workload, lambda m: ng.GramNGD(m, workload.likelihood, lr=1e-3, search=ng.LearningRate(predict=False))
    )
    target = Target(4, "Gram step at batch 512 / SGD (W1)", 2.4, lambda s: s["gram"] / s[c.SGD])
    return [target], [*c.torch_contenders(workload).actions, Action("gram", step)]


def basis_targets(quick: bool) -> tuple[list[Target], list[Action]]:
    """6: renewing the eigenbases of the autoencoder's factors after a batch that is new, beside their eigh."""
    workload = autoencoder(width=2, batch=250) if quick else autoencoder()
    structure = ng.EigenKronecker()
    metric, model = ng.Fisher(structure=structure), workload.model()
    partition, generator = metric.partition(model), torch.Generator().manual_seed(0)
    from natgrad.metric.eigenbasis import completed

    parts = []
    for shift in range(0, 20, 5):  # other images, of the same kind
        with recording(model) as tape:
            tape.output = model(workload.x.roll(shift, 1))
        parts.append(metric.statistics(tape, workload.likelihood, None, partition, generator=generator))
    old = completed(parts[0] + parts[1] + parts[2])  # type: ignore[operator, arg-type]
    new = completed(old + parts[3])  # type: ignore[operator, arg-type]
    means, bases = new.means(), old.bases
    factors = [kinds[side] for kinds in means.values() for side in ("input", "output")]
    followed, kept = (ng.EigenKronecker(basis=ng.CholeskyQR(tolerance)) for tolerance in (0.0, 0.99))
    return [
        Target(6, "renewal of all eigenbases / eigh of all factors (W1)", 0.25, lambda s: s["renewal"] / s["eigh"]),
        Target(6, "… from the bases before, CholeskyQR(tolerance=0)", 0.25, lambda s: s["followed"] / s["eigh"]),
        Target(6, "… where they still diagonalise, and stay", 0.25, lambda s: s["kept"] / s["eigh"]),
    ], [
        Action("renewal", lambda: structure.renewed_bases(means, bases)),
        Action("followed", lambda: followed.renewed_bases(means, bases)),
        Action("kept", lambda: kept.renewed_bases(means, bases)),
        Action("eigh", lambda: [torch.linalg.eigh(f) for f in factors]),
    ]  # fmt: skip


class _ByLayer:
    """K-FAC written out layer by layer, as libraries without batching do it: what 64 equal layers are held against."""

    def __init__(self, model: nn.Sequential, likelihood: ng.Categorical) -> None:
        self.model, self.likelihood, self.steps = model, likelihood, 0
        self.layers = [m for m in model if isinstance(m, nn.Linear)]
        self.a = [torch.eye(m.in_features + 1) for m in self.layers]
        self.g = [torch.eye(m.out_features) for m in self.layers]
        self.inverses: list[tuple[Tensor, Tensor]] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        seen: list[tuple[Tensor, Tensor]] = []
        h = x
        for module in self.model:
            out = module(h)
            if isinstance(module, nn.Linear):
                seen.append((h.detach(), out))
            h = out
        labels = self.likelihood.sample(h.detach(), 1)[0]
        outputs = [out for _, out in seen]
        scores = torch.autograd.grad(
            nn.functional.cross_entropy(h, labels, reduction="sum"), outputs, retain_graph=True
        )
        grads = torch.autograd.grad(nn.functional.cross_entropy(h, y), [p for m in self.layers for p in m.parameters()])
        with torch.no_grad():
            for i, ((a, _), g) in enumerate(zip(seen, scores, strict=True)):
                a = torch.cat([a, a.new_ones(len(a), 1)], 1)
                self.a[i].addmm_(a.T, a, beta=0.95, alpha=0.05 / len(a))
                self.g[i].addmm_(g.T, g, beta=0.95, alpha=0.05 / len(a))
            if self.steps % 10 == 0:
                self.inverses = [(_inverse(a), _inverse(g)) for a, g in zip(self.a, self.g, strict=True)]
            for i, layer in enumerate(self.layers):
                left, right = self.inverses[i][1], self.inverses[i][0]
                d = left @ torch.cat([grads[2 * i], grads[2 * i + 1][:, None]], 1) @ right
                layer.weight.sub_(d[:, :-1], alpha=1e-3)
                layer.bias.sub_(d[:, -1], alpha=1e-3)
        self.steps += 1


def _inverse(matrix: Tensor) -> Tensor:
    damped = matrix + 0.03 * torch.eye(len(matrix))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def small_layer_targets(quick: bool) -> tuple[list[Target], list[Action]]:
    """7: 64 layers of 64 units at batch 64, ten steps (one renewal) at a time."""
    depth = 8 if quick else 64
    x, y = torch.randn(64, 64), torch.randint(64, (64,))

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(64, 64), nn.Tanh())))

    mine, other = model(), _ByLayer(model(), ng.Categorical())
    opt = ng.KFAC(mine, ng.Categorical(), lr=1e-3, search=ng.LearningRate(predict=False), refresh=ng.Refresh(1, 10))

    def gradient(of: nn.Module) -> None:
        of.zero_grad()
        nn.functional.cross_entropy(of(x), y).backward()

    def kfac() -> None:
        for _ in range(10):
            gradient(mine)
            opt.step()

    plain = model()
    actions = [
        Action("kfac", kfac),
        Action("by layer", lambda: [other.step(x, y) for _ in range(10)]),
        Action("gradients", lambda: [gradient(plain) for _ in range(10)]),
    ]

    def ratio(s: Seconds) -> float:
        return (s["kfac"] - s["gradients"]) / (s["by layer"] - s["gradients"])

    return [Target(7, "64 equal small layers: optimizer / written out layer by layer", 0.3, ratio)], actions


def counted(quick: bool, clock: Clock, threads: int, with_memory: bool) -> list[Outcome]:
    """What is no median of times: retained activations (3), memory (4), slowest steps (6), bytes of state (8)."""
    workload = autoencoder(width=2, batch=250) if quick else autoencoder()
    found = [Outcome(3, "activations retained beyond autograd's own, MB", 0.0, _retained(workload) / 1e6)]
    if with_memory:
        sgd, gram = (memory.working_memory("W1-gram", n, quick=quick, threads=threads) for n in (c.SGD, "gram"))
        if sgd is not None and gram is not None:
            found.append(Outcome(4, "memory of GramNGD at batch 512 beyond SGD's, MB", 100.0, (gram - sgd) / 1e6))
    model = workload.model()
    opt = ng.KFAC(
        model, workload.likelihood, lr=1e-3, search=ng.LearningRate(predict=False), refresh=ng.Staggered(1, 10),
        structure=ng.Kronecker(sampling=ng.Sampling(_W1)),
    )  # fmt: skip
    now = time.perf_counter if clock == "wall" else time.process_time
    times = []
    for _ in range(12 + (20 if quick else 50)):
        start = now()
        opt.zero_grad()
        workload.loss(model(workload.x), workload.y).backward()
        opt.step()
        times.append(now() - start)
    times = sorted(times[12:])
    slow = times[min(len(times) - 1, int(0.99 * len(times)))]
    found.append(
        Outcome(
            6, "99th percentile / median of step times, Staggered(1, 10) (W1)", 1.3, slow / statistics.median(times)
        )
    )
    for what, storage in (
        ("bytes of K-FAC's state, ng.Packed() / factors and eigenvectors in float32 (W1)", ng.Packed()),
        ("… with inverses in bfloat16", ng.Packed(torch.bfloat16)),
        ("… with whole matrices, ng.Unpacked()", ng.Unpacked()),
    ):
        found.append(Outcome(8, what, 0.55, _state(workload, storage)))
    return found


def _state(workload: Workload, storage: ng.Unpacked) -> float:
    """Bytes of curvature after a step, over those of both factors of every layer and as many eigenvectors."""
    model = workload.model()
    opt = ng.KFAC(model, workload.likelihood, structure=ng.Kronecker(storage=storage))
    workload.loss(model(workload.x), workload.y).backward()
    opt.step()
    kept = sum(
        t.nbytes
        for slot in opt.state.values()
        for k, t in slot.items()
        if k.startswith(("average.", "inverse.", "basis."))
    )
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return kept / (4 * 2 * sum((m.in_features + 1) ** 2 + m.out_features**2 for m in layers))


def _retained(workload: Workload) -> int:
    """Bytes of layers' inputs that a tape holds and autograd does not."""
    model, saved = workload.model(), set()

    def pack(t: Tensor) -> Tensor:
        saved.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), recording(model) as tape:
        tape.output = model(workload.x)
    own = {use.input.untyped_storage().data_ptr(): use.input.nbytes for uses in tape.uses.values() for use in uses}
    return sum(size for pointer, size in own.items() if pointer not in saved)


GROUPS = {
    "W1": autoencoder_targets, "W2": transformer_targets, "gram": gram_targets, "bases": basis_targets,
    "small": small_layer_targets,
}  # fmt: skip


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures the speed targets and says which are met.")
    parser.add_argument("--quick", action="store_true", help="smaller workloads: a check of the program, not of speed")
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, "counted"], default=[*GROUPS, "counted"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("runs/targets.json"))
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    found: list[Outcome] = []
    for name in options.only:
        if name == "counted":
            new = counted(options.quick, options.clock, options.threads, not (options.no_memory or options.quick))
        else:
            plan = Plan(blocks=options.blocks, least=options.blocks, seconds=1e9, turn=0.0, clock=options.clock)
            new = outcomes(*GROUPS[name](options.quick), plan)
        for outcome in new:
            print(outcome, flush=True)
        found += new
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps([vars(o) for o in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
