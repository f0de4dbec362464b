"""Bytes that a step holds beyond its state, the gradients and what autograd holds: the largest of its phases.

Numbers of copies are those that were counted in measurements (``benchmarks/plan.py``), where they do not follow from
what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from natgrad.metric import Dense, Diagonal, EigenKronecker, Kronecker, Sampling, Structure, SubBatch
from natgrad.planning.layers import Layer, Passes
from natgrad.planning.shapes import BlockShapes

_CHUNK = 64 * 2**20
_KEPT = 256 * 2**20
_FLOAT32 = 4
# Vectors of the parameters' size that a step holds at once: momentum, direction, its product with the metric, the step;
# and with a fit the direction and the step before, scaled and as tangents.
_VECTORS, _FITTED_VECTORS = 5, 8
# Copies of the widest activation in a fit: input and output of an operation, two tangents of each, and temporaries.
_TANGENTS = 10


def transient_moments(
    passes: Passes, shapes: Sequence[BlockShapes], structure: Structure, size: int, *, fitted: bool
) -> int:
    """The largest of: rows of all layers beside the moments of the batch; the moments beside new inverses; the moments
    beside the vectors of a step, and the tangents of its fit."""
    item = shapes[0].dtype.itemsize
    moments = sum(s.entries for s in shapes) * item
    largest = max(s.entries for s in shapes) * item
    inverses = sum(s.inverse_bytes + sum(shape.numel() for shape in s.bases) * item for s in shapes)
    step = _FITTED_VECTORS * size * item + _TANGENTS * _widest(passes) if fitted else _VECTORS * size * item
    seen = _seen(passes, structure, item)
    if isinstance(structure, Dense):
        seen += passes.layers[0].examples * size * item * 2
    return int(max(seen + moments, moments + inverses + 2 * largest + size * item, moments + step))


def _seen(passes: Passes, structure: Structure, item: int) -> float:
    """Rows of all layers, predictions and their sampled scores, and the matrices of some examples and their squares."""
    sampling = structure.sampling if isinstance(structure, Kronecker) else Sampling()
    scores = passes.outputs * item * 2
    inputs = 0 if isinstance(structure, Diagonal) else sum(_copied(layer) for layer in passes.layers) * item
    held = scores + sum(_scores(layer) for layer in passes.layers) * item + inputs
    if isinstance(structure, (Diagonal, EigenKronecker)):
        matrices = [layer.examples * layer.geometry.cell.size for layer in passes.layers if layer.positions > 1]
        held += 2 * min(_CHUNK, max(matrices, default=0) * item) * sampling.fraction
    if isinstance(sampling, SubBatch) and sampling.fraction < 1:  # with a graph of its own
        return sampling.fraction * (held + _FLOAT32 * 2 * _activations(passes))
    return held


def _copied(layer: Layer) -> int:
    """Numbers of a layer's inputs that are copied: with their one for the bias, or as patches."""
    g = layer.geometry
    if not g.groups or g.embedding or (len(g.cell.parameters) == 1 and len(g.cell.shapes[0]) == 2):
        return 0
    return layer.rows * g.groups * g.inputs


def _scores(layer: Layer) -> int:
    """Numbers in the gradients of a layer's outputs."""
    g = layer.geometry
    return layer.rows * g.groups * g.outputs if g.groups else layer.examples * g.inputs


def _activations(passes: Passes) -> int:
    return sum(layer.rows * max(1, layer.geometry.outputs * layer.geometry.groups) for layer in passes.layers)


def _widest(passes: Passes) -> int:
    """Bytes of the widest activation."""
    return _FLOAT32 * max(
        layer.rows * max(1, layer.geometry.outputs * layer.geometry.groups) for layer in passes.layers
    )


def transient_gram(passes: Passes, size: int, *, fitted: bool) -> int:
    """The larger of: rows, with those of layers that share weights over positions formed, and Gram matrices; a fit."""
    n, formed, tables = passes.layers[0].examples, 0, 0
    for layer in passes.layers:
        rows = n * layer.geometry.cell.size * _FLOAT32
        if layer.geometry.embedding:
            tables = max(tables, 4 * _FLOAT32 * layer.rows**2)
        else:
            formed += rows if layer.positions > 1 and rows <= _KEPT else 0
    rows = _FLOAT32 * sum(_copied(layer) + _scores(layer) for layer in passes.layers)
    solve = rows + formed + tables + 3 * _FLOAT32 * n * n + 4 * _FLOAT32 * size
    fit = _FITTED_VECTORS * size * _FLOAT32 + _TANGENTS * _widest(passes)
    return int(max(solve, fit) if fitted else solve)


def transient_products(passes: Passes, size: int) -> int:
    """A second graph of the pass, and the vectors of conjugate gradients."""
    return int(_FLOAT32 * (3 * _activations(passes) + 8 * size))
