"""Predicted and measured: bytes of state, bytes held during a step, and time of a step over SGD's, on eight models
(``make bench-plan``).

All steps of one model are interleaved with SGD in one process, as in ``benchmarks/run.py``; the device profile is
measured in the same process. ``off`` is ``predicted / measured − 1``; the target is 20 % of time, 20 % of what a step
holds, and 2 % of state. Lines with ``tokens=`` are predicted from numbers of examples and positions alone. Last come
promises: what ``natgrad plan`` recommends under a limit on time, run as it is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of every start and stop

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks import contenders as c
from benchmarks.allocations import transient
from benchmarks.harness import Action, Plan, Row, measure, row_ratio
from benchmarks.workloads import Workload, _categorical_loss, autoencoder, transformer
from natgrad.metric import Structure
from natgrad.planning import Profile, predict
from natgrad.planning import measure as measure_device
from natgrad.planning import plan as planned
from natgrad.planning.methods import METHODS

TIME, TRANSIENT, MEMORY = 0.20, 0.20, 0.02
SCHEDULES = ((1, 10), (10, 10))


def classifier(name: str, title: str, build: Callable[[], nn.Module], *shape: int) -> Workload:
    """A workload of ten classes, on noise."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    y = torch.randint(10, (shape[0],), generator=torch.Generator().manual_seed(1))
    return Workload(name, title, build, x, y, ng.Categorical(), _categorical_loss, (shape[0], 64, 64))


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, Callable[[], Workload]] = {
    "mlp": lambda: classifier("mlp", "MLP 784-512-512-10, batch 512", lambda: mlp(784, 512, 512, 10), 512, 784),
    "wide": lambda: classifier("wide", "MLP 256-2048-10, batch 256", lambda: mlp(256, 2048, 10), 256, 256),
    "deep": lambda: classifier("deep", "MLP of 12 layers of 256, batch 2048",
                               lambda: mlp(*[256] * 12, 10), 2048, 256),
    "autoencoder": lambda: autoencoder(),
    "autoencoder-small": lambda: autoencoder(width=2, batch=500),
    "transformer": lambda: transformer(tokens=4096, length=128),
    "transformer-narrow": lambda: transformer(tokens=8192, length=64, width=64, depth=2),
    "tokens": lambda: classifier("tokens", "MLP 128-256-10 on 64 positions, mean-pooled, batch 64",
                                 lambda: nn.Sequential(mlp(128, 256, 256, 10), MeanPool()), 64, 64, 128),
}  # fmt: skip
CHECKED: dict[str, tuple[Structure | str, str | None]] = {
    "kfac": ("kfac", None),
    "kfac-klclip": ("kfac", "KLClip"),
    "kfac-sampled": (ng.Kronecker(sampling=ng.Sampling(1 / 16)), "KLClip"),
    "kfac-sub-batch": (ng.Kronecker(sampling=ng.SubBatch(1 / 8)), "KLClip"),
    "ekfac": ("ekfac", None),
    "diagonal": ("diagonal", None),
    "gram": ("gram", None),
}
PROMISES = (0.3, 1.0)
# Examples and positions of the models whose layers all see as many rows.
ROWS = {"mlp": (512, 1), "deep": (2048, 1), "tokens": (64, 64), "transformer-narrow": (128, 64)}


class MeanPool(nn.Module):
    """The mean over the second axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@dataclass(frozen=True)
class Line:
    """One schedule of one method on one model."""

    model: str
    method: str
    predicted: float
    measured: float
    low: float | None
    high: float | None
    state_predicted: int
    state_measured: int
    transient_predicted: int
    transient_measured: int

    @property
    def time_error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def transient_error(self) -> float:
        return self.transient_predicted / max(1, self.transient_measured) - 1

    @property
    def memory_error(self) -> float:
        return self.state_predicted / max(1, self.state_measured) - 1


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state; shared memory counts once."""
    found = {}
    for slot in optimizer.state.values():
        for value in slot.values():
            if isinstance(value, Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


def compare(name: str, profile: Profile, plan: Plan, methods: tuple[str, ...]) -> list[Line]:
    """All lines of one model."""
    workload = MODELS[name]()
    sgd = Action(c.SGD, c.training(workload, c.TORCH[c.SGD]))
    actions, rows, states, held_in_step = [sgd], {}, {}, {}
    for method in methods:
        found, made = c.preset_contender(workload, method), []
        actions += found.actions
        preset = c.PRESETS[method]

        def build(m: nn.Module, preset: c.Preset = preset, made: list = made) -> torch.optim.Optimizer:
            made.append(preset.build(m, workload.likelihood, c.Schedule()))
            return made[0]

        c.training(workload, build, preset.loop)()
        states[method] = held(made[0])
        held_in_step[method] = transient(workload, lambda m, p=preset: p.build(m, workload.likelihood, c.Schedule()))
        for row in found.rows:
            rows[method, row.label] = row
    samples = measure(actions, plan, (c.SGD,), tell=c_tell)
    lines = []
    for (method, label), row in rows.items():
        seen: list[tuple[str, dict[str, Any]]] = [(label, {"inputs": workload.x})]
        if name in ROWS and method == "kfac-sampled":
            seen.append((f"{label} tokens=", {"batch": ROWS[name][0], "tokens": ROWS[name][1]}))
        for title, arguments in seen:
            choice = predict(
                workload.model(), CHECKED[method][0], **intervals(method, label), search=CHECKED[method][1],
                profile=profile, **arguments,
            )  # fmt: skip
            ratio = row_ratio(samples, row, c.SGD)
            lines.append(
                Line(
                    name,
                    title,
                    choice.ratio,
                    ratio.value,
                    ratio.low,
                    ratio.high,
                    choice.state,
                    states[method],
                    choice.transient,
                    held_in_step[method],
                )
            )
    return lines


def intervals(method: str, label: str) -> dict[str, int]:
    """The intervals that a row's label tells."""
    name = CHECKED[method][0]
    if "(" not in label or (isinstance(name, str) and not METHODS[name].scheduled):
        return {"statistics": 1, "inverse": 1}
    statistics, inverse = label.partition("(")[2].partition(")")[0].split(",")
    return {"statistics": int(statistics), "inverse": int(inverse)}


def promise(name: str, overhead: float, profile: Profile, plan: Plan) -> None:
    """Print the time that is promised within a limit, and that of the recommended program over whole periods."""
    workload = MODELS[name]()
    best = planned(workload.model(), inputs=workload.x, max_overhead=overhead, profile=profile).best
    if best is None:
        print(f"{name:20}at most {1 + overhead:.2f}: no structure keeps it")
        return

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return eval(best.code, {"ng": ng, "model": model, "likelihood": workload.likelihood})

    step, period = c.training(workload, build), math.lcm(best.statistics, best.inverse)
    for _ in range(best.inverse):
        step()  # beyond the first steps, in which inverses are renewed more often

    def run() -> None:
        for _ in range(period):
            step()

    sgd = Action(c.SGD, c.training(workload, c.TORCH[c.SGD]))
    samples = measure([sgd, Action("period", run)], plan, (c.SGD,), tell=c_tell)
    ratio = row_ratio(samples, Row("period", {"period": 1 / period}), c.SGD)
    print(f"{name:20}at most {1 + overhead:.2f}: promised {best.ratio:.2f}, measured {ratio.value:.2f}"
          f" ({best.ratio / ratio.value - 1:+.0%})   {best.code}", flush=True)  # fmt: skip


def c_tell(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/plan.py", description="Predicted and measured memory and time.")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), help="these models only")
    parser.add_argument("--methods", nargs="+", choices=CHECKED, default=list(CHECKED))
    parser.add_argument("--promises", nargs="*", choices=list(MODELS), default=["mlp", "tokens", "transformer-narrow"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seconds", type=float, default=15.0, help="for the timing of one model")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-plan.json"))
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    profile = measure_device()
    plan = Plan(blocks=9, least=3, seconds=options.seconds, clock=options.clock)
    print(
        f"{'model':20}{'method':30}{'predicted':>10}{'measured':>10}{'off':>8}   {'state':>14}{'off':>8}"
        f"{'in a step':>15}{'off':>8}"
    )
    lines: list[Line] = []
    for name in options.only:
        for line in compare(name, profile, plan, tuple(options.methods)):
            lines.append(line)
            spread = "" if line.low is None else f" [{line.low:.2f}-{line.high:.2f}]"
            print(
                f"{line.model:20}{line.method:30}{line.predicted:10.2f}{line.measured:10.2f}{line.time_error:+8.0%}   "
                f"{line.state_measured:14,}{line.memory_error:+8.2%}{line.transient_measured:15,}{line.transient_error:+8.0%}{spread}",
                flush=True,
            )
    within = sum(abs(line.time_error) <= TIME for line in lines)
    print(
        f"time within {TIME:.0%}: {within} of {len(lines)}, median |error| "
        f"{statistics.median(abs(line.time_error) for line in lines):.0%}; state within {MEMORY:.0%}: "
        f"{sum(abs(line.memory_error) <= MEMORY for line in lines)} of {len(lines)}; bytes in a step within "
        f"{TRANSIENT:.0%}: {sum(abs(line.transient_error) <= TRANSIENT for line in lines)} of {len(lines)}"
    )
    for name in options.promises:
        for overhead in PROMISES:
            promise(name, overhead, profile, plan)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps([{**vars(line), "off": line.time_error} for line in lines], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
