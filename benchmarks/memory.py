"""Peak memory of a contender, in a process of its own.

The process builds model, batch and optimizer, takes a few steps and reports the high-water mark of its resident memory
above what it was before the model was built (so that the libraries do not count). Linux: ``VmHWM``, because
``ru_maxrss`` is inherited from the parent process; elsewhere ``ru_maxrss``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_STEPS = 3


def peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def child(workload_name: str, contender: str, quick: bool) -> dict[str, int]:
    """Runs in the child: steps of one contender, and what they took."""
    from benchmarks import contenders as c
    from benchmarks.suite import workload_of

    # What the first use of the libraries allocates is no contender's own.
    warm = c.training(workload_of("W0", quick=True), c.TORCH[c.SGD])
    warm()
    workload = workload_of(workload_name, quick=quick)
    before = peak_bytes()
    if contender in c.TORCH:
        step = c.training(workload, c.TORCH[contender])
    else:
        preset = c.PRESETS[contender]
        schedule = c.Schedule()
        step = c.training(workload, lambda m: preset.build(m, workload.likelihood, schedule), preset.loop)
    for _ in range(_STEPS):
        step()
    return {"before": before, "peak": peak_bytes()}


def working_memory(workload_name: str, contender: str, *, quick: bool, threads: int) -> int | None:
    """Bytes that training with ``contender`` takes above the bare process; None where the child failed."""
    command: Sequence[str] = [
        sys.executable, str(Path(__file__).with_name("run.py")), "--memory-child", workload_name, contender,
        "--threads", str(threads), *(["--quick"] if quick else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"] - found["before"]
