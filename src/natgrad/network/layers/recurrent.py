"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: two linear layers per layer and direction, whose positions are the steps.

torch runs them as one operation, inside which the gates' gradients are not seen. They are found by running the layer
once more, step by step: from the gradient of its output (or of a final state) back to both products ``W_ih x_t + b_ih``
and ``W_hh h_{t-1} + b_hh`` of every step. Where the network uses output and final state, their rows add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from natgrad.network.layers.base import LayerRule, LayerUse, Layout, Note
from natgrad.network.rows import LinearRows, Rows, with_ones

Taps = dict[str, tuple[Tensor, Tensor]]
"""By ``ih_l0``, ``hh_l0``, …: inputs ``[N, T, in]`` and output gradients ``[K, N, T, out]``."""


class RecurrentRule(LayerRule):
    """The matrices of a recurrent layer. None is served where dropout acts between layers, or with ``proj_size``."""

    def parts(self, module: nn.Module) -> tuple[tuple[str, ...], ...]:
        layer: Any = module
        if layer.proj_size or (layer.dropout and layer.num_layers > 1):
            return ()
        kinds = ("weight", "bias") if layer.bias else ("weight",)
        return tuple(tuple(f"{k}_{side}{s}" for k in kinds) for s in _suffixes(layer) for side in ("ih", "hh"))

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for part in self.parts(module) for name in part)

    def layout(self, module: nn.Module) -> Layout:
        return Layout(1)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        raise NotImplementedError("The uses of a recurrent layer come with rules of their own.")

    def watch(self, module: nn.Module, note: Note) -> Callable[[], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if not torch.is_grad_enabled():
                note("", None)
                return
            given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
            x, hx = given["input"], given.get("hx")
            if not isinstance(x, Tensor) or x.dim() != 3 or not self.parts(module):
                return  # packed sequences have no axis of examples
            states = () if hx is None else tuple(t.detach() for t in (hx if isinstance(hx, tuple) else (hx,)))
            results = (output[0], *(output[1] if isinstance(output[1], tuple) else (output[1],)))
            for i, result in enumerate(results):
                if result.requires_grad:
                    rule = _ResultRule(i, states)
                    note("", LayerUse(x.detach(), x._version, get_gradient_edge(result), rule))

        return module.register_forward_hook(record, with_kwargs=True, prepend=True).remove


@dataclass(frozen=True)
class _ResultRule(RecurrentRule):
    """Rows by way of one result of a call: the output (0), the final h (1) or the final c (2)."""

    result: int
    states: tuple[Tensor, ...]
    _known: list[tuple[Tensor, Taps]] = field(default_factory=list, compare=False)

    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        if not (self._known and self._known[0][0] is g):  # all matrices of the layer ask in turn
            self._known[:] = [(g, _taps(module, x, self.states, self.result, g))]
        a, gates = self._known[0][1][trainable[0].split("_", 1)[1]]
        weight, bias = (any(n.startswith(kind) for n in trainable) for kind in ("weight", "bias"))
        return LinearRows(with_ones(a[None], weight, bias), gates[:, None])


def _suffixes(layer: Any) -> list[str]:
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"_l{i}{end}" for i in range(layer.num_layers) for end in ends]


@torch.enable_grad()
def _taps(layer: Any, x: Tensor, states: tuple[Tensor, ...], result: int, g: Tensor) -> Taps:
    x = x if layer.batch_first else x.transpose(0, 1)
    known = {n: p.detach().to(x.dtype) for n, p in layer._parameters.items() if p is not None}
    sequence, seen, ends = list(x.unbind(1)), {}, []
    suffixes, directions = _suffixes(layer), 2 if layer.bidirectional else 1
    for i in range(layer.num_layers):
        outputs = []
        for d in range(directions):
            place = i * directions + d
            zero = x.new_zeros(len(x), layer.hidden_size)
            state = tuple(s[place].to(x.dtype) for s in states) or (zero,) * (2 if layer.mode == "LSTM" else 1)
            steps, seen[suffixes[place]], state = _unrolled(layer.mode, sequence, state, known, suffixes[place], d == 1)
            outputs.append(steps)
            ends.append(state)
        sequence = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    if result:
        target = torch.stack([state[result - 1] for state in ends])
    else:
        target = torch.stack(sequence, 1 if layer.batch_first else 0)
    products = [pair for suffix in suffixes for step in seen[suffix] for pair in (step[1], step[3])]
    columns = [torch.autograd.grad(target, products, c, retain_graph=True, allow_unused=True) for c in g]
    found = [
        torch.stack([torch.zeros_like(p) if c[i] is None else c[i] for c in columns]) for i, p in enumerate(products)
    ]
    taps: Taps = {}
    for k, suffix in enumerate(suffixes):
        own = found[2 * k * x.shape[1] : 2 * (k + 1) * x.shape[1]]
        for side, name in enumerate(("ih", "hh")):
            a = torch.stack([step[2 * side].detach() for step in seen[suffix]], 1)
            taps[name + suffix] = (a, torch.stack(own[side::2], 2))
    return taps


def _unrolled(
    mode: str, sequence: list[Tensor], state: tuple[Tensor, ...], p: dict[str, Tensor], suffix: str, backwards: bool
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor, Tensor, Tensor]], tuple[Tensor, ...]]:
    """Outputs ``h_t``; ``(x_t, W x_t + b, h_{t-1}, W h_{t-1} + b)`` of every step in order of time; the last state."""
    h, *c = state
    outputs, steps = [], []
    for x in reversed(sequence) if backwards else sequence:
        left = F.linear(x, p["weight_ih" + suffix], p.get("bias_ih" + suffix))
        right = F.linear(h, p["weight_hh" + suffix], p.get("bias_hh" + suffix))
        left, right = (t if t.requires_grad else t.requires_grad_() for t in (left, right))
        steps.append((x, left, h, right))
        if mode == "LSTM":
            i, f, new, o = (left + right).chunk(4, -1)
            c = [f.sigmoid() * c[0] + i.sigmoid() * new.tanh()]
            h = o.sigmoid() * c[0].tanh()
        elif mode == "GRU":
            (r, z, new), (r2, z2, new2) = left.chunk(3, -1), right.chunk(3, -1)
            z = (z + z2).sigmoid()
            h = (1 - z) * (new + (r + r2).sigmoid() * new2).tanh() + z * h
        else:
            h = (left + right).tanh() if mode == "RNN_TANH" else (left + right).relu()
        outputs.append(h)
    if backwards:
        outputs.reverse()
        steps.reverse()
    return outputs, steps, (h, *c)
