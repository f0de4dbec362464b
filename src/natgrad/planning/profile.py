"""What a device does in a second: measured once in at most three seconds, and kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from natgrad.errors import ArgumentError
from natgrad.planning.work import Operation

VERSION = 2
"""Of the file's contents; a profile of another version is measured anew."""

_SIZES = (8, 32, 128, 512, 1536)
_FACTORS = (16, 64, 256, 512, 1024)
_ALWAYS = 512  # factorisations up to here are measured on the slowest machine: larger ones are told from them
_BYTES = (2**16, 2**20, 2**24, 2**26)
_LONG = 1024
_SECONDS = 2.6


@dataclass(frozen=True)
class Profile:
    """Rates of one device.

    Args:
        device: its name and number of threads.
        version_of_torch: the version that was measured.
        gemm: operations a second of products, by dtype and ``"smallest,middle"`` extent.
        inverse, eigh, qr: seconds by n, float32.
        bandwidth: bytes a second of elementwise operations, by their bytes.
        call: seconds that an operation on almost nothing takes.
        version: of the format.
    """

    device: str
    version_of_torch: str
    gemm: dict[str, dict[str, float]]
    inverse: dict[str, float]
    eigh: dict[str, float]
    qr: dict[str, float]
    bandwidth: dict[str, float]
    call: float
    version: int = field(default=VERSION)

    def seconds(self, work: Iterable[Operation], dtype: torch.dtype = torch.float32) -> float:
        """How long the operations take one after the other; products of ``dtype``, factorisations of float32."""
        known: dict[tuple[object, ...], float] = {}  # a model's layers are much alike
        total = 0.0
        for o in work:
            key = (o.kind, o.flops, o.bytes, o.shape)
            if key not in known:
                known[key] = self._one(o, dtype)
            total += known[key] * o.count
        return total

    def _one(self, operation: Operation, dtype: torch.dtype) -> float:
        moved = operation.bytes / _interpolated(self.bandwidth, operation.bytes)
        if operation.kind == "memory":
            return self.call + moved
        if operation.kind == "gemm":
            rates = self.gemm.get(_name(dtype)) or self.gemm["float32"]
            return self.call + max(moved, operation.flops / _rate(rates, *operation.shape))
        # An inverse is no faster than its n³ operations at the best rate of products.
        least = 0.0 if operation.kind != "inverse" else operation.flops / max(self.gemm["float32"].values())
        return self.call + max(least, _scaled(getattr(self, operation.kind), operation.shape[0]))

    def save(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @staticmethod
    def load(path: Path) -> Profile:
        """Read what :meth:`save` wrote.

        Raises:
            ArgumentError: the file is missing, damaged, or of another version.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            found = Profile(**raw)
            tables = [*found.gemm.values(), found.inverse, found.eigh, found.qr, found.bandwidth]
            numbers = [float(v) for table in tables for v in table.values()] + [float(found.call)]
            if not ("float32" in found.gemm and all(tables) and all(0 < v < math.inf for v in numbers)):
                raise ValueError("a rate is missing or not positive")
        except FileNotFoundError as error:
            raise ArgumentError(
                f"There is no device profile at {path}. `natgrad plan --profile FILE` makes one."
            ) from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ArgumentError(f"{path} is no device profile ({type(error).__name__}: {error}). Delete it.") from error
        if found.version != VERSION:
            raise ArgumentError(f"{path} is a device profile of version {found.version}, not {VERSION}. Delete it.")
        return found


def cache_folder() -> Path:
    """``$NATGRAD_CACHE``, else the platform's folder for caches."""
    given = os.environ.get("NATGRAD_CACHE")
    if given:
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "natgrad" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "natgrad"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natgrad"


def profile_of(device: torch.device | str = "cpu", path: Path | None = None) -> Profile:
    """The profile of ``device`` at its present number of threads: from the cache, or measured and cached.

    Args:
        device: cpu, cuda, …; ``meta`` stands for cpu.
        path: file to read, or to write where there is none; None: one in :func:`cache_folder`. A cache that cannot be
            read or written is no error.

    Raises:
        ArgumentError: ``path`` is given and is no profile.
    """
    device = torch.device("cpu" if torch.device(device).type == "meta" else device)
    if path is not None:
        if path.exists():
            return Profile.load(path)
        found = measure(device)
        try:
            found.save(path)
        except OSError as error:
            raise ArgumentError(f"The device profile cannot be written to {path}: {error}.") from error
        return found
    name = described(device)
    slug = "".join(c if c.isalnum() else "-" for c in f"{name}-torch-{torch.__version__}")
    cached = cache_folder() / f"profile-{slug}.json"
    try:
        return Profile.load(cached)
    except ArgumentError:
        found = measure(device)
    with contextlib.suppress(OSError):  # a cache is a convenience
        found.save(cached)
    return found


def described(device: torch.device) -> str:
    """What the rates depend on: the device, and for a processor its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def measure(device: torch.device | str = "cpu", seconds: float = _SECONDS) -> Profile:
    """Measure a device, in about ``seconds`` at most: slow machines get fewer repeats, and no large sizes."""
    device = torch.device(device)
    clock = _Clock(device, time.perf_counter() + seconds)
    generator = torch.Generator(device=device).manual_seed(0)

    def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    tiny = matrix(8)
    call = clock.least(lambda: torch.add(tiny, tiny), 200)
    factorisations: dict[str, dict[str, float]] = {name: {} for name in _FACTORISATIONS}

    def factorise(sizes: Iterable[int], share: float) -> None:
        for n in sizes:
            x = matrix(n, 2 * n)
            positive = x @ x.mT / n + torch.eye(n, device=device)
            for name, run in _FACTORISATIONS.items():
                if n <= _ALWAYS or not clock.over(share):
                    took = clock.least(lambda run=run, positive=positive: run(positive), 3)
                    factorisations[name][str(n)] = took

    factorise([n for n in _FACTORS if n <= _ALWAYS], 0.0)
    gemm: dict[str, dict[str, float]] = {"float32": {}, "bfloat16": {}}
    pairs = [(small, middle) for middle in _SIZES for small in _SIZES if small <= middle]
    for small, middle in sorted(pairs, key=lambda p: p[0] * p[1]):
        if clock.over(0.5) and len(gemm["float32"]) > len(_SIZES):
            break
        gemm["float32"][f"{small},{middle}"] = clock.product(matrix, small, middle, torch.float32, call)
    for small in (128, 512):
        gemm["bfloat16"][f"{small},{small}"] = clock.product(matrix, small, small, torch.bfloat16, call)
    factorise([n for n in _FACTORS if n > _ALWAYS], 0.7)
    bandwidth = {}
    for size in _BYTES:
        if bandwidth and clock.over(1.0):
            break
        a, out = torch.zeros(size // 12, device=device), torch.zeros(size // 12, device=device)
        took = clock.least(lambda a=a, out=out: torch.add(a, out, out=out), 3)
        bandwidth[str(size)] = size / max(took - call, 0.1 * took)
    return Profile(
        described(device), torch.__version__, gemm, factorisations["inverse"], factorisations["eigh"],
        factorisations["qr"], bandwidth, call,
    )  # fmt: skip


_FACTORISATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "inverse": lambda a: torch.cholesky_inverse(torch.linalg.cholesky_ex(a)[0]),
    "qr": torch.linalg.qr,
    "eigh": torch.linalg.eigh,
}


@dataclass(frozen=True)
class _Clock:
    device: torch.device
    deadline: float
    start: float = field(default_factory=time.perf_counter)

    def over(self, share: float) -> bool:
        """Whether this share of the time is spent."""
        return time.perf_counter() - self.start > share * (self.deadline - self.start)

    def least(self, run: Callable[[], Any], repeats: int) -> float:
        """Least seconds of a run, of ``repeats``: what others do on the machine only adds. The first warms up."""
        times = []
        for _ in range(repeats + 1):
            self._wait()
            start = self._now()
            run()
            self._wait()
            times.append(self._now() - start)
            if self.over(0.9) or times[-1] > 0.05 * (self.deadline - self.start):
                break
        return max(min(times[1:] or times), 1e-9)

    def product(
        self, matrix: Callable[..., torch.Tensor], small: int, middle: int, dtype: torch.dtype, call: float
    ) -> float:
        """Operations a second of a product whose smallest extents are these.

        The smallest is that of the result: as a sum over so few, a product takes the time of writing its result, which
        is told from the bandwidth.
        """
        long = max(_LONG, middle)
        left, right = matrix(small, middle, dtype=dtype), matrix(middle, long, dtype=dtype)
        took = self.least(lambda: torch.mm(left, right), 3)
        return 2.0 * long * small * middle / max(took - call, 0.1 * took)

    def _now(self) -> float:
        """Processor time where one thread does all the work: other processes have no part in it."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rate(rates: dict[str, float], small: int, middle: int) -> float:
    """Rate of a product, interpolated between the measured sizes; the largest known one beyond them."""
    known: dict[int, dict[str, float]] = {}
    for key, rate in rates.items():
        a, b = (int(part) for part in key.split(","))
        known.setdefault(b, {})[str(a)] = rate
    columns = {str(b): _interpolated(table, min(small, b)) for b, table in known.items()}
    return _interpolated(columns, middle)


def _interpolated(table: dict[str, float], at: float) -> float:
    """Values between those of the table, in logarithms of both; the nearest one outside."""
    points = sorted((float(key), value) for key, value in table.items())
    if at <= points[0][0]:
        return points[0][1]
    for (a, low), (b, high) in pairwise(points):
        if at <= b:
            share = math.log(at / a) / math.log(b / a)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return points[-1][1]


def _scaled(table: dict[str, float], n: int) -> float:
    """Seconds of a factorisation: interpolated, and beyond the largest size measured with the power of n of the last
    two, between 2.5 and 3: it still gains on smaller ones there."""
    points = sorted((int(key), seconds) for key, seconds in table.items())
    last, seconds = points[-1]
    if n <= last:
        return _interpolated(table, n)
    power = 3.0
    if len(points) > 1:
        (a, low), (b, high) = points[-2:]
        power = min(3.0, max(2.5, math.log(high / low) / math.log(b / a)))
    return seconds * (n / last) ** power
