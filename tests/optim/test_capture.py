"""Statistics of the empirical estimate from the loss's own backward pass: those of a pass of their own, without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad as ng
from natgrad.metric import Fisher
from natgrad.network import Tape

N, T, WIDTH, OUT = 6, 4, 5, 3
STRUCTURES = [ng.Kronecker(), ng.Kronecker.reduce(), ng.EigenKronecker(), ng.Diagonal()]

Backward = Callable[[nn.Module, Tensor, Tensor], None]


class Net(nn.Module):
    """Tokens to logits: tied weights, a layer that is called twice, a norm, a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.twice = nn.Embedding(OUT, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.act, self.last = nn.Linear(WIDTH, 7), nn.Softplus(), nn.Linear(7, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, OUT, bias=False)
        self.head.weight = self.table.weight
        self.checkpointed = False

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(self.norm(self.table(tokens)))))
        if self.checkpointed:
            self.hidden = h + checkpoint(self.body, h, use_reentrant=False)
        else:
            self.hidden = h + self.body(h)
        return self.head(self.hidden)

    def body(self, h: Tensor) -> Tensor:
        return self.last(self.act(self.first(h)))


def _data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(OUT, (N, T), generator=generator), torch.randint(OUT, (N, T), generator=generator)


def mean(model: nn.Module, output: Tensor, y: Tensor) -> None:
    F.cross_entropy(output.flatten(0, 1), y.flatten(), ignore_index=-100).backward()


def summed_and_scaled(model: nn.Module, output: Tensor, y: Tensor) -> None:
    (1024.0 * F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="sum")).backward()


def twice(model: nn.Module, output: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(output.flatten(0, 1), y.flatten())
    loss.backward(retain_graph=True)
    (3 * loss).backward()


def decayed(model: nn.Module, output: Tensor, y: Tensor) -> None:
    decay = sum(p.square().sum() for p in model.parameters())
    (F.cross_entropy(output.flatten(0, 1), y.flatten()) + 0.1 * decay).backward()


def smoothed(model: nn.Module, output: Tensor, y: Tensor) -> None:
    F.cross_entropy(output.flatten(0, 1), y.flatten(), label_smoothing=0.1).backward()


def halves(model: nn.Module, output: Tensor, y: Tensor) -> None:
    F.cross_entropy(output[:3].flatten(0, 1), y[:3].flatten()).backward(retain_graph=True)
    F.cross_entropy(output[3:].flatten(0, 1), y[3:].flatten()).backward()


def hidden_penalty(model: nn.Module, output: Tensor, y: Tensor) -> None:
    (F.cross_entropy(output.flatten(0, 1), y.flatten()) + model.hidden.square().mean()).backward()  # type: ignore[operator, union-attr]


def some(model: nn.Module, output: Tensor, y: Tensor) -> None:
    F.cross_entropy(output.flatten(0, 1), y.flatten()).backward(inputs=[model.last.weight])  # type: ignore[arg-type, union-attr]


def _run(
    structure: Any, backward: Backward, steps: int = 3, likelihood: Any = None, **model_options: Any
) -> tuple[dict[str, Tensor], nn.Module]:
    """What the optimizer has averaged after a few steps."""
    model = Net().double()
    for name, value in model_options.items():
        setattr(model, name, value)
    opt = ng.NaturalGradient(
        model, likelihood or ng.Categorical(), lr=0.05, damping=0.1, average=0.5,
        metric=Fisher(ng.Empirical(), structure),
    )  # fmt: skip
    for step in range(steps):
        x, y = _data(step)
        if likelihood is not None:
            y[0] = -100
        opt.zero_grad()
        output = model(x)
        opt.observe(output, y)
        backward(model, output, y)
        opt.step()
    names = {p: n for n, p in model.named_parameters()}
    return {f"{names[p]}.{k}": v for p, slot in opt.state.items() for k, v in slot.items() if k[:3] == "ave"}, model


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each backward pass of natgrad's own that goes through more than nothing."""
    seen: list[int] = []
    original = Tape.backward

    def counted(self: Tape, targets: Any, columns: Tensor) -> Any:
        seen.extend([1] * bool(targets))
        return original(self, targets, columns)

    monkeypatch.setattr(Tape, "backward", counted)
    return seen


def _of_its_own(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(Fisher, "from_loss", False)
        return _run(*args, **kwargs)[0]


def _check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and any("average" in key for key in found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backward", [mean, summed_and_scaled, twice, decayed])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: repr(s))
def test_statistics_are_those_of_a_pass_of_their_own_without_it(
    structure: Any, backward: Backward, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = _run(structure, backward, 1)
    first = len(passes)  # of which all parameters are examined
    passes.clear()
    found, _ = _run(structure, backward)
    assert len(passes) == first
    _check(found, _of_its_own(monkeypatch, structure, backward))
    assert len(passes) > 2 * first


@pytest.mark.parametrize("backward", [smoothed, halves, hidden_penalty, some])
@pytest.mark.parametrize("structure", STRUCTURES[:2], ids=lambda s: repr(s))
def test_losses_of_another_kind_get_a_pass_of_their_own(
    structure: Any, backward: Backward, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = _run(structure, backward)
    mine = len(passes)
    _check(found, _of_its_own(monkeypatch, structure, backward))
    assert len(passes) == 2 * mine


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: repr(s))
def test_ignored_labels(structure: Any, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    _run(structure, mean, 1, likelihood)
    first = len(passes)
    passes.clear()
    found, _ = _run(structure, mean, likelihood=likelihood)
    assert len(passes) == first
    _check(found, _of_its_own(monkeypatch, structure, mean, likelihood=likelihood))


def test_checkpointed_activations_are_not_kept(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = _run(ng.Kronecker(), mean, checkpointed=True)
    assert len(passes) > 3
    _check(found, _of_its_own(monkeypatch, ng.Kronecker(), mean, checkpointed=True))


def test_micro_batches_and_closures_add_up(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> dict[str, Tensor]:
        model = Net().double()
        metric = Fisher(ng.Empirical(), ng.Kronecker())
        opt = ng.NaturalGradient(model, ng.Categorical(), lr=0.05, damping=0.1, metric=metric)
        for step in range(3):
            opt.zero_grad()
            x, y = _data(step)
            outputs = [model(x[:2]), model(x[2:])]
            opt.observe(outputs[0], y[:2])
            opt.observe(outputs[1], y[2:])
            for output, labels, share in zip(outputs, (y[:2], y[2:]), (2 / 6, 4 / 6), strict=True):
                (share * F.cross_entropy(output.flatten(0, 1), labels.flatten())).backward()
            opt.step()
            opt.step(lambda x=x, y=y: (F.cross_entropy((f := model(x)).flatten(0, 1), y.flatten()), f, y))
        return {f"{i}.{k}": v for i, s in enumerate(opt.state.values()) for k, v in s.items() if k[:3] == "ave"}

    found = run()
    mine = len(passes)
    passes.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Fisher, "from_loss", False)
        _check(found, run())
    assert mine < len(passes) - 6


def test_a_pass_without_a_backward_pass_is_run_again_at_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_hand(model: nn.Module, output: Tensor, y: Tensor) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    found, _ = _run(ng.Kronecker(), by_hand)
    _check(found, _of_its_own(monkeypatch, ng.Kronecker(), by_hand))


def test_nothing_is_left_of_a_pass_that_leads_nowhere() -> None:
    import gc
    import weakref

    _, model = _run(ng.Kronecker(), mean, 0)
    opt = ng.KFAC(model, ng.Categorical(), estimate=ng.Empirical())
    for step in range(2):
        x, y = _data(step)
        output = model(x)
        opt.observe(output, y)
        mean(model, output, y)
        opt.step()
    gc.disable()
    try:
        output = model(x)
        opt.observe(output, y)
        (observation,) = opt._observer.observations
        assert observation.capture is not None
        node, kept = output.grad_fn, weakref.ref(observation.capture)
        opt.zero_grad()
        opt._observer.observations.clear()
        del observation, output, node
        model.hidden = None  # type: ignore[assignment]
        assert kept() is None
    finally:
        gc.enable()
