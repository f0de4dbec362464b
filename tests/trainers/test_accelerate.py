"""Hugging Face's accelerate: its wrapper around the optimizer, accumulation, clipping, schedules, saved states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
from test_examples import load  # noqa: E402

example = load("accelerate_loop")


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """accelerate keeps its settings for the whole process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def kfac(model: nn.Module, **settings: Any) -> ng.KFAC:
    """Not due for statistics and inverses at every step, so that a resumed run must know where it stands."""
    return ng.KFAC(model, ng.Bernoulli(), lr=0.3, search=ng.KLClip(0.1), refresh=ng.Refresh(2, 4), **settings)


def trained(epochs: int = 1, make: Any = kfac) -> tuple[Any, ...]:
    parts = example.prepared(make)
    example.train(*parts, epochs=epochs)
    return parts


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_kfac_ends_below_adamw_at_its_best_rate():
    losses = example.main()
    assert losses["K-FAC"][0] < 0.8 * losses["AdamW"][0]
    assert losses["K-FAC"][1] < 0.8 * losses["AdamW"][1]


def test_reports_are_behind_the_wrapper():
    _, model, optimizer, _, _ = trained()
    assert not hasattr(optimizer, "metrics")
    inner = optimizer.optimizer
    assert type(inner) is ng.KFAC
    assert 0 < inner.metrics()["natgrad/kl_predicted"] <= 0.1 * (1 + 1e-5)
    assert {row.parameter for row in inner.coverage()} == set(parameters(model))
    assert all(row.treatment == "Kronecker" for row in inner.coverage())


def test_preparing_changes_nothing():
    """``prepare`` gives the optimizer its own state back, casts and all."""
    prepared = trained()
    accelerator, model, optimizer, loader, schedule = example.prepared(kfac)
    # Twice: a second time with state in it.
    example.train(accelerator, model, accelerator.prepare(optimizer.optimizer), loader, schedule, epochs=1)
    assert same(prepared[1], model)


@pytest.mark.parametrize("form", ["model", "parameters"])
def test_resume_is_bitwise_and_needs_the_state(tmp_path, form):
    def make(model: nn.Module) -> ng.KFAC:
        settings = {"lr": 0.3, "search": ng.KLClip(0.1), "refresh": ng.Refresh(2, 4), "momentum": 0.5}
        if form == "model":
            return ng.KFAC(model, ng.Bernoulli(), **settings)
        return ng.KFAC(model.named_parameters(), ng.Bernoulli(), **settings).attach(model)

    whole = example.prepared(make)
    example.train(*whole, epochs=1)
    whole[0].save_state(str(tmp_path))
    example.train(*whole, epochs=1)

    again = example.prepared(make)
    again[0].load_state(str(tmp_path))
    example.train(*again, epochs=1)
    assert same(whole[1], again[1])
    state, resumed = whole[2].state_dict()["state"], again[2].state_dict()["state"]
    for index, tensors in state.items():
        assert all(torch.equal(t, resumed[index][key]) for key, t in tensors.items())

    fresh = example.prepared(make)
    before = fresh[2].state_dict()
    fresh[0].load_state(str(tmp_path))
    fresh[2].load_state_dict(before)
    example.train(*fresh, epochs=1)
    assert not same(whole[1], fresh[1])


def test_the_saved_state_is_plain(tmp_path):
    trained()[0].save_state(str(tmp_path))
    (path,) = Path(tmp_path).glob("optimizer*.bin")
    saved = torch.load(path, weights_only=True)
    assert saved["state"]
    assert all(type(t) is Tensor for tensors in saved["state"].values() for t in tensors.values())


def test_accumulated_batches_are_one_batch():
    def after(parts: int) -> dict[str, Tensor]:
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=parts, cpu=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 64)).double()
        optimizer = ng.KFAC(model, ng.Bernoulli(), lr=0.3, estimate=ng.Exact(), search=ng.KLClip(0.1))
        model, optimizer = accelerator.prepare(model, optimizer)
        for x in example.digits()[0][:192].double().split(64):
            for part in x.chunk(parts):
                with accelerator.accumulate(model):
                    accelerator.backward(example.loss_of(model(part), part))
                    optimizer.step()
                    optimizer.zero_grad()
        return parameters(model)

    whole = after(1)
    torch.testing.assert_close(after(4), whole, rtol=1e-8, atol=1e-10)


def test_gradients_are_clipped_and_the_schedule_is_followed():
    norms: list[float] = []
    accelerator, model, optimizer, loader, schedule = example.prepared(
        lambda model: ng.KFAC(model, ng.Bernoulli(), lr=0.3, damping=1.0, search=ng.LearningRate())
    )
    norm_of = lambda: float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()])))  # noqa: E731
    optimizer.optimizer.register_step_pre_hook(lambda opt, args, kwargs: norms.append(norm_of()))
    clip = accelerator.clip_grad_norm_
    accelerator.clip_grad_norm_ = lambda parameters, _: clip(parameters, 1e-3)
    before = parameters(model)
    example.train(accelerator, model, optimizer, loader, schedule, epochs=1)
    assert len(norms) == len(loader) // 2
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    # With λ = 1 no step is longer than lr times the gradient that is preconditioned.
    moved = torch.linalg.vector_norm(torch.stack([(p - before[n]).norm() for n, p in parameters(model).items()]))
    assert 0 < float(moved) <= 0.3 * sum(norms)
    total = example.EPOCHS * len(loader) // 2
    expected = 0.15 * (1 + torch.cos(torch.tensor(torch.pi * len(norms) / total)).item())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected) == schedule.get_last_lr()[0]


def test_the_loss_may_be_made_before_the_output_is_converted():
    """In mixed precision accelerate returns float32 copies of what the model, and the loss inside it, computed."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layer(x)
            return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}

    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = WithLoss()
    model, optimizer = accelerator.prepare(model, ng.KFAC(model, ng.Categorical()))
    x, losses = example.digits()[0][:256], []
    labels = (x @ torch.randn(64, 10)).argmax(1)
    for _ in range(10):
        outputs = model(x, labels)
        assert outputs["logits"].dtype == torch.float32
        accelerator.backward(outputs["loss"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
