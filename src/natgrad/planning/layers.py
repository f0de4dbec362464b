"""How a batch meets the layers: rows that each sees, and what forward and backward pass take without natgrad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from natgrad.errors import ArgumentError
from natgrad.network import EmbeddingRows, LinearRows, Rows, Tape, as_arguments, output_tensor, recording
from natgrad.planning.shapes import Geometry
from natgrad.planning.work import Operation, Work, gemm, memory

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
# Elementwise passes over a layer's output in forward and backward where no pass was seen: activation and its gradient,
# a norm or a residual sum now and then, the copy that autograd makes.
_PASSES_FORWARD, _PASSES_BACKWARD = 4, 6


@dataclass(frozen=True)
class Layer:
    """A cell with the batch that it sees.

    Args:
        geometry: its matrices.
        rows: examples times positions that share the parameters; 0 where the pass does not reach it.
        examples: rows of the batch.
        first: whether no gradient of its input is needed.
    """

    geometry: Geometry
    rows: int
    examples: int
    first: bool = False

    @property
    def positions(self) -> int:
        """Positions per example that share the parameters."""
        return max(1, math.ceil(self.rows / self.examples))


@dataclass(frozen=True)
class Passes:
    """Forward and backward pass of a model on a batch.

    Args:
        layers: what every cell sees.
        forward, backward: the work of each; the backward pass includes the gradients of parameters.
        sampled: of a backward pass to the layers' outputs alone, which sampled labels take.
        outputs: numbers in the model's output.
        seen: whether a pass was run to find this, or the same number of rows taken for every layer.
    """

    layers: tuple[Layer, ...]
    forward: Work
    backward: Work
    sampled: Work
    outputs: int
    seen: bool


def assumed(found: tuple[Geometry, ...], batch: int, tokens: int) -> Passes:
    """Passes in which every layer sees ``batch`` times ``tokens`` rows; products of attention are not counted."""
    matrices = [g for g in found if g.groups]
    layers = tuple(Layer(g, batch * tokens, batch, bool(matrices) and g is matrices[0]) for g in found)
    forward = tuple(o for layer in layers for o in forward_of(layer))
    backward = tuple(o for layer in layers for o in (*inputs_of(layer), *weights_of(layer)))
    outputs = batch * tokens * (matrices[-1].outputs if matrices else 1)
    sampled = tuple(o for layer in layers for o in (*inputs_of(layer), *ones_of(layer)))
    return Passes(layers, forward, backward, sampled, outputs, seen=False)


def forward_of(layer: Layer) -> Work:
    """The layer's own product, and the elementwise operations that follow it."""
    g, rows = layer.geometry, layer.rows
    if not g.groups:
        return (memory(rows * g.inputs, _PASSES_FORWARD),)
    width = g.outputs * g.groups
    product = () if g.embedding else (gemm(rows, g.inputs, g.outputs, count=g.groups),)
    return (*product, memory(rows * width, _PASSES_FORWARD))


def inputs_of(layer: Layer) -> Work:
    """The gradient of the layer's input, and of the elementwise operations after it."""
    g, rows = layer.geometry, layer.rows
    if not g.groups:
        return (memory(rows * g.inputs, _PASSES_BACKWARD),)
    needed = not (g.embedding or layer.first)
    product = (gemm(rows, g.outputs, g.inputs, count=g.groups),) if needed else ()
    return (*product, memory(rows * g.outputs * g.groups, _PASSES_BACKWARD))


def ones_of(layer: Layer) -> Work:
    """The copy of the layer's input with a one for the bias."""
    g = layer.geometry
    return (memory(layer.rows * g.inputs, 2, count=g.groups),) if g.groups and not g.embedding else ()


def weights_of(layer: Layer) -> Work:
    """The gradient of the layer's parameters."""
    g, rows = layer.geometry, layer.rows
    if not g.groups or g.embedding:
        return (memory(g.cell.size + rows * g.outputs, 2),)
    return (gemm(g.outputs, rows, g.inputs, count=g.groups),)


def seen(model: nn.Module, found: tuple[Geometry, ...], inputs: Any) -> Passes:
    """Passes of ``model`` on ``inputs``, of which only shapes and dtypes count where it is on the meta device.

    Raises:
        ArgumentError: the model does not run on them there.
    """
    device = next(model.parameters()).device
    arguments = pytree.tree_map_only(Tensor, lambda t: t.detach().to(device), as_arguments(inputs))
    forward, backward, sampled = _Counter(), _Counter(), _Counter()
    try:
        with torch.enable_grad(), recording(model) as tape, forward:
            raw = model(*arguments[0], **arguments[1])
        output = output_tensor(raw)
        if output is None:
            output = next((t for t in pytree.tree_leaves(raw) if isinstance(t, Tensor) and t.requires_grad), None)
        if output is None or output.dim() == 0:
            raise ArgumentError("The model's output is no tensor with a batch axis, so its batch cannot be told.")
        tape.output, column = output, torch.zeros_like(output)
        with sampled:
            rows = tape.rows([g.cell for g in found if g.cell.module is not None], column[None])
        with backward:
            torch.autograd.grad(output, [p for p in model.parameters() if p.requires_grad], column, allow_unused=True)
    except ArgumentError:
        raise
    except Exception as error:  # a model may do anything
        raise ArgumentError(
            f"The model does not run on inputs without memory ({type(error).__name__}: {error}). Give batch= and "
            "tokens= instead of inputs=, or inputs that fit it."
        ) from error
    examples = output.shape[0]
    layers = tuple(Layer(g, _seen(g, rows, tape, examples), examples) for g in found)
    return Passes(layers, tuple(forward.work), tuple(backward.work), tuple(sampled.work), output.numel(), seen=True)


def _seen(geometry: Geometry, rows: Mapping[str, Rows], tape: Tape, examples: int) -> int:
    """Rows that a cell's layer saw."""
    cell = geometry.cell
    if cell.module is None:
        return examples
    if cell.name not in rows:
        return 0
    if geometry.groups:
        return _count(rows[cell.name])
    return sum(use.input.numel() for use in tape.uses[cell.module]) // max(cell.shapes[0].numel(), 1)


def _count(rows: Rows) -> int:
    if isinstance(rows, LinearRows):
        return rows.a.shape[1] * rows.a.shape[2]
    if isinstance(rows, EmbeddingRows):
        return rows.index.numel()
    return sum(_count(part) for part in getattr(rows, "parts", ())) or rows.shape[1]


class _Counter(TorchDispatchMode):
    """Writes down every operation that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket._qualified_op_name.removeprefix("aten::")
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if name in _PRODUCTS:
            self.work.extend(_product(name, args, results))
        elif not func.is_view and name != "detach" and results:
            entries = sum(t.numel() for t in tensors) + sum(t.numel() for t in results)
            self.work.append(memory(entries, 1, itemsize=results[0].element_size()))
        return out


def _product(name: str, args: Any, results: list[Tensor]) -> list[Operation]:
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        left, right = (args[1], args[2]) if name in ("addmm", "baddbmm") else (args[0], args[1])
        count = left.shape[0] if left.dim() == 3 else 1
        size = left.element_size()
        return [gemm(left.shape[-2], left.shape[-1], right.shape[-1], count=count, itemsize=size)]
    backward = name == "convolution_backward"
    x, w, groups = (args[1], args[2], args[9]) if backward else (args[0], args[1], args[8])
    positions = (args[0] if backward else results[0]).shape[2:].numel() * x.shape[0]
    inner, outer = w[0].numel(), w.shape[0] // groups
    wanted = sum(args[10][:2]) if backward else 1
    return [gemm(positions, inner, outer, count=groups * wanted, itemsize=x.element_size())]
