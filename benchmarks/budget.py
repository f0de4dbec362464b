"""What is reached in 25 seconds of training, without tuning: ``python benchmarks/budget.py --data DIR``.

The autoencoder 784-1000-500-250-30 of Fashion-MNIST at batch 1000 with ``AdaptiveKFAC`` as it comes and the average of
its iterates (``iterate_average``). The clock counts everything of a step, the update of the average included, and no
evaluation; the loss is that of the whole training set, of the average and of the last iterate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.optim.swa_utils import AveragedModel

import natgrad as ng
from benchmarks.targets import Outcome
from natgrad.errors import ArgumentError
from natgrad.tasks import load_task
from natgrad.tasks.task import Task, mean_nll, take
from natgrad.tasks.train import batch_indices, evaluate

TARGET = 205.0
DECAY = 0.9
PEERS = {
    "kfac-jax": 209.4, "Muon": 219.9, "AdamW": 236.6, "SOAP": 254.6, "kfac-pytorch": 262.8, "SINGD": 265.0,
    "Distributed Shampoo": 281.6,
}  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """One run.

    Args:
        seed: of weights and data order.
        steps: updates within the budget.
        seconds: on the clock.
        average: training loss of the averaged parameters.
        last: training loss of the last iterate.
        processors: processor seconds over seconds on the clock; below the number of threads the machine was shared.
    """

    seed: int
    steps: int
    seconds: float
    average: float
    last: float
    processors: float


def train(task: Task, seed: int, seconds: float, steps: int | None) -> Reached:
    """Train until the budget is used up, or for so many steps."""
    torch.manual_seed(seed)
    model = task.model(seed).train()
    optimizer = ng.AdaptiveKFAC(model, task.likelihood)
    averaged = AveragedModel(model, multi_avg_fn=ng.iterate_average(DECAY))
    batches, elapsed, taken, spent = batch_indices(task.train_rows, task.batch_size, seed), 0.0, 0, 0.0
    while elapsed < seconds if steps is None else taken < steps:
        index = next(batches)
        x, y = take(task.train[0], index), take(task.train[1], index)
        start, processor = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        output = model(x)
        optimizer.observe(output, y)
        mean_nll(task.likelihood, output, y).backward()
        optimizer.step()
        averaged.update_parameters(model)
        elapsed, taken = elapsed + time.perf_counter() - start, taken + 1
        spent += time.process_time() - processor
    average, _ = evaluate(task, averaged.module, task.train, metric=False)
    last, _ = evaluate(task, model, task.train, metric=False)
    return Reached(seed, taken, elapsed, average, last, spent / elapsed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's IDX files (Debian: dataset-fashion-mnist)")
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--steps", type=int, help="instead of --seconds, on a machine that others use")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/budget.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        task = load_task("fashion-mnist-autoencoder", options.data)
    except ArgumentError as error:
        sys.exit(str(error))
    runs = []
    for seed in range(options.seeds):
        runs.append(train(task, seed, options.seconds, options.steps))
        print(
            "seed {seed}: {steps} steps in {seconds:.1f} s, training loss {average:.2f} (average), {last:.2f} (last "
            "iterate), {processors:.2f} processors used".format(**asdict(runs[-1])),
            flush=True,
        )
    losses = sorted(run.average for run in runs)
    budget = f"{options.seconds:g} s" if options.steps is None else f"{options.steps} steps"
    what = f"training loss after {budget}, median of {len(runs)} seeds [range] (W1 on Fashion-MNIST)"
    print(Outcome(10, what, TARGET, statistics.median(losses), losses[0], losses[-1]))
    print("Peers in 25 s:", ", ".join(f"{name} {loss}" for name, loss in PEERS.items()))
    print(f"Load average {os.getloadavg()[0]:.1f}, {options.threads} threads, torch {torch.__version__}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"target": TARGET, "runs": [asdict(run) for run in runs]}, indent=1))


if __name__ == "__main__":
    main()
