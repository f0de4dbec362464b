"""The benchmark harness: numbers that must agree with each other, whatever the machine does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.cli import arguments
from benchmarks.harness import Action, Plan, Row, Samples, measure, row_flops, row_ratio, row_seconds
from benchmarks.results import Line, SuiteResult, render, result_of
from benchmarks.suite import SUITES, Suite
from benchmarks.workloads import Layer, autoencoder, flops_of, small_classifier, transformer

import natgrad as ng
from benchmarks import contenders as c
from benchmarks import harness, memory


class Clock:
    """Time that passes only when an action says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2

    def action(self, name: str, seconds: Callable[[int], float]) -> Action:
        """An action whose n-th run lasts ``seconds(n)``."""
        runs = iter(range(10**6))

        def run() -> None:
            self.now += seconds(next(runs))

        return Action(name, run)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(harness, "time", fake)
    return fake


def test_measure_recovers_known_times_whatever_the_first_runs_cost(clock: Clock) -> None:
    actions = [
        clock.action("fast", lambda n: 5.0 if n == 0 else 0.5),
        clock.action("slow", lambda n: 9.0 if n == 0 else 1.5),
    ]
    samples = measure(actions, Plan(blocks=7, least=3, seconds=1e3, turn=1.0))
    assert samples.median("fast") == pytest.approx(0.5)
    assert samples.median("slow") == pytest.approx(1.5)
    assert len(samples.wall["fast"]) == len(samples.wall["slow"]) == 7
    assert samples.processors() == pytest.approx(0.5)
    row = Row("three parts fast, one part slow", {"fast": 0.75, "slow": 0.25})
    ratio = row_ratio(samples, row, "fast")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_actions_are_interleaved_in_changing_order(clock: Clock) -> None:
    order: list[str] = []
    actions = [Action(name, lambda name=name: order.append(name)) for name in "abc"]
    measure(actions, Plan(blocks=12, least=12, seconds=1.0, turn=0.0))
    warm, blocks = order[:6], [order[i : i + 3] for i in range(6, len(order), 3)]
    assert warm == ["a", "a", "b", "b", "c", "c"]
    assert len(blocks) == 12 and all(sorted(block) == ["a", "b", "c"] for block in blocks)
    assert len({tuple(block) for block in blocks}) > 2


def test_slow_actions_sit_out_blocks_but_never_fall_below_the_least(clock: Clock) -> None:
    actions = [clock.action(name, lambda n, t=t: t) for name, t in (("fast", 0.01), ("base", 0.2), ("slow", 0.9))]
    samples = measure(actions, Plan(blocks=8, least=2, seconds=2.5, turn=0.0), bases=("base",))
    assert len(samples.wall["fast"]) == len(samples.wall["base"]) == 8
    assert len(samples.wall["slow"]) == 2
    assert len(samples.ratios("slow", "base")) == 2


def test_past_the_deadline_only_what_was_never_timed_is_still_timed(clock: Clock) -> None:
    # Fast while it warms up, then a hundred times slower: as on a machine that others began to use.
    actions = [
        clock.action("slows down", lambda n: 0.01 if n < 2 else 1.0),
        clock.action("steady", lambda n: 0.01),
    ]
    samples = measure(actions, Plan(blocks=8, least=2, seconds=0.5, turn=0.0))
    assert len(samples.wall["slows down"]) in (1, 2)
    assert 1 <= len(samples.wall["steady"]) < 8
    again = measure(actions, Plan(blocks=8, least=2, seconds=0.5, turn=0.0), bases=("steady",))
    assert len(again.wall["steady"]) == 8


def test_either_clock_can_be_read() -> None:
    samples = Samples(clock="cpu")
    samples.add("a", 0, wall=4.0, cpu=1.0)
    samples.add("b", 0, wall=8.0, cpu=3.0)
    assert samples.ratios("b", "a") == [3.0]
    assert Samples(samples.wall, samples.cpu).ratios("b", "a") == [2.0]
    assert samples.processors() == pytest.approx(1 / 3)


@pytest.mark.parametrize("timings", [1, 2, 3])
def test_an_interval_takes_three_timings_of_every_part(timings: int) -> None:
    times = {"base": dict.fromkeys(range(5), 1.0), "often": dict.fromkeys(range(5), 2.0)}
    samples = Samples(times | {"seldom": {i: 3.0 + i for i in range(timings)}}, {})
    found = row_ratio(samples, Row("mixed", {"often": 0.5, "seldom": 0.5}), "base")
    assert found.value == pytest.approx(1 + 0.5 * (3 + (timings - 1) / 2))
    assert ((found.low, found.high) == (None, None)) == (timings < 3)
    line = Line("mixed", 1.0, {"base": found}, None, None, timings)
    result = SuiteResult("W", "few timings", 1, 1.0, 0.0, 1.0, 1.0, (), (line,), {}, {}, {})
    assert (f"{found.value:.2f} [–]" in render(result)) == (timings < 3)


def test_rows_are_weighted_sums_and_ratios_are_taken_within_blocks() -> None:
    # The machine is twice as slow in every second block; within a block b is 3 times a and c 10 times a.
    drift = [1.0, 2.0, 1.0, 2.0, 1.0]
    samples = Samples(
        {
            "a": dict(enumerate(drift)),
            "b": {i: 3 * d for i, d in enumerate(drift)},
            "c": {1: 20.0, 2: 10.0, 3: 20.0},
        },
        {},
    )
    row = Row("mixed", {"b": 0.9, "c": 0.1})
    found = row_ratio(samples, row, "a")
    assert (found.value, found.low, found.high) == pytest.approx((3.7, 3.7, 3.7))
    assert row_seconds(samples, row) == pytest.approx(0.9 * 3 + 0.1 * 20)
    assert row_flops([Action("b", print, 10.0), Action("c", print, 20.0)], row) == pytest.approx(11.0)
    assert row_flops([Action("b", print, 10.0), Action("c", print)], row) is None


def test_operations_of_the_gradient_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    workload = autoencoder(width=10, batch=8)
    model = workload.model()
    with FlopCounterMode(display=False) as counter:
        workload.loss(model(workload.x), workload.y).backward()
    biases = sum(2 * 2 * 8 * q.m for q in workload.layers)  # our n counts the bias as an input, forward and for weights
    hidden = sum(2 * 8 * q.m for q in workload.layers if not q.first)
    assert flops_of(workload).gradient - biases - hidden == pytest.approx(counter.get_total_flops())


def test_operations_of_the_fit_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    workload = autoencoder(width=10, batch=8)
    model = workload.model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    vectors = {name: torch.randn(2, *p.shape) for name, p in parameters.items()}

    def push(tangent: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        run = lambda p: torch.func.functional_call(model, p, (workload.x,))  # noqa: E731
        return torch.func.jvp(run, (parameters,), (tangent,))

    with FlopCounterMode(display=False) as counter:
        torch.vmap(push, out_dims=(None, 0))(vectors)
    biases = sum(2 * 8 * q.m * (3 if q.first else 5) for q in workload.layers)
    first = workload.layers[0]
    needless = 2 * 8 * (first.n - 1) * first.m  # torch multiplies the zero tangent of the model's input as well
    assert flops_of(workload).fit - biases == counter.get_total_flops() - needless


def test_layers_of_the_transformer() -> None:
    workload = transformer(tokens=32, length=8, width=16, depth=1)
    assert workload.layers[0] == Layer(rows=32, n=17, m=16, first=False)
    assert {(q.n, q.m) for q in workload.layers} == {(17, 16), (17, 64), (65, 16)}
    assert len(workload.layers) == 7
    assert workload.parameters == sum(q.m * q.n for q in workload.layers) + 16 * 16 + 8 * 16 + 3 * 2 * 16


@pytest.mark.parametrize("name", list(c.PRESETS))
def test_every_preset_takes_each_kind_of_step(name: str) -> None:
    torch.manual_seed(0)
    measured = c.preset_contender(small_classifier(batch=16, inputs=6, hidden=4), name)
    for action in measured.actions:
        action.run()
        action.run()
    known = {action.name for action in measured.actions}
    for row in measured.rows:
        assert set(row.shares) <= known
        assert sum(row.shares.values()) == pytest.approx(1.0)


def test_kinds_of_step_do_what_they_say() -> None:
    workload = small_classifier(batch=16, inputs=6, hidden=4)
    opts: list[ng.NaturalGradient] = []
    schedule = c.Schedule()

    def build(model: torch.nn.Module) -> ng.NaturalGradient:
        opts.append(ng.KFAC(model, workload.likelihood, refresh=schedule))  # type: ignore[arg-type]
        return opts[0]

    step = c.training(workload, build)

    def state(kind: str) -> list[torch.Tensor]:
        return [
            t.clone() for s in opts[0].state.values() for k, t in s.items() if isinstance(k, str) and k.startswith(kind)
        ]

    def changed(statistics: bool, inverse: bool) -> tuple[bool, bool]:
        averages, inverses = state("average."), state("inverse.")
        schedule.statistics, schedule.inverse = statistics, inverse
        step()
        return tuple(
            any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in ((averages, state("average.")), (inverses, state("inverse.")))
        )

    step()
    assert changed(True, True) == (True, True)
    assert changed(True, False) == (True, False)
    assert changed(False, False) == (False, False)


def test_shares_of_a_schedule_are_those_of_refresh() -> None:
    for t1, t2 in ((1, 10), (10, 10), (2, 6)):
        refresh = ng.Refresh(t1, t2)
        steps = range(60, 60 + 10 * t2)
        kinds = [(refresh.statistics_due(i), refresh.inverse_due(i)) for i in steps]
        shares = c._shares("x", t1, t2)
        assert shares["x renew"] == pytest.approx(kinds.count((True, True)) / len(kinds))
        assert shares.get("x observe", 0.0) == pytest.approx(kinds.count((True, False)) / len(kinds))
        assert shares.get("x plain", 0.0) == pytest.approx(kinds.count((False, False)) / len(kinds))


@pytest.mark.parametrize("make", [c.operations, c.gram_solve])
def test_a_whole_result_is_consistent(make: Callable[..., c.Measured]) -> None:
    workload = small_classifier(batch=16, inputs=6, hidden=4)
    suite = Suite("tiny", lambda: workload, lambda: workload, ("kfac",), (1, 1), (make,))
    optimizers, operations = c.contenders(workload, suite.presets), make(workload)
    if make is c.gram_solve:
        operations = c.operations(workload) + operations
    product = c.matrix_product(workload)
    samples = measure([product, *optimizers.actions, *operations.actions], Plan(5, 2, 0.5, 0.001))
    result = result_of(suite, workload, samples, optimizers, operations, product, {c.SGD: 100, "kfac": 250}, 1.0, 2.0)
    assert result.line(c.SGD).ratios[c.SGD].value == 1.0
    assert result.line(c.GRADIENT).limit == 1.0
    kfac = result.line("kfac (1, 10)")
    assert kfac.memory_ratio == 2.5
    # The share of the matrix-product rate and the limit are two views of the same times and operations.
    flops = flops_of(workload)
    assert kfac.limit is not None and kfac.gemm_share is not None
    assert kfac.limit == pytest.approx(
        1 + (flops.inputs + flops.factors + flops.inverses / 10 + flops.precondition + flops.fit) / flops.gradient
    )
    assert kfac.gemm_share == pytest.approx(
        kfac.limit * flops.gradient / (kfac.milliseconds / 1e3 * result.gflops * 1e9)
    )
    text = render(result)
    assert "kfac (10, 10)" in text and "GFLOP/s in the same run" in text
    assert result.as_json()["name"] == "tiny"


def test_peak_memory_is_a_high_water_mark() -> None:
    before = memory.peak_bytes()
    block = torch.ones(60_000_000, dtype=torch.uint8)
    during = memory.peak_bytes()
    del block
    # The kernel counts pages a little lazily.
    slack = 2_000_000
    assert during >= before - slack
    assert during > 60_000_000
    assert memory.peak_bytes() >= during - slack


def test_arguments() -> None:
    given = arguments(["--quick", "--only", "W1", "W0", "--threads", "1"])
    assert given.quick and given.only == ["W1", "W0"] and given.threads == 1
    assert arguments([]).only == list(SUITES) and arguments([]).threads == 2
