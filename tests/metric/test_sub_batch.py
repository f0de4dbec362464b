"""Statistics of picked examples that are run by themselves: what they are, that they are right on average, and when."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad as ng
from natgrad.metric.sampling import Picks

N, WIDTH, OUT = 6, 4, 3
STRETCHES = ((0, 1), (2, 3), (4, 5))  # of SubBatch(1 / 2)


class Watched(nn.Module):
    """Tokens ``[N, S, WIDTH]`` to logits ``[N, S, OUT]``; remembers how many examples each pass had."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.seen = nn.Linear(WIDTH, 5), nn.Linear(5, OUT), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.last(torch.tanh(self.first(x)))


def _pick(monkeypatch: pytest.MonkeyPatch, index: dict[int, Tensor]) -> None:
    """The examples to be picked, by their number in the batch."""
    monkeypatch.setattr(Picks, "of", lambda self, n, device: index.get(n) if self.fraction < 1 else None)


def _data(s: int = 2, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, s, WIDTH, dtype=torch.float64, generator=generator)
    return x, torch.randint(OUT, (n, s), generator=generator)


def _optimizer(model: nn.Module, structure: Any, likelihood: Any = None, estimate: Any = None) -> ng.NaturalGradient:
    """Keeps the statistics of the last step alone, and moves nothing."""
    return ng.NaturalGradient(
        model, likelihood or ng.Categorical(), lr=0.0, average=0.0, damping=1.0,
        metric=ng.Fisher(estimate or ng.Exact(), structure),
    )  # fmt: skip


def _step(model: nn.Module, opt: ng.NaturalGradient, batches: Any, weights: bool = False) -> dict[str, Tensor]:
    opt.zero_grad()
    for x, y in batches:
        output = model(x)
        opt.observe(output, y)
        labels = y[0] if weights else y
        F.cross_entropy(output.flatten(0, -2), labels.flatten().clamp_min(0)).backward()
    opt.step()
    named = {p: n for n, p in model.named_parameters()}
    return {
        f"{named[p]}.{key}": value.clone()
        for p, slot in opt.state.items()
        for key, value in slot.items()
        if key.startswith("average.")
    }


def _after_first(model: nn.Module, opt: ng.NaturalGradient, batches: Any, weights: bool = False) -> dict[str, Tensor]:
    _step(model, opt, batches, weights)  # of whole batches: it is examined
    return _step(model, opt, batches, weights)


def _oracle(x: Tensor, index: list[int], w: Tensor | None, copies: float, total: float) -> dict[str, Tensor]:
    """K-FAC's factors of examples ``index``, by autograd on each token by itself."""
    model = Watched().double()
    w = torch.ones(x.shape[:2], dtype=x.dtype) if w is None else w
    sums: dict[str, Any] = {}
    for n, s in itertools.product(index, range(x.shape[1])):
        a = x[n, s]
        h = model.first(a)
        t = torch.tanh(h)
        f = model.last(t)
        p = f.softmax(-1).detach()
        for name, given, made in (("first", a, h), ("last", t, f)):
            b = torch.cat([given.detach(), torch.ones(1, dtype=x.dtype)])
            inputs = sums.setdefault(name, [0.0, 0.0, 0.0])
            inputs[0] = inputs[0] + w[n, s] * b.outer(b)
            inputs[1] = inputs[1] + w[n, s]
            for k in range(OUT):
                column = p[k].sqrt() * (torch.eye(OUT, dtype=x.dtype)[k] - p)
                (g,) = torch.autograd.grad(f, made, column, retain_graph=True)
                inputs[2] = inputs[2] + copies * w[n, s] * g.outer(g)
    out = {}
    for name, (inputs, count, outputs) in sums.items():
        out[f"{name}.weight.average.input"] = (inputs / count)[None]
        out[f"{name}.weight.average.output"] = (outputs / total)[None]
    return out


@pytest.mark.parametrize("weighted", [False, True])
def test_factors_are_those_of_the_picked_examples(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    index = [1, 2, 5]
    _pick(monkeypatch, {N: torch.tensor(index)})
    x, y = _data()
    w = torch.rand(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    model = Watched().double()
    likelihood = ng.Weighted(ng.Categorical()) if weighted else ng.Categorical()
    opt = _optimizer(model, ng.Kronecker(sampling=ng.SubBatch(1 / 2)), likelihood)
    found = _after_first(model, opt, [(x, (y, w) if weighted else y)], weighted)
    expected = _oracle(x, index, w if weighted else None, 2.0, float(w.sum()) if weighted else 2.0 * N)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14)


def test_only_the_picked_examples_are_run() -> None:
    model = Watched().double()
    opt = _optimizer(model, ng.Kronecker(sampling=ng.SubBatch(1 / 3)))
    x, y = _data()
    _step(model, opt, [(x, y)])
    model.seen.clear()
    _step(model, opt, [(x, y)])
    assert model.seen == [N, 2]


STRUCTURES = [ng.Kronecker, ng.Kronecker.reduce, ng.EigenKronecker]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimate", [ng.Exact(), ng.Empirical()])
def test_the_mean_over_all_picks_is_the_statistic_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, structure: Any, estimate: Any
) -> None:
    x, y = _data()
    model = Watched().double()
    basis = _after_first(model, _optimizer(model, structure(), None, estimate), [(x, y)])

    def taken(structure: Any) -> dict[str, Tensor]:
        """At a step at which no basis is renewed; second moments have means in a common basis only."""
        model = Watched().double()
        opt = _optimizer(model, structure, None, estimate)
        for _ in range(3):
            _step(model, opt, [(x, y)])
        if isinstance(structure, ng.EigenKronecker):
            _use_basis(opt, model, basis)
        return _step(model, opt, [(x, y)])

    whole, drawn = taken(structure()), []
    for index in itertools.product(*STRETCHES):
        _pick(monkeypatch, {N: torch.tensor(index)})
        drawn.append(taken(structure(sampling=ng.SubBatch(1 / 2))))
    for key, value in whole.items():
        values = torch.stack([d[key] for d in drawn])
        assert (values.std(0) > 1e-6).any()
        torch.testing.assert_close(values.mean(0), value, rtol=1e-10, atol=1e-12)


def _use_basis(opt: ng.NaturalGradient, model: nn.Module, means: dict[str, Tensor]) -> None:
    named = dict(model.named_parameters())
    for name in ("first", "last"):
        slot = opt.state[named[f"{name}.weight"]]
        for side, kind in (("left", "output"), ("right", "input")):
            basis = torch.linalg.eigh(means[f"{name}.weight.average.{kind}"])[1]
            slot[f"basis.{side}"] = basis.reshape(slot[f"basis.{side}"].shape)


def test_uneven_micro_batches_weigh_what_their_examples_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 and 3 examples 3 and 2 are picked: each of the former stands for 2 of them, of the latter for 1.5."""
    index = {6: torch.tensor([0, 3, 4]), 3: torch.tensor([0, 2])}
    _pick(monkeypatch, index)
    model = Watched().double()
    opt = _optimizer(model, ng.Kronecker(sampling=ng.SubBatch(1 / 2)))
    batches = [_data(1), _data(1, 3)]
    found = _after_first(model, opt, batches)
    parts = [_oracle(x, index[len(x)].tolist(), None, len(x) / len(index[len(x)]), len(x)) for x, _ in batches]
    for key, value in found.items():
        torch.testing.assert_close(value, (6 * parts[0][key] + 3 * parts[1][key]) / 9, rtol=1e-12, atol=1e-14)


def test_ignored_labels_and_sampled_ones() -> None:
    model = Watched().double()
    likelihood = ng.Weighted(ng.Categorical(), ignore_index=-100)
    opt = _optimizer(model, ng.Kronecker(sampling=ng.SubBatch(1 / 2)), likelihood, ng.MonteCarlo())
    x, y = _data()
    y[:3] = -100
    first = _after_first(model, opt, [(x, y)])
    again = _step(model, opt, [(x, y)])
    assert any(not torch.equal(first[k], again[k]) for k in first)  # other examples, other labels
    assert all(v.isfinite().all() for v in again.values())


class Centred(nn.Module):
    """Couples the examples, whatever mode it is in."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Masked(nn.Module):
    """Takes a mask ``[S, S]`` between positions as its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.softmax(h @ h.mT + mask, -1) @ h)


def _mlp(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 5), middle, nn.Tanh(), nn.Linear(5, OUT)).double()


def _reasons(model: nn.Module, *given: Tensor) -> tuple[set[str], list[int]]:
    """Reasons in the coverage table after two steps, and the numbers of examples of the passes of the second one."""
    opt = _optimizer(model, ng.Kronecker(sampling=ng.SubBatch(1 / 2)), None, ng.MonteCarlo())
    seen: list[int] = []
    for _ in range(2):
        seen.clear()
        handle = model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
        output = model(*given)
        F.cross_entropy(output.flatten(0, -2), torch.zeros(output.shape[:-1], dtype=torch.long).flatten()).backward()
        opt.step()
        opt.zero_grad()
        handle.remove()
    return {row.reason for row in opt.coverage() if "diagonal of its rows" not in row.reason}, seen


def test_models_whose_examples_stand_for_themselves_are_divided() -> None:
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    frozen = nn.BatchNorm1d(5)
    for middle in (nn.Identity(), nn.Dropout(0.5), frozen, nn.LayerNorm(5)):
        model = _mlp(middle)
        frozen.eval()
        assert _reasons(model, x) == ({""}, [N, N // 2])


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (nn.BatchNorm1d(5), "1 normalises by the batch's own statistics"),
        (Centred(), "couples its examples"),
        (nn.Sequential(nn.Dropout(0.5), Centred()), "couples its examples"),
        (Noisy(), "draws numbers in evaluation mode"),
    ],
)
def test_models_that_cannot_be_divided_say_why(middle: nn.Module, why: str) -> None:
    reasons, seen = _reasons(_mlp(middle), torch.randn(N, WIDTH, dtype=torch.float64))
    assert seen == [N]
    assert all("statistics of whole batches" in r and why in r for r in reasons) and reasons


@pytest.mark.parametrize("s", [N, 4])
def test_an_argument_that_is_as_long_as_the_batch_is_not_taken_for_it(s: int) -> None:
    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(N, s, WIDTH, dtype=torch.float64)
    mask = torch.zeros(s, s, dtype=torch.float64).masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
    reasons, seen = _reasons(model, x, mask)
    assert seen == ([N] if s == N else [N, N // 2])
    assert reasons == {""} if s != N else all("RuntimeError" in r for r in reasons)


def test_a_hidden_coupling_is_found_where_the_output_does_not_show_it() -> None:
    model = _mlp(Centred())
    with torch.no_grad():
        model[3].weight.zero_()
    reasons, _ = _reasons(model, torch.randn(N, WIDTH, dtype=torch.float64))
    assert all("couples its examples" in r for r in reasons)


def test_nothing_but_the_statistics_changes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.dropout(x, 0.5, self.training)

    def run(structure: Any) -> tuple[Tensor, Tensor, Tensor]:
        model = _mlp(Counting())
        opt = _optimizer(model, structure, None, ng.MonteCarlo())
        torch.manual_seed(3)
        for _ in range(3):
            opt.zero_grad()
            model(torch.randn(N, WIDTH, dtype=torch.float64)).square().sum().backward()
            opt.step()
        gradient = model[0].weight.grad
        assert gradient is not None
        return gradient, model[1].calls, torch.get_rng_state()

    for mine, plain in zip(run(ng.Kronecker(sampling=ng.SubBatch(1 / 2))), run(ng.Kronecker()), strict=True):
        assert torch.equal(mine, plain)


def test_what_was_found_out_goes_along_with_the_state() -> None:
    model = Watched().double()
    opt = _optimizer(model, ng.Kronecker(sampling=ng.SubBatch(1 / 2)))
    _step(model, opt, [_data()])
    other = Watched().double()
    again = _optimizer(other, ng.Kronecker(sampling=ng.SubBatch(1 / 2)))
    again.load_state_dict(opt.state_dict())
    _step(other, again, [_data()])
    assert other.seen == [N, N // 2]


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ng.errors.ArgumentError, match=r"SubBatch\(fraction"):
        ng.SubBatch(fraction)
