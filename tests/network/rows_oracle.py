"""Jacobian rows against the gradients of single examples, by ordinary backward passes in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from natgrad.network import Tape, cells, misaligned_parameters, record, uncovered_parameters
from support import assert_close

K = 2


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prepared(model: nn.Module) -> nn.Module:
    """In float64, with parameters away from where layers start."""
    model = model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.3 * normal(*p.shape, seed=i)
    return model


def example_gradients(output: Tensor, model: nn.Module, columns: Tensor) -> dict[str, Tensor]:
    """[K, N, *shape] by parameter: one ordinary backward pass per column and example."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {n: [] for n in parameters}
    for column in columns:
        for n in range(len(output)):
            grads = torch.autograd.grad(
                (output[n] * column[n]).sum(), list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for (name, p), g in zip(parameters.items(), grads, strict=True):
                found[name].append(torch.zeros_like(p) if g is None else g)
    return {n: torch.stack(g).reshape(len(columns), len(output), *g[0].shape) for n, g in found.items()}


def checked_rows(model: nn.Module, x, covered: set[str], tolerance: float = 1e-12) -> Tape:
    """The rows of the covered parameters are the gradients of single examples, and the covered ones are these."""
    tape = record(model, x)
    output = tape.output
    assert output is not None
    columns = torch.randn(K, *output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    uncovered = uncovered_parameters(tape)
    uncovered |= misaligned_parameters(tape)
    found = [cell for cell in cells(model, uncovered) if cell.module is not None]
    assert {n for cell in found for n in cell.parameters} == covered, uncovered
    expected = example_gradients(output, model, columns)
    rows = tape.rows(found, columns)
    for cell in found:
        dense = rows[cell.name].dense()
        for name, have in cell.unpack(dense).items():
            assert_close(have, expected[name], tolerance)
        assert_close(cell.pack({n: expected[n] for n in cell.parameters}), dense, tolerance)
        flat, v = dense.flatten(0, 1), normal(cell.size, seed=9)
        assert_close(rows[cell.name].gram(), flat @ flat.T, tolerance)
        assert_close(rows[cell.name].matvec(v), flat @ v, tolerance)
        assert_close(rows[cell.name].rmatvec(flat[:, 0]), flat.T @ flat[:, 0], tolerance)
        assert_close(rows[cell.name].squared_sum(), flat.square().sum(0), tolerance)
        assert_close(rows[cell.name].total(), dense.sum(1), tolerance)
        assert (rows[cell.name].largest() > 0).tolist() == (dense.abs().amax((0, 2)) > 0).tolist()
    return tape


def parameter_names(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_parameters()}
