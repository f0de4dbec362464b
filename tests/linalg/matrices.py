"""Random matrices for the linalg tests, with known spectra."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed)).Q


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with the given eigenvalues."""
    q = orthogonal(eigenvalues.shape[0], seed)
    matrix = (q * eigenvalues) @ q.mT
    return (matrix + matrix.mT) / 2


def spd(n: int, seed: int = 0) -> Tensor:
    """Symmetric positive definite with condition number 30."""
    return with_spectrum(torch.logspace(-1, 0.5, n, dtype=torch.float64), seed)


def spd_stack(count: int, n: int, seed: int = 0) -> Tensor:
    return torch.stack([spd(n, seed + i) for i in range(count)])


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Equal to ``rtol`` of the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert error <= rtol * scale, f"off by {error:.3g} where the scale is {scale:.3g}"
