"""What training loops do around an optimizer: schedulers, scalers, averages, copies, compilation, closures."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from contract_problems import backward, batch, flat, net, run, values
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import natgrad as ng
from natgrad.errors import ArgumentError
from natgrad.network import Pass
from support import assert_close

PRESETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "NGD": (ng.NGD, {"lr": 0.1, "momentum": 0.9}),
    "DiagonalNGD": (ng.DiagonalNGD, {}),
    "BlockNGD": (ng.BlockNGD, {}),
    "KFAC": (ng.KFAC, {}),
    "KFAC clipped": (ng.KFAC, {"lr": 0.1, "momentum": 0.9, "search": ng.KLClip(1e-2)}),
    "EKFAC": (ng.EKFAC, {}),
    "GramNGD": (ng.GramNGD, {}),
    "HessianFree": (ng.HessianFree, {}),
    "GaussNewton": (ng.GaussNewton, {}),
    "Newton": (ng.Newton, {"damping": 100.0}),
    "TrustRegionNGD": (ng.TrustRegionNGD, {}),
}
LABELLED = (ng.HessianFree, ng.GaussNewton, ng.Newton)
each_preset = pytest.mark.parametrize("name", PRESETS)
KFAC = {"metric": ng.Fisher(ng.MonteCarlo(), ng.Kronecker()), "refresh": ng.Refresh(1, 2), "lr": 0.1}


def start(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, ng.NaturalGradient]:
    model = net(dtype=dtype)
    kind, options = PRESETS[name]
    return model, kind(model, ng.Categorical(), **options)


def kfac(model: nn.Module, **options: Any) -> ng.NaturalGradient:
    return ng.NaturalGradient(model, ng.Categorical(), **{**KFAC, **options})


def gradients(model: Any, optimizer: ng.NaturalGradient, seed: int) -> torch.Tensor:
    """One pass and its gradients; labels for the presets that need them."""
    x, y = batch(seed)
    optimizer.zero_grad()
    output = model(x)
    if isinstance(optimizer, LABELLED):
        optimizer.observe(output, y)
    loss = F.cross_entropy(output, y)
    loss.backward()
    return loss.detach()


def train(model: Any, optimizer: ng.NaturalGradient, seeds: Any) -> None:
    for seed in seeds:
        gradients(model, optimizer, seed)
        optimizer.step()


# Learning-rate schedulers

SCHEDULERS: dict[str, Any] = {
    "step": lambda o: rates.StepLR(o, 2, 0.5),
    "multistep": lambda o: rates.MultiStepLR(o, [2, 4], 0.1),
    "linear": lambda o: rates.LinearLR(o, 0.1, 1.0, 4),
    "cosine": lambda o: rates.CosineAnnealingLR(o, 6),
    "restarts": lambda o: rates.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: rates.PolynomialLR(o, 6),
    "multiplicative": lambda o: rates.MultiplicativeLR(o, lambda epoch: 0.9),
    "one cycle with momentum": lambda o: rates.OneCycleLR(o, 0.2, total_steps=9),
    "one cycle": lambda o: rates.OneCycleLR(o, [0.2, 0.1][: len(o.param_groups)], total_steps=9, cycle_momentum=False),
    "cyclic with momentum": lambda o: rates.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "cyclic": lambda o: rates.CyclicLR(o, 0.01, 0.2, step_size_up=3, cycle_momentum=False),
    "plateau": lambda o: rates.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
    "sequential": lambda o: rates.SequentialLR(o, [rates.ConstantLR(o, 0.1, 2), rates.ExponentialLR(o, 0.8)], [2]),
    "chained": lambda o: rates.ChainedScheduler([rates.ConstantLR(o, 0.5, 3), rates.ExponentialLR(o, 0.9)]),
    "averaging": lambda o: SWALR(o, 0.05, anneal_epochs=3),
}


def follow(scheduler: Any, loss: torch.Tensor) -> None:
    scheduler.step(loss) if isinstance(scheduler, rates.ReduceLROnPlateau) else scheduler.step()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_to_euclidean_what_they_do_to_sgd(name, groups):
    """To the bit, momentum and the rates of groups included; nothing warns."""
    runs = []
    for sgd in (True, False):
        model = net()
        parts = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.05}]
        given = parts if groups == 2 else model.parameters()
        if sgd:
            optimizer: Any = torch.optim.SGD(given, lr=0.1, momentum=0.9)
        else:
            optimizer = ng.NaturalGradient(given, ng.Categorical(), metric=ng.Euclidean(), lr=0.1, momentum=0.9)
            optimizer.attach(model)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for seed in range(7):
            loss = backward(model, [optimizer], seed)
            optimizer.step()
            seen.append([(float(g["lr"]), g["momentum"]) for g in optimizer.param_groups])
            follow(scheduler, loss.detach())
        runs.append((flat(model), seen))
    assert runs[0][1] == runs[1][1]
    assert torch.equal(runs[0][0], runs[1][0])
    assert len({str(rate) for rate in runs[0][1]}) > 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_length_of_a_natural_step(name):
    """The step of K-FAC is the scheduled rate times the direction at rate 1."""
    model = net()
    optimizer = kfac(model, refresh=ng.Refresh(1, 1))
    scheduler = SCHEDULERS[name](optimizer)
    for seed in range(6):
        unit = copy.deepcopy((model, optimizer))
        for group in unit[1].param_groups:
            group["lr"] = 1.0
        rate = float(optimizer.param_groups[0]["lr"])
        before = flat(model)
        train(*unit, [seed])
        loss = gradients(model, optimizer, seed)
        optimizer.step()
        assert_close(flat(model) - before, rate * (flat(unit[0]) - before), 1e-9)
        follow(scheduler, loss)


@each_preset
def test_a_schedule_is_resumed_with_the_optimizer(name):
    model, optimizer = start(name)
    scheduler = rates.StepLR(optimizer, 2, 0.5)
    for seed in range(3):
        train(model, optimizer, [seed])
        scheduler.step()
    again, resumed = start(name)
    again.load_state_dict(model.state_dict())
    later = rates.StepLR(resumed, 2, 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    later.load_state_dict(scheduler.state_dict())
    for seed in range(3, 6):
        for net_, opt, sch in ((model, optimizer, scheduler), (again, resumed, later)):
            train(net_, opt, [seed])
            sch.step()
    assert torch.equal(flat(model), flat(again))
    assert optimizer.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]


@each_preset
def test_a_tensor_rate_is_followed(name):
    """As numbers set in the group; the tensor stays the one given."""
    runs = []
    kind, options = PRESETS[name]
    for tensor in (True, False):
        model = net()
        lr: Any = torch.tensor(0.5, dtype=torch.float64) if tensor else 0.5
        optimizer = kind(model, ng.Categorical(), **{**options, "lr": lr})
        for seed, rate in enumerate((0.5, 0.25, 0.125)):
            if tensor:
                lr.fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
            train(model, optimizer, [seed])
        assert not tensor or optimizer.param_groups[0]["lr"] is lr
        runs.append(flat(model))
    assert_close(*runs, 1e-9)


# Gradient scaling and clipping


@each_preset
def test_a_gradient_scaler_changes_nothing(name):
    """Scaled by a power of two and back: the run without a scaler."""
    runs = []
    for enabled in (False, True):
        model, optimizer = start(name)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=enabled)
        for seed in range(5):
            x, y = batch(seed)
            optimizer.zero_grad()
            output = model(x)
            if isinstance(optimizer, LABELLED):
                optimizer.observe(output, y)
            scaler.scale(F.cross_entropy(output, y)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (2.0**14 if enabled else 1.0)
        runs.append(flat(model))
    assert_close(runs[0], runs[1], 1e-9)


@pytest.mark.parametrize("unscaled", [False, True])
@each_preset
def test_a_step_that_overflows_is_as_if_its_batch_had_not_been(name, unscaled):
    runs = []
    for bad in (None, 2):
        model, optimizer = start(name)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
        for seed in range(5):
            if bad is None and seed == 2:
                continue
            x, y = batch(seed)
            optimizer.zero_grad()
            output = model(x)
            if isinstance(optimizer, LABELLED):
                optimizer.observe(output, y)
            scaler.scale(F.cross_entropy(output, y)).backward()
            if seed == bad:
                model[0].weight.grad[0, 0] = torch.inf
            if unscaled:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_value_(model.parameters(), 1e6)
            before = flat(model)
            scaler.step(optimizer)
            scaler.update()
            assert (seed == bad) == torch.equal(flat(model), before)
        assert scaler.get_scale() == 2.0 ** (12 if bad is None else 11)
        runs.append(flat(model))
    assert_close(runs[0], runs[1], 1e-9)


def test_clipped_gradients_are_the_ones_preconditioned():
    """Clipping before the step shortens the gradient; the curvature is that of the model."""
    plain, clipped = net(), net()
    one, two = (kfac(model, refresh=ng.Refresh(1, 1)) for model in (plain, clipped))
    before = flat(plain)
    gradients(plain, one, 0)
    gradients(clipped, two, 0)
    norm = torch.nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3)
    one.step()
    two.step()
    assert_close(flat(clipped) - before, (flat(plain) - before) * 1e-3 / norm, 1e-4)


# Copies and averages


@each_preset
def test_averages_of_the_model_disturb_nothing(name):
    """EMA and SWA copies carry the model's hooks along, and run in training mode where their statistics are made."""
    runs = []
    for averaged in (False, True):
        model, optimizer = start(name)
        copies = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
        for seed in range(4):
            if averaged:
                for average in copies:
                    F.cross_entropy(average(batch(seed + 50)[0]), batch(seed + 50)[1]).backward()
            train(model, optimizer, [seed])
            if averaged:
                for average in copies:
                    average.update_parameters(model)
                    update_bn([batch(seed + 70)[0]], average)
        if averaged:
            mean = flat(copies[0])
            assert not torch.equal(mean, flat(model)) and bool(torch.isfinite(mean).all())
        runs.append(flat(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
@each_preset
def test_a_copy_goes_on_like_the_original(name, steps, how):
    """To the bit, and each on its own: the copied optimizer watches and moves the copied model."""
    model, optimizer = start(name)
    train(model, optimizer, range(steps))
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    place = flat(model)
    train(other, copied, range(steps, steps + 3))
    assert torch.equal(flat(model), place)
    train(model, optimizer, range(steps, steps + 3))
    assert torch.equal(flat(model), flat(other)) and not torch.equal(flat(model), place)
    assert copied.metrics() == optimizer.metrics()


@each_preset
def test_a_copy_of_the_optimizer_alone_is_attached_to_another_module(name):
    """The state goes along; what is copied with it of the model is not the user's."""
    model, optimizer = start(name)
    train(model, optimizer, range(2))
    place = flat(model)
    alone = copy.deepcopy(optimizer)
    assert alone.state_dict().keys() == optimizer.state_dict().keys()
    assert len(alone.state) == len(optimizer.state)
    alone.zero_grad()
    train(model, optimizer, [2])
    assert not torch.equal(flat(model), place)


def test_hooks_and_schedulers_of_the_original_are_not_copied():
    model, optimizer = start("KFAC")
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    rates.StepLR(optimizer, 1)
    other, copied = copy.deepcopy((model, optimizer))
    train(other, copied, [0])
    assert calls == []
    train(model, optimizer, [0])
    assert calls == [1]


# Activation checkpointing


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        layers = net(seed=1), net(seed=2)
        self.first, self.second, self.reentrant = *layers, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(h) if self.reentrant is None else checkpoint(self.second, h, use_reentrant=self.reentrant)


@each_preset
def test_activation_checkpointing_of_both_kinds_is_transparent(name):
    runs = []
    for reentrant in (None, False, True):
        model = Checkpointed(reentrant)
        kind, options = PRESETS[name]
        train(model, kind(model, ng.Categorical(), **options), range(3))
        runs.append(flat(model))
    assert_close(runs[0], runs[1], 1e-9)
    assert_close(runs[0], runs[2], 1e-9)


# Compilation


@pytest.fixture
def compiler() -> Any:
    """torch.compile with all of its stages but code generation; what it remembers does not outlive the test."""
    torch.compiler.reset()
    yield "aot_eager"
    torch.compiler.reset()


# By the compiler itself, where it is given the output of a layer that it did not compile.
LEAVES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@each_preset
def test_a_model_compiled_before_the_optimizer_is_made(name, compiler):
    expected, reference = start(name)
    train(expected, reference, range(3))
    model = net()
    compiled: Any = torch.compile(model, backend=compiler)
    kind, options = PRESETS[name]
    train(compiled, kind(compiled, ng.Categorical(), **options), range(3))
    assert_close(flat(model), flat(expected), 1e-9)


class Part(nn.Module):
    """A block of the user's own; the compiler leaves calls of torch's layers by themselves alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def part(model: nn.Sequential) -> nn.Module:
    model[0] = Part(model[0])
    model[0].compile(backend="aot_eager")
    return model


class Decorated(Part):
    @torch.compile(backend="aot_eager")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def decorated_part(model: nn.Sequential) -> nn.Module:
    model[2] = Decorated(model[2])
    return model


def wrapped_part(model: nn.Sequential) -> nn.Module:
    model[2] = torch.compile(model[2], backend="aot_eager")  # type: ignore[assignment]
    return model


def inner(model: nn.Sequential) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="aot_eager"),
    "forward": inner,
    "a part in place": part,
    "a part": wrapped_part,
    "a decorated class": decorated_part,
}


@LEAVES
@pytest.mark.parametrize(
    ("form", "late"), [*((form, False) for form in COMPILED), *((form, True) for form in COMPILED if form != "whole")]
)
@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_layers_inside_compiled_graphs_are_seen(name, form, late, compiler):
    """As outside, whatever is compiled; also once it is, where the optimizer was made before and can see the pass."""
    expected, reference = start(name)
    train(expected, reference, range(3))
    model = net()
    parameters = list(model.parameters())
    kind, options = PRESETS[name]
    if late:
        optimizer = kind(model, ng.Categorical(), **options)
        compiled: Any = COMPILED[form](model)
    else:
        compiled = COMPILED[form](model)
        optimizer = kind(compiled, ng.Categorical(), **options)
    train(compiled, optimizer, range(3))
    assert [row.treatment for row in optimizer.coverage()] == [row.treatment for row in reference.coverage()]
    assert not any(row.reason for row in optimizer.coverage())
    assert_close(torch.cat([p.detach().flatten() for p in parameters]), flat(expected), 1e-9)


class Helped(nn.Module):
    """Calls a layer from a compiled function that is no module's ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = net()[0], net(1)[2]

    @torch.compile(backend="aot_eager")
    def help(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.help(x))


@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_layers_that_a_compiled_helper_calls_are_named(name, compiler):
    model = Helped().double()
    optimizer = PRESETS[name][0](model, ng.Categorical())
    first = gradients(model, optimizer, 0)
    optimizer.step()
    rows = {row.parameter: row for row in optimizer.coverage()}
    for parameter in ("first.weight", "first.bias"):
        assert rows[parameter].treatment == "Diagonal" and "compiled" in rows[parameter].reason
    assert not rows["second.weight"].reason
    for _ in range(5):
        last = gradients(model, optimizer, 0)
        optimizer.step()
    assert last < first


@pytest.mark.parametrize("structure", [ng.Kronecker(), ng.EigenKronecker(), ng.Gram()], ids=repr)
@pytest.mark.parametrize("estimate", [ng.Empirical(), ng.Exact(), ng.Signed()], ids=repr)
@pytest.mark.parametrize("labels", ["observe", "closure"])
def test_every_estimate_of_a_compiled_model_is_that_of_the_model(estimate, structure, labels, compiler):
    """The scores of the data's labels, too, are made of the likelihood and the output: no loss is run again."""
    runs = []
    for compiled in (False, True):
        model = net()
        called: Any = torch.compile(model, backend=compiler) if compiled else model
        options: dict[str, Any] = {"metric": ng.Fisher(estimate, structure), "lr": 0.1, "damping": 0.1}
        optimizer = ng.NaturalGradient(called, ng.Categorical(), **options)
        for seed in range(3):
            (x, y), (x2, y2) = batch(seed), batch(seed + 10)

            def closure(x=x, y=y, called=called) -> Any:
                output = called(x)
                return F.cross_entropy(output, y), output, y

            optimizer.zero_grad()
            if labels == "closure":
                optimizer.step(closure)
                continue
            for inputs, target in ((x, y), (x2, y2)):  # two passes before a step
                output = called(inputs)
                optimizer.observe(output, target)
                (F.cross_entropy(output, target) / 2).backward()
            optimizer.step()
        runs.append(flat(model))
    assert_close(runs[1], runs[0], 1e-9)


@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_replays_of_a_compiled_model_leave_no_trace(name, compiler):
    """BatchNorm's statistics, the random streams and the draws of dropout are those of the model that is not compiled.

    BatchNorm counts the passes, so that a second one could not hide.
    """
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layers = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
        model = nn.Sequential(*layers).double()
        called: Any = torch.compile(model, backend=compiler) if compiled else model
        kind, options = PRESETS[name]
        train(called, kind(called, ng.Categorical(), **options), range(4))
        runs.append((flat(model), dict(model.named_buffers()), torch.get_rng_state()))
    (plain, buffers, stream), (found, again, other) = runs
    assert_close(found, plain, 1e-8)
    assert int(again["1.num_batches_tracked"]) == 4 and torch.equal(stream, other)
    for key, buffer in buffers.items():
        assert_close(again[key].double(), buffer.double(), 1e-8)


@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_a_compiled_model_is_run_again_only_where_statistics_are_due(name, compiler, monkeypatch):
    passes: list[int] = []
    tape = Pass.tape
    monkeypatch.setattr(Pass, "tape", lambda observed: passes.append(step) or tape(observed))
    model: Any = torch.compile(net(), backend=compiler)
    optimizer = PRESETS[name][0](model, ng.Categorical(), refresh=ng.Refresh(3, 3))
    for step in range(8):
        train(model, optimizer, [step])
    assert passes == [0, 3, 6]
    model = net()
    optimizer = PRESETS[name][0](model, ng.Categorical(), refresh=ng.Refresh(3, 3))
    train(model, optimizer, range(4))
    assert passes == [0, 3, 6]


@pytest.mark.parametrize("form", ["whole", "forward", "a part in place"])
@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_the_graph_stays_whole_and_is_compiled_once(name, form, compiler):
    """With statistics and without, before and after steps."""
    counters.clear()
    model = COMPILED[form](net())
    optimizer = PRESETS[name][0](model, ng.Categorical(), refresh=ng.Refresh(2, 4))
    train(model, optimizer, [0])
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, range(1, 7))
    assert counters["stats"]["unique_graphs"] == 1 and counters["aot_autograd"]["ok"] == 1
    assert not counters["graph_break"] and not counters["recompiles"]


@each_preset
def test_a_compiled_run_is_resumed(name, compiler):
    """To the bit, from the optimizer's state dict."""
    kind, options = PRESETS[name]
    model: Any = torch.compile(net(), backend=compiler)
    optimizer = kind(model, ng.Categorical(), **options)
    train(model, optimizer, range(2))
    again: Any = torch.compile(net(1), backend=compiler)
    again.load_state_dict(model.state_dict())
    resumed = kind(again, ng.Categorical(), **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(2, 5))
    train(again, resumed, range(2, 5))
    assert torch.equal(flat(model), flat(again))


OUT_OF_SIGHT = ["function", "method", "method before", "after a step", "whole loop body"]


@LEAVES
@pytest.mark.parametrize("form", OUT_OF_SIGHT)
@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "NGD", "HessianFree", "TrustRegionNGD"])
def test_a_model_compiled_out_of_sight_is_seen(name, form, compiler):
    """After the optimizer was made, as a whole in place, or by a function that calls it: hooks run between graphs."""
    expected, reference = start(name)
    train(expected, reference, range(3))
    model, optimizer = start(name)
    seeds = range(3)
    if form == "method before":
        model.compile(backend=compiler)
        optimizer = PRESETS[name][0](model, ng.Categorical(), **PRESETS[name][1])
    if form == "after a step":
        train(model, optimizer, [0])
        seeds = range(1, 3)
    if form == "function":
        run_through: Any = torch.compile(model, backend=compiler)
    elif form == "whole loop body":
        run_through = torch.compile(lambda x: model(1.0 * x), backend=compiler)
    else:
        if form != "method before":
            model.compile(backend=compiler)
        run_through = model
    train(run_through, optimizer, seeds)
    assert [row.reason for row in optimizer.coverage()] == [row.reason for row in reference.coverage()]
    assert_close(flat(model), flat(expected), 1e-7)


@LEAVES
@pytest.mark.parametrize("form", ["function", "method"])
def test_a_model_compiled_out_of_sight_is_one_graph(form, compiler):
    """The breaks are before and behind the network, not in it, and there are none in evaluation."""
    counters.clear()
    model, optimizer = start("KFAC")
    if form == "function":
        run_through: Any = torch.compile(model, backend=compiler)
    else:
        model.compile(backend=compiler)
        run_through = model
    train(run_through, optimizer, [0])
    with torch.compiler.set_stance("fail_on_recompile"):
        train(run_through, optimizer, range(1, 4))
    assert counters["aot_autograd"]["ok"] == 1 and counters["graph_break"]
    counters.clear()
    with torch.no_grad():
        run_through(batch(0)[0])
    run_through.eval()(batch(0)[0])
    assert not counters["graph_break"]


def test_fullgraph_says_what_to_do(compiler):
    model, optimizer = start("KFAC")
    late: Any = torch.compile(model, backend=compiler, fullgraph=True)
    with pytest.raises(Unsupported, match=r"give the optimizer what torch\.compile\(model\) returned"):
        late(batch(0)[0])
    optimizer = PRESETS["KFAC"][0](late, ng.Categorical(), **PRESETS["KFAC"][1])
    expected, reference = start("KFAC")
    fresh = net()
    compiled: Any = torch.compile(fresh, backend=compiler, fullgraph=True)
    optimizer = PRESETS["KFAC"][0](compiled, ng.Categorical(), **PRESETS["KFAC"][1])
    train(expected, reference, range(2))
    train(compiled, optimizer, range(2))
    assert_close(flat(fresh), flat(expected), 1e-9)


@LEAVES
@pytest.mark.parametrize("form", ["whole", "a part in place", "method"])
@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "NGD", "Newton", "TrustRegionNGD"])
def test_a_compiled_model_takes_batches_of_every_size(name, form, compiler):
    """The last batch of an epoch is smaller: the compiler makes a second graph, whose buffers may be freed at once."""
    runs = []
    for compiled in (False, True):
        model = net()
        parameters = list(model.parameters())
        called: Any = model
        if compiled and form == "method":
            model.compile(backend=compiler)
        elif compiled:
            called = COMPILED[form](model)
        optimizer = PRESETS[name][0](called, ng.Categorical(), **PRESETS[name][1])
        for _ in range(2):
            for seed, size in enumerate((8, 8, 5)):
                x, y = batch(seed)
                optimizer.zero_grad()
                output = called(x[:size])
                if isinstance(optimizer, LABELLED):
                    optimizer.observe(output, y[:size])
                F.cross_entropy(output, y[:size]).backward()
                optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert_close(runs[1], runs[0], 1e-7)


@LEAVES
@pytest.mark.parametrize("name", ["KFAC", "NGD"])
def test_a_loss_function_that_is_compiled_with_the_model_outside(name, compiler):
    """Only the loss is compiled: nothing changes."""
    expected, reference = start(name)
    train(expected, reference, range(3))
    model, optimizer = start(name)
    loss_of = torch.compile(F.cross_entropy, backend=compiler)
    for seed in range(3):
        x, y = batch(seed)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    assert_close(flat(model), flat(expected), 1e-9)


# Closures


def closure_of(model: nn.Module, optimizer: ng.NaturalGradient, seed: int, returns: Any) -> Any:
    """One of torch's kind: it runs the backward pass itself."""

    def closure() -> Any:
        loss = gradients(model, optimizer, seed)
        return returns(loss)

    return closure


RETURNS: dict[str, Any] = {
    "the loss": lambda loss: loss,
    "a number": lambda loss: loss.item(),
    "an integer": lambda loss: 1,
    "a detached tensor": lambda loss: loss.detach().clone(),
    "nothing": lambda loss: None,
    "a dictionary": lambda loss: {"loss": loss},
}


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("returns", RETURNS)
@each_preset
def test_closures_of_torchs_kind_are_called_once_and_give_the_ordinary_run(name, returns, keyword):
    expected, reference = start(name)
    train(expected, reference, range(3))
    model, optimizer = start(name)
    for seed in range(3):
        calls: list[int] = []
        inner = closure_of(model, optimizer, seed, RETURNS[returns])

        def closure(inner: Any = inner, calls: list[int] = calls) -> Any:
            calls.append(1)
            return inner()

        result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert calls == [1]
        assert type(result) is type(RETURNS[returns](torch.tensor(0.0)))
    assert torch.equal(flat(model), flat(expected))


@pytest.mark.parametrize("keyword", [False, True])
@each_preset
def test_closures_that_return_the_output_are_stepped_by_position_and_keyword(name, keyword):
    expected, reference = start(name)
    train(expected, reference, range(3))
    model, optimizer = start(name)
    for seed in range(3):
        x, y = batch(seed)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> Any:
            output = model(x)
            return F.cross_entropy(output, y), output, y

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert isinstance(loss, torch.Tensor) and not loss.requires_grad
    assert_close(flat(model), flat(expected), 1e-6)


def test_step_without_a_closure_returns_none():
    model, optimizer = start("KFAC")
    gradients(model, optimizer, 0)
    assert optimizer.step() is None
    gradients(model, optimizer, 1)
    assert optimizer.step(None) is None


def test_a_closure_beside_a_gradient_scaler_that_is_on_is_refused_or_right():
    """By keyword the scaler itself refuses; by position it would let the scaled gradients through."""
    model, optimizer = start("KFAC")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(gradients(model, optimizer, 0).requires_grad_())
    with pytest.raises(RuntimeError, match="Closure"):
        scaler.step(optimizer, closure=lambda: None)


# Memory


def live_tensors() -> tuple[int, int]:
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not isinstance(o, FakeTensor)]
    return len(found), sum(t.numel() * t.element_size() for t in found)


@pytest.mark.parametrize(
    "name", ["KFAC", *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS if name != "KFAC")]
)
def test_a_thousand_steps_do_not_grow(name):
    model, optimizer = start(name)
    train(model, optimizer, range(20))
    before = live_tensors()
    size = len(pickle.dumps(optimizer.state_dict()))
    for seed in range(980):
        train(model, optimizer, [seed % 10])
    after = live_tensors()
    assert after[0] <= before[0] + 5 and after[1] <= before[1] * 1.02
    assert abs(len(pickle.dumps(optimizer.state_dict())) - size) < 200


# What is left alone


@each_preset
def test_gradients_streams_and_statistics_are_left_alone(name):
    """The same loop with nothing but gradients: same .grad, same random stream, same batch statistics, same hooks."""

    def noisy() -> nn.Sequential:
        model = net()
        return nn.Sequential(model[0], nn.BatchNorm1d(4).double(), nn.Tanh(), nn.Dropout(0.3), model[2])

    model, plain = noisy(), noisy()
    kind, options = PRESETS[name]
    optimizer = kind(model, ng.Categorical(), **{**options, "lr": 0.0} if name != "TrustRegionNGD" else options)
    for seed in range(3):
        plain.load_state_dict(model.state_dict())
        torch.manual_seed(seed)
        gradients(plain, torch.optim.SGD(plain.parameters(), lr=0.0), seed)
        stream = torch.get_rng_state()
        torch.manual_seed(seed)
        gradients(model, optimizer, seed)
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), stream)
        for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), key
        for (key, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b), key


def test_a_parameter_frozen_and_one_without_gradient_stay():
    """Torch's comparison of implementations: gradients absent at one step, a layer frozen for two, then free again."""
    model, optimizer = start("KFAC clipped")
    for seed in range(7):
        before = values(model)
        if seed == 3:
            model[2].requires_grad_(False)
        if seed == 5:
            model[2].requires_grad_(True)
        if seed == 2:
            optimizer.zero_grad()
            optimizer.step()
        else:
            train(model, optimizer, [seed])
        moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
        expected = set() if seed == 2 else {"0.weight", "0.bias"} if seed in (3, 4) else set(before)
        assert moved == expected


def test_momentum_outside_its_range_in_a_group_is_an_error():
    model = net()
    with pytest.raises(ArgumentError, match="momentum"):
        ng.NaturalGradient(
            [{"params": list(model.parameters()), "momentum": 1.0}], ng.Categorical(), metric=ng.Euclidean()
        )


def test_the_run_helper_trains():
    model = net()
    optimizer = kfac(model)
    before = flat(model)
    run(model, [optimizer], [0])
    assert not torch.equal(flat(model), before)
