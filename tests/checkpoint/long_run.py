"""A K-FAC run that saves a snapshot after every step; run as a program, it goes on where the snapshot ends.

python long_run.py STEPS SNAPSHOT DTYPE [SNAPSHOT DTYPE …]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import natgrad as ng


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 4)).to(dtype)


def run(path: Path, steps: int, dtype: torch.dtype) -> nn.Sequential:
    """Train up to step ``steps``, from the snapshot where there is one; batches and dropout from the global stream."""
    model = network(dtype)
    damping = ng.LevenbergMarquardt(ng.FactoredTikhonov(1e-2))
    optimizer = ng.KFAC(model, ng.Categorical(), lr=0.5, damping=damping, refresh=ng.Refresh(1, 3))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    done = 0
    if path.exists():
        extras = ng.load(path, model, optimizer)
        done = extras["step"]
        schedule.load_state_dict(extras["schedule"])
        torch.set_rng_state(extras["random"])
    for step in range(done, steps):
        x, y = torch.randn(32, 6).to(dtype), torch.randint(4, (32,))
        optimizer.zero_grad()
        output = model(x)
        optimizer.observe(output, y)
        F.cross_entropy(output.float(), y).backward()
        optimizer.step()
        schedule.step()
        kept = {"schedule": schedule.state_dict(), "random": torch.get_rng_state()}
        ng.save(path, model, optimizer, step=step + 1, **kept)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    for snapshot, name in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        run(Path(snapshot), int(sys.argv[1]), getattr(torch, name))
