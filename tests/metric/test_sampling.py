"""Factors from a part of the batch: what they are for given picks, and that they are right on average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.metric import Moments
from natgrad.metric.sampling import Picks
from natgrad.network import recording

N, S, WIDTH, OUT = 8, 6, 4, 3


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, OUT)).double()


def _moments(structure: Any, seed: int = 0, likelihood: Any = None, target: Tensor | None = None) -> Moments:
    model, x = _model(), torch.randn(N, S, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with recording(model) as tape:
        tape.output = model(x)
    metric = ng.Fisher(ng.Exact(), structure)
    found = metric.statistics(
        tape, likelihood or ng.Categorical(), target, metric.partition(model),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    assert isinstance(found, Moments)
    return found


def _scores(weights: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """By autograd, position by position: per layer inputs ``[N, S, in + 1]`` and score gradients ``[K, N, S, out]``."""
    model = _model()
    x = torch.randn(N, S, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = model[0](x)
    t = torch.tanh(h)
    f = model[2](t)
    p = f.softmax(-1)
    columns = [p.sqrt()[..., k, None] * (torch.eye(OUT, dtype=torch.float64)[k] - p) for k in range(OUT)]
    if weights is not None:
        columns = [c * weights.sqrt()[..., None] for c in columns]
    out = []
    for given, made in ((x, h), (t, f)):
        g = torch.stack([torch.autograd.grad(f, made, c.detach(), retain_graph=True)[0] for c in columns])
        out.append((torch.cat([given, torch.ones(N, S, 1)], -1).detach(), g))
    return out


def test_all_of_the_batch_is_what_it_was_without_sampling() -> None:
    for structure in (ng.Kronecker, ng.EigenKronecker):
        whole, sampled = _moments(structure()), _moments(structure(sampling=ng.Sampling(1.0)))
        assert all(
            torch.equal(whole.means()[b][k], sampled.means()[b][k]) for b in whole.values for k in whole.values[b]
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_factors_are_those_of_the_picked_positions(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    index = torch.tensor([1, 7, 8, 20, 33, 47])
    monkeypatch.setattr(Picks, "of", lambda self, count, device: index)
    weights = torch.rand(N, S, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    likelihood = ng.Weighted(ng.Categorical()) if weighted else ng.Categorical()
    y = torch.randint(OUT, (N, S), generator=torch.Generator().manual_seed(3))
    moments = _moments(
        ng.Kronecker(sampling=ng.Sampling(1 / 8)), likelihood=likelihood, target=(y, weights) if weighted else None
    )
    layers = _scores(weights if weighted else None)
    total = weights.sum() if weighted else torch.tensor(float(N * S), dtype=torch.float64)
    share = weights.flatten()[index] if weighted else torch.ones(len(index), dtype=torch.float64)
    for name, (a, g) in zip(("0", "2"), layers, strict=True):
        a, g = a.flatten(0, 1)[index], g.flatten(1, 2)[:, index]
        inputs = torch.einsum("n,ni,nj->ij", share, a, a) / share.sum()
        outputs = torch.einsum("kni,knj->ij", g, g) * (N * S / len(index)) / total
        torch.testing.assert_close(moments.means()[name]["input"][0], inputs)
        torch.testing.assert_close(moments.means()[name]["output"][0], outputs)


@pytest.mark.parametrize("structure", [ng.Kronecker, ng.Kronecker.reduce, ng.EigenKronecker])
def test_factors_are_right_on_average(structure: Any) -> None:
    whole = _moments(structure())
    draws = [_moments(structure(sampling=ng.Sampling(3 / 8)), seed=s) for s in range(400)]
    for block, kinds in whole.means().items():
        for kind, expected in kinds.items():
            found = torch.stack([d.means()[block][kind] for d in draws])
            error = found.std(0) / math.sqrt(len(draws))
            assert (found.std(0) > 0).any()
            assert ((found.mean(0) - expected).abs() < 5 * error + 1e-12).all()


def test_second_moments_of_picked_examples_are_right_on_average() -> None:
    from natgrad.linalg.psd import safe_eigh
    from natgrad.metric.eigenbasis import projected

    whole = _moments(ng.EigenKronecker())
    means = whole.means()
    bases: Any = {b: (safe_eigh(k["output"][0])[1], safe_eigh(k["input"][0])[1]) for b, k in means.items()}
    expected = projected(whole, bases).means()
    draws = [
        projected(_moments(ng.EigenKronecker(sampling=ng.Sampling(3 / 8)), seed=s), bases).means() for s in range(400)
    ]
    for block in means:
        found = torch.stack([d[block]["eigenvalues"] for d in draws])
        error = found.std(0) / math.sqrt(len(draws))
        assert ((found.mean(0) - expected[block]["eigenvalues"]).abs() < 5 * error + 1e-12).all()


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.3), (7, 0.5), (64, 1 / 16), (5, 0.01)])
def test_every_position_is_picked_as_often_as_any_other(count: int, fraction: float) -> None:
    generator = torch.Generator().manual_seed(0)
    number, draws = max(1, round(count * fraction)), 4000
    picked = torch.zeros(count)
    for _ in range(draws):
        index = Picks(fraction, generator).of(count, torch.device("cpu"))
        assert index is not None and len(index) == number and (index.diff() >= 0).all()
        picked += torch.bincount(index, minlength=count)
    expected = draws * number / count
    assert ((picked - expected).abs() < 5 * expected**0.5).all()


def test_layers_with_as_many_positions_share_their_picks() -> None:
    picks = Picks(0.25, torch.Generator().manual_seed(0))
    first = picks.of(100, torch.device("cpu"))
    assert picks.of(100, torch.device("cpu")) is first
    assert picks.of(2, torch.device("cpu")) is not None and picks.of(1, torch.device("cpu")) is None


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, math.nan, "all"])
def test_a_fraction_out_of_range_is_refused(fraction: Any) -> None:
    with pytest.raises(ng.errors.ArgumentError, match="fraction"):
        ng.Sampling(fraction)
    with pytest.raises(ng.errors.ArgumentError, match="sampling"):
        ng.Kronecker(sampling=0.5)  # type: ignore[arg-type]


def test_a_sampled_run_trains_and_its_state_loads_where_all_is_taken() -> None:
    model = _model()
    opt = ng.KFAC(model, ng.Categorical(), structure=ng.Kronecker(sampling=ng.Sampling(1 / 4)))
    x, y = torch.randn(N, WIDTH, dtype=torch.float64), torch.arange(N) % OUT
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    ng.KFAC(_model(), ng.Categorical()).load_state_dict(opt.state_dict())
