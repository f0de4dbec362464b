"""Time to the loss of tuned AdamW, with equal tuning for all: ``python benchmarks/time_to_target.py``.

Every optimizer gets twelve trials on each task: its default setting (learning rate, or radius) times the powers of two
from 1/64 to 32; the trial with the lowest training loss at the end of the budget wins. The winners, and the default
settings of natgrad's presets, are then trained on every seed. The target is the median final training loss of tuned
AdamW; counted is the first evaluation at or below it.

Printed are, per task, the seconds of every contender over those of tuned AdamW; then the geometric mean over tasks of
natgrad's best tuned preset (target 0.6) and the worst task of the best default preset, one preset for all tasks
(target 1.2). Who never arrives counts as infinite.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.tasks import load_task, models
from natgrad.tasks.optimizers import OptimizerSpec, find_optimizers
from natgrad.tasks.results import Run
from natgrad.tasks.summary import arrival
from natgrad.tasks.task import Task
from natgrad.tasks.train import Limit, train

FACTORS = tuple(2.0**k for k in range(-6, 6))
PRESETS = ("kfac", "adaptive-kfac", "ekfac")
OTHERS = ("adamw", "muon", "sgd")


def ill_conditioned() -> Task:
    """Logistic regression of 50 inputs whose scales span three orders of magnitude: condition number 1e6."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, 50)
    x = torch.randn(2500, 50, generator=generator) * scales
    logits = x @ (torch.randn(50, generator=generator) / scales / 50**0.5 * 3)
    y = torch.bernoulli(logits.sigmoid(), generator=generator).unsqueeze(1)
    return Task(
        "ill-conditioned", "Logistic regression with condition number 1e6.", models.seeded(lambda: nn.Linear(50, 1)),
        ng.Bernoulli(), (x[:2000], y[:2000]), (x[2000:], y[2000:]), batch_size=2000,
    )  # fmt: skip


def upsampled_digits() -> Task:
    """The autoencoder 784-1000-500-250-30 on the digits enlarged to 28x28, where Fashion-MNIST is not given."""
    small = load_task("digits-autoencoder")

    def enlarged(data: object) -> torch.Tensor:
        assert isinstance(data, torch.Tensor)
        return F.interpolate(data.reshape(-1, 1, 8, 8), size=28, mode="bilinear").flatten(1).clamp(0, 1)

    train_pixels, test_pixels = enlarged(small.train[0]), enlarged(small.test[0])
    return replace(
        small, name="upsampled-digits-autoencoder", train=(train_pixels, train_pixels), test=(test_pixels, test_pixels),
        model=models.seeded(lambda: models.autoencoder([784, 1000, 500, 250, 30])), batch_size=1000,
    )  # fmt: skip


def tasks(data: Path | None) -> dict[str, Callable[[], Task]]:
    """The six tasks by name."""
    wide = upsampled_digits if data is None else lambda: load_task("fashion-mnist-autoencoder", data)
    return {
        "breast-cancer": lambda: load_task("breast-cancer"),
        "ill-conditioned": ill_conditioned,
        "digits": lambda: load_task("digits"),
        "autoencoder": wide,
        "curves-autoencoder": lambda: load_task("curves-autoencoder"),
        "stdlib-lm": lambda: load_task("stdlib-lm"),
    }


def final_loss(run: Run) -> float:
    """Training loss at the end; infinite where the run failed."""
    return math.inf if run.final is None or run.failure is not None else run.final.train_loss


def tuned(task: Task, spec: OptimizerSpec, default: float, limit: Limit, trials: int) -> float:
    """The best of the first seed's trials; those nearest to the default where there are fewer than twelve."""
    factors = sorted(FACTORS, key=lambda f: abs(math.log(f)))[:trials]
    losses = {f: final_loss(train(task, spec, default * f, 0, limit, detailed=False)[0]) for f in sorted(factors)}
    return default * min(losses, key=lambda f: losses[f])


def seconds_to(runs: list[Run], target: float) -> float:
    """Median seconds to the target; infinite for a run that did not arrive."""
    points = [arrival(run, target) for run in runs]
    return statistics.median(math.inf if p is None else p.seconds for p in points)


def ratios_of(task: Task, limit: Limit, seeds: int, trials: int) -> dict[str, float]:
    """Seconds to AdamW's loss over AdamW's, by contender."""
    runs: dict[str, list[Run]] = {}
    for spec in find_optimizers((*OTHERS, *PRESETS)):
        default = spec.lr_of(task.model(0), task.likelihood)
        settings = {f"{spec.name}, tuned": tuned(task, spec, default, limit, trials)}
        if spec.name in PRESETS:
            settings[f"{spec.name}, default"] = default
        for name, value in settings.items():
            runs[name] = [train(task, spec, value, seed, limit)[0] for seed in range(seeds)]
            loss = statistics.median(final_loss(run) for run in runs[name])
            print(f"  {task.name}: {name} ({spec.knob} {value:.3g}): training loss {loss:.5g}", flush=True)
    target = statistics.median_high(final_loss(run) for run in runs["adamw, tuned"])
    reference = seconds_to(runs["adamw, tuned"], target)
    return {name: seconds_to(found, target) / reference for name, found in runs.items()}


def verdicts(ratios: dict[str, dict[str, float]]) -> list[str]:
    """The two lines of target 9, from ratios by task and contender."""
    best = [min(found[f"{p}, tuned"] for p in PRESETS) for found in ratios.values()]
    mean = math.inf if math.inf in best else math.exp(statistics.fmean(math.log(max(b, 1e-9)) for b in best))
    worst = {p: max(found[f"{p}, default"] for found in ratios.values()) for p in PRESETS}
    preset = min(worst, key=lambda p: worst[p])

    def line(what: str, value: float, bound: float) -> str:
        return f"9. {what:<78} {value:7.3f} target {bound:g}: {'met' if value <= bound else 'MISSED'}"

    return [
        line("best tuned preset / tuned AdamW, geometric mean over tasks", mean, 0.6),
        line(f"default settings ({preset}) / tuned AdamW, worst task", worst[preset], 1.2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="names of tasks")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's IDX files; else digits are upsampled")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=len(FACTORS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_target.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = tasks(options.data)
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    names = options.only or list(known)
    limit = Limit(seconds=options.seconds)
    ratios = {name: ratios_of(known[name](), limit, options.seeds, options.trials) for name in names}
    for name, found in ratios.items():
        print(f"{name}: " + "; ".join(f"{who} {ratio:.2f}" for who, ratio in found.items()))
    print(*verdicts(ratios), sep="\n")
    print(
        f"{options.trials} trials, {options.seeds} seeds, {options.seconds:g} s a run, {options.threads} threads, load "
        f"average {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
