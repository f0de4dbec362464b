"""Which contenders run on which workload, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import contenders as c
from benchmarks.harness import Clock, Plan
from benchmarks.workloads import Workload, autoencoder, small_classifier, transformer

_ALL_SMALL = (
    "ngd", "block", "gauss-newton", "newton", "kfac", "ekfac", "diagonal", "gram", "hessian-free", "trust-region",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """One table of results.

    Args:
        name: for ``--only``.
        full, quick: the workload; the quick one is smaller.
        presets: natgrad optimizers that fit it.
        operations: further things to time, made from the workload.
        base: of the operations' ratios.
        seconds: for all blocks of timing, ``(full, quick)``.
        memory: contenders whose memory is measured.
        least: how often every action is timed at the least.
        cycle: whether a whole refresh cycle of K-FAC checks the sum of its kinds of step.
    """

    name: str
    full: Callable[[], Workload]
    quick: Callable[[], Workload]
    presets: tuple[str, ...]
    seconds: tuple[float, float]
    operations: tuple[Callable[[Workload], c.Measured], ...] = ()
    base: str = c.GRADIENT
    memory: tuple[str, ...] = ()
    least: int = 3
    cycle: bool = False

    def plan(self, quick: bool, clock: Clock = "wall") -> Plan:
        if quick:
            return Plan(blocks=5, least=2, seconds=self.seconds[1], turn=0.02, clock=clock)
        return Plan(blocks=15, least=self.least, seconds=self.seconds[0], clock=clock)


_LARGE = ("kfac", "kfac-klclip", "kfac-no-clip", "ekfac", "diagonal", "gram", "hessian-free", "trust-region")
SUITES: dict[str, Suite] = {
    "W0": Suite("W0", small_classifier, lambda: small_classifier(64, 32, 16), _ALL_SMALL, (20, 4)),
    "W1": Suite(
        "W1", autoencoder, lambda: autoencoder(width=2, batch=250), _LARGE, (70, 9), (c.operations,),
        memory=(c.SGD, c.ADAMW, "kfac", "ekfac", "diagonal", "gram", "hessian-free", "trust-region"), cycle=True,
    ),
    "W1-gram": Suite(
        "W1-gram", lambda: autoencoder(batch=512), lambda: autoencoder(width=2, batch=128), ("gram", "kfac"), (15, 3),
        (c.gram_solve,), base=c.SGD, memory=(c.SGD, "gram"),
    ),
    "W2": Suite(
        "W2", transformer, lambda: transformer(tokens=1024, length=128, width=64, depth=2),
        (*_LARGE[:3], "kfac-reduce", *_LARGE[3:]), (150, 9), (c.operations,),
        memory=(c.SGD, c.ADAMW, "kfac", "ekfac", "gram", "hessian-free"),
    ),
}  # fmt: skip


def workload_of(name: str, *, quick: bool) -> Workload:
    """The workload of a suite."""
    suite = SUITES[name]
    return suite.quick() if quick else suite.full()
