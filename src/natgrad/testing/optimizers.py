"""Conformance of an optimizer: the laws that a training loop relies on, whatever metric, search or preset is in use."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from natgrad.errors import NatgradError
from natgrad.optim import NaturalGradient

Factory = Callable[[nn.Module], NaturalGradient]


@dataclass(frozen=True)
class Problem:
    """Batches and a loss that fit the likelihood of the optimizer under test.

    Args:
        outputs: size of the model's output.
        loss: mean loss of an output [N, outputs] and labels.
        labels: draws N labels from a generator.
        labels_can_be_nan: whether labels are floating-point numbers.
    """

    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    labels: Callable[[int, torch.Generator], Tensor]
    labels_can_be_nan: bool = False

    def batch(self, seed: int, n: int = 12) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, 4, dtype=torch.float64, generator=generator), self.labels(n, generator)


CLASSIFICATION = Problem(3, F.cross_entropy, lambda n, g: torch.randint(0, 3, (n,), generator=g))
"""For Categorical()."""

REGRESSION = Problem(
    2,
    lambda f, y: 0.5 * (f - y).square().sum(-1).mean(),
    lambda n, g: torch.randn(n, 2, dtype=torch.float64, generator=g),
    labels_can_be_nan=True,
)
"""For Gaussian()."""


def check_optimizer(
    factory: Factory,
    *,
    problem: Problem = CLASSIFICATION,
    observe: bool = False,
    sampled: bool = False,
    scheduled: bool = True,
    tolerance: float = 1e-9,
) -> None:
    """Raises AssertionError, naming the law, unless the optimizer that ``factory(model)`` makes obeys the laws of one.

    factory: from a float64 model to an optimizer of it, without weight decay. problem: what it is trained on.
    observe: call ``observe(output, labels)`` before every backward pass. sampled: the curvature is estimated from
    random draws, so that micro-batches draw other labels than the whole batch. scheduled: its learning rate is finite
    and may be set by a scheduler. tolerance: relative, of the laws that do not hold to the bit.

    Laws. Zero gradients or a learning rate of 0 change no parameter. NaN and infinity in gradients, inputs or labels
    reach neither parameters nor state, and training goes on afterwards. Buffers, random streams and gradients are as
    they are without the optimizer. Passes in eval mode, under no_grad, through a deep copy, or whose output no backward
    pass reaches, change nothing. A loss times a constant, its gradient divided by it, gives the same step.
    Micro-batches accumulate to the step of the whole batch. The state dict holds plain tensors, loads with
    weights_only=True and resumes to the bit. Parameters without gradient stay, frozen ones stay, unfrozen ones move.
    Schedulers work.
    """
    trial = _Trial(factory, problem, observe)
    check_no_change(trial)
    check_bad_numbers(trial)
    check_no_side_effects(trial)
    check_ignored_passes(trial)
    check_loss_scale(trial, tolerance)
    if not sampled:
        check_accumulation(trial, tolerance)
    check_resume(trial)
    check_parameters_without_gradient(trial)
    if scheduled:
        check_schedulers(trial)


@dataclass(frozen=True)
class _Trial:
    """A way to make the optimizer, and steps with it."""

    factory: Factory
    problem: Problem
    observe: bool

    def model(self, noisy: bool = False) -> nn.Module:
        """A model at fixed parameters; ``noisy``: with batch norm and dropout."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            between = [nn.BatchNorm1d(5), nn.ELU(inplace=True), nn.Dropout(0.3)] if noisy else [nn.ELU(inplace=True)]
            return nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, self.problem.outputs)).double()

    def start(self, noisy: bool = False) -> tuple[nn.Module, NaturalGradient]:
        """A model with its optimizer."""
        model = self.model(noisy)
        return model, self.factory(model)

    def backward(self, model: nn.Module, optimizer: NaturalGradient, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        output = model(x)
        if self.observe:
            optimizer.observe(output, y)
        (scale * self.problem.loss(output, y)).backward()

    def step(self, model: nn.Module, optimizer: NaturalGradient, seed: int, n: int = 12) -> None:
        optimizer.zero_grad()
        self.backward(model, optimizer, *self.problem.batch(seed, n))
        optimizer.step()


def check_no_change(trial: _Trial) -> None:
    """Zero gradients and lr = 0."""
    model, optimizer = trial.start()
    before = _values(model)
    for seed in range(2):
        optimizer.zero_grad()
        trial.backward(model, optimizer, *trial.problem.batch(seed), scale=0.0)
        optimizer.step()
        _require(_same(before, _values(model)), "zero gradients must change no parameter")
    model, optimizer = trial.start()
    optimizer.param_groups[0]["lr"] = 0.0
    for seed in range(2):
        trial.step(model, optimizer, seed)
        _require(_same(before, _values(model)), "lr = 0 must change no parameter")


def check_bad_numbers(trial: _Trial) -> None:
    """NaN and infinity in the gradient, the inputs and the labels, in the first step and in a later one."""
    sources = ["gradients", "inputs"] + (["labels"] if trial.problem.labels_can_be_nan else [])
    for source in sources:
        for bad, late in ((math.nan, False), (math.nan, True), (math.inf, True)):
            law = f"{bad} in the {source} of {'a later' if late else 'the first'} step"
            model, optimizer = trial.start()
            if late:
                trial.step(model, optimizer, 0)
            before = _values(model)
            _bad_step(trial, model, optimizer, source, bad)
            _require(_same(before, _values(model)), f"{law} must not change the parameters")
            _require(_finite_state(optimizer), f"{law} must not reach the state")
            trial.step(model, optimizer, 2)
            _require(all(torch.isfinite(v).all() for v in _values(model).values()), f"{law} must not linger")
            _require(_finite_state(optimizer), f"{law} must not linger in the state")


def _bad_step(trial: _Trial, model: nn.Module, optimizer: NaturalGradient, source: str, bad: float) -> None:
    x, y = trial.problem.batch(1)
    if source == "inputs":
        x[0, 0] = bad
    if source == "labels":
        y[0, 0] = bad
    optimizer.zero_grad()
    try:
        trial.backward(model, optimizer, x, y)
        if source == "gradients":
            gradient = next(model.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[0] = bad
        optimizer.step()
    except NatgradError:
        pass  # an error that says what is wrong is as good as a skipped step


def check_no_side_effects(trial: _Trial) -> None:
    """Buffers, random streams, gradients and hooks."""
    model, optimizer = trial.start(noisy=True)
    hooks = _hooks(model)
    plain = copy.deepcopy(model)
    for seed in range(3):
        x, y = trial.problem.batch(seed)
        stream = torch.get_rng_state()
        plain.zero_grad()
        trial.problem.loss(plain(x), y).backward()
        expected, expected_stream = _gradients(plain), torch.get_rng_state()
        torch.set_rng_state(stream)
        optimizer.zero_grad()
        trial.backward(model, optimizer, x, y)
        _require(_same(expected, _gradients(model)), "gradients must be those of the loss alone")
        optimizer.step()
        _require(_same(expected, _gradients(model)), "step() must leave .grad as it is")
        _require(torch.equal(torch.get_rng_state(), expected_stream), "the global random stream must not be touched")
        _require(_same(dict(plain.named_buffers()), dict(model.named_buffers())), "buffers must not be touched")
        _require(model.training and _hooks(model) == hooks, "mode and hooks of the model must be left as they are")
        plain.load_state_dict(model.state_dict())


def check_ignored_passes(trial: _Trial) -> None:
    """Passes that are no training passes."""
    runs = []
    for disturbed in (False, True):
        model, optimizer = trial.start()
        for seed in range(3):
            optimizer.zero_grad()
            if disturbed:
                _other_passes(model, trial.problem.batch(seed + 10)[0])
            trial.backward(model, optimizer, *trial.problem.batch(seed))
            if disturbed:
                _other_passes(model, trial.problem.batch(seed + 20)[0])
            optimizer.step()
        runs.append(_values(model))
    _require(_same(*runs), "passes in eval mode, under no_grad or through a copy must change nothing")


def _other_passes(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    average = copy.deepcopy(model)
    average(x).sum().backward()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)


def check_loss_scale(trial: _Trial, tolerance: float) -> None:
    """A scaled loss with its gradient scaled back, as under a gradient scaler."""
    runs = []
    for scale in (1.0, 2.0**10):
        model, optimizer = trial.start()
        for seed in range(3):
            optimizer.zero_grad()
            trial.backward(model, optimizer, *trial.problem.batch(seed), scale=scale)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= scale
            optimizer.step()
        runs.append(_values(model))
    _require_close(runs[1], runs[0], tolerance, "a loss times a constant must not change the metric")


def check_accumulation(trial: _Trial, tolerance: float) -> None:
    """Micro-batches of unequal size against the whole batch."""
    runs = []
    for sizes in ([12], [3, 9], [4, 4, 4]):
        model, optimizer = trial.start()
        for seed in range(3):
            x, y = trial.problem.batch(seed)
            optimizer.zero_grad()
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
                trial.backward(model, optimizer, a, b, scale=len(a) / len(x))
            optimizer.step()
        runs.append(_values(model))
    for run in runs[1:]:
        _require_close(run, runs[0], tolerance, "micro-batches must accumulate to the step of the whole batch")


def check_resume(trial: _Trial, steps: int = 8) -> None:
    """Save, load into a new optimizer, go on: the same parameters to the bit."""
    for cut in (0, 3, 6):
        model, optimizer = trial.start()
        for seed in range(cut):
            trial.step(model, optimizer, seed)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again, resumed = trial.start()
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        for seed in range(cut, steps):
            trial.step(model, optimizer, seed)
            trial.step(again, resumed, seed)
            same = _same(_values(model), _values(again))
            _require(same, f"a run resumed after {cut} steps must be the same to the bit")
        same = _same_tree(optimizer.state_dict(), resumed.state_dict())
        _require(same, f"the state of a run resumed after {cut} steps must be the same to the bit")


def check_parameters_without_gradient(trial: _Trial) -> None:
    """No gradient, frozen, unfrozen later."""
    model, optimizer = trial.start()
    bias = model.get_parameter("0.bias")
    before = bias.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        trial.backward(model, optimizer, *trial.problem.batch(seed))
        bias.grad = None
        optimizer.step()
    _require(torch.equal(bias, before), "a parameter whose gradient is None must stay")
    optimizer.zero_grad()
    state = len(optimizer.state)
    optimizer.step()
    _require(len(optimizer.state) == state, "a step without any gradient must do nothing")
    model = trial.model()
    model.get_parameter("0.weight").requires_grad_(False)
    optimizer = trial.factory(model)
    weight = model.get_parameter("0.weight")
    before = weight.detach().clone()
    for seed in range(3):
        trial.step(model, optimizer, seed)
    _require(torch.equal(weight, before), "a frozen parameter must stay")
    weight.requires_grad_(True)
    head = model.get_parameter("2.bias").requires_grad_(False)
    kept = head.detach().clone()
    for seed in range(3, 9):
        trial.step(model, optimizer, seed)
    _require(not torch.equal(weight, before), "an unfrozen parameter must move")
    _require(torch.equal(head, kept), "a parameter that is frozen later must stay")


def check_schedulers(trial: _Trial) -> None:
    """torch's schedulers set the learning rate, and complain of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = trial.start()
        scheduler = LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 0.0)
        for seed in range(4):
            before = _values(model)
            trial.step(model, optimizer, seed)
            moved = not _same(before, _values(model))
            _require(moved == (seed < 2), "the learning rate a scheduler sets must be the one in use")
            scheduler.step()
        for make in (lambda o: StepLR(o, 1), lambda o: OneCycleLR(o, max_lr=0.1, total_steps=4)):
            model, optimizer = trial.start()
            scheduler = make(optimizer)
            for seed in range(3):
                trial.step(model, optimizer, seed)
                scheduler.step()


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _leaves(tree: object) -> Iterator[tuple[object, ...]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            for path in _leaves(value):
                yield key, *path
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            for path in _leaves(value):
                yield i, *path
    else:
        yield (tree,)


def _same_tree(a: object, b: object) -> bool:
    ours, theirs = list(_leaves(a)), list(_leaves(b))
    return len(ours) == len(theirs) and all(
        x[:-1] == y[:-1] and _same_leaf(x[-1], y[-1]) for x, y in zip(ours, theirs, strict=True)
    )


def _same_leaf(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def _finite_state(optimizer: torch.optim.Optimizer) -> bool:
    tensors = [leaf[-1] for leaf in _leaves(optimizer.state_dict()["state"]) if isinstance(leaf[-1], Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _require(holds: bool, law: str) -> None:
    if not holds:
        raise AssertionError(f"check_optimizer: {law}")


def _require_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, law: str) -> None:
    for name, value in wanted.items():
        error = float((got[name] - value).norm() / value.norm().clamp_min(torch.finfo(value.dtype).tiny))
        _require(error <= tolerance, f"{law}; {name} differs by {error:.1e}, relatively")
