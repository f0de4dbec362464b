"""One forward pass, remembered: what every layer saw, and where its output stands in the autograd graph.

The tape never touches parameters' gradients. It holds gradient *edges*, taken when the layer returned, so that
later in-place activations, another forward pass or gradient accumulation cannot change what it refers to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from natgrad.errors import ShapeError, StaleTapeError, UnsupportedError
from natgrad.network.layers import LayerUse, Note, rule_for
from natgrad.network.partition import Cell, Site
from natgrad.network.rows import DenseRows, EmbeddingRows, LinearRows, Rows
from natgrad.network.tied import TiedRows


@dataclass
class Tape:
    """What one forward pass of ``model`` left behind.

    Args:
        model: the network (weakly held).
        uses: calls of each supported layer, by qualified module name, in order.
        output: the network's output ``[N, *positions, C]``, set when the pass ends.
        hidden: whether a layer was called without a graph, of which there is nothing here.
        packed: whether autograd keeps something else than a layer's input (checkpointing), which only this holds then.
    """

    _model: weakref.ref[nn.Module]
    uses: dict[str, list[LayerUse]] = field(default_factory=dict)
    output: Tensor | None = None
    hidden: bool = False
    packed: bool = False

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise StaleTapeError("The model of a recorded forward pass no longer exists. Keep a reference to it.")
        return model

    def rows(self, cell_list: Sequence[Cell], columns: Tensor) -> dict[str, Rows]:
        """Jacobian rows ``J_nᵀ s_kn`` of each cell.

        Args:
            cell_list: the cells whose rows are wanted.
            columns: ``[K, *output.shape]``.

        Returns:
            Rows by cell name; a cell that took no part in the pass has no entry.
        """
        covered = [c for c in cell_list if any(self.uses.get(site.module) for site in c.sites)]
        # A layer whose parameters are in several cells is gone through once.
        layers = list(dict.fromkeys(site.module for c in covered for site in c.sites if self.uses.get(site.module)))
        found = iter(self.backward([use.edge for layer in layers for use in self.uses[layer]], columns))
        gradients = {layer: [next(found) for _ in self.uses[layer]] for layer in layers}
        out: dict[str, Rows] = {}
        for cell in covered:
            rows = self.cell_rows(cell, gradients, columns.shape[1])
            if rows is not None:
                out[cell.name] = rows
        raw = [c for c in cell_list if c.module is None]
        out.update(self.example_rows(raw, columns))
        return out

    def cell_rows(self, cell: Cell, gradients: Mapping[str, Sequence[Tensor | None]], n: int) -> Rows | None:
        """Rows of a cell of n examples from the gradients ``[K, *output.shape]`` of every use of its layers."""
        rows: Rows | None = None
        for site in cell.sites:
            for use, g in zip(self.uses.get(site.module, ()), gradients.get(site.module, ()), strict=True):
                if g is None or not use.input.numel() or not use.concerns(site.names):
                    continue
                new = self._use_rows(cell, site, use, g)
                seen = new.shape[1]
                # A layer may see tokens and batch as one axis; whether they lie as folding assumes is checked once.
                new = new.folded(n) if seen != n and n and seen % n == 0 else new
                if cell.layout.mixed and isinstance(new, EmbeddingRows | LinearRows):
                    new = TiedRows((new,))
                rows = new if rows is None else rows.joined(new)
        return rows

    def _use_rows(self, cell: Cell, site: Site, use: LayerUse, g: Tensor) -> Rows:
        if use.input._version != use.version:
            raise StaleTapeError(
                f"The input of layer {cell.name!r} was changed in place after the layer used it. "
                "Use an out-of-place operation there."
            )
        module = self.model.get_submodule(site.module)
        rule = use.rule or rule_for(module)
        assert rule is not None
        rows = rule.rows(module, accumulation(use.input), accumulation(g), site.names)
        if rule.plain and isinstance(rows, LinearRows):
            x, parts = use.input, tuple(name.rpartition(".")[2] for name in site.names)
            return replace(rows, origin=(x.data_ptr(), x.dtype, x.shape, x.stride(), use.version, parts))
        return rows

    def example_rows(self, cell_list: Sequence[Cell], columns: Tensor) -> dict[str, Rows]:
        """Rows of parameters that no layer rule covers: one backward pass per example, batched by vmap."""
        if not cell_list:
            return {}
        parameters = dict(self.model.named_parameters())
        targets = [parameters[name] for cell in cell_list for name in cell.parameters]
        n = columns.shape[1]
        selector = torch.eye(n, dtype=columns.dtype, device=columns.device)
        selector = selector.reshape(n, n, *[1] * (columns.dim() - 2))
        per_column = [self.backward(targets, selector * column) for column in columns]
        out: dict[str, Rows] = {}
        for i, cell in enumerate(cell_list):
            grads = [grad[i] for grad in per_column]
            if all(g is None for g in grads):
                continue
            out[cell.name] = DenseRows(accumulation(torch.stack([g.reshape(n, -1) for g in grads if g is not None])))
        return out

    def backward(self, targets: Sequence[Tensor | GradientEdge], columns: Tensor) -> list[Tensor | None]:
        """``Jᵀ s_k`` with respect to each target for every column, ``[K, *target.shape]`` (None where unused)."""
        if self.output is None:
            raise StaleTapeError("The forward pass has not ended, so there is no output to differentiate yet.")
        if columns.shape[1:] != self.output.shape:
            raise ShapeError(
                f"Columns of shape {tuple(columns.shape[1:])} do not fit an output of shape {tuple(self.output.shape)}."
            )
        if not targets:
            return []
        columns = columns.to(self.output.dtype)
        try:
            found = self._batched_backward(targets, columns)
        except RuntimeError as error:
            raise clearer(error) from error
        if any(g is not None and g.is_sparse for g in found):
            raise UnsupportedError(
                "A parameter has sparse gradients, which natgrad does not support. Make its embedding without "
                "sparse=True."
            )
        return found

    def _batched_backward(self, targets: Sequence[Tensor | GradientEdge], columns: Tensor) -> list[Tensor | None]:
        output: Any = self.output
        inputs: Any = list(targets)
        if columns.shape[0] > 1:
            try:
                return list(
                    torch.autograd.grad(
                        output, inputs, columns, retain_graph=True, allow_unused=True, is_grads_batched=True
                    )
                )
            except RuntimeError as error:
                # Some backward formulas have no batching rule; the loop below gives the same result.
                if "second time" in str(error) or "checkpoint" in str(error).lower():
                    raise
        if columns.shape[0] == 1:
            grads = torch.autograd.grad(output, inputs, columns[0], retain_graph=True, allow_unused=True)
            return [None if g is None else g[None] for g in grads]
        per_column = [
            torch.autograd.grad(output, inputs, column, retain_graph=True, allow_unused=True) for column in columns
        ]
        return [None if grads[0] is None else torch.stack(grads) for grads in zip(*per_column, strict=True)]


def clearer(error: RuntimeError) -> Exception:
    """What went wrong in a backward pass of natgrad's own, in the user's terms where the cause is known."""
    if "checkpoint" in str(error).lower():
        return UnsupportedError(
            "The forward pass uses activation checkpointing that allows no backward pass but the loss's own: it wraps "
            "the whole model, or is reentrant around parts without any layer that natgrad knows. Use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) on parts of the model."
        )
    if "second time" in str(error) or "modified by an inplace" in str(error):
        return StaleTapeError(
            "The graph of the observed forward pass is gone: backward() has already freed it, or an operation changed "
            "a saved tensor in place. Call observe(output) before loss.backward()."
        )
    return error


class Recorder:
    """Records one forward pass at a time: hooks stand on the layers only while it runs.

    They come first, so that a model that is itself a layer is recorded before an observer of the model takes them off.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tape = Tape(weakref.ref(model))
        self._ends: list[Callable[[], None]] = []
        for name, module in model.named_modules():
            rule = rule_for(module)
            if rule is not None:
                end = rule.watch(module, self._note(name))
                if end is None:
                    end = module.register_forward_hook(self._hook(name), with_kwargs=True, prepend=True).remove
                self._ends.append(end)

    def _note(self, name: str) -> Note:
        tape = self.tape

        def note(layer: str, use: LayerUse | None) -> None:
            tape.hidden = tape.hidden or use is None
            tape.packed = tape.packed or _packing()
            if use is not None:
                tape.uses.setdefault(".".join(part for part in (name, layer) if part), []).append(use)

        return note

    def _hook(self, name: str) -> Any:
        tape = self.tape

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.compiler.is_compiling():
                return  # traced into a graph: there is nothing to watch; the coverage check names what was not seen
            tape.hidden = tape.hidden or not torch.is_grad_enabled()
            if not torch.is_grad_enabled() or not isinstance(output, Tensor) or not output.requires_grad:
                return
            x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
            if isinstance(x, Tensor):
                tape.packed = tape.packed or _packing()
                use = LayerUse(x.detach(), x._version, get_gradient_edge(output))
                tape.uses.setdefault(name, []).append(use)

        return record

    def stop(self) -> None:
        """Take the hooks off again."""
        for end in self._ends:
            end()
        self._ends = []


def _packing() -> bool:
    """Whether tensors that are saved for the backward pass go through hooks now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore


@contextmanager
def recording(model: nn.Module) -> Iterator[Tape]:
    """Record the forward pass that runs inside the ``with`` statement."""
    recorder = Recorder(model)
    try:
        yield recorder.tape
    finally:
        recorder.stop()


def accumulation(t: Tensor) -> Tensor:
    """``t`` in the precision in which statistics are accumulated: float32 or better; indices as they are."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def output_tensor(output: Any) -> Tensor | None:
    """The tensor a likelihood reads: the output itself, or its ``logits`` (as transformers' models return)."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def as_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward pass from the forms in which a user gives an input."""
    if isinstance(x, dict):
        return (), dict(x)
    return (x, {}) if isinstance(x, tuple) else ((x,), {})
