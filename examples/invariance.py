"""The picture of the README: the same two-parameter model trained in two coordinate systems.

A Gaussian N(μ, σ²) is fitted to 200 numbers. Once its parameters are (μ, log σ) themselves, once they are φ with
(μ, log σ) = A φ + b. The data, the start and the learning rate are the same.

    python examples/invariance.py docs/images/invariance.svg     # the picture needs the extra `report`
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import natgrad as ng

LIKELIHOOD = ng.Gaussian.learned()  # reads an output as (mean, log scale)
START = torch.tensor([-2.2, 0.6]).double()
COORDINATES = {"in (μ, log σ)": ([[1.0, 0.0], [0.0, 1.0]], 0.0), "mixed: Aφ + b": ([[1.6, 0.9], [-0.5, 0.4]], 1.0)}
METHODS = {
    "Gradient descent": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "Natural gradient": lambda model: ng.NGD(model, LIKELIHOOD, lr=0.1, damping=0.0, search=ng.LearningRate()),
}


class Gaussian(nn.Module):
    """(μ, log σ) = A φ + b for every row of the input, with φ the parameter."""

    def __init__(self, matrix: list[list[float]], offset: float) -> None:
        super().__init__()
        self.matrix, self.offset = torch.tensor(matrix).double(), offset
        self.phi = nn.Parameter(torch.linalg.solve(self.matrix, START - offset))

    def forward(self, y: Tensor) -> Tensor:
        return (self.matrix @ self.phi + self.offset).expand(len(y), 2)


def path(method: str, coordinates: str, y: Tensor, steps: int = 60) -> Tensor:
    """(μ, log σ) at the start and after every step, [steps + 1, 2]."""
    model = Gaussian(*COORDINATES[coordinates])
    optimizer = METHODS[method](model)
    points = [START]
    for _ in range(steps):
        optimizer.zero_grad()
        LIKELIHOOD.nll(model(y), y).mean().backward()
        optimizer.step()
        points.append(model(y)[0].detach())
    return torch.stack(points)


def draw(y: Tensor, paths: dict[str, list[Tensor]], picture: str) -> None:
    """Contours of the loss with both paths of each method."""
    from natgrad.report.figures import Panel, Trajectory, trajectories

    mu, log_scale = torch.linspace(-3, 3, 61).double(), torch.linspace(-1.2, 1.8, 61).double()
    grid = torch.stack(torch.meshgrid(mu, log_scale, indexing="xy"), -1)[..., None, :]
    loss = LIKELIHOOD.nll(grid.expand(-1, -1, len(y), 2), y.expand(61, 61, -1, 1)).mean(-1)
    panels = []
    for method, both in paths.items():
        drawn = [Trajectory(name, p, k, "6 3" * k) for k, (name, p) in enumerate(zip(COORDINATES, both, strict=True))]
        panels.append(Panel(method, mu, log_scale, loss, drawn, "μ", "log σ"))
    minimum = (float(y.mean()), float(y.std(correction=0).log()))
    trajectories(panels, title="One model in two coordinate systems", minimum=minimum).save(picture)


def main(picture: str | None = None) -> dict[str, float]:
    """Largest distance of the two paths of each method; draws them where a file is given."""
    y = 1 + 0.5 * torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).double()
    paths = {method: [path(method, name, y) for name in COORDINATES] for method in METHODS}
    gaps = {method: float((a - b).norm(dim=1).max()) for method, (a, b) in paths.items()}
    for method, gap in gaps.items():
        print(f"{method}: the two paths are up to {gap:.2g} apart")
    if picture is not None:
        draw(y, paths, picture)
    return gaps


if __name__ == "__main__":
    main(*sys.argv[1:])
