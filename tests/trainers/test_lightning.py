"""Lightning's Trainer: automatic and manual optimization, accumulation, bf16-mixed, checkpoints."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import natgrad as ng

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")
lightning = pytest.importorskip("lightning")
from test_examples import load  # noqa: E402

example = load("lightning_module")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Double(example.Autoencoder):
    """In float64, with the Fisher matrix of all labels: nothing is sampled."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ng.KFAC(self.network, ng.Bernoulli(), estimate=ng.Exact())

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x.double())


def trained(kind: type = example.Autoencoder, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """The parameters and the optimizer after training from the one start."""
    torch.manual_seed(0)
    module = kind()
    made: list[torch.optim.Optimizer] = []
    configure = module.configure_optimizers
    module.configure_optimizers = lambda: made.append(configure()) or made[-1]  # type: ignore[method-assign]
    example.train(module, **options)
    return {name: p.detach() for name, p in module.named_parameters()}, made[-1]


def test_kfac_ends_below_adam_at_its_best_rate_in_every_mode():
    losses = example.main()
    adam = [loss for name, loss in losses.items() if name.startswith("Adam")]
    assert len(adam) == len(example.RATES) and min(adam) not in (adam[0], adam[-1])  # the best rate is inside the grid
    kfac = {name: loss for name, loss in losses.items() if name.startswith("K-FAC")}
    assert len(kfac) == 4
    for name, loss in kfac.items():
        assert loss < min(adam) - 1, (name, loss, adam)


def test_manual_optimization_is_the_same_training():
    automatic, _ = trained(epochs=1)
    manual, _ = trained(example.ManualAutoencoder, epochs=1)
    for name, p in automatic.items():
        assert torch.equal(p, manual[name]), name


def test_accumulated_batches_make_the_step_of_the_whole_batch():
    options = {"epochs": 1, "precision": "64-true", "max_steps": 2}
    whole, _ = trained(Double, **options)
    parts, _ = trained(Double, batch=75, accumulate_grad_batches=2, **options)
    other, _ = trained(Double, batch=75, **options)
    for name, p in whole.items():
        torch.testing.assert_close(parts[name], p, rtol=1e-9, atol=1e-11)
    assert max(float((other[name] - p).abs().max()) for name, p in whole.items()) > 1e-3


@pytest.mark.parametrize("batches", [1, 2])
def test_the_closure_runs_once_per_batch(batches):
    calls: list[bool] = []

    class Counting(example.Autoencoder):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return super().training_step(batch)

    _, optimizer = trained(Counting, epochs=1, max_steps=3, accumulate_grad_batches=batches)
    assert calls == [True] * (3 * batches)
    assert bool(optimizer.last.accepted) and optimizer.state_dict()["state"][0]["step"] == 3


def test_bf16_mixed_keeps_curvature_in_float32():
    seen: set[torch.dtype] = set()

    class Watched(example.Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.network.register_forward_hook(lambda module, args, output: seen.add(output.dtype))

    parameters, optimizer = trained(Watched, epochs=1, max_steps=2, precision="bf16-mixed")
    assert seen == {torch.bfloat16, torch.float32}  # in training, and where the example measures the loss
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    state = [t for values in optimizer.state_dict()["state"].values() for t in values.values()]
    assert len(state) > 30 and {t.dtype for t in state} == {torch.float32}


def test_clipping_acts_on_the_gradients_of_the_closure():
    """With a plain learning rate, a gradient clipped to nothing is a step of nothing."""

    class Plain(example.Autoencoder):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return ng.KFAC(self.network, ng.Bernoulli(), lr=0.1, search=ng.LearningRate())

    options = {"epochs": 1, "max_steps": 1}
    free, _ = trained(Plain, **options)
    clipped, _ = trained(Plain, gradient_clip_val=1e-12, **options)
    torch.manual_seed(0)
    before = {name: p.detach() for name, p in Plain().named_parameters()}
    for name, p in before.items():
        torch.testing.assert_close(clipped[name], p, rtol=0, atol=1e-6)
        assert float((free[name] - p).abs().max()) > 1e-4, name


def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_run(tmp_path):
    straight, _ = trained(epochs=4)

    torch.manual_seed(0)
    callback = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="half")
    options = {"enable_checkpointing": True, "callbacks": [callback]}
    example.train(example.Autoencoder(), epochs=2, **options)

    torch.manual_seed(1)  # other initial weights
    resumed = example.Autoencoder()
    example.train(resumed, epochs=4, resume=tmp_path / "half.ckpt")
    for name, p in resumed.named_parameters():
        assert torch.equal(p, straight[name]), name


def test_labels_are_given_through_the_wrapped_optimizer():
    """Damping that follows the measured loss needs the labels."""

    class Measured(example.Autoencoder):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            damping = ng.LevenbergMarquardt(ng.FactoredTikhonov(1e-2))
            return ng.KFAC(self.network, ng.Bernoulli(), damping=damping)

        def training_step(self, batch: list[Tensor]) -> Tensor:
            output = self.network(batch[0])
            self.optimizers().optimizer.observe(output, batch[0])
            return torch.nn.functional.binary_cross_entropy_with_logits(output, batch[0], reduction="sum") / 150

    _, optimizer = trained(Measured, epochs=1, max_steps=3)
    assert optimizer.last.loss_change_measured < 0
