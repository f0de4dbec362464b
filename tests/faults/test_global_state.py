"""Global settings of torch that a program may have changed: the steps are the same, and the settings stay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng

PRESETS = (ng.NGD, ng.DiagonalNGD, ng.BlockNGD, ng.KFAC, ng.EKFAC, ng.GramNGD, ng.TrustRegionNGD, ng.GaussNewton)
every_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.__name__)


class Net(nn.Module):
    """Convolution, batch norm and dropout in float32, whatever the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def train(preset, steps: int = 3, seed: int = 0) -> list[Tensor]:
    """The parameters and the optimizer's state after a few steps in float32."""
    torch.manual_seed(seed)
    model = Net().float()
    with torch.no_grad():  # the default dtype changes how many random numbers the initialisation draws
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float32))
    optimizer = preset(model, ng.Categorical())
    for i in range(steps):
        generator.manual_seed(i)
        x = torch.randn(8, 2, 4, generator=generator, dtype=torch.float32)
        y = torch.randint(0, 3, (8,), generator=generator)
        torch.manual_seed(i)
        optimizer.zero_grad()
        output = model(x)
        optimizer.observe(output, y)
        F.cross_entropy(output, y).backward()
        optimizer.step()
    slots = optimizer.state.values()
    state = [v for slot in slots for k, v in slot.items() if isinstance(v, Tensor) and k != "step"]
    return [p.detach() for p in model.parameters()] + state


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@cache
def undisturbed(preset) -> list[Tensor]:
    return train(preset)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def anomaly() -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(True):
        yield
        assert torch.is_anomaly_enabled()


SETTINGS = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "medium matmul precision": medium_precision,
    "deterministic algorithms": deterministic,
    "anomaly detection": anomaly,
}


@every_preset
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_global_setting_changes_no_bit(preset, setting):
    """Also of the state: an average in the default dtype would not load into a run without it."""
    with SETTINGS[setting]():
        found = train(preset)
    assert same(found, undisturbed(preset))


def test_the_comparison_can_fail():
    assert not same(train(ng.KFAC, seed=1), undisturbed(ng.KFAC))


def test_steps_are_counted_whatever_the_default_dtype():
    with default_dtype(torch.bfloat16):
        model = nn.Linear(2, 2).float()
        optimizer = ng.KFAC(model, ng.Categorical())
        F.cross_entropy(model(torch.eye(2, dtype=torch.float32)), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert all(slot["step"].dtype in (torch.float32, torch.float64) for slot in optimizer.state.values())


@every_preset
def test_anomaly_mode_finds_nothing_to_complain_of_in_natgrads_own_passes(preset):
    """A batch of NaN: torch's anomaly mode blames the user's backward pass, and natgrad has already left it out."""
    model = Net()
    optimizer = preset(model, ng.Categorical())
    with torch.autograd.set_detect_anomaly(True):
        output = model(torch.full((4, 2, 4), torch.nan))
        with pytest.raises(RuntimeError, match="nan values"), pytest.warns(UserWarning, match="Error detected"):
            F.cross_entropy(output, torch.zeros(4, dtype=torch.int64)).backward()
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@every_preset
def test_data_made_in_inference_mode(preset):
    """Such a tensor cannot be saved for a backward pass: torch says so itself; a copy of it trains as usual."""
    model = Net()
    optimizer = preset(model, ng.Categorical())
    with torch.inference_mode():
        x, y = torch.randn(8, 2, 4), torch.randint(0, 3, (8,))
        model(x)  # is not observed
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(x)
    before = model.head.weight.detach().clone()
    output = model(x.clone())
    optimizer.observe(output, y.clone())
    F.cross_entropy(output, y.clone()).backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


@every_preset
def test_a_step_inside_inference_mode(preset):
    """Parameters are ordinary tensors, so that torch's own optimizers step there, too."""
    model = Net()
    optimizer = preset(model, ng.Categorical())

    def backward() -> None:
        optimizer.zero_grad()
        output, y = model(torch.randn(8, 2, 4)), torch.randint(0, 3, (8,))
        optimizer.observe(output, y)
        F.cross_entropy(output, y).backward()

    before = model.head.weight.detach().clone()
    backward()
    with torch.inference_mode():
        optimizer.step()
    between = model.head.weight.detach().clone()
    backward()
    optimizer.step()
    assert not torch.equal(before, between) and not torch.equal(between, model.head.weight)


@every_preset
def test_models_trained_in_threads_at_the_same_time(preset):
    """Nothing is shared between optimizers. Without dropout and sampling, whose streams torch keeps per process."""
    seeds = range(4)

    def alone(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        optimizer = preset(model, ng.Categorical())
        for _ in range(5):
            x, y = torch.randn(8, 3, generator=generator), torch.randint(0, 3, (8,), generator=generator)
            optimizer.zero_grad()
            output = model(x)
            optimizer.observe(output, y)
            F.cross_entropy(output, y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = {seed: alone(seed) for seed in seeds}
    found: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda s=s: found.update({s: alone(s)})) for s in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        for a, b in zip(found[seed], expected[seed], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", [ng.KFAC, ng.TrustRegionNGD], ids=lambda p: p.__name__)
def test_more_threads_inside_torch_give_the_same_steps(preset):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = train(preset)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, undisturbed(preset), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
