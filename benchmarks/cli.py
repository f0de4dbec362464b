"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders as c
from benchmarks import memory
from benchmarks.harness import Clock, measure
from benchmarks.results import SuiteResult, render, result_of
from benchmarks.suite import SUITES, Suite


def run_suite(
    suite: Suite, *, quick: bool, seed: int, with_memory: bool, threads: int, clock: Clock = "wall"
) -> SuiteResult:
    """Measure one suite."""
    workload = suite.quick() if quick else suite.full()
    optimizers = c.contenders(workload, suite.presets)
    if suite.cycle and not quick:
        optimizers = optimizers + c.cycle_contender(workload, "kfac", 10)
    operations = c.Measured((), ())
    for make in suite.operations:
        operations = operations + make(workload)
    product = c.matrix_product(workload)
    started, load = time.perf_counter(), os.getloadavg()[0]
    actions = [product, *optimizers.actions, *operations.actions]
    bases = (product.name, c.SGD, c.ADAMW, *({suite.base} - {c.SGD} if suite.operations else ()))
    samples = measure(actions, suite.plan(quick, clock), bases, seed, _tell)
    seconds, load = time.perf_counter() - started, max(load, os.getloadavg()[0])
    peaks: dict[str, int | None] = {}
    if with_memory:
        for name in suite.memory:
            _tell(f"memory of {name}")
            peaks[name] = memory.working_memory(suite.name, name, quick=quick, threads=threads)
    _tell("")
    return result_of(suite, workload, samples, optimizers, operations, product, peaks, load, seconds)


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def environment(threads: int, quick: bool, clock: Clock) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "quick": quick,
        "clock": clock,
    }


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py", description="Times natgrad beside SGD and fused AdamW, interleaved in one process."
    )
    parser.add_argument("--quick", action="store_true", help="smaller workloads and fewer blocks, under a minute")
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES), help="these tables only")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for a busy machine and one thread",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random order")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"), help="where every number goes")
    parser.add_argument("--memory-child", nargs=2, metavar=("WORKLOAD", "CONTENDER"), help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    torch.set_num_threads(options.threads)
    if options.memory_child:
        print(json.dumps(memory.child(*options.memory_child, quick=options.quick)))
        return 0
    facts = environment(options.threads, options.quick, options.clock)
    print("natgrad benchmarks: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    results = []
    for name in options.only:
        result = run_suite(
            SUITES[name],
            quick=options.quick,
            seed=options.seed,
            with_memory=not (options.no_memory or options.quick),
            threads=options.threads,
            clock=options.clock,
        )
        print(render(result), flush=True)
        results.append(result.as_json())
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"environment": facts, "suites": results}, indent=1) + "\n")
    print(f"Every number: {options.json}")
    return 0
