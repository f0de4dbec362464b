"""From samples to numbers, and from numbers to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import contenders as c
from benchmarks.harness import (
    Action,
    Interval,
    Row,
    Samples,
    fewest,
    row_flops,
    row_ratio,
    row_seconds,
)
from benchmarks.suite import Suite
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Args:
        label: the contender.
        milliseconds: median per step.
        ratios: to each base, with intervals.
        limit: ratio to the first base if both ran at the matrix-product rate.
        gemm_share: operations needed over those the machine could have done in the time, as a fraction.
        samples: the fewest timings behind any part of the line.
        memory_ratio: working memory over that of SGD.
        note: what else to know.
    """

    label: str
    milliseconds: float
    ratios: dict[str, Interval]
    limit: float | None
    gemm_share: float | None
    samples: int
    memory_ratio: float | None = None
    note: str = ""


@dataclass(frozen=True)
class SuiteResult:
    """Everything measured on one workload."""

    name: str
    title: str
    parameters: int
    gflops: float
    load: float
    processors: float
    seconds: float
    optimizers: tuple[Line, ...]
    operations: tuple[Line, ...]
    memory: dict[str, int | None]
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self, label: str) -> Line:
        return next(line for line in (*self.optimizers, *self.operations) if line.label == label)


def result_of(
    suite: Suite,
    workload: Workload,
    samples: Samples,
    optimizers: c.Measured,
    operations: c.Measured,
    product: Action,
    peaks: Mapping[str, int | None],
    load: float,
    seconds: float,
) -> SuiteResult:
    """All numbers of one suite."""
    assert product.flops is not None
    rate = product.flops / samples.median(product.name)
    actions = (*optimizers.actions, *operations.actions)
    return SuiteResult(
        name=suite.name,
        title=workload.title,
        parameters=workload.parameters,
        gflops=rate / 1e9,
        load=load,
        processors=samples.processors(),
        seconds=seconds,
        optimizers=tuple(_line(r, (c.SGD, c.ADAMW), actions, samples, rate, peaks) for r in optimizers.rows),
        operations=tuple(_line(r, (suite.base,), actions, samples, rate, {}) for r in operations.rows),
        memory=dict(peaks),
        wall={name: list(found.values()) for name, found in samples.wall.items()},
        cpu={name: list(found.values()) for name, found in samples.cpu.items()},
    )


def _line(
    row: Row,
    bases: Sequence[str],
    actions: Sequence[Action],
    samples: Samples,
    rate: float,
    peaks: Mapping[str, int | None],
) -> Line:
    seconds, flops = row_seconds(samples, row), row_flops(actions, row)
    base = next(a.flops for a in actions if a.name == bases[0])
    own, sgd = peaks.get(row.label.split(" (")[0]), peaks.get(c.SGD)
    return Line(
        label=row.label,
        milliseconds=1e3 * seconds,
        ratios={name: row_ratio(samples, row, name) for name in bases},
        limit=None if flops is None or base is None else flops / base,
        gemm_share=None if flops is None else flops / (seconds * rate),
        samples=fewest(samples, row),
        memory_ratio=None if own is None or not sgd else own / sgd,
        note=row.note,
    )


def render(result: SuiteResult) -> str:
    """Plain tables."""
    head = [
        "",
        f"{result.name}: {result.title}; {result.parameters:,} parameters",
        f"matrix product {result.gflops:.1f} GFLOP/s in the same run, load average {result.load:.1f}, "
        f"{result.processors:.2f} processors used, {result.seconds:.0f} s",
    ]
    parts = ["\n".join(head)]
    if result.optimizers:
        parts.append(_table(result.optimizers, (c.SGD, c.ADAMW), memory=any(result.memory.values())))
    if result.operations:
        parts.append(_table(result.operations, tuple(result.operations[0].ratios), memory=False))
    return "\n\n".join(parts)


def _table(lines: Sequence[Line], bases: Sequence[str], *, memory: bool) -> str:
    header = [
        "",
        "ms",
        *(f"/ {base} [95 %]" for base in bases),
        "limit",
        "% of GEMM",
        *(["memory"] if memory else []),
        "n",
    ]
    cells = [header] + [_cells(line, bases, memory) for line in lines]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    text = []
    for row, note in zip(cells, ["", *(line.note for line in lines)], strict=True):
        padded = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        text.append(("  ".join(padded) + (f"  {note}" if note else "")).rstrip())
    return "\n".join(text)


def _cells(line: Line, bases: Sequence[str], memory: bool) -> list[str]:
    share = "" if line.gemm_share is None else f"{100 * line.gemm_share:.0f}"
    found = [line.label, f"{line.milliseconds:.3g}"]
    for base in bases:
        r = line.ratios[base]
        found.append(f"{r.value:.2f} [–]" if r.low is None else f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]")
    found += ["" if line.limit is None else f"{line.limit:.2f}", share]
    if memory:
        found.append("" if line.memory_ratio is None else f"{line.memory_ratio:.2f}")
    return [*found, str(line.samples)]
