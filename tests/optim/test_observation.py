"""What counts as a training pass, and what must be named when it cannot be seen."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import natgrad as ng
from natgrad.errors import ArgumentError, NotObservedError, ShapeError, StaleTapeError, UnsupportedError
from natgrad.testing import families, oracles, zoo
from support import assert_close

CATEGORICAL = families.categorical()
EXACT = ng.Fisher(ng.Exact(), ng.Dense())
OPTIONS = {"metric": EXACT, "damping": 1e-2, "lr": 0.1, "average": 0.0, "refresh": ng.Refresh(1, 1)}


def make(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def optimizer_of(model: nn.Module, **options) -> ng.NaturalGradient:
    return ng.NaturalGradient(model, ng.Categorical(), **{**OPTIONS, **options})


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def expected_step(model: nn.Module, x: Tensor, y: Tensor, select=None) -> Tensor:
    """−lr (F + λI)⁻¹ g from dense oracles, on a copy that nobody watches."""
    model = copy.deepcopy(model)
    f = oracles.network_output(model, x, select)
    fisher = oracles.exact_fisher(oracles.jacobian(model, x, select), CATEGORICAL.fisher(f))
    output = model(*x) if isinstance(x, tuple) else model(x)
    output = output if select is None else select(output)
    gradient = oracles.flat_gradient(model, F.cross_entropy(output.flatten(0, -2), y.flatten()))
    return -0.1 * oracles.damped_inverse(fisher, 1e-2) @ gradient


def counted(optimizer: ng.NaturalGradient) -> int:
    return sum(o.used for o in optimizer._observer.observations)


# Which passes count


def other_passes(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model.eval()
    model(x)
    model.train()
    model(x)  # a training pass that no backward pass reaches
    model[0](x)  # a part of the model
    copy.deepcopy(model)(x).sum().backward()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p, row):
        return torch.func.functional_call(model, p, (row,)).square().sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_passes_that_are_not_training_passes_do_not_count(when):
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)
    start, expected = flat(model), expected_step(model, x, y)
    other = batch(5)[0]
    if when == "before":
        other_passes(model, other)
    output = model(x)
    if when == "between":
        other_passes(model, other)
    optimizer.zero_grad()
    F.cross_entropy(output, y).backward()
    if when == "after":
        other_passes(model, other)
    assert counted(optimizer) == 1
    optimizer.step()
    assert_close(flat(model) - start, expected)


def test_an_average_of_the_model_does_not_count():
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    expected = expected_step(model, x, y)
    start = flat(model)
    F.cross_entropy(average(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    assert counted(optimizer) == 1
    optimizer.step()
    average.update_parameters(model)
    assert_close(flat(model) - start, expected)


def test_passes_whose_gradients_are_discarded_do_not_count():
    """As after an overflow that a gradient scaler skips, or in the other half of an adversarial pair."""
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)
    start, expected = flat(model), expected_step(model, x, y)
    F.cross_entropy(model(batch(7)[0]), batch(7)[1]).backward()
    output = model(x)
    optimizer.zero_grad()  # after the forward pass, as many loops have it
    F.cross_entropy(output, y).backward()
    optimizer.step()
    assert_close(flat(model) - start, expected)


def test_several_losses_of_one_pass_count_once():
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)
    start, expected = flat(model), expected_step(model, x, y)
    output = model(x)
    (0.25 * F.cross_entropy(output, y)).backward(retain_graph=True)
    (0.75 * F.cross_entropy(output, y)).backward()
    assert counted(optimizer) == 1
    optimizer.step()
    assert_close(flat(model) - start, expected)


def test_a_pass_does_not_overwrite_what_an_earlier_backward_needs():
    """Two forward passes, then their backward passes in either order: the step is that of the joint batch."""
    for order in (1, -1):
        model, (x, y) = make(), batch()
        optimizer = optimizer_of(model)
        start, expected = flat(model), expected_step(model, x, y)
        losses = [
            F.cross_entropy(model(a), b) * len(a) / 8 for a, b in zip(*(t.split([3, 5]) for t in (x, y)), strict=True)
        ]
        for loss in losses[::order]:
            loss.backward()
        optimizer.step()
        assert_close(flat(model) - start, expected)


def test_two_optimizers_on_one_model_do_not_disturb_each_other():
    model, (x, y) = make(), batch()
    first, second = optimizer_of(model), optimizer_of(model, metric=ng.Fisher(ng.Exact(), ng.MatrixFree()))
    start, expected = flat(model), expected_step(model, x, y)
    F.cross_entropy(model(x), y).backward()
    first.step()
    assert_close(flat(model) - start, expected)
    assert counted(second) == 1


def test_a_pass_that_raises_leaves_no_hook_and_no_observation():
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match="shapes"):
        model(x[:, :2])
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not optimizer._observer.observations
    start, expected = flat(model), expected_step(model, x, y)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_close(flat(model) - start, expected)


def test_a_hook_of_the_users_that_raises_before_the_pass_does_no_lasting_harm():
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)

    def refuse(*_):
        raise RuntimeError("no")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(RuntimeError, match="no"):
        model(x)
    handle.remove()
    start, expected = flat(model), expected_step(model, x, y)
    F.cross_entropy(model(x), y).backward()
    assert counted(optimizer) == 1
    optimizer.step()
    assert_close(flat(model) - start, expected)


# Memory and life


@pytest.mark.parametrize("metric", [EXACT, ng.Fisher(ng.Empirical(), ng.Kronecker()), ng.Hessian()], ids=str)
def test_passes_without_a_backward_pass_are_not_kept_alive(metric):
    model, x = make(), batch()[0]
    optimizer = optimizer_of(model, metric=metric)
    for _ in range(5):
        model(x)
    gc.collect()
    output = model(x)
    gc.collect()
    assert len(optimizer._observer.observations) == 1
    reference = weakref.ref(output)
    del output
    gc.collect()
    assert reference() is None


def test_an_optimizer_that_is_gone_watches_no_more():
    model, x = make(), batch()[0]
    optimizer = optimizer_of(model)
    observer = weakref.ref(optimizer._observer)
    del optimizer
    gc.collect()
    assert observer() is None
    model(x).sum().backward()


def test_a_watched_model_can_be_copied_and_pickled():
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    for other in (loaded, copy.deepcopy(model)):
        F.cross_entropy(other(x), y).backward()
    assert counted(optimizer) == 0
    own = optimizer_of(loaded)
    own.zero_grad()
    start, expected = flat(loaded), expected_step(loaded, x, y)
    F.cross_entropy(loaded(x), y).backward()
    own.step()
    assert_close(flat(loaded) - start, expected)


# Activation checkpointing


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 4))
        self.double()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.body(h) if self.reentrant is None else checkpoint(self.body, h, use_reentrant=self.reentrant)
        return self.head(torch.tanh(h))


@pytest.mark.parametrize(
    "metric",
    [EXACT, ng.Fisher(ng.MonteCarlo(), ng.Kronecker()), ng.Fisher(ng.Exact(), ng.MatrixFree())],
    ids=["dense", "kfac", "free"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing_counts_once(metric, dropout):
    steps = []
    for reentrant in (None, False, True):
        model, (x, y) = Checkpointed(reentrant, dropout), batch()
        optimizer = optimizer_of(model, metric=metric)
        for _ in range(2):
            optimizer.zero_grad()
            torch.manual_seed(5)
            F.cross_entropy(model(x), y).backward()
            assert counted(optimizer) == 1
            optimizer.step()
        steps.append(flat(model))
    assert_close(steps[1], steps[0], 1e-12)
    assert_close(steps[2], steps[0], 1e-12)


def test_reentrant_checkpointing_that_comes_first_counts_once():
    """Natgrad's backward pass would never meet it: its layers would just not be seen."""
    steps = []
    for reentrant in (None, True):
        model, (x, y) = Checkpointed(reentrant), batch()
        model.stem.requires_grad_(False)
        optimizer = optimizer_of(model)
        model.stem.register_forward_hook(lambda m, i, o: o.requires_grad_())
        F.cross_entropy(model(x), y).backward()
        assert counted(optimizer) == 1
        optimizer.step()
        steps.append(flat(model))
    assert_close(steps[1], steps[0], 1e-12)


def test_reentrant_checkpointing_of_layers_without_a_rule_is_a_clear_error():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)
            self.double()

        def forward(self, x):
            return self.head(checkpoint(lambda z: z * self.scale, x.clone().requires_grad_(), use_reentrant=True))

    model, (x, y) = Scaled(), batch()
    optimizer = optimizer_of(model)
    start = flat(model)
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert torch.equal(flat(model), start)


def test_a_checkpoint_around_the_whole_model_is_a_clear_error():
    model, x = make(), batch()[0]
    optimizer = optimizer_of(model)
    with pytest.raises(UnsupportedError, match="wraps the whole model"):
        checkpoint(model, x, use_reentrant=False)
    assert counted(optimizer) == 0


# Layers that hooks alone would get wrong


@pytest.mark.parametrize(
    "name", ["inplace", "residual", "reused", "shared_parameter", "lstm", "multihead", "tied_head"]
)
def test_the_step_is_exact_where_hooks_alone_would_be_wrong(name):
    case = zoo.case(name)
    f = case()
    y = torch.randint(0, 3, f.shape[:-1], generator=torch.Generator().manual_seed(1))
    optimizer = optimizer_of(case.model)
    start, expected = flat(case.model), expected_step(case.model, case.x, y)
    F.cross_entropy(case().flatten(0, -2), y.flatten()).backward()
    optimizer.step()
    assert_close(flat(case.model) - start, expected)


@pytest.mark.parametrize(
    ("name", "parameter", "reason"),
    [
        ("tied_head", "embedding.weight", "outside its module"),
        ("raw_parameter", "temperature", "RawParameter"),
    ],
)
def test_what_no_rule_covers_is_reported_by_name(name, parameter, reason):
    case = zoo.case(name)
    optimizer = optimizer_of(case.model, metric=ng.Fisher(ng.Exact(), ng.Kronecker()))
    case().sum().backward()
    optimizer.step()
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert set(rows) == {n for n, _ in case.model.named_parameters()}
    assert reason in rows[parameter].reason and rows[parameter].treatment == "Diagonal"
    assert all(tuple(p.shape) == rows[n].shape for n, p in case.model.named_parameters())
    assert any(row.reason == "" and row.treatment == "Kronecker" for row in rows.values())


class Functional(nn.Module):
    """A Linear whose weight is used by F.linear alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.stem.weight, self.stem.bias)))


def test_functional_use_of_a_layer_is_reported_and_exact():
    model, (x, y) = Functional().double(), batch()
    optimizer = optimizer_of(model)
    start, expected = flat(model), expected_step(model, x, y)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_close(flat(model) - start, expected)
    reasons = {row.parameter: row.reason for row in optimizer.coverage()}
    assert "without calling its module" in reasons["stem.weight"] and not reasons["head.weight"]


class TwoHeads(nn.Module):
    """Logits and a value, as actor-critic models return."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.policy, self.value = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.stem(x))
        return self.policy(h), self.value(h)


def test_a_parameter_out_of_the_outputs_sight_is_an_error_and_not_a_huge_step():
    """Its metric would be zero, and its step the gradient over the damping."""
    model, (x, y) = TwoHeads().double(), batch()
    optimizer = optimizer_of(model)
    logits, value = model(x)
    optimizer.observe(logits)
    (F.cross_entropy(logits, y) + value.square().mean()).backward()
    start = flat(model)
    with pytest.raises(UnsupportedError, match=r"value.bias, value.weight"):
        optimizer.step()
    assert torch.equal(flat(model), start)


# Outputs that are not a tensor


class Packed(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = make(), form

    def forward(self, x: Tensor):
        f = self.net(x)
        forms = {"logits": {"hidden": f * 2, "logits": f}, "tuple": (f * 2, f), "nested": {"a": [f * 2, {"b": f}]}}
        return forms[self.form]


SELECT = {"logits": lambda o: o["logits"], "tuple": lambda o: o[1], "nested": lambda o: o["a"][1]["b"]}


@pytest.mark.parametrize("metric", [EXACT, ng.Fisher(ng.Exact(), ng.MatrixFree())], ids=["dense", "free"])
@pytest.mark.parametrize("form", SELECT)
def test_outputs_inside_containers(form, metric):
    """One called logits is found; others are pointed out by observe()."""
    model, (x, y) = Packed(form), batch()
    optimizer = optimizer_of(model, metric=metric, solver=None if metric is EXACT else ng.linalg.CG(tolerance=1e-13))
    start, expected = flat(model), expected_step(model, x, y, SELECT[form])
    output = SELECT[form](model(x))
    if form != "logits":
        optimizer.observe(output)
    F.cross_entropy(output, y).backward()
    optimizer.step()
    assert_close(flat(model) - start, expected)


def test_an_output_that_cannot_be_told_is_asked_for():
    model, (x, y) = Packed("tuple"), batch()
    optimizer = optimizer_of(model)
    F.cross_entropy(model(x)[1], y).backward()
    with pytest.raises(NotObservedError, match="observe"):
        optimizer.step()


# Explicit observation


def test_explicit_observation_is_the_same_as_passive():
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)
    start, expected = flat(model), expected_step(model, x, y)
    output = model(x)
    optimizer.observe(output, y)
    optimizer.zero_grad()
    F.cross_entropy(output, y).backward()
    assert counted(optimizer) == 1
    optimizer.step()
    assert_close(flat(model) - start, expected)


@pytest.mark.parametrize("metric", [ng.Fisher(ng.Empirical(), ng.Dense()), ng.Hessian()], ids=["empirical", "hessian"])
def test_metrics_that_need_labels_ask_for_them(metric):
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model, metric=metric, damping=10.0)
    F.cross_entropy(model(x), y).backward()
    start = flat(model)
    with pytest.raises(NotObservedError, match=r"observe\(output, target\)"):
        optimizer.step()
    assert torch.equal(flat(model), start)
    optimizer.zero_grad()
    output = model(x)
    optimizer.observe(output, y)
    F.cross_entropy(output, y).backward()
    optimizer.step()
    assert not torch.equal(flat(model), start)


def test_stale_outputs_are_errors():
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model, metric=ng.Fisher(ng.Empirical(), ng.Dense()))
    with pytest.raises(StaleTapeError, match="no training pass"):
        optimizer.observe(torch.zeros(8, 3))
    output = model(x)
    with pytest.raises(StaleTapeError, match="very tensor"):
        optimizer.observe(2 * output, y)
    F.cross_entropy(output, y).backward()
    with pytest.raises(StaleTapeError, match=r"before loss\.backward"):
        optimizer.observe(output, y)
    optimizer.zero_grad()
    fresh = model(x)
    optimizer.observe(fresh, y)
    F.cross_entropy(fresh, y).backward()
    optimizer.step()
    with pytest.raises(StaleTapeError, match="no training pass"):
        optimizer.observe(fresh, y)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 0, 0, 0]), ArgumentError, "3"),
        (torch.zeros(7, dtype=torch.int64), ShapeError, "7"),
        (torch.zeros(8), ArgumentError, "int"),
    ],
)
def test_labels_that_do_not_fit_are_clear_errors(target, error, message):
    model, x = make(), batch()[0]
    optimizer = optimizer_of(model)
    output = model(x)
    with pytest.raises(error, match=message):
        optimizer.observe(output, target)


# torch.compile


# By the compiler itself, where it is given the output of a layer that it did not compile.
LEAVES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@LEAVES
def test_a_model_compiled_afterwards_is_observed():
    model, (x, y) = make(), batch()
    compiled = torch.compile(model, backend="eager")
    optimizer = optimizer_of(model)
    start = flat(model)
    F.cross_entropy(compiled(x), y).backward()
    assert counted(optimizer)
    expected = expected_step(copy.deepcopy(model), x, y)
    optimizer.step()
    assert_close(flat(model) - start, expected)


def test_the_compiled_model_itself_works():
    model, (x, y) = make(), batch()
    expected = expected_step(copy.deepcopy(model), x, y)
    compiled = torch.compile(model, backend="eager")
    optimizer = ng.NaturalGradient(compiled, ng.Categorical(), **OPTIONS)
    start = flat(model)
    F.cross_entropy(compiled(x), y).backward()
    optimizer.step()
    assert_close(flat(model) - start, expected)


@LEAVES
def test_late_compilation_of_the_module_is_observed():
    model, (x, y) = make(), batch()
    optimizer = optimizer_of(model)
    for compiled in (False, True):
        optimizer.zero_grad()
        if compiled:
            model.compile(backend="eager")
        start, expected = flat(model), expected_step(make_like(model), x, y)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert_close(flat(model) - start, expected)


def make_like(model: nn.Module) -> nn.Module:
    """A plain model with the same parameters."""
    plain = make()
    plain.load_state_dict(model.state_dict())
    return plain
