"""Why no layer rule serves a parameter, in words that say what would."""

from __future__ import annotations

from torch import Tensor, nn

from natgrad.network.layers.registry import rule_for


def why_without_rule(module: nn.Module, name: str) -> str:
    """The reason for the parameter that ``module`` calls ``name``."""
    kind = type(module).__name__
    if hasattr(module, "parametrizations"):
        return f"the true parameters of {kind} are behind its parametrisation"
    if isinstance(module, nn.RNNBase) and (module.proj_size or (module.dropout and module.num_layers > 1)):
        return f"no layer rule for {kind} with proj_size or with dropout between layers; one {kind} per layer has one"
    if isinstance(module, nn.RNNCellBase):
        return f"no layer rule for {kind}; nn.{kind.removesuffix('Cell')} has one, and so have gates made of nn.Linear"
    rule = rule_for(module)
    if rule is not None:
        return f"the layer rule for {kind} does not know {name}"
    if kind.endswith("Experts") and isinstance(found := getattr(module, name, None), Tensor) and found.dim() == 3:
        return f"no layer rule for {kind}: its experts are fused in one tensor; one nn.Linear per expert would have one"
    return f"no layer rule for {kind}"
