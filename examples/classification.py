"""K-FAC in an ordinary training loop: a convolutional network on the digits of scikit-learn.

The only differences from a loop with torch.optim.Adam are the line that makes the optimizer and what it can report.

    python examples/classification.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad as ng


def main(epochs: int = 4) -> float:
    """Train, print one line per epoch, and return the accuracy on the images that were held back."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    # The radius bounds what the layers' own matrices predict for a step, in nats per image.
    optimizer = ng.KFAC(model, ng.Categorical(), lr=0.03, search=ng.KLClip(1e-3))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=128, shuffle=True)

    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        schedule.step()
        model.eval()  # passes in evaluation mode are not observed
        with torch.no_grad():
            accuracy = float((model(x[test]).argmax(1) == y[test]).float().mean())
        step = optimizer.metrics()
        print(
            f"epoch {epoch}: loss of the last batch {loss.item():.3f}, test accuracy {accuracy:.3f}, "
            f"KL that the last step was predicted to make {step['natgrad/kl_predicted']:.1e}"
        )
    return accuracy


if __name__ == "__main__":
    main()
