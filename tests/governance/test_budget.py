"""The KL budget against KL divergences written out here, and states compared bit for bit."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError, BudgetError, LedgerError, NonFiniteError, ShapeError
from natgrad.governance import AtLimit, Decision, ProbeSet, read, verify

DOUBLE = torch.float64
LIKELIHOOD = ng.Categorical()


def network(seed: int = 0, *middle: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()


def batches(seed: int = 0, n: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(n, 4, dtype=DOUBLE, generator=generator)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


PROBE = next(batches(99, 32))[0]


def backward(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()


@torch.no_grad()
def log_probabilities(model: nn.Module, x: Tensor = PROBE) -> Tensor:
    """On a copy in evaluation mode."""
    return copy.deepcopy(model).eval()(x).double().log_softmax(-1)


def kl(a: Tensor, b: Tensor) -> float:
    """Mean over rows of Σ p (log p − log q)."""
    return float((a.exp() * (a - b)).sum(-1).mean())


def frozen(*things: Any) -> Any:
    """A copy of everything that may change: modules' and optimizers' states."""
    return copy.deepcopy([t.state_dict() for t in things])


def same(a: Any, b: Any) -> bool:
    """Equality bit for bit of nested containers of tensors."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "adamw": lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, amsgrad=True),
    "sgd": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda m, lr: torch.optim.RMSprop(m.parameters(), lr=torch.tensor(lr), momentum=0.5),
    "kfac": lambda m, lr: ng.KFAC(m, LIKELIHOOD, lr=lr, damping=1e-2, momentum=0.5, search=ng.LearningRate()),
    "gram": lambda m, lr: ng.GramNGD(m, LIKELIHOOD, lr=lr, damping=1e-2, search=ng.LearningRate()),
}


# The limits.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lr", [30.0, 0.05])
def test_no_update_exceeds_the_radius(name: str, lr: float) -> None:
    model, stream = network(), batches()
    guard = ng.KLBudget(OPTIMIZERS[name](model, lr), model, LIKELIHOOD, PROBE, per_step=1e-3)
    decisions = set()
    for batch in itertools.islice(stream, 25):
        before = log_probabilities(model)
        backward(model, guard, batch)
        guard.step()
        moved = kl(before, log_probabilities(model))
        assert moved <= 1e-3 * (1 + 1e-9)
        assert guard.last is not None
        assert guard.last.kl_step == pytest.approx(moved, rel=1e-6, abs=1e-14)
        decisions.add(guard.last.decision)
        if guard.last.decision is Decision.SHRUNK:
            assert guard.last.kl_proposed > 1e-3 and 0 < guard.last.scale < 1
            assert moved > 0.3e-3  # and it is not shortened more than needed
    assert decisions <= {Decision.ACCEPTED, Decision.SHRUNK}
    if lr == 30.0:
        assert Decision.SHRUNK in decisions


def test_unguarded_the_same_learning_rate_destroys_what_the_guard_keeps() -> None:
    losses = {}
    for guarded in (False, True):
        model = network()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=30.0)
        if guarded:
            optimizer = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-2)
        for batch in itertools.islice(batches(), 60):
            backward(model, optimizer, batch)
            optimizer.step()
        x, y = next(batches(5, 500))
        losses[guarded] = float(F.cross_entropy(model(x), y).detach())
    assert losses[True] < math.log(3) < losses[False]


def test_budget_to_the_reference_is_held_and_ends() -> None:
    model, stream = network(), batches()
    reference = log_probabilities(model)
    guard = ng.KLBudget(torch.optim.AdamW(model.parameters(), lr=0.3), model, LIKELIHOOD, PROBE, to_reference=0.05)
    steps = 0
    for batch in itertools.islice(stream, 50):
        backward(model, guard, batch)
        guard.step()
        steps += 1
        measured = kl(log_probabilities(model), reference)  # KL(new ‖ reference)
        assert measured <= 0.05 * (1 + 1e-9)
        assert guard.last is not None and guard.last.budget_left is not None
        assert guard.last.kl_reference == pytest.approx(measured, rel=1e-6, abs=1e-14)
        assert guard.last.budget_left == pytest.approx(0.05 - measured, rel=1e-6, abs=1e-12)
        if guard.exhausted:
            break
    assert guard.exhausted and steps < 50
    assert 0 <= guard.last.budget_left < 0.01 * 0.05


def test_the_sum_of_steps_is_no_bound_and_is_not_taken_for_one() -> None:
    """Small steps in one direction: charged little each, together far. The guard measures and stops at the limit."""
    model, batch = network(), next(batches())
    reference = log_probabilities(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-4, to_reference=0.02)
    spent = path = 0.0
    while not guard.exhausted:
        backward(model, guard, batch)
        guard.step()
        spent += guard.last.kl_step
        path += math.sqrt(2 * guard.last.kl_step)
        assert guard.last.step < 200
    measured = kl(log_probabilities(model), reference)
    assert 0.0198 <= measured <= 0.02
    assert spent < 0.2 * measured
    assert guard.last.path_length == pytest.approx(path, rel=1e-9)
    assert 0.5 * path**2 > 0.8 * measured


def test_a_spent_budget_does_nothing_more() -> None:
    model, batch = network(), next(batches())
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, to_reference=1e-3)
    for _ in range(20):
        backward(model, guard, batch)
        guard.step()
        if guard.exhausted:
            break
    assert guard.exhausted
    before = frozen(model, optimizer)
    backward(model, guard, batch)
    assert guard.step(lambda: pytest.fail("the closure was called")) is None
    assert same(frozen(model, optimizer), before)
    assert guard.last.decision is Decision.EXHAUSTED and not guard.last.accepted
    assert guard.last.reason


def test_both_limits_hold_with_running_statistics_and_dropout() -> None:
    model = network(0, nn.BatchNorm1d(8, momentum=0.5), nn.Dropout(0.3))
    reference = log_probabilities(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=2e-3, to_reference=0.05)
    before = reference
    moved = False
    for batch in itertools.islice(batches(), 40):
        backward(model, guard, batch)
        guard.step()
        now = log_probabilities(model)
        assert kl(before, now) <= 2e-3 * (1 + 1e-9)
        assert kl(now, reference) <= 0.05 * (1 + 1e-9)
        moved = moved or kl(before, now) > 1e-3
        before = now
    assert moved and model.training and all(m.training for m in model.modules())


def test_limits_hold_for_numbers_as_they_are_stored() -> None:
    """In bfloat16 a shortened step is rounded; what is measured is the rounded one."""
    model = network().bfloat16()
    probe = PROBE.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, probe, per_step=1e-2)
    for x, y in itertools.islice(batches(), 12):
        before = log_probabilities(model, probe)
        backward(model, guard, (x.bfloat16(), y))
        guard.step()
        assert kl(before, log_probabilities(model, probe)) <= 1e-2 * (1 + 1e-4)
    assert guard.last.kl_reference > 0


# Nothing else changes.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_within_the_limits_the_guard_changes_nothing(name: str) -> None:
    results = []
    for guarded in (False, True):
        torch.manual_seed(3)
        model = network(0, nn.BatchNorm1d(8), nn.Dropout(0.2))
        optimizer = OPTIMIZERS[name](model, 1e-3)
        outer: Any = optimizer
        if guarded:
            outer = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1.0, to_reference=10.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(outer, 10)
        for batch in itertools.islice(batches(), 6):
            backward(model, outer, batch)
            outer.step()
            scheduler.step()
        results.append((frozen(model, optimizer), torch.get_rng_state(), [p.grad for p in model.parameters()]))
    assert same(results[0], results[1])
    assert optimizer.param_groups[0]["lr"] < 1e-3


def test_measuring_leaves_no_trace() -> None:
    model = network(0, nn.BatchNorm1d(8), nn.Dropout(0.5))
    model[1].eval()  # modes differ between modules
    modes = [m.training for m in model.modules()]
    state, stream = frozen(model), torch.get_rng_state()
    probe = PROBE.clone()
    guard = ng.KLBudget(torch.optim.SGD(model.parameters(), lr=0.0), model, LIKELIHOOD, probe, per_step=1.0)
    backward(model, guard, next(batches()))
    after_forward = torch.get_rng_state()
    probe.fill_(math.nan)  # the guard has a copy
    guard.step()
    assert torch.equal(torch.get_rng_state(), after_forward) and not torch.equal(after_forward, stream)
    assert same(frozen(model), state)
    assert [m.training for m in model.modules()] == modes
    assert guard.last.accepted and guard.last.kl_step == 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 2])
def test_an_undone_update_leaves_no_bit_changed(name: str, at: int) -> None:
    """A run in which update ``at`` is undone equals one that never saw its gradient."""
    results = []
    for poisoned in (False, True):
        model = network(0, nn.BatchNorm1d(8))
        optimizer = OPTIMIZERS[name](model, 1e-3)
        guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=0.5, at_limit=AtLimit.SKIP)
        for i, batch in enumerate(itertools.islice(batches(), 5)):
            if i == at:
                modules = frozen(model)[0]
                backward(model, guard, batch)
                if not poisoned:  # a pass whose gradients are discarded, and whose running statistics are put back
                    guard.zero_grad()
                    model.load_state_dict(modules)
                    continue
                before = modules, frozen(optimizer)[0]["state"]
                rate, group = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]
                group["lr"] = 1e5
                for p in model.parameters():
                    p.grad.mul_(1e3)
                guard.step()
                optimizer.param_groups[0]["lr"] = rate
                assert guard.last.decision is Decision.REJECTED and guard.last.kl_proposed > 0.5
                assert guard.last.scale == 0.0 and guard.last.kl_step == 0.0
                assert same((*frozen(model), frozen(optimizer)[0]["state"]), before)
            else:
                backward(model, guard, batch)
                guard.step()
                assert guard.last.decision is Decision.ACCEPTED
        optimizer.zero_grad()
        results.append((frozen(model), frozen(optimizer)[0]["state"]))
    assert same(results[0], results[1])


def test_state_in_another_precision_than_the_parameters_is_restored_as_it_was() -> None:
    class Wide(torch.optim.Optimizer):
        """Keeps float64 averages of bfloat16 gradients, a plain number, and a nested list."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
                for p in group["params"]:
                    state = self.state[p]
                    state["average"] = state.get("average", 0.0) + p.grad.double() / 3
                    state["history"] = [*state.get("history", []), p.grad.double() / 7]
                    p.sub_(state["average"].to(p.dtype) * group["lr"])

    model = network().bfloat16()
    optimizer = Wide(model.parameters())
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE.bfloat16(), per_step=1.0, at_limit="skip")
    x, y = next(batches())
    backward(model, guard, (x.bfloat16(), y))
    optimizer.param_groups[0]["lr"] = 1e-3
    guard.step()
    assert guard.last.accepted
    before = frozen(model, optimizer)
    optimizer.param_groups[0]["lr"] = 1e4
    backward(model, guard, (x.bfloat16(), y))
    guard.step()
    assert guard.last.decision is Decision.REJECTED
    optimizer.param_groups[0]["lr"] = 1e-3
    assert same(frozen(model, optimizer), before)
    assert next(iter(optimizer.state.values()))["average"].dtype == DOUBLE


def test_gradients_that_are_not_finite_are_undone() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-2)
    stream = batches()
    for _ in range(2):
        backward(model, guard, next(stream))
        guard.step()
    before = frozen(model, optimizer)
    for bad in (math.nan, math.inf):
        backward(model, guard, next(stream))
        model[0].weight.grad[0, 0] = bad
        guard.step()
        assert guard.last.decision is Decision.REJECTED and "nan" in guard.last.reason
        assert same(frozen(model, optimizer), before)
    backward(model, guard, next(stream))
    guard.step()
    assert guard.last.accepted and guard.last.kl_step > 0


def test_an_error_inside_the_update_undoes_it() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1.0)
    batch = next(batches())
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        if len(calls) == 9:
            raise KeyboardInterrupt
        return loss

    loss = guard.step(closure)
    wanted = F.cross_entropy(network()(batch[0]), batch[1])
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert guard.last.accepted and guard.last.kl_step > 0
    before, calls[:] = frozen(model, optimizer), [1] * 6
    with pytest.raises(KeyboardInterrupt):
        guard.step(closure)
    assert same(frozen(model, optimizer), before)
    assert guard.last.step == 1


def test_parameters_outside_the_model_move_and_are_undone_with_it() -> None:
    model, head = network(), nn.Linear(3, 1).double()
    start = copy.deepcopy(head.weight.detach())
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=100.0)
    for at_limit, scale in (("skip", 0.0), ("shrink", None)):
        guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-3, at_limit=at_limit)
        guard.zero_grad()
        x, y = next(batches())
        f = model(x)
        (F.cross_entropy(f, y) + head(f).mean()).backward()
        expected = start - 100.0 * head.weight.grad
        guard.step()
        if scale is None:
            scale = guard.last.scale
            assert 0 < scale < 1
        assert torch.allclose(head.weight, start + scale * (expected - start), rtol=1e-12, atol=1e-14)


# What happens at a limit.


def test_halt_raises_after_undoing() -> None:
    model, batch = network(), next(batches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=30.0)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-3, at_limit="halt")
    before = frozen(model, optimizer)
    backward(model, guard, batch)
    with pytest.raises(BudgetError, match=r"Update 1 was undone.*per_step=0\.001"):
        guard.step()
    assert same(frozen(model, optimizer), before)
    assert guard.last.decision is Decision.REJECTED


def test_halt_raises_when_the_budget_is_spent() -> None:
    model, batch = network(), next(batches())
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, to_reference=1e-3)
    while not guard.exhausted:
        backward(model, guard, batch)
        guard.step()
    state = guard.state_dict()
    halting = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, to_reference=1e-3, at_limit="halt")
    halting.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(BudgetError, match="spent"):
            halting.step()


def test_skip_and_no_backtracks_never_shorten() -> None:
    for options in ({"at_limit": "skip"}, {"backtracks": 0}):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=30.0)
        guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-3, **options)
        backward(model, guard, next(batches()))
        guard.step()
        assert guard.last.decision is Decision.REJECTED and guard.last.backtracks == 0
        assert same(frozen(model), frozen(network()))


# Changes from outside, resuming, company.


def test_a_change_from_outside_is_a_new_start_is_recorded_and_counts(tmp_path: Path) -> None:
    model, stream = network(), batches()
    reference = log_probabilities(model)
    ledger = ng.Ledger(tmp_path / "run.jsonl")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = ng.KLBudget(
        optimizer, model, LIKELIHOOD, PROBE, per_step=1e-3, to_reference=0.5, at_limit="skip", ledger=ledger
    )
    backward(model, guard, next(stream))
    guard.step()
    before = log_probabilities(model)
    with torch.no_grad():
        model[0].weight.mul_(1.3)  # e.g. a projection, or a checkpoint that was loaded
    changed = log_probabilities(model)
    backward(model, guard, next(stream))
    guard.step()
    assert guard.last.accepted  # the update itself is small
    (outside,) = [r.data for r in ledger.records() if r.kind == "outside"]
    assert outside["kl_step"] == pytest.approx(kl(before, changed), rel=1e-6)
    assert outside["kl_reference"] == pytest.approx(kl(changed, reference), rel=1e-6)
    assert guard.last.kl_reference == pytest.approx(kl(log_probabilities(model), reference), rel=1e-6)
    with torch.no_grad():
        model[2].weight.mul_(30.0)
    kept = frozen(model)
    backward(model, guard, next(stream))
    guard.step()
    assert guard.exhausted and guard.last.budget_left < 0  # over budget by someone else's hand: no update is allowed
    assert same(frozen(model), kept)


def test_a_resumed_run_keeps_its_reference(tmp_path: Path) -> None:
    def run(steps: int, model: nn.Module, guard: ng.KLBudget, skip: int = 0) -> None:
        for batch in itertools.islice(batches(), skip, skip + steps):
            backward(model, guard, batch)
            guard.step()

    def make() -> tuple[nn.Module, ng.KLBudget]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        return model, ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-3, to_reference=0.1)

    straight, guard = make()
    run(8, straight, guard)
    first, early = make()
    run(5, first, early)
    torch.save([first.state_dict(), early.state_dict()], tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for model_first in (True, False):
        second = network(7)
        late = ng.KLBudget(
            torch.optim.AdamW(second.parameters(), lr=0.5), second, LIKELIHOOD, PROBE, per_step=1e-3, to_reference=0.1
        )
        for part in (second, late) if model_first else (late, second):
            part.load_state_dict(copy.deepcopy(saved[0] if part is second else saved[1]))
        run(3, second, late, skip=5)
        assert same(frozen(second, late.optimizer), frozen(straight, guard.optimizer))
        assert late.last.kl_reference == guard.last.kl_reference
        assert late.last.step == 8
        if model_first:
            assert late.last.path_length == guard.last.path_length
    other = ng.KLBudget(torch.optim.AdamW(second.parameters()), second, LIKELIHOOD, PROBE + 1, to_reference=0.1)
    with pytest.raises(ArgumentError, match="probe set"):
        other.load_state_dict(saved[1])
    plain = torch.optim.AdamW(second.parameters())
    other.load_state_dict(plain.state_dict())  # a bare optimizer's state is taken too
    plain.load_state_dict(guard.state_dict())  # and the other way round


def test_trainers_treat_it_as_the_optimizer() -> None:
    model = network().float()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}], lr=0.1)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE.float(), per_step=1e-2)
    assert isinstance(guard, torch.optim.Optimizer) and guard.optimizer is optimizer
    guard.add_param_group({"params": model[2].parameters(), "lr": 0.01})
    assert guard.param_groups is optimizer.param_groups and len(guard.param_groups) == 2
    seen = []
    handle = guard.register_step_post_hook(lambda *_: seen.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(guard, max_lr=[0.5, 0.1], total_steps=10)
    for x, y in itertools.islice(batches(), 4):
        guard.zero_grad()
        scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
        scaler.unscale_(guard)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(guard)
        scaler.update()
        scheduler.step()
    assert len(seen) == 4 and guard.last.step == 4
    handle.remove()
    assert guard.state is optimizer.state and len(guard.state) == 4
    assert "per_step=0.01" in repr(guard) and "AdamW" in repr(guard)
    twin = copy.deepcopy(guard)
    assert same(frozen(twin), frozen(guard)) and twin.optimizer is not optimizer


def test_two_guards_on_two_probe_sets_hold_both() -> None:
    model = network()
    other = next(batches(50, 20))[0] * 3
    inner = ng.KLBudget(torch.optim.AdamW(model.parameters(), lr=3.0), model, LIKELIHOOD, PROBE, per_step=1e-3)
    outer = ng.KLBudget(inner, model, LIKELIHOOD, other, per_step=2e-4)
    for batch in itertools.islice(batches(), 8):
        before = log_probabilities(model), log_probabilities(model, other)
        backward(model, outer, batch)
        outer.step()
        assert kl(before[0], log_probabilities(model)) <= 1e-3 * (1 + 1e-9)
        assert kl(before[1], log_probabilities(model, other)) <= 2e-4 * (1 + 1e-9)
        assert outer.last.accepted


def test_predicted_kl_is_that_of_the_step_as_taken() -> None:
    model = network()
    optimizer = ng.NGD(model, LIKELIHOOD, lr=1.0, damping=1e-3)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-5)
    x = PROBE
    for _ in range(3):
        backward(model, guard, (x, (x[:, 0] > 0).long()))
        guard.step()
        assert guard.last.decision is Decision.SHRUNK
        # The probe set is the training batch, so the metric predicts what is measured, up to third order.
        assert guard.last.kl_predicted == pytest.approx(guard.last.kl_step, rel=0.02)
    plain = ng.KLBudget(torch.optim.SGD(model.parameters(), lr=0.1), model, LIKELIHOOD, PROBE, per_step=1.0)
    backward(model, plain, next(batches()))
    plain.step()
    assert plain.last.kl_predicted is None


# The ledger.


def test_every_update_is_in_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model, batch = network(), next(batches())
    optimizer = ng.NGD(model, LIKELIHOOD, lr=0.5, damping=1e-3)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-3, to_reference=4e-3, ledger=ng.Ledger(path))
    reports = []
    while not guard.exhausted:
        backward(model, guard, batch)
        guard.step()
        reports.append(guard.last)
        assert guard.last.step < 100
    for _ in range(3):
        guard.step()
    reports.append(guard.last)
    assert verify(path).ok
    records = list(read(path))
    assert [r.kind for r in records] == ["genesis", "budget"] + ["update"] * len(reports)
    start = records[1].data
    assert start["per_step"] == 1e-3 and start["to_reference"] == 4e-3 and start["at_limit"] == "shrink"
    assert start["optimizer"] == "NGD" and start["probe_predictions"] == 32
    assert len(start["probe_sha256"]) == 64
    for record, report in zip(records[2:], reports, strict=True):
        for name in ("step", "decision", "reason", "scale", "kl_step", "kl_proposed", "kl_predicted", "kl_reference"):
            assert record.data[name] == getattr(report, name)
        assert record.data["budget_left"] == report.budget_left
    assert records[2].data["lr"] == [0.5] and records[2].data["kl_predicted"] > 0
    assert records[-1].data["decision"] == "exhausted"


def test_an_update_that_cannot_be_recorded_does_not_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    ledger = ng.Ledger(tmp_path / "run.jsonl")
    optimizer = torch.optim.AdamW(model.parameters(), lr=30.0)
    guard = ng.KLBudget(optimizer, model, LIKELIHOOD, PROBE, per_step=1e-3, ledger=ledger)
    stream = batches()
    backward(model, guard, next(stream))
    guard.step()
    before = frozen(model, optimizer)
    backward(model, guard, next(stream))

    def full(kind: str, data: Any) -> None:
        raise LedgerError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append", full)
        with pytest.raises(LedgerError):
            guard.step()
    assert same(frozen(model, optimizer), before)
    guard.step()
    assert guard.last.step == 2 and guard.last.accepted
    assert [r.data["step"] for r in ledger.records() if r.kind == "update"] == [1, 2]


def test_a_broken_ledger_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("{}\n")
    model = network()
    with pytest.raises(LedgerError, match="line 1"):
        ng.KLBudget(
            torch.optim.SGD(model.parameters(), lr=0.1), model, LIKELIHOOD, PROBE, per_step=1.0, ledger=ng.Ledger(path)
        )


# Probe sets.


class Tagger(nn.Module):
    """A prediction at every position; takes keyword arguments, returns a structure, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, ids: Tensor, shift: Tensor) -> dict[str, Tensor]:
        h = self.embed(ids).cumsum(1)
        return {"logits": self.head(torch.tanh(h + shift))}


def test_padding_does_not_count() -> None:
    reports = []
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 1]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    shift = torch.zeros(1, dtype=DOUBLE)
    for padding in (0, 3):
        torch.manual_seed(0)
        model = Tagger().double()
        padded = torch.cat([ids, ids.new_zeros(2, padding)], 1)
        probe = ProbeSet({"ids": padded, "shift": shift}, F.pad(mask, (0, padding)))
        guard = ng.KLBudget(torch.optim.SGD(model.parameters(), lr=5.0), model, LIKELIHOOD, probe, per_step=1e-2)
        before = copy.deepcopy(model)
        F.cross_entropy(model(ids, shift)["logits"].flatten(0, 1), ids.flatten()).backward()
        guard.step()
        a, b = (m(ids, shift)["logits"].detach().log_softmax(-1) for m in (before, model))
        wanted = float(((a.exp() * (a - b)).sum(-1) * mask).sum() / 6)
        assert guard.last.kl_step == pytest.approx(wanted, rel=1e-9)
        reports.append(guard.last)
    assert reports[0].kl_step == pytest.approx(reports[1].kl_step, rel=1e-9)
    tuples = ng.KLBudget(torch.optim.SGD(model.parameters(), lr=5.0), model, LIKELIHOOD, (ids, shift), to_reference=1.0)
    backward_loss = F.cross_entropy(model(ids, shift)["logits"].flatten(0, 1), ids.flatten())
    backward_loss.backward()
    tuples.step()
    assert tuples.last.accepted


def test_gaussian_kl_is_measured_in_the_right_direction() -> None:
    """With a learned scale KL is not symmetric: the step is KL(old ‖ new), the reference KL(new ‖ reference)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(10, 3, dtype=DOUBLE)
    guard = ng.KLBudget(
        torch.optim.SGD(model.parameters(), lr=0.3), model, ng.Gaussian.learned(), x, per_step=10.0, to_reference=10.0
    )

    def normal() -> torch.distributions.Normal:
        mean, log_scale = model(x).detach().unbind(-1)
        return torch.distributions.Normal(mean, log_scale.exp())

    old = normal()
    ng.Gaussian.learned().nll(model(x), torch.ones(10, 1, dtype=DOUBLE)).mean().backward()
    guard.step()
    new = normal()
    forward = float(torch.distributions.kl_divergence(old, new).mean())
    reverse = float(torch.distributions.kl_divergence(new, old).mean())
    assert abs(forward - reverse) > 1e-3
    assert guard.last.kl_step == pytest.approx(forward, rel=1e-9)
    assert guard.last.kl_reference == pytest.approx(reverse, rel=1e-9)


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode too, or counts its calls."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.layer, self.counts, self.calls = nn.Linear(4, 3), counts, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        f = self.layer(x)
        return f * self.calls if self.counts else f + torch.randn_like(f)


def test_a_model_that_is_not_reproducible_is_refused_and_fixed_draws_are_not() -> None:
    model = Noisy(counts=True).double()
    with pytest.raises(ArgumentError, match="two evaluations"):
        ng.KLBudget(torch.optim.SGD(model.parameters(), lr=0.1), model, LIKELIHOOD, PROBE, per_step=1e-3)
    model = Noisy(counts=False).double()  # the same draws every time
    guard = ng.KLBudget(torch.optim.SGD(model.parameters(), lr=0.0), model, LIKELIHOOD, PROBE, per_step=1e-3)
    backward(model, guard, next(batches()))
    guard.step()
    assert guard.last.kl_step == 0.0


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"optimizer": "adamw"}, ArgumentError, "optimizer is of type str"),
    ({"model": [1]}, ArgumentError, "model is of type list"),
    ({"likelihood": nn.CrossEntropyLoss()}, ArgumentError, "likelihood is of type CrossEntropyLoss"),
    ({"per_step": 0.0}, ArgumentError, r"per_step=0\.0"),
    ({"per_step": math.nan}, ArgumentError, "per_step=nan"),
    ({"to_reference": -1.0}, ArgumentError, r"to_reference=-1\.0"),
    ({"to_reference": math.inf}, ArgumentError, "to_reference=inf"),
    ({"per_step": 1e-16}, ArgumentError, "resolves"),
    ({"per_step": None}, ArgumentError, "nothing to guard"),
    ({"ledger": "run.jsonl"}, ArgumentError, r"ng\.Ledger\(path\)"),
    ({"at_limit": "explode"}, ArgumentError, "at_limit='explode'.*shrink"),
    ({"backtracks": -1}, ArgumentError, "backtracks=-1"),
    ({"probe": PROBE[:0]}, ArgumentError, "empty"),
    ({"probe": PROBE * math.nan}, NonFiniteError, "NaN"),
    ({"probe": ProbeSet(PROBE, torch.ones(3))}, ShapeError, r"\(3,\)"),
    ({"probe": ProbeSet(PROBE, -torch.ones(32))}, ArgumentError, "negative"),
    ({"probe": ProbeSet(PROBE, torch.zeros(32))}, ArgumentError, "positive"),
    ({"probe": ProbeSet(PROBE, torch.full((32,), math.nan))}, NonFiniteError, "weights"),
    ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)}, ArgumentError, "no parameter of the model"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    model = network()
    arguments: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "model": model,
        "likelihood": LIKELIHOOD,
        "probe": PROBE,
        "per_step": 1e-3,
    }
    with pytest.raises(kind, match=words):
        ng.KLBudget(**{**arguments, **change})
