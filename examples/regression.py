"""Exact natural gradient with adaptive damping: the mean and the noise of a regression, learned together.

The network predicts a mean and a log scale for every patient. Their units have nothing to do with each other, which is
no matter to natural gradient: the Fisher matrix measures both in nats. Every step uses all the data, so the loss can be
measured before and after it, and Levenberg-Marquardt damping follows from how good the prediction was.

    python examples/regression.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import natgrad as ng


def main(steps: int = 30) -> tuple[float, float]:
    """Train, print the course of it, and return the test loss before and after, in nats per patient."""
    torch.manual_seed(0)
    inputs, target = load_diabetes(return_X_y=True)
    x = torch.tensor(inputs) * len(inputs) ** 0.5  # columns of unit variance, float64
    y = torch.tensor(target)[:, None]
    y = (y - y.mean()) / y.std()
    order = torch.randperm(len(x))
    train, test = order[:300], order[300:]
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    likelihood = ng.Gaussian.learned()
    # Armijo measures the loss of every step, so weight decay is part of that loss. Without it this network, which may
    # shrink the noise of single patients, overfits within twenty steps.
    optimizer = ng.NGD(
        model, likelihood, lr=1.0, damping=ng.LevenbergMarquardt(0.1), search=ng.Armijo(), weight_decay=0.03
    )

    def closure() -> tuple[Tensor, Tensor]:
        output = model(x[train])
        return likelihood.nll(output, y[train]).mean(), output

    @torch.no_grad()
    def test_loss() -> float:
        return float(likelihood.nll(model(x[test]), y[test]).mean())

    first = test_loss()
    for k in range(steps):
        loss = optimizer.step(closure)
        done = optimizer.metrics()
        if k % 5 == 0:
            print(
                f"step {k:2}: training loss {float(loss):.4f}, damping {done['natgrad/damping']:.1e}, "
                f"measured over predicted change {done['natgrad/ratio']:.2f}"
            )
    last = test_loss()
    print(f"test loss {first:.3f} before, {last:.3f} after {steps} steps")
    return first, last


if __name__ == "__main__":
    main()
