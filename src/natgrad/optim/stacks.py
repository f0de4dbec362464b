"""Blocks whose Kronecker factors have equal shapes, side by side: inverted together, and applied together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import NatgradError
from natgrad.linalg import KroneckerProduct, LinearOperator
from natgrad.network import BlockVector
from natgrad.optim.penalty import Penalised
from natgrad.step import FactoredTikhonov, LevenbergMarquardt

# The widest factors that gain. On a CPU a batched product of wider matrices takes twice as long as one after the other;
# of their inverses only the checks and the damping are saved.
_CPU_PRODUCTS, _CPU_INVERSES, _ELSEWHERE = 48, 128, 512


def inverted_together(
    names: Sequence[str], rules: Mapping[str, Any], operators: Mapping[str, LinearOperator]
) -> dict[str, LinearOperator]:
    """Damped inverses of the blocks that have a like: of equal shapes, under the same rule of factored damping.

    Blocks among which one cannot be inverted are left out, to be inverted each by itself.
    """
    groups: dict[Any, list[str]] = {}
    for name in names:
        rule, shape = _factored(rules[name]), _shape(operators[name], _CPU_INVERSES)
        if rule is not None and shape is not None:
            groups.setdefault((rule, shape), []).append(name)
    found: dict[str, LinearOperator] = {}
    for (rule, _), members in groups.items():
        if len(members) > 1:
            try:
                inverse: Any = rule.inverse(_stacked([operators[name] for name in members]))
            except NatgradError:
                continue
            found.update(zip(members, _members(inverse), strict=True))
    return found


def _factored(rule: Any) -> FactoredTikhonov | None:
    """The rule by which a Kronecker product is damped factor by factor, the same for all blocks; None: another kind."""
    if isinstance(rule, LevenbergMarquardt):
        return _factored(rule.rule)
    if isinstance(rule, Penalised):
        inner = _factored(rule.rule)
        return None if inner is None else FactoredTikhonov(inner.value + rule.decay.mean)
    return rule if type(rule) is FactoredTikhonov else None


class Stacks:
    """Inverses of many blocks as they are applied: small ones of equal shape by one batched product."""

    def __init__(self) -> None:
        self._members: dict[str, LinearOperator] = {}
        self._groups: list[tuple[list[str], KroneckerProduct]] = []

    def matvec(self, inverses: Mapping[str, LinearOperator], vectors: BlockVector) -> BlockVector:
        """``inverses[name] @ vectors[name]`` of every vector, in its dtype and in their order."""
        found: BlockVector = {}
        for names, inverse in self._grouped(inverses):
            if all(name in vectors for name in names):
                stack = torch.stack([vectors[name] for name in names])
                rows = inverse.matvec(stack.reshape(-1)).reshape(stack.shape).to(stack.dtype)
                found.update(zip(names, rows.unbind(), strict=True))
        return {
            name: found[name] if name in found else inverses[name].matvec(v).to(v.dtype) for name, v in vectors.items()
        }

    def _grouped(self, inverses: Mapping[str, LinearOperator]) -> list[tuple[list[str], KroneckerProduct]]:
        """The groups, made anew where an inverse has been since they were made."""
        known = self._members
        if len(known) != len(inverses) or any(known.get(name) is not inverse for name, inverse in inverses.items()):
            alike: dict[Any, list[str]] = {}
            for name, inverse in inverses.items():
                shape = _shape(inverse, _CPU_PRODUCTS)
                if shape is not None:
                    alike.setdefault(shape, []).append(name)
            several = [names for names in alike.values() if len(names) > 1]
            self._groups = [(names, _stacked([inverses[name] for name in names])) for names in several]
            self._members = dict(inverses)
        return self._groups


def _shape(operator: LinearOperator, widest_on_cpu: int) -> tuple[Any, ...] | None:
    """What operators of one group have in common; None for one that is best computed with by itself."""
    if type(operator) is not KroneckerProduct or operator.stack:
        return None
    left, right = operator.left, operator.right
    widest = widest_on_cpu if operator.device.type == "cpu" else _ELSEWHERE
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or max(operator.p, operator.q) > widest:
        return None
    return operator.p, operator.q, operator.dtype, operator.device


def _stacked(operators: Sequence[Any]) -> KroneckerProduct:
    return KroneckerProduct(
        torch.stack([operator.left for operator in operators]), torch.stack([operator.right for operator in operators])
    )


def _members(stack: KroneckerProduct) -> list[KroneckerProduct]:
    assert isinstance(stack.left, Tensor) and isinstance(stack.right, Tensor)
    return [KroneckerProduct(a, b) for a, b in zip(stack.left.unbind(), stack.right.unbind(), strict=True)]
