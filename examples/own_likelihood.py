"""A likelihood that natgrad does not have: gamma regression, from a torch distribution.

Disease scores are positive and skewed. The model predicts the log mean and the log shape of a gamma distribution, and
`FromDistribution` gets the rest from torch: sampling, the KL divergence, and the Fisher matrix as its Hessian. One step
of exact natural gradient with lr 1 is one step of Fisher scoring, the classical way to fit such models.

    python examples/own_likelihood.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.distributions import Gamma

import natgrad as ng


def gamma(f: Tensor) -> Gamma:
    """The output [N, 2] is (log mean, log shape). A builder indexes from the end and accepts every real output."""
    shape = f[..., 1].exp()
    return Gamma(shape, shape * (-f[..., 0]).exp())


LIKELIHOOD = ng.FromDistribution(gamma)


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Fisher scoring, K-FAC with its defaults, and Adam with a rate of 0.05."""
    return {
        "NGD": ng.NGD(model, LIKELIHOOD, lr=1.0, damping=1e-6, search=ng.LearningRate()),
        "KFAC": ng.KFAC(model, LIKELIHOOD),
        "Adam": torch.optim.Adam(model.parameters(), lr=0.05),
    }


def main(steps: int = 60) -> dict[str, list[float]]:
    """Train each optimizer from the same start, and return the mean negative log-likelihood at every step."""
    inputs, target = load_diabetes(return_X_y=True)
    x = torch.tensor(inputs) * len(inputs) ** 0.5
    y = torch.tensor(target) / 100
    losses: dict[str, list[float]] = {}
    for name in ("NGD", "KFAC", "Adam"):
        torch.manual_seed(0)
        model = nn.Linear(10, 2).double()
        optimizer = optimizers(model)[name]
        losses[name] = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = LIKELIHOOD.nll(model(x), y).mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        course = ", ".join(f"{losses[name][k]:.4f}" for k in (0, 5, 10, 20, steps - 1))
        print(f"{name}: {course} nats per patient at steps 0, 5, 10, 20 and {steps - 1}")
    return losses


if __name__ == "__main__":
    main()
