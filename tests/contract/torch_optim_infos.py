"""natgrad's presets as torch describes its own optimizers to its tests; a small module with the loss of those tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import CyclicLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

import natgrad as ng

pytest.importorskip("expecttest")  # of torch's own tests
common = pytest.importorskip("torch.testing._internal.common_optimizers")

FITS = (ng.BlockNGD, ng.KFAC, ng.EKFAC, ng.GramNGD)
"""Their default search fits the momentum of every step itself."""
SAMPLED = (ng.DiagonalNGD, *FITS)
WITHOUT_MOMENTUM = (ng.HessianFree, ng.GaussNewton, ng.Newton)
LABELLED = (ng.HessianFree, ng.GaussNewton, ng.Newton)
"""They need the labels, or the loss that the labels give."""
PRESETS = (
    ng.NGD, ng.DiagonalNGD, ng.BlockNGD, ng.KFAC, ng.EKFAC, ng.GramNGD, ng.HessianFree, ng.GaussNewton, ng.Newton,
    ng.TrustRegionNGD,
)  # fmt: skip
SCHEDULERS = (
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: ExponentialLR(opt, gamma=0.99), lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=20, cycle_momentum=False)],
    [lambda opt: CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=5, cycle_momentum=False)],
)


def likelihood() -> Any:
    return ng.Gaussian()


def inputs_of(preset: Any) -> Any:
    """The function from a device to constructor arguments that torch's tests ask for."""

    def inputs(device: str, dtype: torch.dtype | None = None) -> list[Any]:
        always: dict[str, Any] = {"likelihood": likelihood()}
        if preset in SAMPLED:  # three sampled labels leave most directions without curvature
            always["estimate"] = ng.Exact()
        if preset is ng.TrustRegionNGD:
            always["lr"] = 1.0
        chosen: dict[str, dict[str, Any]] = {
            "default": {"estimate": ng.MonteCarlo()} if preset in SAMPLED else {},
            "lr": {"lr": 0.1},
            "tensor lr": {"lr": torch.tensor(0.1)},
            "weight_decay": {"weight_decay": 0.1},
            "maximize": {"lr": 0.1, "weight_decay": 1e-3, "maximize": True},
            "damping": {"damping": 20.0},
        }
        if preset not in WITHOUT_MOMENTUM:
            chosen["momentum"] = {"lr": 0.1, "momentum": 0.9}
            if preset in FITS:
                chosen["momentum"]["search"] = ng.KLClip(1e-2)
        return [common.OptimizerInput(None, {**always, **kwargs}, desc) for desc, kwargs in chosen.items()]

    return inputs


def errors_of(preset: Any) -> Any:
    """The function from device and dtype to arguments that must be refused, with how: torch's own and natgrad's."""

    def errors(device: str, dtype: torch.dtype) -> list[Any]:
        found = common.get_error_inputs_for_all_optims(device, dtype)
        for error in found:
            given = error.optimizer_error_input
            given.kwargs = {"likelihood": likelihood(), **given.kwargs}
            if given.params is None:
                given.params = [Parameter(torch.randn(1, 1, device=device, dtype=dtype))]
        ours = [
            ({"lr": -1e-2}, "lr=-0.01"),
            ({"weight_decay": -0.5}, "weight_decay=-0.5"),
            ({"damping": -1.0}, "value"),
        ]
        if preset not in WITHOUT_MOMENTUM:
            ours.append(({"momentum": -0.5}, "momentum=-0.5"))
        for kwargs, message in ours:
            params = [Parameter(torch.randn(1, 1, device=device, dtype=dtype))]
            given = common.OptimizerInput(params, {"likelihood": likelihood(), **kwargs}, message)
            found.append(common.ErrorOptimizerInput(given, error_type=ValueError, error_regex=message))
        return found

    return errors


INFOS = [
    common.OptimizerInfo(
        preset,
        optim_inputs_func=inputs_of(preset),
        scheduler_inputs=SCHEDULERS,
        supported_impls=(),
        not_og_supported_flags=("damping", "max_kl", "division"),
        supports_sparse=False,
        supports_complex=False,
        supports_multiple_devices=False,
        optim_error_inputs_func=errors_of(preset),
    )
    for preset in PRESETS
]


class Net(nn.Module):
    """A linear layer whose output is shifted: ``x [N, 5] -> W x + b + shift [N, 4]``."""

    def __init__(self, contiguous: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.shift = Parameter(torch.randn(4))
        if not contiguous:
            self.linear.weight = Parameter(torch.randn(4, 5, 2)[..., 0])
            self.linear.bias = Parameter(torch.randn(4, 2)[..., 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.shift


def evaluate(optimizer: Any, model: nn.Module, x: Tensor) -> Tensor:
    """What the closures of torch's tests do: gradients of the sum of squares; its value."""
    optimizer.zero_grad()
    output = model(x)
    if isinstance(optimizer, LABELLED):
        optimizer.observe(output, torch.zeros_like(output))
    loss = output.square().flatten(1).sum(-1).mean()
    loss.backward()
    return loss
