"""Layers that read the same tensor share the product of its input factor, and no others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad as ng
from natgrad.metric import Moments
from natgrad.metric.kronecker import Kronecker
from natgrad.network import recording

N, T, WIDTH = 5, 4, 6


class Block(nn.Module):
    """Attention and a gated layer: q, k, v read one tensor, gate and up another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate, self.up = (nn.Linear(WIDTH, 8, bias=False) for _ in range(2))
        self.down = nn.Linear(8, 3)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        see = (lambda t: t.clone()) if self.apart else (lambda t: t)
        h = F.scaled_dot_product_attention(self.q(see(x)), self.k(see(x)), self.v(see(x)))
        return self.down(F.silu(self.gate(see(h))) * self.up(see(h)))


def _moments(structure: Any, apart: bool, monkeypatch: pytest.MonkeyPatch, model: nn.Module | None = None, **also: Any):
    model = Block().double() if model is None else model
    if isinstance(model, Block):
        model.apart = apart
    x = torch.randn(N, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with recording(model) as tape:
        tape.output = model(x)
    calls: list[tuple[int, ...]] = []
    original = Kronecker._input_moment

    def counted(self: Kronecker, rows: Any, factor: Any, picks: Any) -> Any:
        calls.append(tuple(rows.a.shape))
        return original(self, rows, factor, picks)

    metric = ng.Fisher(ng.MonteCarlo(), structure)
    with monkeypatch.context() as patch:
        patch.setattr(Kronecker, "_input_moment", counted)
        found = metric.statistics(
            tape, also.get("likelihood", ng.Categorical()), also.get("target"), metric.partition(model),
            generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
    assert isinstance(found, Moments)
    return found.means(), calls


@pytest.mark.parametrize("structure", [ng.Kronecker(), ng.Kronecker.reduce(), ng.EigenKronecker(),
                                       ng.Kronecker(sampling=ng.Sampling(1 / 2))])  # fmt: skip
@pytest.mark.parametrize("weighted", [False, True])
def test_one_product_for_each_tensor_that_is_read(
    structure: Any, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    also: dict[str, Any] = {}
    if weighted:
        weights = torch.rand(N, T, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        also = {"likelihood": ng.Weighted(ng.Categorical()), "target": (torch.zeros(N, T, dtype=torch.long), weights)}
    shared, calls = _moments(structure, False, monkeypatch, **also)
    unshared, all_calls = _moments(structure, True, monkeypatch, **also)
    assert len(calls) == 3 and len(all_calls) == 6
    for block, kinds in unshared.items():
        for kind, expected in kinds.items():
            assert torch.equal(shared[block][kind], expected), (block, kind)


class Twice(nn.Module):
    """One tensor, read by two layers, before and after it is changed in place; and by one layer frozen in part."""

    def __init__(self, part: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.part = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3), part
        if part == "frozen bias":
            self.two.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.part == "views":
            return self.one(x[:, :2]) + self.two(x[:, 2:])
        if self.part == "twice":
            return self.one(x) + self.two(x) + self.two(torch.tanh(x))
        return self.one(x) + self.two(x)


@pytest.mark.parametrize("part", ["views", "frozen bias", "twice"])
def test_what_is_not_the_same_is_not_shared(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls = _moments(ng.Kronecker(), False, monkeypatch, Twice(part).double())
    x = torch.randn(N, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(*x.shape[:2], 1, dtype=x.dtype)
    inputs = {"one": [torch.cat([x, ones], 2)], "two": [torch.cat([x, ones], 2)]}
    if part == "views":
        inputs = {"one": [inputs["one"][0][:, :2]], "two": [inputs["two"][0][:, 2:]]}
    elif part == "frozen bias":
        inputs["two"] = [x]
    else:
        inputs["two"].append(torch.cat([torch.tanh(x), ones], 2))
    assert len(calls) == 2
    for name, seen in inputs.items():
        a = torch.cat([t.flatten(0, 1) for t in seen])
        torch.testing.assert_close(found[name]["input"][0], a.T @ a / len(a), rtol=1e-12, atol=1e-14)
