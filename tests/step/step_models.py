"""Small models whose KL, loss and curvature are exact, and the probes that measure them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natgrad.linalg import DenseMatrix, LinearOperator
from natgrad.step import LocalModel, Trial

SIZES = {"a": 3, "b": 2}


def join(vector: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([vector[name] for name in sorted(vector)])


def split(vector: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    names = sorted(sizes)
    return dict(zip(names, vector.split([sizes[name] for name in names]), strict=True))


def blocks_of(matrix: Tensor, sizes: Mapping[str, int]) -> dict[str, LinearOperator]:
    """The diagonal blocks of a matrix over the joined blocks, as operators."""
    result, start = {}, 0
    for name in sorted(sizes):
        end = start + sizes[name]
        result[name] = DenseMatrix(matrix[start:end, start:end], symmetric=True)
        start = end
    return result


def psd(n: int, seed: int, rank: int | None = None) -> Tensor:
    root = torch.randn(n, rank or n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / n


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def local_model(gradient: Tensor, matrix: Tensor, sizes: Mapping[str, int], damping: float = 0.0, **rest) -> LocalModel:
    """The local model with the diagonal blocks of ``matrix`` as metric (its inverse is not used by searches)."""
    return LocalModel(split(gradient, sizes), blocks_of(matrix, sizes), {}, damping, **rest)


@dataclass
class QuadraticProbe:
    """loss(Δ) = loss0 + gᵀΔ + ½ ΔᵀHΔ and KL = ½ ΔᵀFΔ, both exact; remembers what it was asked."""

    fisher: Tensor
    gradient: Tensor | None = None
    hessian: Tensor | None = None
    loss0: float = 0.0

    def __post_init__(self) -> None:
        self.deltas: list[Tensor] = []

    def __call__(self, delta: Mapping[str, Tensor]) -> Trial:
        d = join(delta)
        self.deltas.append(d)
        loss = None
        if self.gradient is not None and self.hessian is not None:
            loss = self.loss0 + self.gradient @ d + 0.5 * d @ self.hessian @ d
        return Trial(kl=0.5 * d @ self.fisher @ d, loss=loss)

    def curvature(self, deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
        stacked = torch.stack([join(d) for d in deltas])
        return stacked @ self.fisher @ stacked.T


class NetworkProbe:
    """A real model θ ↦ outputs f [N, C] of an output family, measured by direct evaluation."""

    def __init__(self, theta: Tensor, sizes: Mapping[str, int], forward: Callable[[Tensor], Tensor], family) -> None:
        self.theta, self.sizes, self.forward, self.family = theta, sizes, forward, family

    def loss(self, theta: Tensor) -> Tensor:
        return self.family.nll(self.forward(theta)).mean()

    def kl(self, delta: Tensor) -> Tensor:
        old = self.family.distribution(self.forward(self.theta))
        new = self.family.distribution(self.forward(self.theta + delta))
        return torch.distributions.kl_divergence(old, new).mean()

    def __call__(self, delta: Mapping[str, Tensor]) -> Trial:
        d = join(delta)
        return Trial(kl=self.kl(d), loss=self.loss(self.theta + d))

    def gradient(self) -> Tensor:
        return torch.func.grad(self.loss)(self.theta)

    def fisher(self) -> Tensor:
        """The dense Fisher matrix, as the Hessian of the mean KL at Δ = 0: an oracle that knows no Λ."""
        return torch.func.hessian(self.kl)(torch.zeros_like(self.theta))

    def curvature(self, deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """(J d_i)ᵀ Λ (J d_j) by forward mode, Λ the family's own closed form."""
        f = self.forward(self.theta)
        pushed = torch.stack([torch.func.jvp(self.forward, (self.theta,), (join(d),))[1] for d in deltas])
        return torch.einsum("inc,ncd,jnd->ij", pushed, self.family.information(f), pushed) / f.shape[0]


class Softmax:
    """Categorical outputs."""

    outputs = 3

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def distribution(self, f: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Categorical(logits=f, validate_args=False)

    def nll(self, f: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(f, self.targets, reduction="none")

    def information(self, f: Tensor) -> Tensor:
        p = f.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


class Normal:
    """Mean and log scale of one Gaussian: the family whose KL is far from symmetric."""

    outputs = 2

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def distribution(self, f: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Normal(f[:, 0], f[:, 1].exp(), validate_args=False)

    def nll(self, f: Tensor) -> Tensor:
        return -self.distribution(f).log_prob(self.targets)

    def information(self, f: Tensor) -> Tensor:
        return torch.diag_embed(torch.stack([torch.exp(-2 * f[:, 1]), torch.full_like(f[:, 1], 2.0)], -1))


def network(family_class, seed: int = 0, dtype: torch.dtype = torch.float64, rows: int = 12) -> NetworkProbe:
    """A network of 2 → 3 → C with tanh, its two layers as blocks, on random data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator, dtype=torch.float64).to(dtype)
    if family_class is Softmax:
        family = Softmax(torch.randint(3, (rows,), generator=generator))
    else:
        family = Normal(torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype))
    c = family.outputs
    sizes = {"hidden": 9, "out": 4 * c}
    theta = torch.randn(9 + 4 * c, generator=generator, dtype=torch.float64).to(dtype)

    def forward(theta: Tensor) -> Tensor:
        w, b, v, u = theta.split([6, 3, 3 * c, c])
        return torch.tanh(x @ w.reshape(2, 3) + b) @ v.reshape(3, c) + u

    return NetworkProbe(theta, sizes, forward, family)


class ForbidWaiting(TorchDispatchMode):
    """Raises where a tensor's value is read by Python: float(), bool(), .item(), .tolist()."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
