"""Every preset with momentum, Levenberg–Marquardt damping and a trust region: training runs cut in two.

Run as a program, ``python resume_runs.py SAVED RESULTS`` continues every run of the file SAVED, as a training script
started anew would, and writes what comes of them to the file RESULTS.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import natgrad as ng

CUT, END = 4, 11  # between the inverses of steps 0 and 10 of Refresh(1, 10)

PRESETS: dict[str, Any] = {
    "NGD": ng.NGD,
    "DiagonalNGD": ng.DiagonalNGD,
    "BlockNGD": ng.BlockNGD,
    "KFAC": ng.KFAC,
    "EKFAC": ng.EKFAC,
    "GramNGD": ng.GramNGD,
    "HessianFree": ng.HessianFree,
    "GaussNewton": ng.GaussNewton,
    "Newton": ng.Newton,
    "TrustRegionNGD": ng.TrustRegionNGD,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FITS = ("BlockNGD", "KFAC", "EKFAC", "GramNGD")
"""Presets whose default search fits the momentum of every step itself."""
WITHOUT_MOMENTUM = ("HessianFree", "GaussNewton", "Newton")
CONTROLS = ("default", "momentum", "damping", "radius")
SHARES = {"KFAC": ng.Kronecker, "EKFAC": ng.EigenKronecker}
"""Presets that renew inverses a share at a time, and sample positions: their structures."""


def options(preset: str, control: str) -> dict[str, Any]:
    """Arguments of the preset beside model and likelihood."""
    out: dict[str, Any] = {"damping": 100.0} if preset == "Newton" else {}
    if control == "momentum":
        out["momentum"] = 0.9
        if preset in FITS:
            out["search"] = ng.KLClip(1e-2)
    elif control == "damping":
        inside: Any = ng.FactoredTikhonov(1.0) if preset in ("KFAC", "EKFAC") else 1.0
        out["damping"] = ng.LevenbergMarquardt(1e3 if preset == "Newton" else inside)
    elif control == "shares":  # the shares of steps 3 to 5 are cut in two
        out["refresh"], out["structure"] = ng.Staggered(1, 3), SHARES[preset](sampling=ng.Sampling(0.5))
    elif control == "empirical":
        out["estimate"] = ng.Empirical()
    elif control == "part":
        out["structure"] = SHARES[preset](sampling=ng.SubBatch(0.5))
    elif control == "radius" and preset == "TrustRegionNGD":
        out["max_kl"] = 1e-3
    elif control == "radius":
        out["search"] = ng.TrustRegion(1e-3)
    return out


@dataclass(frozen=True)
class Combination:
    """A preset with one control of its steps, at one precision of the parameters, with batch normalisation or not."""

    preset: str
    control: str
    dtype: str
    norm: bool = True

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.control}-{self.dtype}"

    @property
    def controlled(self) -> bool:
        """Whether a continuation without the optimizer's state is run beside it, which must end elsewhere."""
        return self.control in ("momentum", "damping") and self.dtype == "float32"

    def start(self) -> tuple[nn.Module, ng.NaturalGradient]:
        """The model at its first parameters, with its optimizer. Leaves the global random stream at a fixed place."""
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(6) if self.norm else nn.Identity()
        model = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
        model.to(DTYPES[self.dtype])
        return model, PRESETS[self.preset](model, ng.Categorical(), **options(self.preset, self.control))


COMBINATIONS = [
    Combination(preset, control, dtype)
    for preset in PRESETS
    for control in CONTROLS
    for dtype in DTYPES
    if not (control == "momentum" and preset in WITHOUT_MOMENTUM)
] + [Combination(preset, "shares", dtype) for preset in SHARES for dtype in DTYPES]
COMBINATIONS += [
    Combination(preset, control, dtype, norm=False)
    for control in ("part", "empirical")
    for preset in SHARES
    for dtype in DTYPES
]


def train(model: nn.Module, optimizer: ng.NaturalGradient, first: int, last: int) -> list[float]:
    """Steps ``first`` to ``last`` in an ordinary loop; the loss before each."""
    losses = []
    for seed in range(first, last):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        output = model(x.to(next(model.parameters()).dtype))
        optimizer.observe(output, y)
        loss = F.cross_entropy(output.float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved(model: nn.Module, optimizer: ng.NaturalGradient) -> dict[str, Any]:
    """What a training script puts into its checkpoint."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}


def outcome(model: nn.Module, optimizer: ng.NaturalGradient, losses: list[float]) -> dict[str, Any]:
    """All that two runs must have in common."""
    return {**saved(model, optimizer), "losses": losses, "metrics": optimizer.metrics()}


def continued(combination: Combination, checkpoint: dict[str, Any], forgets: bool = False) -> dict[str, Any]:
    """The rest of a run; ``forgets``: without the optimizer's state, as a control."""
    model, optimizer = combination.start()
    model.load_state_dict(checkpoint["model"])
    if not forgets:
        optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["random"])
    return outcome(model, optimizer, train(model, optimizer, CUT, END))


def main(source: str, target: str) -> None:
    torch.set_num_threads(1)
    checkpoints = torch.load(source, weights_only=True)
    results: dict[str, Any] = {}
    for combination in COMBINATIONS:
        checkpoint = checkpoints.get(combination.name)
        if checkpoint is None:
            continue
        try:
            results[combination.name] = continued(combination, checkpoint)
            if combination.controlled:
                results[combination.name + "-forgetful"] = continued(combination, checkpoint, forgets=True)
        except Exception as error:
            results[combination.name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
