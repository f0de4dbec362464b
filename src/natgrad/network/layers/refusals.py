"""Why no layer rule serves a parameter, in words that say what would."""

from __future__ import annotations

from torch import Tensor, nn

from natgrad.network.layers.registry import rule_for

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def why_without_rule(module: nn.Module, name: str) -> str:
    """The reason for the parameter that ``module`` calls ``name``."""
    kind = type(module).__name__
    if hasattr(module, "parametrizations"):
        return f"the true parameters of {kind} are behind its parametrisation"
    if isinstance(module, _RECURRENT):
        return (
            f"no layer rule for {kind}: its gates are inside one operation, where their gradients are not seen; "
            "gates made of nn.Linear are"
        )
    rule = rule_for(module)
    if rule is not None:
        return f"the layer rule for {kind} does not know {name}"
    if kind.endswith("Experts") and isinstance(found := getattr(module, name, None), Tensor) and found.dim() == 3:
        return f"no layer rule for {kind}: its experts are fused in one tensor; one nn.Linear per expert would have one"
    return f"no layer rule for {kind}"
