"""Facts about the machine, and the memory that an optimizer needs."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from natgrad.tasks.optimizers import OptimizerSpec, Stepper
from natgrad.tasks.results import Machine
from natgrad.tasks.task import Task, take

_PROBE_STEPS = 3


def machine_facts(device: torch.device) -> Machine:
    """What the timings of this process depend on, with the matrix-product rate measured now."""
    import natgrad

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        natgrad=getattr(natgrad, "__version__", "unknown"),
        torch=torch.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=cores,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        gemm_gflops=gemm_rate(device),
    )


def gemm_rate(device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """Median rate of a float32 product of two [size, size] matrices, in 1e9 floating point operations a second."""
    left, right = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        torch.mm(left, right)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:]) / 1e9


def synchronise(device: torch.device) -> None:
    """Waits for the device's queued work, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(task: Task, spec: OptimizerSpec, lr: float, seed: int, device: torch.device) -> tuple[int | None, int]:
    """(peak bytes of tensors in training, bytes of optimizer state), from a few steps of a model of its own.

    The peak counts parameters, gradients, state, activations and temporaries that torch's allocator handed out, not the
    batch and not libraries' own workspaces. It repeats the first batch of the seed's order, outside any clock.
    """
    order = torch.randperm(task.train_rows, generator=torch.Generator().manual_seed(seed))
    batch = order[: task.batch_size].to(device)
    inputs, targets = take(task.train[0], batch), take(task.train[1], batch)

    def probe() -> Stepper:
        torch.manual_seed(seed)
        stepper = spec.build(task.model(seed).train(), task.likelihood, lr)
        for _ in range(_PROBE_STEPS):
            stepper.step(inputs, targets)
        return stepper

    gc.collect()  # garbage of earlier runs must not be freed while the allocator is watched
    with torch.random.fork_rng():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            stepper = probe()
            return torch.cuda.max_memory_allocated(device) - before, stepper.state_bytes()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself on stderr
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
            stepper = probe()
        return _peak_of(trace), stepper.state_bytes()


def _peak_of(trace: torch.profiler.profile) -> int | None:
    """The largest running sum of the allocations and frees that the profiler saw."""
    results = getattr(getattr(trace, "profiler", None), "kineto_results", None)
    if results is None:
        return None
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(events, key=lambda pair: pair[0]):
        held += size
        peak = max(peak, held)
    return peak


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or sys.platform
