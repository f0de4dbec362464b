"""Two processes with uneven parts of a batch do what one process does with the whole of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import natgrad as ng
from distributed.processes import SIZE, in_processes
from natgrad.distributed import Replicas, computed_by_owners, owners
from natgrad.metric.sampling import Picks

COMPILED = ["inside", "around", "late", "in place"]
CUT, TOTAL = 9, 14  # the first process has 9 examples of 14
EXACT_KFAC = ng.Fisher(ng.Exact(), ng.Kronecker())
TRUST = {"search": ng.TrustRegion(1e-2), "lr": 2.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "kfac": {"metric": EXACT_KFAC, "damping": ng.FactoredTikhonov(1e-2), "momentum": 0.5},
    "ekfac": {"metric": ng.Fisher(ng.Exact(), ng.EigenKronecker()), "damping": 1e-2, "refresh": ng.Refresh(1, 2)},
    "ekfac, followed": {
        "metric": ng.Fisher(ng.Exact(), ng.EigenKronecker(basis=ng.CholeskyQR())),
        "damping": 1e-2,
        "refresh": ng.Refresh(1, 2),
    },
    "kfac, packed": {
        "metric": ng.Fisher(ng.Exact(), ng.Kronecker(storage=ng.Packed(least=2))),
        "damping": ng.FactoredTikhonov(1e-2),
    },
    "ekfac, packed": {
        "metric": ng.Fisher(ng.Exact(), ng.EigenKronecker(storage=ng.Packed(least=2))),
        "damping": 1e-2,
        "refresh": ng.Refresh(1, 2),
    },
    "dense": {"metric": ng.Fisher(ng.Exact(), ng.Dense()), "damping": 1e-2},
    "diagonal": {"metric": ng.Fisher(ng.Exact(), ng.Diagonal()), "damping": 1e-2},
    "empirical": {"metric": ng.Fisher(ng.Empirical(), ng.BlockDiagonal()), "damping": 1e-2},
    "empirical kfac": {"metric": ng.Fisher(ng.Empirical(), ng.Kronecker()), "damping": ng.FactoredTikhonov(1e-2)},
    "gram": {"metric": ng.Fisher(ng.Exact(), ng.Gram()), "damping": 1e-2},
    "matrix free": {"metric": ng.Fisher(ng.Exact(), ng.MatrixFree()), "damping": 1e-1},
    "hessian": {"metric": ng.Hessian(), "damping": 10.0},
    "kfac, fit": {"metric": EXACT_KFAC, "damping": 1e-2, "search": ng.QuadraticFit(max_kl=0.1), "lr": 1.0},
    "trust region": {"metric": EXACT_KFAC, "damping": 1e-2, **TRUST},
    "LM": {"metric": ng.Fisher(ng.Exact(), ng.Dense()), "damping": ng.LevenbergMarquardt(0.1)},
}


class Experts(nn.Module):
    """The sign of the first input decides which expert sees an example: here each process needs only one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.experts = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        h, chosen = torch.tanh(self.inputs(x)), x[:, 0] > 0
        out = h.new_zeros(len(x), 3)
        for flag, expert in zip((True, False), self.experts, strict=True):
            at = torch.nonzero(chosen == flag).flatten()
            if len(at):
                out = out.index_copy(0, at, expert(h[at]))
        return out


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(TOTAL, 3, generator=generator).double()
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(TOTAL) < CUT, 1.0, -1.0)
    return x, torch.randint(3, (TOTAL,), generator=generator)


def part(rank: int, t: int) -> tuple[Tensor, Tensor]:
    x, y = batch(t)
    return (x[:CUT], y[:CUT]) if rank == 0 else (x[CUT:], y[CUT:])


def theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(model: nn.Module, rank: int | None, steps: int = 4, **options: Any) -> tuple[nn.Module, Any]:
    """Train on this rank's part (None: on the whole batch). The loss is scaled so that its mean over ranks is whole."""
    wrapped = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = ng.NaturalGradient(wrapped, ng.Categorical(), **({"lr": 0.1} | options))
    for t in range(steps):
        x, y = batch(t) if rank is None else part(rank, t)
        optimizer.zero_grad()
        output = wrapped(x)
        optimizer.observe(output, y)
        loss = F.cross_entropy(output, y, reduction="sum") / TOTAL * (1 if rank is None else SIZE)
        loss.backward()
        optimizer.step()
    return model, optimizer


def trained(rank: int) -> dict[str, Any]:
    return {name: _report(*train(network(), rank, **options)) for name, options in OPTIONS.items()}


def _report(model: nn.Module, optimizer: Any) -> tuple[Tensor, dict[str, float]]:
    return theta(model), optimizer.metrics()


def experts(rank: int) -> dict[str, Tensor]:
    found = {}
    for name in ("kfac", "ekfac"):
        torch.manual_seed(0)
        found[name] = theta(train(Experts().double(), rank, **OPTIONS[name])[0])
    return found


def closures(rank: int | None) -> tuple[Tensor, dict[str, float]]:
    model = network()
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = ng.NaturalGradient(wrapped, ng.Categorical(), **OPTIONS["trust region"])
    for t in range(3):
        x, y = batch(t) if rank is None else part(rank, t)

        def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor, Tensor]:
            output = wrapped(x)
            return F.cross_entropy(output, y, reduction="sum") / TOTAL * (1 if rank is None else SIZE), output, y

        optimizer.step(closure)
    return _report(model, optimizer)


def eigenbases(rank: int) -> dict[str, Any]:
    """EKFAC: eigenvectors are determined up to sign only, so that bases found side by side would not agree."""
    model, optimizer = train(network(), rank, metric=ng.Fisher(ng.Exact(), ng.EigenKronecker()), damping=1e-2)
    bases = optimizer._curvature.bases
    return {"theta": theta(model), "bases": {n: [t.clone() for t in basis] for n, basis in bases.items()}}


def sampled(rank: int) -> dict[str, Any]:
    """One and the same part in both processes: were the labels the same, the sum would be that of one of them."""
    model = network()
    wrapped = DistributedDataParallel(model)
    options = {"metric": ng.Fisher(ng.MonteCarlo(1), ng.Dense()), "average": 0.0, "lr": 0.0}
    factors = []
    for seen in (wrapped, copy.deepcopy(model)):
        optimizer = ng.NaturalGradient(seen, ng.Categorical(), **options)
        x, y = part(0, 0)
        F.cross_entropy(seen(x), y).backward()
        optimizer.step()
        factors.append(optimizer._curvature.operators["*"].to_dense())
    return {"together": factors[0], "alone": factors[1]}


def part_of_parts(rank: int) -> dict[str, Any]:
    """A third of each process's part: as one process that takes both in turn, with the picks of both."""
    picks = {CUT: torch.tensor([1, 3, 8]), TOTAL - CUT: torch.tensor([0, 4])}
    kept = Picks.of
    Picks.of = lambda self, n, device: picks.get(n) if self.fraction < 1 else None
    try:
        metric = ng.Fisher(ng.Exact(), ng.Kronecker(sampling=ng.SubBatch(1 / 3)))
        options = {"metric": metric, "damping": ng.FactoredTikhonov(1e-2)}
        together, _ = train(network(), rank, **options)
        return {"together": theta(together), "alone": theta(in_micro_batches(network(), **options))}
    finally:
        Picks.of = kept


def poisoned(rank: int) -> dict[str, Any]:
    """NaN in the second process's part of the second batch."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = ng.KFAC(wrapped, ng.Categorical(), lr=0.1)
    seen = []
    for t in range(3):
        x, y = part(rank, t)
        if t == 1 and rank == 1:
            x = x * float("nan")
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        seen.append(theta(model))
    return {"seen": seen, "accepted": optimizer.last.accepted}


def work(rank: int) -> dict[str, Any]:
    """How many decompositions each process does."""
    done: list[int] = []

    class Counting(ng.FactoredTikhonov):
        def inverse(self, operator: Any, solver: Any = None) -> Any:
            done.append(operator.shape[0])
            return super().inverse(operator, solver)

    train(network(), rank, 1, metric=EXACT_KFAC, damping=Counting(1e-2))
    return {"done": done}


def accumulated(rank: int) -> dict[str, Any]:
    """Two micro-batches under ``no_sync`` are one batch."""
    found = {}
    for name in ("kfac", "ekfac"):
        model = network()
        wrapped = DistributedDataParallel(model)
        optimizer = ng.NaturalGradient(wrapped, ng.Categorical(), lr=0.1, **OPTIONS[name])
        x, y = part(rank, 0)
        with wrapped.no_sync():
            (F.cross_entropy(wrapped(x[:3]), y[:3], reduction="sum") / TOTAL * SIZE).backward()
        (F.cross_entropy(wrapped(x[3:]), y[3:], reduction="sum") / TOTAL * SIZE).backward()
        optimizer.step()
        found[name] = theta(model)
    return found


def resumed(rank: int) -> dict[str, Any]:
    """Every process loads what rank 0 saved, as is usual, and goes on as if nothing had happened."""
    options = {"metric": ng.Fisher(ng.MonteCarlo(1), ng.Kronecker()), "damping": ng.FactoredTikhonov(1e-2)}
    straight, _ = train(network(), rank, 4, **options)
    model, optimizer = train(network(), rank, 2, **options)
    (saved,) = [s for s in Replicas(dist.group.WORLD).gather(optimizer.state_dict() if rank == 0 else None) if s]
    wrapped = DistributedDataParallel(model)
    again = ng.NaturalGradient(wrapped, ng.Categorical(), lr=0.1, **options)
    again.load_state_dict(saved)
    for t in (2, 3):
        x, y = part(rank, t)
        again.zero_grad()
        (F.cross_entropy(wrapped(x), y, reduction="sum") / TOTAL * SIZE).backward()
        again.step()
    return {"straight": theta(straight), "resumed": theta(model)}


def compiled(rank: int) -> dict[str, Any]:
    """The compiler inside or around the wrapper, before or after the optimizer is made."""
    found = {}
    for form in COMPILED:
        torch.compiler.reset()
        model = network()
        inside = torch.compile(model, backend="aot_eager") if form == "inside" else model
        wrapped: Any = DistributedDataParallel(inside)  # type: ignore[arg-type]
        around = torch.compile(wrapped, backend="aot_eager") if form in ("around", "late") else wrapped
        seen = wrapped if form == "late" else around
        optimizer = ng.NaturalGradient(seen, ng.Categorical(), lr=0.1, **OPTIONS["kfac"])
        if form == "in place":
            wrapped.compile(backend="aot_eager")
        for t in range(3):
            x, y = part(rank, t)
            optimizer.zero_grad()
            (F.cross_entropy(around(x), y, reduction="sum") / TOTAL * SIZE).backward()
            optimizer.step()
        found[form] = theta(model)
    return found


def collectives(rank: int) -> dict[str, Any]:
    replicas = Replicas(dist.group.WORLD)
    mixed = [torch.tensor([1.0 + rank]), torch.tensor(2 - rank), torch.tensor([[0.5]]).double()]
    gathered = replicas.gather({"rank": rank, "tensors": [torch.full((rank + 1,), float(rank)), None]})

    def compute(name: str) -> str:
        if name == "bad":
            raise ng.errors.NonFiniteError("no inverse")
        return f"{name} by {rank}"

    return {
        "sum": replicas.sum(mixed),
        "gather": gathered,
        "any": replicas.any(rank == 1, False),
        "computed": {n: str(v) for n, v in computed_by_owners(replicas, {"a": 3, "b": 2, "bad": 2}, compute).items()},
    }


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    functions = [
        trained,
        experts,
        closures,
        eigenbases,
        sampled,
        part_of_parts,
        poisoned,
        work,
        accumulated,
        resumed,
        compiled,
        collectives,
    ]
    return in_processes({f.__name__: f for f in functions})


@pytest.mark.parametrize("name", OPTIONS)
def test_pitfall_32_uneven_parts_train_as_the_whole_batch_does(found, name):
    (first, numbers), (second, others) = (values[name] for values in found["trained"])
    assert torch.equal(first, second) and numbers == others
    model, optimizer = train(network(), None, **OPTIONS[name])
    expected, start = theta(model), theta(network())
    assert float((first - expected).norm()) <= 1e-8 * float((expected - start).norm())
    for key, value in optimizer.metrics().items():
        assert numbers[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key


def in_micro_batches(model: nn.Module, steps: int = 4, **options: Any) -> nn.Module:
    """One process that takes both parts in turn: in the whole batch an expert's rows could not be told apart."""
    optimizer = ng.NaturalGradient(model, ng.Categorical(), lr=0.1, **options)
    for t in range(steps):
        optimizer.zero_grad()
        for rank in range(SIZE):
            x, y = part(rank, t)
            (F.cross_entropy(model(x), y, reduction="sum") / TOTAL).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_part_of_the_batch_may_leave_an_expert_out(found, name):
    torch.manual_seed(0)
    model = Experts().double()
    start = theta(model)
    trained = in_micro_batches(model, **OPTIONS[name]) if name == "ekfac" else train(model, None, **OPTIONS[name])[0]
    expected = theta(trained)
    for values in found["experts"]:
        assert float((values[name] - expected).norm()) <= 1e-9 * float((expected - start).norm())


def test_closures_measure_the_whole_batch(found):
    expected, numbers = closures(None)
    for values, measured in found["closures"]:
        assert float((values - expected).norm()) <= 1e-9 * float((expected - theta(network())).norm())
        assert measured["natgrad/kl_measured"] == pytest.approx(numbers["natgrad/kl_measured"], rel=1e-6)
        assert measured["natgrad/loss_change_measured"] == pytest.approx(numbers["natgrad/loss_change_measured"])


def test_pitfall_32_eigenbases_are_shared(found):
    first, second = found["eigenbases"]
    assert torch.equal(first["theta"], second["theta"])
    for name, basis in first["bases"].items():
        assert all(torch.equal(a, b) for a, b in zip(basis, second["bases"][name], strict=True))


def test_pitfall_32_sampled_labels_differ_between_processes(found):
    first, second = found["sampled"]
    assert torch.equal(first["together"], second["together"])
    assert torch.equal(first["alone"], second["alone"])
    # Rank 0 samples what a single process samples; the sum would equal it if rank 1 did so, too.
    assert float((first["together"] - first["alone"]).norm()) > 0.05 * float(first["alone"].norm())


def test_parts_of_parts_of_a_batch_add_up(found):
    for values in found["part_of_parts"]:
        torch.testing.assert_close(values["together"], values["alone"], rtol=1e-9, atol=1e-12)


def test_a_poisoned_part_stops_all_processes_alike(found):
    first, second = found["poisoned"]
    for one, other in zip(first["seen"], second["seen"], strict=True):
        assert torch.equal(one, other) and bool(torch.isfinite(one).all())
    assert torch.equal(first["seen"][0], first["seen"][1]) and not torch.equal(first["seen"][1], first["seen"][2])


def test_every_block_is_inverted_once(found):
    first, second = (values["done"] for values in found["work"])
    assert first and second and sorted(first + second) == sorted([5 * 4, 3 * 6])


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_accumulation_without_synchronisation(found, name):
    model, _ = train(network(), None, 1, **OPTIONS[name])
    for values in found["accumulated"]:
        assert float((values[name] - theta(model)).norm()) <= 1e-9 * float((theta(model) - theta(network())).norm())


@pytest.mark.parametrize("form", COMPILED)
def test_compiled_models_train_as_the_whole_batch_does(found, form):
    """Also ``torch.compile(DistributedDataParallel(model))``, whose parts once drifted apart without a word."""
    first, second = (values[form] for values in found["compiled"])
    assert torch.equal(first, second)
    expected = theta(train(network(), None, 3, **OPTIONS["kfac"])[0])
    assert float((first - expected).norm()) <= 1e-8 * float((expected - theta(network())).norm())


def test_resume_from_what_rank_0_saved(found):
    for values in found["resumed"]:
        assert torch.equal(values["straight"], values["resumed"])


def test_collectives(found):
    for values in found["collectives"]:
        total = values["sum"]
        assert [t.tolist() for t in total] == [[3.0], 3, [[1.0]]]
        assert [t.dtype for t in total] == [torch.float32, torch.int64, torch.float64]
        assert [v["rank"] for v in values["gather"]] == [0, 1]
        assert [v["tensors"][0].tolist() for v in values["gather"]] == [[0.0], [1.0, 1.0]]
        assert values["any"] == [True, False]
        assert values["computed"] == {"a": "a by 0", "b": "b by 1", "bad": "no inverse"}


def test_owners_share_the_work_evenly():
    costs = {str(i): float(c) for i, c in enumerate([8, 7, 6, 5, 4])}
    found = owners(costs, 2)
    loads = [sum(costs[n] for n, rank in found.items() if rank == r) for r in (0, 1)]
    assert sorted(loads) == [13.0, 17.0]  # dearest first: 8+5+4 against 7+6; the best is 15 and 15
    assert owners(costs, 1) == dict.fromkeys(costs, 0)


def test_pitfall_33_sharded_parameters_are_refused_by_name():
    class Sharded(nn.Parameter):
        device_mesh = "a mesh"

    model = network()
    model[0].weight = Sharded(model[0].weight.detach())
    with pytest.raises(ng.errors.UnsupportedError, match=r"sharded.*0\.weight.*DistributedDataParallel"):
        ng.KFAC(model, ng.Categorical())
    with pytest.raises(ng.errors.UnsupportedError, match="DistributedDataParallel"):
        ng.KFAC(nn.DataParallel(network()), ng.Categorical())
