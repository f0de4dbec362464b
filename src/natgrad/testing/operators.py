"""Conformance check for linear operators: everything an operator offers, against its dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.linalg import LinearOperator, Solver


def check_operator(
    operator: LinearOperator,
    dense: Tensor,
    *,
    damping: float = 0.1,
    solver: Solver | None = None,
    invertible: bool = True,
    logdet: bool = True,
    rtol: float | None = None,
    seed: int = 0,
) -> None:
    """Assert that ``operator`` behaves as the matrix ``dense`` in every method of LinearOperator.

    ``dense`` is an independently computed float64 matrix of the operator's shape. ``invertible=False`` skips inverse,
    solve and logdet; else dense + damping I must be invertible, and for ``logdet`` positive definite. ``rtol`` is
    relative to the largest entry of each expected result; the default is √eps of the operator's dtype, grown with the
    condition number for inverses. Raises AssertionError that names the method.
    """
    checker = _Checker(operator, dense, rtol, seed)
    checker.shape()
    checker.products()
    checker.algebra()
    if operator.shape[0] == operator.shape[1]:
        checker.square()
        if invertible:
            checker.inverse(damping, solver, logdet)


class _Checker:
    def __init__(self, operator: LinearOperator, dense: Tensor, rtol: float | None, seed: int) -> None:
        self.operator = operator
        self.dense = dense.detach().to("cpu", torch.float64)
        eps = torch.finfo(operator.dtype).eps
        self.rtol = eps**0.5 if rtol is None else rtol
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> tuple[Tensor, Tensor]:
        """The same numbers in the operator's dtype and in float64 (after rounding to the former)."""
        value = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.operator.dtype)
        return value.to(self.operator.device), value.double()

    def close(self, what: str, actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
        name = f"{type(self.operator).__name__}: {what}"
        assert tuple(actual.shape) == tuple(expected.shape), (
            f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
        assert actual.device.type == self.operator.device.type, f"{name} is on {actual.device}"
        if expected.numel() == 0:
            return
        error = float((actual.detach().to("cpu", torch.float64) - expected).abs().max())
        bound = self.rtol * factor * max(float(expected.abs().max()), 1e-300)
        assert error <= bound, f"{name} is off by {error:.3g}, more than {bound:.3g}"

    def shape(self) -> None:
        shape, expected = self.operator.shape, tuple(self.dense.shape)
        assert tuple(shape) == expected, f"shape is {shape}, expected {expected}"
        if self.operator.symmetric:
            self.close("symmetric (the dense matrix is not)", self.dense.mT.to(self.operator.device), self.dense)

    def products(self) -> None:
        op, dense = self.operator, self.dense
        m, n = dense.shape
        x, x64 = self.random(n)
        batch, batch64 = self.random(2, 3, n)
        back, back64 = self.random(2, 3, m)
        columns, columns64 = self.random(n, 4)
        self.close("matvec", op.matvec(x), dense @ x64)
        self.close("matvec of a batch", op.matvec(batch), batch64 @ dense.mT)
        self.close("matvec of an empty batch", op.matvec(batch[:0]), batch64[:0] @ dense.mT)
        self.close("rmatvec", op.rmatvec(back[0, 0]), back64[0, 0] @ dense)
        self.close("rmatvec of a batch", op.rmatvec(back), back64 @ dense)
        self.close("A @ vector", op @ x, dense @ x64)
        self.close("A @ matrix", op @ columns, dense @ columns64)
        self.close("to_dense", op.to_dense(), dense)
        self.close("T", op.T.to_dense(), dense.mT)
        self.close("T.matvec", op.T.matvec(back), back64 @ dense)
        self.close("gram", op.gram(), dense.mT @ dense)

    def algebra(self) -> None:
        op, dense = self.operator, self.dense
        tensor = torch.tensor(0.5, dtype=op.dtype, device=op.device)
        x, x64 = self.random(dense.shape[1])
        cases = {
            "A + A": (op + op, 2 * dense),
            "A - 3 A": (op - 3 * op, -2 * dense),
            "-A": (-op, -dense),
            "2 A": (2 * op, 2 * dense),
            "A * tensor": (op * tensor, 0.5 * dense),
            "tensor * A": (tensor * op, 0.5 * dense),
            "A / 4": (op / 4, dense / 4),
            "A.T @ A": (op.T @ op, dense.mT @ dense),
            "(A @ A.T).T": ((op @ op.T).T, dense @ dense.mT),
            "(A + 2 A).T": ((op + 2 * op).T, 3 * dense.mT),
        }
        for name, (actual, expected) in cases.items():
            assert isinstance(actual, LinearOperator), f"{name} is a {type(actual).__name__}, not a LinearOperator"
            self.close(name, actual.to_dense(), expected)
            if expected.shape[1] == x.shape[0]:
                self.close(f"({name}) @ x", actual @ x, expected @ x64)

    def square(self) -> None:
        op, dense = self.operator, self.dense
        v, v64 = self.random(2, 3, dense.shape[0])
        self.close("diagonal", op.diagonal(), dense.diagonal())
        scale = float(dense.abs().max()) * dense.shape[0] / max(abs(float(dense.trace())), 1e-300)
        self.close("trace", op.trace(), dense.trace(), factor=max(scale, 1.0))
        expected = torch.einsum("...i,ij,...j->...", v64, dense, v64)
        # An indefinite form may cancel: measure against the terms it is made of.
        terms = torch.einsum("...i,ij,...j->...", v64.abs(), dense.abs(), v64.abs())
        factor = float(terms.max()) / max(float(expected.abs().max()), 1e-300)
        self.close("quad", op.quad(v), expected, factor=factor)

    def inverse(self, damping: float, solver: Solver | None, logdet: bool) -> None:
        op = self.operator
        n = self.dense.shape[0]
        damped = self.dense + damping * torch.eye(n, dtype=torch.float64)
        expected = torch.linalg.inv(damped)
        factor = max(1.0, float(torch.linalg.cond(damped)) * self.rtol)
        inverse = op.inverse(damping=damping, solver=solver)
        b, b64 = self.random(n)
        columns, columns64 = self.random(n, 3)
        batch, batch64 = self.random(2, 3, n)
        self.close("inverse.matvec", inverse.matvec(b), expected @ b64, factor)
        self.close("inverse.matvec of a batch", inverse.matvec(batch), batch64 @ expected.mT, factor)
        self.close("inverse.rmatvec", inverse.rmatvec(b), b64 @ expected, factor)
        self.close("inverse.to_dense", inverse.to_dense(), expected, factor)
        self.close("inverse.diagonal", inverse.diagonal(), expected.diagonal(), factor)
        self.close("inverse.trace", inverse.trace(), expected.trace(), factor)
        self.close("solve of a vector", op.solve(b, damping=damping, solver=solver), expected @ b64, factor)
        self.close("solve of a matrix", op.solve(columns, damping=damping, solver=solver), expected @ columns64, factor)
        assert inverse.report.method, f"{type(op).__name__}: the report of the inverse names no method"
        if logdet:
            actual = op.logdet(damping=damping, solver=solver)
            log_eigenvalues = torch.linalg.eigvals(damped).abs().log()
            spread = float(log_eigenvalues.abs().sum()) / max(abs(float(log_eigenvalues.sum())), 1e-300)
            self.close("logdet", actual, torch.linalg.slogdet(damped).logabsdet, max(factor, spread))
