"""Predicted and measured: bytes of state and time of a step over SGD's, on eight models (``make bench-plan``).

All steps of one model are interleaved with SGD in one process, as in ``benchmarks/run.py``; the device profile is
measured in the same process. ``off`` is ``predicted / measured − 1``; the target is 20 % of time and 2 % of state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks import contenders as c
from benchmarks.harness import Action, Plan, Row, measure, row_ratio
from benchmarks.workloads import Workload, _categorical_loss, autoencoder, transformer
from natgrad.planning import Profile, predict
from natgrad.planning import measure as measure_device
from natgrad.planning.methods import METHODS

TIME, MEMORY = 0.20, 0.02
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
CHECKED = ("kfac", "kfac-klclip", "ekfac", "diagonal", "gram")


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

    @property
    def time_error(self) -> float:
        return self.predicted / self.measured - 1

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
    actions, rows, states = [sgd], {}, {}
    for method in methods:
        found, made = c.preset_contender(workload, method), []
        actions += found.actions
        preset = c.PRESETS[method]

        def build(m: nn.Module, preset: c.Preset = preset, made: list = made) -> torch.optim.Optimizer:
            made.append(preset.build(m, workload.likelihood, c.Schedule()))
            return made[0]

        c.training(workload, build, preset.loop)()
        states[method] = held(made[0])
        for row in found.rows:
            rows[method, row.label] = row
    samples = measure(actions, plan, (c.SGD,), tell=c_tell)
    lines = []
    for (method, label), row in rows.items():
        lines.append(_line(name, workload, method, label, row, samples, states[method], profile))
    return lines


def _line(name, workload: Workload, method: str, label: str, row: Row, samples, state: int, profile: Profile) -> Line:
    structure, search = ("kfac", "KLClip") if method == "kfac-klclip" else (method, None)
    intervals = (1, 1)
    if METHODS[structure].scheduled and "(" in label:
        intervals = tuple(int(n) for n in label.partition("(")[2].partition(")")[0].split(","))
    choice = predict(
        workload.model(), structure, statistics=intervals[0], inverse=intervals[1], search=search, inputs=workload.x,
        profile=profile,
    )  # fmt: skip
    ratio = row_ratio(samples, row, c.SGD)
    return Line(name, label, choice.ratio, ratio.value, ratio.low, ratio.high, choice.state, state)


def c_tell(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/plan.py", description="Predicted and measured memory and time.")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), help="these models only")
    parser.add_argument("--methods", nargs="+", choices=CHECKED, default=list(CHECKED))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seconds", type=float, default=15.0, help="for the timing of one model")
    parser.add_argument("--json", type=Path, default=Path("runs/bench-plan.json"))
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    profile = measure_device()
    plan = Plan(blocks=9, least=3, seconds=options.seconds, clock=options.clock)
    print(f"{'model':20}{'method':20}{'predicted':>10}{'measured':>10}{'off':>8}   {'state':>14}{'off':>8}")
    lines: list[Line] = []
    for name in options.only:
        for line in compare(name, profile, plan, tuple(options.methods)):
            lines.append(line)
            spread = "" if line.low is None else f" [{line.low:.2f}-{line.high:.2f}]"
            print(
                f"{line.model:20}{line.method:20}{line.predicted:10.2f}{line.measured:10.2f}{line.time_error:+8.0%}   "
                f"{line.state_measured:14,}{line.memory_error:+8.2%}{spread}",
                flush=True,
            )
    within = sum(abs(line.time_error) <= TIME for line in lines)
    print(
        f"time within {TIME:.0%}: {within} of {len(lines)}, median |error| "
        f"{statistics.median(abs(line.time_error) for line in lines):.0%}; state within {MEMORY:.0%}: "
        f"{sum(abs(line.memory_error) <= MEMORY for line in lines)} of {len(lines)}"
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps([{**vars(line), "off": line.time_error} for line in lines], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
