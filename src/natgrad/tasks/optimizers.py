"""The optimizers of a comparison, by name: natgrad's presets and the ones that people use today.

None of them is tuned here. Weight decay is off everywhere, so that all minimise the same training loss; every other
setting is the library's default or is stated in the note, which the report prints.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from natgrad.errors import ArgumentError, UnsupportedError
from natgrad.tasks.registry import close_matches
from natgrad.tasks.task import Rows, forward, mean_nll


class Stepper(Protocol):
    """One optimizer bound to one model."""

    def step(self, inputs: Rows, targets: Rows) -> tuple[Tensor, Tensor]:
        """One update on a batch; returns the loss and the output before it, detached."""
        ...

    def kl_predicted(self) -> float:
        """KL(old ‖ new) of the last update as the optimizer predicted it; NaN when it predicts none."""
        ...

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state tensors."""
        ...


@dataclass(frozen=True)
class OptimizerSpec:
    """How to build an optimizer. ``default_lr`` None means: as the preset's own default says.

    ``knob`` is the setting that the learning-rate grid scales: ``lr``, or the radius ``max_kl`` of a trust region.
    """

    name: str
    family: str
    note: str
    build: Callable[[nn.Module, Any, float | None], Stepper]
    default_lr: float | None = None
    knob: str = "lr"

    def lr_of(self, model: nn.Module, likelihood: Any) -> float:
        """The documented default of the knob."""
        if self.default_lr is not None:
            return self.default_lr
        stepper = self.build(model, likelihood, None)
        return float(getattr(stepper, "knob_value", math.nan))


class LoopStepper:
    """The ordinary loop: zero_grad, forward, backward, step; of one optimizer or of several on disjoint parameters."""

    def __init__(self, model: nn.Module, likelihood: Any, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.model, self.likelihood, self.optimizers = model, likelihood, list(optimizers)

    def step(self, inputs: Rows, targets: Rows) -> tuple[Tensor, Tensor]:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        output = forward(self.model, inputs)
        loss = mean_nll(self.likelihood, output, targets)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach(), output.detach()

    def kl_predicted(self) -> float:
        return math.nan

    def state_bytes(self) -> int:
        return sum(tensor_bytes(optimizer.state_dict()["state"]) for optimizer in self.optimizers)


class ClosureStepper(LoopStepper):
    """torch's LBFGS, which evaluates a closure as often as its line search asks, on the same batch."""

    def step(self, inputs: Rows, targets: Rows) -> tuple[Tensor, Tensor]:
        first: list[tuple[Tensor, Tensor]] = []

        def closure() -> Tensor:
            self.optimizers[0].zero_grad(set_to_none=True)
            output = forward(self.model, inputs)
            loss = mean_nll(self.likelihood, output, targets)
            loss.backward()
            if not first:
                first.append((loss.detach(), output.detach()))
            return loss

        self.optimizers[0].step(closure)  # type: ignore[arg-type]
        return first[0]


class NatgradStepper:
    """A natgrad preset. The closure returns loss, output and target; natgrad calls backward itself."""

    def __init__(self, model: nn.Module, likelihood: Any, optimizer: Any, knob_value: float) -> None:
        self.model, self.likelihood, self.optimizer, self.knob_value = model, likelihood, optimizer, knob_value

    def step(self, inputs: Rows, targets: Rows) -> tuple[Tensor, Tensor]:
        first: list[tuple[Tensor, Tensor]] = []

        def closure() -> tuple[Tensor, Tensor, Rows]:
            output = forward(self.model, inputs)
            loss = mean_nll(self.likelihood, output, targets)
            if not first:
                first.append((loss.detach(), output.detach()))
            return loss, output, targets

        self.optimizer.step(closure)
        return first[0]

    def kl_predicted(self) -> float:
        value = getattr(getattr(self.optimizer, "last", None), "kl_predicted", None)
        return math.nan if value is None else float(value)

    def state_bytes(self) -> int:
        return tensor_bytes(self.optimizer.state_dict()["state"])


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples, each storage counted once."""
    storages: dict[int, int] = {}
    pending = [tree]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
    return sum(storages.values())


def _sgd(model: nn.Module, likelihood: Any, lr: float | None) -> Stepper:
    return LoopStepper(model, likelihood, [torch.optim.SGD(_trainable(model), lr=lr or SGD_LR, momentum=0.9)])


def _adamw(model: nn.Module, likelihood: Any, lr: float | None) -> Stepper:
    return LoopStepper(model, likelihood, [torch.optim.AdamW(_trainable(model), lr=lr or ADAMW_LR, weight_decay=0.0)])


def _muon(model: nn.Module, likelihood: Any, lr: float | None) -> Stepper:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise UnsupportedError(f"torch {torch.__version__} has no torch.optim.Muon; it came with torch 2.9.")
    rate = lr or MUON_LR
    hidden = hidden_matrices(model)
    chosen = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in _trainable(model) if id(parameter) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(muon(hidden, lr=rate, weight_decay=0.0))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=rate * MUON_ADAMW_SHARE, weight_decay=0.0))
    return LoopStepper(model, likelihood, optimizers)


def _lbfgs(model: nn.Module, likelihood: Any, lr: float | None) -> Stepper:
    optimizer = torch.optim.LBFGS(_trainable(model), lr=lr or LBFGS_LR, line_search_fn="strong_wolfe")
    return ClosureStepper(model, likelihood, [optimizer])


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """2-D weights that are neither an embedding nor in the last linear layer: what Muon is meant for."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    excluded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if linears:
        excluded.add(id(linears[-1].weight))
    return [parameter for parameter in _trainable(model) if parameter.dim() == 2 and id(parameter) not in excluded]


def _preset(class_name: str, knob: str) -> Callable[[nn.Module, Any, float | None], Stepper]:
    def build(model: nn.Module, likelihood: Any, value: float | None) -> Stepper:
        import natgrad  # here, because the presets live above what this module needs otherwise

        preset = getattr(natgrad, class_name)
        parameters = inspect.signature(preset).parameters
        if knob == "max_kl" and knob not in parameters:
            # The radius belongs to the preset's own kind of search.
            search = parameters["search"].default
            radius = float(search.max_kl if value is None else value)
            optimizer = preset(model, likelihood, search=replace(search, max_kl=radius))
            return NatgradStepper(model, likelihood, optimizer, radius)
        chosen = float(parameters[knob].default) if value is None else value
        return NatgradStepper(model, likelihood, preset(model, likelihood, **{knob: chosen}), chosen)

    return build


SGD_LR, ADAMW_LR, MUON_LR, LBFGS_LR = 0.01, 1e-3, 0.02, 1.0
# Keller Jordan's Muon runs its AdamW part at a fixed share of the Muon rate; here the share gives AdamW's own default.
MUON_ADAMW_SHARE = 0.05

_PRESETS = {
    "ngd": ("NGD", "max_kl", "exact Fisher, dense"),
    "diagonal": ("DiagonalNGD", "max_kl", "diagonal of the Fisher"),
    "block": ("BlockNGD", "max_kl", "one dense Fisher block per layer"),
    "kfac": ("KFAC", "max_kl", "Kronecker-factored Fisher"),
    "adaptive-kfac": ("AdaptiveKFAC", "lr", "K-FAC with rate, momentum and damping from the quadratic model"),
    "ekfac": ("EKFAC", "max_kl", "Kronecker eigenbasis with corrected eigenvalues"),
    "gram": ("GramNGD", "max_kl", "exact damped Fisher of the batch, solved in example space"),
    "hessian-free": ("HessianFree", "lr", "matrix-free Fisher and conjugate gradients"),
    "gauss-newton": ("GaussNewton", "lr", "generalised Gauss-Newton with Levenberg-Marquardt damping"),
    "newton": ("Newton", "lr", "the Hessian itself"),
    "trust-region": ("TrustRegionNGD", "max_kl", "natural gradient to a radius of measured KL"),
}

OPTIMIZERS: dict[str, OptimizerSpec] = {
    **{
        name: OptimizerSpec(name, "natgrad", f"natgrad.{cls} with its defaults: {what}", _preset(cls, knob), knob=knob)
        for name, (cls, knob, what) in _PRESETS.items()
    },
    "sgd": OptimizerSpec("sgd", "torch", "torch.optim.SGD, momentum 0.9", _sgd, SGD_LR),
    "adamw": OptimizerSpec("adamw", "torch", "torch.optim.AdamW, no weight decay", _adamw, ADAMW_LR),
    "muon": OptimizerSpec(
        "muon",
        "torch",
        "torch.optim.Muon, no weight decay, for 2-D weights other than embeddings and the last layer; "
        f"AdamW at {MUON_ADAMW_SHARE:g} of its rate for the rest",
        _muon,
        MUON_LR,
    ),
    "lbfgs": OptimizerSpec(
        "lbfgs",
        "torch",
        "torch.optim.LBFGS with strong Wolfe line search; one step is up to 20 inner iterations on one batch",
        _lbfgs,
        LBFGS_LR,
    ),
}
DEFAULT = ("kfac", "ekfac", "sgd", "adamw", "muon")


def find_optimizers(names: Iterable[str]) -> tuple[OptimizerSpec, ...]:
    """The specs of the names, without repeats; ArgumentError names an unknown one and its close matches."""
    specs = []
    for name in dict.fromkeys(names):
        if name not in OPTIMIZERS:
            raise ArgumentError(
                f"There is no optimizer {name!r}{close_matches(name, OPTIMIZERS)}. Known: {', '.join(OPTIMIZERS)}."
            )
        specs.append(OPTIMIZERS[name])
    if not specs:
        raise ArgumentError(f"No optimizer was given. Known: {', '.join(OPTIMIZERS)}.")
    return tuple(specs)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
