"""Networks of policies and critics: a perceptron, and one with a memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def perceptron(inputs: int, hidden: Sequence[int], outputs: int, *, last: float) -> nn.Sequential:
    """tanh layers with orthogonal weights; the last layer's are multiplied by ``last``.

    A small last layer lets a policy start near the uniform one. Source: Andrychowicz et al. 2021, section 3.2.
    """
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        layers += [_orthogonal(n, m, 2**0.5), nn.Tanh()]
    return nn.Sequential(*layers, _orthogonal(sizes[-1], outputs, last))


def _orthogonal(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Recurrent(nn.Module):
    """A tanh layer, a gated recurrent unit (Cho et al. 2014) and a linear layer, over sequences.

    Written with linear layers, because double differentiation, which Fisher products use, has no fused kernel.

    Args:
        inputs, hidden, outputs: sizes; the memory has ``hidden`` entries.
        last: factor of the last layer's weights.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, last: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.encoder = _orthogonal(inputs, hidden, 2**0.5)
        self.input_gates = _orthogonal(hidden, 3 * hidden, 1.0)
        self.memory_gates = _orthogonal(hidden, 3 * hidden, 1.0)
        self.output = _orthogonal(hidden, outputs, last)

    def start(self, n: int) -> Tensor:
        """The empty memory of n sequences, [n, hidden]."""
        return self.output.weight.new_zeros(n, self.hidden)

    def forward(self, x: Tensor, starts: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run over sequences.

        Args:
            x: [N, T, inputs].
            starts: [N, T], one where an episode begins: the memory of what came before is emptied there.
            memory: [N, hidden] before the first step.

        Returns:
            Outputs [N, T, outputs], and the memory after every step [N, T, hidden].
        """
        gates = self.input_gates(torch.tanh(self.encoder(x)))
        kept = (1 - starts.to(x.dtype)).unsqueeze(-1)
        memories = []
        for t in range(x.shape[1]):
            memory = self._cell(gates[:, t], memory * kept[:, t])
            memories.append(memory)
        stacked = torch.stack(memories, 1)
        return self.output(stacked), stacked

    def _cell(self, gates: Tensor, memory: Tensor) -> Tensor:
        reset, update, candidate = gates.chunk(3, -1)
        own_reset, own_update, own_candidate = self.memory_gates(memory).chunk(3, -1)
        z = torch.sigmoid(update + own_update)
        new = torch.tanh(candidate + torch.sigmoid(reset + own_reset) * own_candidate)
        return (1 - z) * new + z * memory
