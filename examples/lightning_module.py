"""K-FAC in Lightning's Trainer: an autoencoder of the digits of scikit-learn, beside Adam at its best rate.

`configure_optimizers` makes the optimizer with the network that `training_step` calls; nothing else changes.

    python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad as ng

RATES = (3e-3, 1e-2, 3e-2, 1e-1)  # of Adam; K-FAC runs with its defaults


class Autoencoder(lightning.LightningModule):
    """Every pixel is a Bernoulli variable: the loss is the cross entropy of an image's 64 pixels, in nats."""

    def __init__(self, adam: float | None = None) -> None:
        super().__init__()
        widths = ((64, 32), (32, 16), (16, 4), (4, 16), (16, 32), (32, 64))
        layers = [layer for width in widths for layer in (nn.Linear(*width), nn.Tanh())]
        self.network, self.adam = nn.Sequential(*layers[:-1]), adam

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adam is not None:
            return torch.optim.Adam(self.parameters(), lr=self.adam)
        return ng.KFAC(self.network, ng.Bernoulli())

    def loss(self, x: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self.network(x), x, reduction="sum") / len(x)

    def training_step(self, batch: list[Tensor]) -> Tensor | None:
        return self.loss(batch[0])


class ManualAutoencoder(Autoencoder):
    """The same with the loop's three lines written out."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor]) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch[0]))
        optimizer.step()


def train(module: Autoencoder, epochs: int = 4, batch: int = 150, resume: Any = None, **options: Any) -> float:
    """Fit to 1500 images, and return the loss on all of them; `resume` is the path of a checkpoint."""
    x = torch.tensor(load_digits().data[:1500], dtype=torch.float32) / 16
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **{**quiet, **options})
    trainer.fit(module, DataLoader(TensorDataset(x), batch), ckpt_path=resume)
    return module.loss(x).item()


def main() -> dict[str, float]:
    """Train in every mode, 40 steps each from the same start, and return the training losses."""
    runs: dict[str, Any] = {f"Adam({rate})": (lambda rate=rate: Autoencoder(rate), {}) for rate in RATES}
    runs |= {"K-FAC": (Autoencoder, {}), "K-FAC, manual": (ManualAutoencoder, {})}
    runs["K-FAC, two batches a step"] = (Autoencoder, {"batch": 75, "accumulate_grad_batches": 2})
    runs["K-FAC, bf16-mixed"] = (Autoencoder, {"precision": "bf16-mixed"})
    losses = {}
    for name, (build, options) in runs.items():
        lightning.seed_everything(0, verbose=False)
        losses[name] = train(build(), **options)
        print(f"{name}: {losses[name]:.2f} nats per image after 40 steps")
    return losses


if __name__ == "__main__":
    main()
