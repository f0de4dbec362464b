"""The engine on a problem small enough to check by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from natgrad.errors import ArgumentError
from natgrad.likelihood import Bernoulli, Gaussian, Weighted
from natgrad.tasks import Comparison, Task
from natgrad.tasks import optimizers as catalogue
from natgrad.tasks.compare import GRID, Plan, compare, seconds_planned
from natgrad.tasks.measure import memory_of
from natgrad.tasks.models import seeded
from natgrad.tasks.optimizers import OPTIMIZERS, LoopStepper, OptimizerSpec, hidden_matrices
from natgrad.tasks.summary import choose_target, summarise
from natgrad.tasks.train import Limit, batch_indices, evaluate, train

CPU = torch.device("cpu")


def regression(rows: int = 60, likelihood=None, model=None) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * torch.randn(rows, 1, generator=generator)
    cut = rows - 10
    return Task(
        "line",
        "a line",
        model or seeded(lambda: nn.Linear(3, 1)),
        likelihood or Gaussian(scale=1.0),
        (x[:cut], y[:cut]),
        (x[cut:], y[cut:]),
        batch_size=20,
    )


def run_of(name: str, steps: int = 12, task: Task | None = None, seed: int = 0, lr: float | None = None):
    spec = OPTIMIZERS[name]
    return train(task or regression(), spec, lr if lr is not None else spec.default_lr, seed, Limit(steps=steps))[0]


class Breaks(LoopStepper):
    """Raises at its third step."""

    count = 0

    def step(self, inputs, targets):
        self.count += 1
        if self.count == 3:
            raise self.error
        return super().step(inputs, targets)


def breaking(error: BaseException) -> OptimizerSpec:
    def build(model, likelihood, lr):
        stepper = Breaks(model, likelihood, [torch.optim.SGD(model.parameters(), lr=lr)])
        stepper.error = error
        return stepper

    return OptimizerSpec("breaks", "torch", "fails on purpose", build, 0.1)


def test_sgd_run_equals_a_hand_written_loop():
    task = regression()
    run = run_of("sgd", steps=7)
    torch.manual_seed(123)  # the engine must not depend on it
    model = task.model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses, order = [], batch_indices(50, 20, 0)
    for _ in range(7):
        index = next(order)
        optimizer.zero_grad()
        error = model(task.train[0][index]) - task.train[1][index]
        loss = (0.5 * error.square() + 0.5 * math.log(2 * math.pi)).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert run.train_loss == pytest.approx(losses, rel=1e-6)
    with torch.no_grad():
        error = model(task.test[0]) - task.test[1]
    assert run.final.test_loss == pytest.approx(float(0.5 * error.square().mean() + 0.5 * math.log(2 * math.pi)))
    assert run.final.step == 7 and run.failure is None


def test_measured_kl_is_that_of_the_update():
    task = regression()
    run = run_of("sgd", steps=1)
    index = next(batch_indices(50, 20, 0))
    before, after = task.model(0), task.model(0)
    loss = (0.5 * (after(task.train[0][index]) - task.train[1][index]).square()).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in after.parameters():
            parameter -= 0.01 * parameter.grad
        change = after(task.train[0][index]) - before(task.train[0][index])
    assert run.kl_measured[0] == pytest.approx(float(0.5 * change.square().mean()), rel=1e-4)
    assert math.isnan(run.kl_predicted[0])


def test_kl_is_zero_when_nothing_moves_even_with_dropout_and_batch_norm():
    def build():
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))

    def still(model, likelihood, lr):
        return LoopStepper(model, likelihood, [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)])

    task = regression(model=seeded(build))
    run, _ = train(task, OptimizerSpec("still", "torch", "", still, 1.0), 1.0, 0, Limit(steps=3))
    # Batch norm's running statistics move between the two passes, dropout's masks must not.
    assert run.failure is None and max(run.kl_measured) < 0.1
    task = regression(model=seeded(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))))
    run, _ = train(task, OptimizerSpec("still", "torch", "", still, 1.0), 1.0, 0, Limit(steps=3))
    assert run.kl_measured == (0.0, 0.0, 0.0)


def test_batches_are_epochs_in_the_seed_s_order():
    first = [index for index, _ in zip(batch_indices(50, 20, 3), range(4), strict=False)]
    again = [index for index, _ in zip(batch_indices(50, 20, 3), range(4), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(torch.cat(first[:2]).unique()) == 40, "no row twice within an epoch"
    assert not torch.equal(first[0], next(batch_indices(50, 20, 4)))
    assert torch.equal(next(batch_indices(5, 20, 0)).sort().values, torch.arange(5)), "batch larger than the data"


def test_optimizers_share_weights_and_batches():
    runs = [run_of(name, steps=1) for name in ("sgd", "adamw", "lbfgs")]
    assert len({run.train_loss[0] for run in runs}) == 1
    assert len({run.evaluations[0].train_loss for run in runs}) == 1


def test_the_caller_s_random_stream_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    compare(regression(), Plan(("sgd",), (0,), Limit(steps=2)))
    assert torch.equal(state, torch.get_rng_state())


def test_weighted_loss_is_the_weighted_mean():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 3, generator=generator), torch.rand(30, 1, generator=generator).round()
    w = torch.rand(30, generator=generator)
    plain = Task("w", "", seeded(lambda: nn.Linear(3, 1)), Weighted(Bernoulli()), (x, (y, w)), (x, (y, w)))
    loss, _ = evaluate(plain, plain.model(0), plain.train, metric=True)
    with torch.no_grad():
        nll = nn.functional.binary_cross_entropy_with_logits(plain.model(0)(x), y, reduction="none")[:, 0]
    assert loss == pytest.approx(float((w * nll).sum() / w.sum()), rel=1e-5)
    run, _ = train(plain, OPTIMIZERS["sgd"], 0.1, 0, Limit(steps=1))
    # By hand: all rows are one batch, so the first loss is the weighted mean, and the first step of SGD follows its
    # gradient; the KL that it made is weighted in the same way.
    model = plain.model(0)
    before = model(x)
    nll = nn.functional.binary_cross_entropy_with_logits(before, y, reduction="none")[:, 0]
    gradients = torch.autograd.grad((w * nll).sum() / w.sum(), list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= 0.1 * gradient
        old, new = (torch.distributions.Bernoulli(logits=logits.double()) for logits in (before, model(x)))
        kl = torch.distributions.kl_divergence(old, new)[:, 0]
    assert run.failure is None
    assert run.train_loss[0] == pytest.approx(loss, rel=1e-5)
    assert run.kl_measured[0] == pytest.approx(float((w * kl).sum() / w.sum()), rel=1e-3)
    assert abs(float(kl.mean()) / run.kl_measured[0] - 1) > 0.01, "weights too even to tell"
    assert abs(float(nll.detach().mean()) / loss - 1) > 0.01, "weights too even to tell"


@pytest.mark.parametrize("rows", [5, 1500, 2048, 2049])
def test_evaluation_in_chunks_is_the_mean(rows):
    task = regression(rows + 10)
    model = task.model(0)
    loss, _ = evaluate(task, model, task.train, metric=False)
    with torch.no_grad():
        whole = task.likelihood.nll(model(task.train[0]), task.train[1]).double().mean()
    assert loss == pytest.approx(float(whole), rel=1e-6)


def test_divergence_is_a_result():
    run = run_of("sgd", steps=500, lr=1e4)
    assert run.failure is not None and run.failure.startswith("diverged: the training loss became")
    assert 0 < run.steps < 500


def test_a_crash_is_a_result_and_the_others_go_on(monkeypatch):
    monkeypatch.setitem(catalogue.OPTIMIZERS, "breaks", breaking(RuntimeError("out of luck\nsecond line")))
    seen = []
    result = compare(regression(), Plan(("breaks", "sgd"), (0, 1), Limit(steps=5)), on_run=seen.append)
    assert [run.failure for run in result.runs_of("sgd")] == [None, None]
    assert [run.failure for run in result.runs_of("breaks")] == ["RuntimeError at step 3: out of luck"] * 2
    assert [run.steps for run in result.runs] == [2, 5, 2, 5] and seen == list(result.runs)
    row = next(row for row in result.summary if row.optimizer == "breaks")
    assert row.failed == 2 and row.train_loss is None and row.failure == "RuntimeError at step 3: out of luck"


def test_interruption_keeps_what_is_done(monkeypatch):
    calls = []

    def build(model, likelihood, lr):
        calls.append(lr)
        stepper = Breaks(model, likelihood, [torch.optim.SGD(model.parameters(), lr=lr)])
        stepper.error = KeyboardInterrupt()
        # The first stepper measures memory and the second trains seed 0: let both pass.
        stepper.count = -1000 if len(calls) <= 2 else 0
        return stepper

    spec = OptimizerSpec("breaks", "torch", "interrupts", build, 0.1)
    monkeypatch.setitem(catalogue.OPTIMIZERS, "breaks", spec)
    result = compare(regression(), Plan(("sgd", "breaks"), (0, 1, 2), Limit(steps=5)))
    assert result.interrupted
    assert [(run.optimizer, run.seed, run.steps) for run in result.runs] == [
        ("sgd", 0, 5),
        ("breaks", 0, 5),
        ("sgd", 1, 5),
        ("breaks", 1, 2),
    ]
    assert result.runs[-1].failure == "interrupted after 2 steps"


def test_budget_counts_training_seconds():
    spec = OPTIMIZERS["sgd"]
    run, _ = train(regression(), spec, 0.01, 0, Limit(seconds=0.05))
    assert run.seconds[-1] >= 0.05 > run.seconds[-2]
    assert run.seconds[-1] == pytest.approx(sum(run.seconds_per_step))
    assert run.final.step == run.steps
    steps = [point.step for point in run.evaluations]
    assert steps == sorted(set(steps)) and steps[0] == 0


def test_tuning_tries_the_same_grid_for_all():
    result = compare(regression(), Plan(("sgd", "adamw"), (0,), Limit(steps=20), tune=Limit(steps=5)))
    tuning = result.settings.tuning
    assert tuning is not None and tuning.factors == GRID and tuning.steps == 5
    for info in result.optimizers:
        trials = [trial for trial in tuning.trials if trial.optimizer == info.name]
        assert [trial.lr for trial in trials] == pytest.approx([info.default_lr * factor for factor in GRID])
        best = min((t for t in trials if t.failure is None), key=lambda t: t.train_loss)
        run = result.runs_of(info.name)[0]
        assert run.lr == best.lr and run.tuned
    assert not compare(regression(), Plan(("sgd",), (0,), Limit(steps=1))).runs[0].tuned


def test_json_round_trip(tmp_path):
    result = compare(regression(), Plan(("sgd", "lbfgs"), (0,), Limit(steps=3), tune=Limit(steps=1), command="x"))
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    back = Comparison.from_json(data)
    for info in data["optimizers"]:  # files written before the knob was recorded
        info.pop("knob")
    assert {info.knob for info in Comparison.from_json(data).optimizers} == {"lr"}
    assert back.to_json() == result.to_json()
    assert back.runs[0].kl_measured == result.runs[0].kl_measured and isinstance(back.runs[0].evaluations, tuple)
    assert math.isnan(back.runs[0].kl_predicted[0]), "what was not measured comes back as NaN"
    assert Comparison.load(result.save(tmp_path / "a.json")).summary == result.summary
    with pytest.raises(ArgumentError, match="format is 99"):
        Comparison.from_json({**data, "format": 99})
    with pytest.raises(ArgumentError, match="lacks runs"):
        Comparison.from_json({key: value for key, value in data.items() if key != "runs"})


def test_target_and_arrival():
    result = compare(regression(), Plan(("sgd", "adamw"), (0, 1, 2), Limit(steps=40)))
    finals = sorted(run.final.train_loss for run in result.runs_of("adamw"))
    assert result.target.train_loss == finals[1] and "adamw" in result.target.source
    sgd = next(row for row in result.summary if row.optimizer == "sgd")
    assert sgd.reached == 3 and 0 < sgd.steps_to_target <= 40
    for run in result.runs_of("sgd"):
        first = next(point.step for point in run.evaluations if point.train_loss <= result.target.train_loss)
        assert all(p.train_loss > result.target.train_loss for p in run.evaluations if p.step < first)
    never = summarise(result.runs, ["sgd"], replace(result.target, train_loss=-1e9))[0]
    assert never.reached == 0 and never.steps_to_target is None and never.seconds_to_target is None
    assert choose_target(0.5, result.runs).train_loss == 0.5
    assert choose_target(None, result.runs_of("sgd")).source.endswith("sgd")
    assert choose_target(None, []) is None


def test_memory_counts_parameters_gradients_and_state():
    task = regression(model=seeded(lambda: nn.Linear(3, 1, bias=False)))
    wide = replace(task, model=seeded(lambda: nn.Sequential(nn.Linear(3, 10_000), nn.Linear(10_000, 1))))
    bytes_of_weights = 4 * (10_000 * 3 + 10_000 + 10_000 + 1)
    sgd, sgd_state = memory_of(wide, OPTIMIZERS["sgd"], 0.01, 0, CPU)
    adamw, adamw_state = memory_of(wide, OPTIMIZERS["adamw"], 0.01, 0, CPU)
    assert sgd_state == bytes_of_weights
    assert adamw_state == pytest.approx(2 * bytes_of_weights, rel=1e-3)
    activations = 4 * 20 * 10_000
    assert 3 * bytes_of_weights <= sgd <= 6 * bytes_of_weights + 4 * activations
    assert adamw - sgd >= 0.9 * bytes_of_weights


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_by_name_trains(name):
    task = regression()
    result = compare(task, Plan((name,), (0,), Limit(steps=6)))
    run = result.runs[0]
    assert run.failure is None, run.failure
    assert run.final.train_loss < run.evaluations[0].train_loss
    assert all(kl >= 0 for kl in run.kl_measured)
    if OPTIMIZERS[name].family == "natgrad":
        assert all(math.isfinite(kl) for kl in run.kl_predicted)


def test_muon_takes_hidden_matrices_only():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
            self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 5)

    model = Model()
    assert [id(p) for p in hidden_matrices(model)] == [id(model.hidden.weight)]


def test_results_name_the_setting_that_was_scaled():
    result = compare(regression(), Plan(("kfac", "hessian-free", "sgd"), (0,), Limit(steps=1)))
    found = Comparison.from_json(result.to_json())
    assert [info.knob for info in found.optimizers] == ["max_kl", "lr", "lr"]
    assert found.knob_of("kfac") == "max_kl" and found.knob_of("sgd") == "lr"


def test_settings_that_cannot_be():
    with pytest.raises(ArgumentError, match="did you mean 'kfac'"):
        Plan(("kfak",))
    with pytest.raises(ArgumentError, match="No optimizer"):
        Plan(())
    with pytest.raises(ArgumentError, match="seed"):
        Plan(("sgd",), ())
    for limit in ({}, {"seconds": 1.0, "steps": 2}, {"seconds": math.nan}, {"seconds": -1.0}, {"steps": 0}):
        with pytest.raises(ArgumentError):
            Limit(**limit)


def test_planned_seconds():
    plan = Plan(("sgd", "adamw"), (0, 1, 2), Limit(seconds=10.0), tune=Limit(seconds=2.0))
    assert seconds_planned(plan) == pytest.approx(2 * (3 * 10 + len(GRID) * 2))
    assert seconds_planned(Plan(("sgd",), (0,), Limit(steps=3))) is None
