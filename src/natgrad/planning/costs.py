"""What every structure costs: operations of statistics, refresh, application and search, and bytes held meanwhile.

For a layer with N rows (examples times positions), inputs n (bias included) and outputs m, in operations::

    forward, input gradient, weight gradient      2Nmn each
    K-FAC       statistics 2N(n² + m²)            refresh n³ + m³          application 2mn(m + n)
    EKFAC       and 2N(n² + m²) + 2Nmn            eigh of both, rotations  application 4mn(m + n)
    diagonal    2Nmn                              1/x                      mn
    block       2N(mn)²  for N examples           (mn)³                    2(mn)²
    Gram        2N²(n + m), with positions 2Nmn + 2N²mn for N examples; then N³
    products    one is two forward and two backward passes' worth of 2Nmn for each of k iterations

Sampled labels add a backward pass to the layers' outputs. Wide symmetric products are computed to 5/8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from natgrad.metric import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Gram,
    Kronecker,
    MatrixFree,
    Sampling,
    Structure,
    SubBatch,
)
from natgrad.metric.widths import Side
from natgrad.planning.layers import Layer, Passes
from natgrad.planning.shapes import BlockShapes
from natgrad.planning.transient import transient_gram, transient_moments, transient_products
from natgrad.planning.work import Work, eigh, gemm, gram, inverse, memory, repeated

# Passes over a moment until it is in its average: mean, check that it is finite, selection, weighted sum.
_AVERAGING = 9
# Passes over the parameters of every step: packing, unpacking, inner products, the update itself.
_STEPPING = 14
_SIDES: tuple[tuple[Side, Side], ...] = (("input", "output"), ("output", "input"))


@dataclass(frozen=True)
class Costs:
    """What a structure adds to a step.

    Args:
        statistics: whenever statistics are due.
        refresh: whenever inverses are due; one entry per block, since blocks may be renewed at different steps.
        each: at every step.
        transient: bytes held during a step beyond the state, the gradients and what autograd holds.
    """

    statistics: Work
    refresh: tuple[Work, ...]
    each: Work
    transient: int

    @property
    def all_refresh(self) -> Work:
        return tuple(o for part in self.refresh for o in part)


def layer_statistics(layer: Layer, structure: Structure) -> Work:
    """What a structure computes of one layer's inputs and output gradients."""
    g, rows = layer.geometry, layer.rows
    if not g.groups:
        return (memory(rows * g.inputs, 6),)
    if isinstance(structure, Diagonal):
        return _squares(layer)
    if isinstance(structure, (Gram, MatrixFree)):
        return ()
    if isinstance(structure, Dense):  # its rows; the product is the block's
        entries = memory(layer.examples * g.cell.size, 3)
        if layer.positions == 1 or g.embedding:
            return (entries,)
        return (gemm(g.outputs, layer.positions, g.inputs, count=layer.examples * g.groups), entries)
    assert isinstance(structure, Kronecker)
    used = layer.examples if structure.sharing == "reduce" else rows
    work = [*_moments(structure, used, g.outputs, g.groups), memory(rows * (g.outputs + g.inputs) * g.groups, 2)]
    if g.embedding:
        work.append(memory(g.inputs + rows, 2))
    else:
        work.extend(_moments(structure, used, g.inputs, g.groups))
    if isinstance(structure, EigenKronecker):
        work.extend(_projections(layer))
    return tuple(work)


def _moments(structure: Kronecker, rows: int, width: int, groups: int) -> Work:
    """One side's factor: of all pairs of its numbers, of those in a block, or of each with itself."""
    treatment = "full" if groups > 1 else structure.widths.treatment(width)
    if treatment == "full":
        return (gram(rows, width, count=groups),)
    if treatment != "blocks":
        return (memory(rows * width, 2),)
    b = structure.widths.block_width(width)
    rest = width % b
    return (gram(rows, b, count=width // b), *([gram(rows, rest)] if rest else ()))


def _squares(layer: Layer) -> Work:
    """``Σ_n r_n²``: a product of squares where an example is one row, else of every example's matrix."""
    g, examples = layer.geometry, layer.examples
    if g.embedding:
        return (memory(examples * g.cell.size, 3),)
    if layer.positions == 1:
        entries = layer.rows * (g.inputs + g.outputs) * g.groups
        return (gemm(g.outputs, layer.rows, g.inputs, count=g.groups), memory(entries, 2))
    return (
        gemm(g.outputs, layer.positions, g.inputs, count=examples * g.groups),
        memory(examples * g.cell.size, 4),
    )


def _projections(layer: Layer) -> Work:
    """Rows along the eigenbasis, and their squares."""
    g, rows = layer.geometry, layer.rows
    sides = [gemm(rows, g.outputs, g.outputs, count=g.groups)]
    if not g.embedding:
        sides.append(gemm(rows, g.inputs, g.inputs, count=g.groups))
    return (*sides, *_squares(layer))


def block_refresh(shapes: BlockShapes, structure: Structure) -> Work:
    """The new inverse of one block."""
    averages, size = shapes.averages, shapes.dtype.itemsize
    if "matrix" in averages:
        n = averages["matrix"][0]
        return (inverse(n, itemsize=size), memory(n * n, 4, itemsize=size))
    if "diagonal" in averages:
        return (memory(averages["diagonal"].numel(), 5, itemsize=size),)
    work = []
    for side, other in _SIDES:
        for count, n in shapes.squares(side):
            if isinstance(structure, EigenKronecker):
                work += [eigh(n, count=count, itemsize=size), gemm(n, n, n, count=count, itemsize=size)]
                work += [gemm(n, n, shapes.width(other), count=count, itemsize=size)]
            else:
                work += [inverse(n, count=count, itemsize=size)]
            work += [memory(n * n * count, 6, itemsize=size)]
        if shapes.diagonal(side):
            work += [memory(shapes.width(side), 5, itemsize=size)]
    return tuple(work)


def block_application(shapes: BlockShapes) -> Work:
    """One product of the inverse with a vector."""
    averages, size = shapes.averages, shapes.dtype.itemsize
    if "matrix" in averages:
        return (memory(averages["matrix"].numel(), 2, itemsize=size),)
    if "diagonal" in averages:
        return (memory(averages["diagonal"].numel(), 3, itemsize=size),)
    times = 2 if shapes.bases else 1
    work = [
        gemm(n, n, shapes.width(other), count=times * count, itemsize=size)
        for side, other in _SIDES
        for count, n in shapes.squares(side)
    ]
    entries = shapes.width("input") * shapes.width("output") * shapes.groups
    if not shapes.bases:  # what is kept folded is unfolded: read, written, and one half mirrored
        folded = [s for s in shapes.inverse if shapes.storage.shape(s) != s]
        work += [memory(s.numel(), 3, itemsize=size) for s in folded]
    return (*work, memory(entries, 3, itemsize=size))


def fit_of(passes: Passes) -> Work:
    """``QuadraticFit``: a forward pass with the tangents of two vectors, each two products a layer."""
    tangents = repeated(passes.forward, 2 * 2)
    return (*passes.forward, *tangents)


def costs_of(
    passes: Passes,
    shapes: Sequence[BlockShapes],
    structure: Structure,
    *,
    iterations: int = 20,
    fitted: bool = False,
) -> Costs:
    """Everything that ``structure`` adds to a step on these passes.

    Args:
        passes: forward and backward pass.
        shapes: what the structure keeps (of the same model).
        structure: what is estimated.
        iterations: products that conjugate gradients take (matrix-free).
        fitted: whether the search is ``QuadraticFit``; otherwise it takes one product with the metric.
    """
    size = sum(layer.geometry.cell.size for layer in passes.layers)
    stepping = (memory(size, _STEPPING),)
    search = fit_of(passes) if fitted else ()
    sampled = (*passes.sampled, memory(passes.outputs, 12))
    if isinstance(structure, MatrixFree):
        product = (*repeated(passes.forward, 2), *passes.backward, memory(size, 6))
        each = (*passes.forward, *passes.backward, *repeated(product, iterations), *stepping, *search)
        return Costs((), (), each, transient_products(passes, size))
    if isinstance(structure, Gram):
        return Costs(
            (), (), (*sampled, *_gram(passes), *stepping, *search), transient_gram(passes, size, fitted=fitted)
        )
    own = [o for layer in passes.layers for o in layer_statistics(layer, structure)]
    if isinstance(structure, Dense):
        sides = [s.averages["matrix"][0] for s in shapes]
        own += [gemm(n, passes.layers[0].examples, n) for n in sides]
    moments = sum(s.entries for s in shapes)
    sampling = structure.sampling if isinstance(structure, Kronecker) else Sampling()
    fraction = sampling.fraction
    if isinstance(sampling, SubBatch) and fraction < 1:  # the picked examples are run by themselves
        sampled = (*repeated(passes.forward, fraction), *repeated(sampled, fraction))
    statistics = (*sampled, *repeated(own, fraction), memory(moments, _AVERAGING))
    application = tuple(o for s in shapes for o in block_application(s))
    each = (*application, *stepping, *(search if fitted else application))
    refresh = tuple(block_refresh(s, structure) for s in shapes)
    return Costs(statistics, refresh, each, transient_moments(passes, shapes, structure, size, fitted=fitted))


def _gram(passes: Passes) -> Work:
    """The Gram matrix, its Cholesky factor, and two products with the rows."""
    work = []
    for layer in passes.layers:
        g, n = layer.geometry, layer.examples
        if not g.groups:
            work += [gram(g.inputs, n), memory(n * g.inputs, 6)]
        elif layer.positions == 1 and not g.embedding:
            work += [gram(g.inputs, n, count=g.groups), gram(g.outputs, n, count=g.groups)]
            work += [gemm(n, g.inputs, g.outputs, count=2 * g.groups)]
        elif g.embedding:
            work += [gemm(layer.rows, g.outputs, layer.rows), memory(layer.rows**2, 4)]
        else:
            work += [gemm(g.outputs, layer.positions, g.inputs, count=n * g.groups), gram(g.cell.size, n)]
            work += [memory(n * g.cell.size, 3)]
        work.append(memory(n * n, 3))
    n = passes.layers[0].examples
    return (*work, inverse(n))


__all__ = [
    "BlockDiagonal", "Costs", "block_application", "block_refresh", "costs_of", "fit_of", "layer_statistics",
]  # fmt: skip
