"""What a step does to a device, as a list of operations: matrix products, factorisations, passes over memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gemm", "inverse", "eigh", "qr", "memory"]


@dataclass(frozen=True)
class Operation:
    """Something whose time a device profile knows.

    Args:
        kind: ``"gemm"`` (matrix product), ``"inverse"`` (Cholesky factor and inverse), ``"eigh"``, ``"qr"``, or
            ``"memory"`` (elementwise work, bound by bandwidth).
        flops: at two per multiply-add; of a factorisation n³ times its usual constant.
        bytes: read and written.
        shape: smallest and middle extent of a product; n of a factorisation, twice.
        count: how often it happens.
    """

    kind: Kind
    flops: float
    bytes: float
    shape: tuple[int, int] = (0, 0)
    count: float = 1.0


Work = tuple[Operation, ...]


def gemm(m: int, k: int, n: int, *, count: float = 1.0, itemsize: int = 4, share: float = 1.0) -> Operation:
    """``[m, k] × [k, n]``, ``count`` times; ``share`` of the operations where a part of the result is known."""
    small, middle, _ = sorted((m, k, n))
    return Operation("gemm", 2.0 * m * k * n * share, itemsize * (m * k + k * n + m * n), (small, middle), count)


def gram(rows: int, n: int, *, count: float = 1.0, itemsize: int = 4) -> Operation:
    """``xᵀx`` of ``[rows, n]``: a full product, of which wide ones skip the blocks below the diagonal."""
    return gemm(n, rows, n, count=count, itemsize=itemsize, share=1.0 if n < 512 else 0.625)


def inverse(n: int, *, count: float = 1.0, itemsize: int = 4) -> Operation:
    """The inverse of a positive definite matrix by its Cholesky factor: n³ in all (1/3 and 2/3)."""
    return Operation("inverse", float(n) ** 3, itemsize * 3.0 * n * n, (n, n), count)


def eigh(n: int, *, count: float = 1.0, itemsize: int = 4) -> Operation:
    """Eigenvalues and eigenvectors of a symmetric matrix, 9 n³ in the usual count."""
    return Operation("eigh", 9.0 * n**3, itemsize * 3.0 * n * n, (n, n), count)


def memory(entries: float, passes: float, *, itemsize: int = 4, count: float = 1.0) -> Operation:
    """``passes`` readings or writings of ``entries`` numbers."""
    return Operation("memory", entries * passes, itemsize * entries * passes, count=count)


def flops_of(work: Iterable[Operation], kinds: tuple[Kind, ...] = ("gemm", "inverse", "eigh", "qr")) -> float:
    """Floating point operations of matrix work; elementwise ones are not counted."""
    return sum(operation.flops * operation.count for operation in work if operation.kind in kinds)


def repeated(work: Iterable[Operation], count: float) -> Work:
    """The same work ``count`` times."""
    return tuple(Operation(o.kind, o.flops, o.bytes, o.shape, o.count * count) for o in work)
