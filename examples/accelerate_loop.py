"""K-FAC in a loop of Hugging Face's accelerate: an autoencoder of the digits of scikit-learn.

Beside it AdamW, at the best of GRID's learning rates. Two batches for a gradient, clipping, a cosine schedule.

    python examples/accelerate_loop.py
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad as ng

GRID = (3e-3, 1e-2, 3e-2, 1e-1)
EPOCHS = 6


def digits() -> tuple[Tensor, Tensor]:
    """1,408 images to train on and 389 held back, as brightness between 0 and 1."""
    x = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32) / 16
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1408], x[1408:]


def kfac(model: nn.Module) -> ng.KFAC:
    return ng.KFAC(model, ng.Bernoulli(), lr=0.3, search=ng.KLClip(0.1))


def loss_of(output: Tensor, x: Tensor) -> Tensor:
    """In nats, summed over pixels, mean over images."""
    return F.binary_cross_entropy_with_logits(output, x, reduction="none").sum(1).mean()


def prepared(make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[Accelerator, Any, Any, Any, Any]:
    """The accelerator, and what its ``prepare`` returns: model, optimizer, batches, schedule."""
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise([64, 32, 16, 8, 16, 32, 64]) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers[:-1])
    loader = DataLoader(TensorDataset(digits()[0]), batch_size=64, shuffle=True)
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader) // 2)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)


def train(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, schedule: Any, epochs: int = EPOCHS):
    """Train, and return the losses of the images trained on and of those held back."""
    for _ in range(epochs):
        for (x,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model(x), x))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 100.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    with torch.no_grad():
        return [float(loss_of(model(x), x)) for x in digits()]


def main() -> dict[str, list[float]]:
    """Train, print and return the two losses of each optimizer."""
    adamw = [train(*prepared(lambda model, lr=lr: torch.optim.AdamW(model.parameters(), lr))) for lr in GRID]
    found = {"AdamW": min(adamw), "K-FAC": train(*prepared(kfac))}
    for name, (loss, held_out) in found.items():
        print(f"{name}: training loss {loss:.2f} nats per image, held-out loss {held_out:.2f}")
    return found


if __name__ == "__main__":
    main()
