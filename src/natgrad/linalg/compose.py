"""Operators made of operators: sums, multiples, products, transposes and block-diagonal matrices."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.errors import ArgumentError, ShapeError
from natgrad.linalg.operator import Inverse, LinearOperator, SolveReport, check_damping, merge_reports

if TYPE_CHECKING:
    from natgrad.linalg.solvers import Solver


def constant_of(operator: LinearOperator) -> float | Tensor | None:
    """c where ``operator`` is c times the identity, else None."""
    from natgrad.linalg.basic import IdentityMatrix

    if isinstance(operator, IdentityMatrix):
        return 1.0
    if isinstance(operator, ScaledOperator) and isinstance(operator.operator, IdentityMatrix):
        return operator.scale
    return None


def add(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    """a + b, merged with a term of a sum where that gives something simpler."""
    if a.shape != b.shape:
        raise ShapeError(f"A + B: A has shape {a.shape}, but B has shape {b.shape}.")
    terms = list(a.terms) if isinstance(a, SumOperator) else [a]
    for new in b.terms if isinstance(b, SumOperator) else (b,):
        for index, term in enumerate(terms):
            merged = term._plus(new) or new._plus(term)
            if merged is not None:
                terms[index] = merged
                break
        else:
            terms.append(new)
    return terms[0] if len(terms) == 1 else SumOperator(*terms)


def multiply(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    """a @ b."""
    from natgrad.linalg.basic import IdentityMatrix

    if a.shape[1] != b.shape[0]:
        raise ShapeError(f"A @ B: A has shape {a.shape}, but B has shape {b.shape}.")
    if isinstance(b, IdentityMatrix) and a.dtype == b.dtype:
        return a
    return a._times(b) or ProductOperator(a, b)


class SumOperator(LinearOperator):
    """The sum of two or more operators of one shape."""

    def __init__(self, *terms: LinearOperator) -> None:
        if not terms:
            raise ArgumentError("SumOperator needs at least one term.")
        if any(term.shape != terms[0].shape for term in terms):
            raise ShapeError(f"The terms of a sum must agree in shape, but have {[term.shape for term in terms]}.")
        dtype = terms[0].dtype
        for term in terms[1:]:
            dtype = torch.promote_types(dtype, term.dtype)
        super().__init__(terms[0].shape, dtype, terms[0].device, symmetric=all(term.symmetric for term in terms))
        self.terms = terms

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        result = self.terms[0].matvec(v)
        for term in self.terms[1:]:
            result = result + term.matvec(v)
        return result

    def rmatvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[0], "rmatvec")
        result = self.terms[0].rmatvec(v)
        for term in self.terms[1:]:
            result = result + term.rmatvec(v)
        return result

    def to_dense(self) -> Tensor:
        return sum((term.to_dense() for term in self.terms[1:]), start=self.terms[0].to_dense())

    def diagonal(self) -> Tensor:
        return sum((term.diagonal() for term in self.terms[1:]), start=self.terms[0].diagonal())

    def trace(self) -> Tensor:
        return sum((term.trace() for term in self.terms[1:]), start=self.terms[0].trace())

    def _transposed(self) -> LinearOperator:
        return SumOperator(*(term.T for term in self.terms))

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        return SumOperator(*(scale * term for term in self.terms))

    def _split_shift(self) -> tuple[LinearOperator, float | Tensor] | None:
        """``(A, c)`` where the sum is A + c I with c >= 0: then c is only more damping."""
        if len(self.terms) != 2:
            return None
        for a, b in (self.terms, self.terms[::-1]):
            constant = constant_of(b)
            if constant is not None and float(constant) >= 0.0:
                return a, constant
        return None

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        split = self._split_shift()
        return None if split is None else split[0].inverse(damping=damping + split[1], solver=solver)

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        split = self._split_shift()
        if split is None:
            return super().logdet(damping=damping, solver=solver)
        return split[0].logdet(damping=check_damping(damping) + split[1], solver=solver)

    def default_solver(self) -> Solver:
        return _composed_solver(self, self.terms)


class ScaledOperator(LinearOperator):
    """``scale`` times an operator; ``scale`` is a number or a 0-d tensor."""

    def __init__(self, operator: LinearOperator, scale: float | Tensor) -> None:
        super().__init__(operator.shape, operator.dtype, operator.device, symmetric=operator.symmetric)
        self.operator = operator
        self.scale = scale

    def matvec(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v) * self.scale

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.rmatvec(v) * self.scale

    def to_dense(self) -> Tensor:
        return self.operator.to_dense() * self.scale

    def diagonal(self) -> Tensor:
        return self.operator.diagonal() * self.scale

    def trace(self) -> Tensor:
        return self.operator.trace() * self.scale

    def quad(self, v: Tensor) -> Tensor:
        return self.operator.quad(v) * self.scale

    def gram(self) -> Tensor:
        return self.operator.gram() * (self.scale * self.scale)

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        """(cA + λI)⁻¹ = (A + λ/c I)⁻¹ / c for c > 0."""
        if float(self.scale) <= 0.0:
            return None
        inner = self.operator.inverse(damping=damping / self.scale, solver=solver)
        return Inverse(inner.operator * (1.0 / self.scale), inner.report)

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        scale = float(self.scale)
        if scale <= 0.0:
            return super().logdet(damping=damping, solver=solver)
        inner = self.operator.logdet(damping=check_damping(damping) / self.scale, solver=solver)
        return inner + self._require_square("logdet") * torch.log(torch.as_tensor(self.scale, dtype=inner.dtype))

    def _transposed(self) -> LinearOperator:
        return self.operator.T * self.scale

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        return self.operator * (self.scale * scale)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        mine, theirs = constant_of(self), constant_of(other)
        if mine is None or theirs is None:
            return None
        return self.operator * (mine + theirs)

    def _times(self, other: LinearOperator) -> LinearOperator | None:
        return multiply(self.operator, other) * self.scale

    def default_solver(self) -> Solver:
        return self.operator.default_solver()


class ProductOperator(LinearOperator):
    """The product of operators, the last one acting first. ``symmetric=True`` is the caller's promise."""

    def __init__(self, *factors: LinearOperator, symmetric: bool = False) -> None:
        if not factors:
            raise ArgumentError("ProductOperator needs at least one factor.")
        flat: list[LinearOperator] = []
        for factor in factors:
            flat.extend(factor.factors if isinstance(factor, ProductOperator) else [factor])
        for left, right in pairwise(flat):
            if left.shape[1] != right.shape[0]:
                raise ShapeError(f"A @ B: A has shape {left.shape}, but B has shape {right.shape}.")
        dtype = flat[0].dtype
        for factor in flat[1:]:
            dtype = torch.promote_types(dtype, factor.dtype)
        super().__init__((flat[0].shape[0], flat[-1].shape[1]), dtype, flat[0].device, symmetric=symmetric)
        self.factors = tuple(flat)

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        for factor in reversed(self.factors):
            v = factor.matvec(v)
        return v

    def rmatvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[0], "rmatvec")
        for factor in self.factors:
            v = factor.rmatvec(v)
        return v

    def _transposed(self) -> LinearOperator:
        return ProductOperator(*(factor.T for factor in reversed(self.factors)))

    def _structured_inverse(self, damping: float | Tensor, solver: Solver | None) -> Inverse | None:
        """Without damping, the inverses of the factors in reverse order."""
        if float(damping) != 0.0 or any(factor.shape[0] != factor.shape[1] for factor in self.factors):
            return None
        inverses = [factor.inverse(solver=solver) for factor in reversed(self.factors)]
        report = merge_reports({str(index): inverse.report for index, inverse in enumerate(inverses)})
        return Inverse(ProductOperator(*inverses, symmetric=self.symmetric), report)

    def default_solver(self) -> Solver:
        return _composed_solver(self, self.factors)


class TransposedOperator(LinearOperator):
    """The transpose of an operator."""

    def __init__(self, operator: LinearOperator) -> None:
        m, n = operator.shape
        super().__init__((n, m), operator.dtype, operator.device, symmetric=operator.symmetric)
        self.operator = operator

    def matvec(self, v: Tensor) -> Tensor:
        return self.operator.rmatvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v)

    def to_dense(self) -> Tensor:
        return self.operator.to_dense().mT

    def diagonal(self) -> Tensor:
        return self.operator.diagonal()

    def trace(self) -> Tensor:
        return self.operator.trace()

    def _transposed(self) -> LinearOperator:
        return self.operator

    def default_solver(self) -> Solver:
        return self.operator.default_solver()


class BlockDiagonalMatrix(LinearOperator):
    """Named blocks along the diagonal, acting on the concatenation of the blocks' vectors in the order given.

    Inverse, trace, diagonal and log-determinant are taken block by block; ``damping`` may be one value or a mapping
    from block name to value.
    """

    def __init__(self, blocks: Mapping[str, LinearOperator]) -> None:
        if not blocks:
            raise ArgumentError("BlockDiagonalMatrix needs at least one block, but the mapping is empty.")
        values = list(blocks.values())
        dtype = values[0].dtype
        for block in values[1:]:
            dtype = torch.promote_types(dtype, block.dtype)
        rows, columns = [b.shape[0] for b in values], [b.shape[1] for b in values]
        symmetric = all(block.symmetric for block in values)
        super().__init__((sum(rows), sum(columns)), dtype, values[0].device, symmetric=symmetric)
        self.blocks: dict[str, LinearOperator] = dict(blocks)
        self._rows, self._columns = rows, columns

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """Views of ``v [*batch, n]``, one per block, ``[*batch, n_block]``."""
        if v.ndim == 0 or v.shape[-1] != self.shape[1]:
            raise ShapeError(f"split needs vectors of length {self.shape[1]} on the last axis, got {tuple(v.shape)}.")
        return dict(zip(self.blocks, v.split(self._columns, dim=-1), strict=True))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of ``split``: one vector ``[*batch, n]`` out of one per block."""
        if parts.keys() != self.blocks.keys():
            raise ArgumentError(_names_message("join", parts, self.blocks))
        return torch.cat([parts[name] for name in self.blocks], dim=-1)

    def matvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[1], "matvec")
        parts = zip(self.blocks.values(), v.split(self._columns, dim=-1), strict=True)
        return torch.cat([block.matvec(part) for block, part in parts], dim=-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        v = self._vector(v, self.shape[0], "rmatvec")
        parts = zip(self.blocks.values(), v.split(self._rows, dim=-1), strict=True)
        return torch.cat([block.rmatvec(part) for block, part in parts], dim=-1)

    def to_dense(self) -> Tensor:
        return torch.block_diag(*(block.to_dense().to(self.dtype) for block in self.blocks.values()))

    def diagonal(self) -> Tensor:
        self._require_square("diagonal")
        return torch.cat([block.diagonal() for block in self.blocks.values()])

    def trace(self) -> Tensor:
        traces = [block.trace() for block in self.blocks.values()]
        return sum(traces[1:], start=traces[0])

    def quad(self, v: Tensor) -> Tensor:
        parts = self.split(self._vector(v, self.shape[1], "quad"))
        quads = [block.quad(parts[name]) for name, block in self.blocks.items()]
        return sum(quads[1:], start=quads[0])

    def gram(self) -> Tensor:
        return torch.block_diag(*(block.gram() for block in self.blocks.values()))

    def _dampings(self, damping: Any) -> dict[str, float | Tensor]:
        if not isinstance(damping, Mapping):
            return dict.fromkeys(self.blocks, check_damping(damping))
        if damping.keys() != self.blocks.keys():
            raise ArgumentError(_names_message("damping", damping, self.blocks))
        return {name: check_damping(damping[name]) for name in self.blocks}

    def inverse(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Inverse:
        """(A + λI)⁻¹ block by block; ``damping`` is one value or a mapping from block name to value.

        The result's ``operator`` is a BlockDiagonalMatrix of the inverses of the blocks.
        """
        values = self._dampings(damping)
        inverses = {name: b.inverse(damping=values[name], solver=solver) for name, b in self.blocks.items()}
        return Inverse(_InverseBlocks(inverses), SolveReport("blocks"))

    def solve(self, b: Tensor, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        return self.inverse(damping=damping, solver=solver) @ b

    def logdet(self, *, damping: Any = 0.0, solver: Solver | None = None) -> Tensor:
        values = self._dampings(damping)
        parts = [block.logdet(damping=values[name], solver=solver) for name, block in self.blocks.items()]
        return sum(parts[1:], start=parts[0])

    def _matches(self, other: LinearOperator) -> bool:
        if not isinstance(other, BlockDiagonalMatrix) or list(self.blocks) != list(other.blocks):
            return False
        return all(self.blocks[name].shape == other.blocks[name].shape for name in self.blocks)

    def _plus(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, BlockDiagonalMatrix) and self._matches(other):
            return BlockDiagonalMatrix({name: block + other.blocks[name] for name, block in self.blocks.items()})
        return None

    def _scaled(self, scale: float | Tensor) -> LinearOperator | None:
        return BlockDiagonalMatrix({name: block * scale for name, block in self.blocks.items()})

    def _transposed(self) -> LinearOperator:
        return BlockDiagonalMatrix({name: block.T for name, block in self.blocks.items()})


class _InverseBlocks(BlockDiagonalMatrix):
    """The inverses of blocks; ``latest`` is put together when asked for, so that iterative blocks are up to date."""

    @property
    def latest(self) -> SolveReport:
        return merge_reports({name: block.report for name, block in self.blocks.items() if isinstance(block, Inverse)})


def _composed_solver(operator: LinearOperator, parts: tuple[LinearOperator, ...]) -> Solver:
    """Conjugate gradients where a part is known only by its action, else the usual default."""
    from natgrad.linalg.solvers import CG

    if operator.symmetric and any(isinstance(part.default_solver(), CG) for part in parts if part.symmetric):
        return CG()
    return LinearOperator.default_solver(operator)


def _names_message(what: str, given: Mapping[str, Any], blocks: Mapping[str, LinearOperator]) -> str:
    missing = [name for name in blocks if name not in given]
    unknown = [name for name in given if name not in blocks]
    return (
        f"{what} needs exactly one entry per block; missing: {missing}, unknown: {unknown}. "
        f"The blocks are {list(blocks)}."
    )
