"""What the layers' rules account for in a real forward pass: found by comparing with autograd, not listed by type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from natgrad.network.partition import cells, trainable_parameters
from natgrad.network.tape import Tape


def uncovered_parameters(tape: Tape, generator: torch.Generator | None = None) -> dict[str, str]:
    """Parameters whose layer rule does not account for their whole gradient in this pass, with the reason.

    Compares, for one random column, the sum of the rows with what an ordinary backward pass gives. This finds layers
    that bypass their module (``F.linear`` on another layer's weight), re-parametrised weights and anything else that a
    list of module types would miss.
    """
    output = tape.output
    assert output is not None
    column = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
    column = column.to(output.dtype)[None]
    cell_list = [cell for cell in cells(tape.model) if cell.module is not None]
    rows = tape.rows(cell_list, column)
    parameters = trainable_parameters(tape.model)
    names = [name for cell in cell_list for name in cell.parameters]
    truth = dict(zip(names, tape.backward([parameters[n] for n in names], column), strict=True))
    found: dict[str, str] = {}
    for cell in cell_list:
        expected = {n: truth[n] for n in cell.parameters}
        if all(g is None for g in expected.values()):
            continue  # took no part in this pass
        if cell.name not in rows:
            if not any(bool(g.any()) for g in expected.values() if g is not None):
                continue  # an expert to which no token was routed
            why = f"{cell.name} is used without calling its module, or is inside a compiled graph"
            found.update({n: why for n in cell.parameters})
            continue
        whole = {n: g if g is not None else torch.zeros(1, *s, dtype=output.dtype, device=output.device)
                 for (n, g), s in zip(expected.items(), cell.shapes, strict=True)}  # fmt: skip
        want, have = cell.pack(whole).float(), rows[cell.name].total().float()
        # Low-precision gradients are rounded on the way; a missing contribution is of the gradient's own size.
        tolerance = 5e-2 if output.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if torch.linalg.vector_norm(want - have) > tolerance * torch.linalg.vector_norm(want):
            found.update(
                {
                    n: f"{cell.name}'s layer rule does not give the whole gradient (also used outside its module?)"
                    for n in cell.parameters
                }
            )
    return found


def unreached_parameters(tape: Tape, names: Sequence[str]) -> frozenset[str]:
    """Those of the parameters called ``names`` on which the observed output does not depend, as autograd sees it.

    Nor does it on those of a layer that was only called on nothing (an expert to which no token was routed).
    """
    output = tape.output
    assert output is not None
    parameters = {n: p for n, p in trainable_parameters(tape.model).items() if n in set(names)}
    grads = tape.backward(list(parameters.values()), torch.zeros_like(output)[None])
    idle = {layer for layer, uses in tape.uses.items() if not any(use.input.numel() for use in uses)}
    return frozenset(
        name
        for name, grad in zip(parameters, grads, strict=True)
        if grad is None or (name.rpartition(".")[0] in idle and not bool(grad.any()))
    )


def misaligned_parameters(
    tape: Tape, generator: torch.Generator | None = None, *, batch_statistics: bool = True
) -> dict[str, str]:
    """Parameters whose rows cannot be told apart by example in this pass, with the reason.

    The rows of a column that is zero for all examples but the first must be zero for all others. They are not where a
    layer has another axis than the batch in front (time-first sequences), or no batch axis (a table of positions).
    BatchNorm in training mode couples all examples: a row of a layer before it then mixes columns of many examples,
    which no exact structure may use. Without ``batch_statistics`` such models are left alone (K-FAC's usual practice).
    """
    output = tape.output
    assert output is not None
    n = output.shape[0]
    coupled = _coupled(tape.model)
    if n < 2 or (coupled and not batch_statistics):
        return {}
    column = torch.zeros_like(output)
    column[0] = torch.randn(output.shape[1:], generator=generator, device=output.device).to(output.dtype)
    cell_list = [cell for cell in cells(tape.model) if cell.module is not None]
    found: dict[str, str] = {}
    for name, rows in tape.rows(cell_list, column[None]).items():
        size = rows.largest()
        if rows.shape[1] != n:
            reason = (
                f"{name} saw {rows.shape[1]} rows where the output has {n}, so that they cannot be told apart "
                "by example (a table of positions, or tokens routed to an expert)"
            )
        elif bool((size[1:] > 1e-6 * size.max()).any()):
            reason = f"the first axis of {name}'s input is not the batch"
            if coupled:
                reason = f"batch statistics (BatchNorm in training mode) mix the examples that {name} sees"
        else:
            continue
        found.update({p: reason for cell in cell_list if cell.name == name for p in cell.parameters})
    return found


def mixing_parameters(tape: Tape, generator: torch.Generator | None = None) -> dict[str, str]:
    """Parameters of layers that are called once for many examples (a table of positions), with the reason.

    At such a call the columns of all examples add up before any product is formed. Found by two columns, one zero for
    the first half of the examples and one for the second: no gradient may be there in both. Batches that BatchNorm
    couples are left alone (K-FAC's usual practice).
    """
    output = tape.output
    assert output is not None
    n = output.shape[0]
    if n < 2 or _coupled(tape.model):
        return {}
    columns = torch.randn(2, *output.shape, generator=generator, device=output.device).to(output.dtype)
    columns[0, : n // 2] = 0
    columns[1, n // 2 :] = 0
    cell_list = [cell for cell in cells(tape.model) if cell.module is not None]
    first, second = (tape.rows(cell_list, column[None]) for column in columns)
    found: dict[str, str] = {}
    for cell in cell_list:
        if cell.name in first and cell.name in second:
            one, other = first[cell.name].largest_by_position(), second[cell.name].largest_by_position()
            if bool(((one > 1e-6 * one.max()) & (other > 1e-6 * other.max())).any()):
                found.update({p: f"{cell.name} is called once for several examples" for p in cell.parameters})
    return found


def _coupled(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
