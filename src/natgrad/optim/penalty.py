"""Weight decay: part of the loss, ½ Σ w ‖θ‖², where the search measures what a step does; decoupled elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.linalg import DiagonalMatrix, IdentityMatrix, KroneckerEigen, KroneckerProduct, LinearOperator, SaddleFree
from natgrad.metric import Hessian, Metric
from natgrad.network import Block, Partition
from natgrad.optim.groups import Group
from natgrad.step import Constant, Damping, FactoredTikhonov, LevenbergMarquardt, Proportional, Search

_EXACT_SUMS = (Constant, Proportional, FactoredTikhonov)


def in_loss(search: Search, groups: Mapping[str, Group]) -> dict[str, float]:
    """The weight decay of each parameter whose decay is part of the loss: of all that have any, or of none."""
    if not search.needs_probe:
        return {}
    return {name: float(group["weight_decay"]) for name, group in groups.items() if group["weight_decay"]}


@dataclass(frozen=True)
class BlockDecay:
    """W, the curvature of the penalty in one block.

    Attributes:
        mean: w, the mean of the diagonal.
        diagonal: the diagonal [n] where it is not w throughout: biases are often left out of weight decay.
    """

    mean: float
    diagonal: Tensor | None = None

    @staticmethod
    def of(block: Block, decay: Mapping[str, float], parameters: Mapping[str, Tensor]) -> BlockDecay:
        """That of ``block``, with the decay of each parameter by name; 0 for those without."""
        values = {name: decay.get(name, 0.0) for name in block.parameters}
        if len(set(values.values())) == 1:
            return BlockDecay(next(iter(values.values())))
        sizes = {name: parameters[name].numel() for name in values}
        mean = sum(w * sizes[name] for name, w in values.items()) / sum(sizes.values())
        full = {
            name: torch.full(p.shape, values[name], dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in ((name, parameters[name]) for name in values)
        }
        return BlockDecay(mean, block.pack(full))

    def operator(self, like: LinearOperator) -> LinearOperator:
        """W, in the dtype and on the device of the operator of the block's metric."""
        if self.diagonal is None:
            return IdentityMatrix(like.shape[0], like.dtype, like.device) * self.mean
        return DiagonalMatrix(self.diagonal.to(device=like.device, dtype=like.dtype))


@dataclass(frozen=True)
class Penalised:
    """A damping rule whose inverse is that of the loss with its penalty, (F + W + λI)⁻¹.

    A Kronecker product plus a diagonal is not inverted factor by factor: where W differs inside such a block, its mean
    takes its place.

    Args:
        rule: what gives λ.
        decay: W.
        ascent: whether −F + W is the curvature of what is minimised, of which the inverse of F + λI is used.
    """

    rule: Damping
    decay: BlockDecay
    ascent: bool = False

    def inverse(self, operator: LinearOperator, solver: Any = None) -> LinearOperator:
        """The inverse of one block."""
        rule, w = self.rule.rule if isinstance(self.rule, LevenbergMarquardt) else self.rule, self.decay.mean
        if not isinstance(rule, _EXACT_SUMS):
            return rule.inverse(operator + self.decay.operator(operator), solver)
        if isinstance(rule, FactoredTikhonov) and isinstance(operator, KroneckerProduct):
            return FactoredTikhonov(rule.value + w).inverse(operator, solver)
        amount = rule.amount(operator)
        factored = isinstance(operator, KroneckerProduct | KroneckerEigen)
        varied = self.decay.diagonal is not None and not factored
        # |H + W| is not |H| + W where H has negative eigenvalues.
        if not self.ascent and (varied or (isinstance(solver, SaddleFree) and not factored)):
            return (operator + self.decay.operator(operator)).inverse(damping=amount, solver=solver)
        return operator.inverse(damping=amount + w, solver=solver)


def penalised(
    rules: Mapping[str, Damping],
    partition: Partition,
    decay: Mapping[str, float],
    groups: Mapping[str, Group],
    parameters: Mapping[str, Tensor],
    metric: Metric,
) -> dict[str, Any]:
    """The rule of each block, with the penalty in its inverse where there is one."""
    out: dict[str, Any] = dict(rules)
    for block in partition.blocks:
        if any(name in decay for name in block.parameters):
            ascent = isinstance(metric, Hessian) and bool(groups[block.parameters[0]]["maximize"])
            out[block.name] = Penalised(rules[block.name], BlockDecay.of(block, decay, parameters), ascent)
    return out


def curvature_of_penalty(
    partition: Partition,
    decay: Mapping[str, float],
    parameters: Mapping[str, Tensor],
    operators: Mapping[str, LinearOperator],
) -> dict[str, LinearOperator] | None:
    """W of each block; None where there is no penalty at all."""
    if not decay:
        return None
    return {b.name: BlockDecay.of(b, decay, parameters).operator(operators[b.name]) for b in partition.blocks}


def shrink(p: Tensor, group: Group, accepted: Tensor) -> None:
    """Decoupled weight decay, ``θ ← (1 − lr·w) θ``."""
    if not group["weight_decay"]:
        return
    rate = 1 - group["lr"] * group["weight_decay"]
    # Not in p's own precision: bfloat16 knows nothing between 0.996 and 1.
    factor = torch.as_tensor(rate, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
    p.mul_(torch.where(accepted, factor, torch.ones_like(factor)))
