r"""Slow, obvious curvature in float64: what the fast code is compared with.

Nothing here uses natgrad's likelihoods, networks, metrics or linear algebra: Jacobians come from `torch.func`, output
distributions are the formulas of `families`, layer inputs and gradients are recorded by plain hooks on a copy of the
model. Every matrix is dense, every sum is written as a sum.

Notation: `f` has shape [N, *positions, C]; `J` = ∂f/∂θ has shape [N, *positions, C, P]; θ is the concatenation of the
trainable parameters in `model.parameters()` order. A *column* is a cotangent of one row's output. Columns are collected
in `U` of shape [R, N, *positions, C], and every Fisher matrix is

    F = (1/M) Σ_r Σ_n (J_nᵀ U_rn)(J_nᵀ U_rn)ᵀ,      M = number of predictions (or the sum of their weights).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from natgrad.testing.families import Family

Select = Callable[[Any], Tensor]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, each shared one once, in `model.parameters()` order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flatten(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """One flat vector [P] from tensors in order."""
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return torch.cat([t.detach().reshape(-1) for t in values])


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """∂loss/∂θ as a flat vector [P]; zero where a parameter does not take part. The graph is kept."""
    parameters = list(trainable(model).values())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return flatten([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])


def parameter_slices(model: nn.Module) -> dict[str, slice]:
    """Where each trainable parameter lies in the flat vector."""
    slices, start = {}, 0
    for name, p in trainable(model).items():
        slices[name] = slice(start, start + p.numel())
        start += p.numel()
    return slices


def _call(model: nn.Module, state: Mapping[str, Tensor], x: Any) -> Any:
    if isinstance(x, Mapping):
        return functional_call(model, dict(state), (), dict(x))
    return functional_call(model, dict(state), tuple(x) if isinstance(x, tuple) else (x,))


def network_function(
    model: nn.Module, x: Any, select: Select | None = None
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The map θ [P] -> f [N, *positions, C] and the present θ. Buffers are copied, so the model is left as it is."""
    parameters = trainable(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def function(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in parameters.values()])
        state = {name: piece.view(p.shape) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        output = _call(model, {**state, **{name: b.clone() for name, b in buffers.items()}}, x)
        return output if select is None else select(output)

    return function, flatten(parameters)


def network_output(model: nn.Module, x: Any, select: Select | None = None) -> Tensor:
    """f [N, *positions, C] without a graph."""
    function, theta = network_function(model, x, select)
    with torch.no_grad():
        return function(theta)


def jacobian(model: nn.Module, x: Any, select: Select | None = None) -> Tensor:
    """∂f/∂θ, shape [N, *positions, C, P], by reverse mode through a functional call."""
    function, theta = network_function(model, x, select)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no batching rule
        return jacrev(function)(theta).detach()


def nll_hessian(
    model: nn.Module, family: Family, x: Any, y: Tensor, weights: Tensor | None = None, select: Select | None = None
) -> Tensor:
    """Hessian [P, P] of the (weighted) mean negative log-likelihood, by backward passes through a backward pass.

    Nested `torch.func` transforms are no oracle here: on torch 2.13 they differentiate LayerNorm and BatchNorm twice
    as if mean and variance were constants (12 % off on a small net, against finite differences)."""
    function, theta = network_function(model, x, select)
    theta = theta.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        nll = family.nll(function(theta), y)
        loss = nll.mean() if weights is None else (weights * nll).sum() / weights.sum()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        return torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient])


def exact_columns(fisher: Tensor, weights: Tensor | None = None) -> Tensor:
    """All columns of a square root of Λ [N, *positions, C, C], each position in columns of its own:
    shape [T·C, N, *positions, C]. `weights` [N, *positions] multiplies Λ."""
    n, positions, outputs = fisher.shape[0], fisher.shape[1:-2], fisher.shape[-1]
    if weights is not None:
        fisher = weights[..., None, None] * fisher
    values, vectors = torch.linalg.eigh(fisher)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    root = root.reshape(n, -1, outputs, outputs)
    columns = []
    for t in range(root.shape[1]):
        for k in range(outputs):
            column = torch.zeros(n, root.shape[1], outputs, dtype=fisher.dtype)
            column[:, t] = root[:, t, :, k]
            columns.append(column.reshape(n, *positions, outputs))
    return torch.stack(columns)


def score_columns(scores: Tensor, weights: Tensor | None = None) -> Tensor:
    """Columns from S score fields [S, N, *positions, C] (sampled labels, or the data's with S = 1), averaged over S.
    A row's score is summed over its positions. `weights` w [N, *positions] enter as √w, so that a row of weight two
    counts as two copies of it."""
    if weights is not None:
        scores = scores * weights.sqrt().unsqueeze(-1)
    return scores / math.sqrt(len(scores))


def signed_columns(columns: Tensor) -> Tensor:
    """Every one of the 2^R sign combinations of `columns` [R, N, ...], scaled so that together they are the expectation
    of the random-sign estimate over signs (shared by the rows, whose cross terms never enter)."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(columns))), dtype=columns.dtype)
    return torch.einsum("er,rn...->en...", signs, columns) / math.sqrt(len(signs))


def total_weight(columns: Tensor, weights: Tensor | None = None) -> float:
    """M: the number of predictions, or the sum of their weights."""
    return float(math.prod(columns.shape[1:-1]) if weights is None else weights.sum())


def unit_gradients(J: Tensor, columns: Tensor) -> Tensor:
    """J_nᵀ U_rn for every column and row: [R, N, P]."""
    rows = J.reshape(J.shape[0], -1, J.shape[-1])
    return torch.einsum("nip,rni->rnp", rows, columns.reshape(*columns.shape[:2], -1))


def dense_fisher(J: Tensor, columns: Tensor, total: float) -> Tensor:
    """F [P, P] from columns."""
    g = unit_gradients(J, columns).reshape(-1, J.shape[-1])
    return g.T @ g / total


def exact_fisher(J: Tensor, fisher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ_b w_b J_bᵀ Λ_b J_b / Σ w, prediction by prediction, without any square root."""
    outputs, size = J.shape[-2:]
    w = torch.ones(J.shape[:-2], dtype=J.dtype) if weights is None else weights
    result = torch.zeros(size, size, dtype=J.dtype)
    for jac, lam, weight in zip(
        J.reshape(-1, outputs, size), fisher.reshape(-1, outputs, outputs), w.reshape(-1), strict=True
    ):
        result += weight * jac.T @ lam @ jac
    return result / w.sum()


def restrict(matrix: Tensor, groups: Sequence[Sequence[slice]]) -> Tensor:
    """Keep only the entries inside the given groups of slices: a block-diagonal copy."""
    kept = torch.zeros_like(matrix)
    for group in groups:
        index = torch.cat([torch.arange(s.start, s.stop) for s in group])
        kept[index[:, None], index] = matrix[index[:, None], index]
    return kept


def module_groups(model: nn.Module) -> dict[str, list[str]]:
    """Trainable parameter names by the module that directly owns them; a shared one belongs to its first owner."""
    groups: dict[str, list[str]] = {}
    for name in trainable(model):
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return groups


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """(A + λI)⁻¹ by a dense solve."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(matrix + damping * identity, identity)


@dataclass(frozen=True)
class LayerRecord:
    """What one use of a layer saw. inputs [N, S, d] (patches, group by group along d, for convolutions);
    outputs: D [N, *positions, C, S, out] = ∂f_n/∂z_n, the row's own output pre-activation gradients."""

    inputs: Tensor
    jacobian: Tensor


def patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Convolution windows [N, S, C_in·kernel], channel-major as the weight, by slicing an explicitly padded input."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in totals]
    elif layer.padding == "valid":
        sides = [(0, 0) for _ in kernel]
    else:
        sides = [(int(p), int(p)) for p in layer.padding]
    flat_sides = [s for side in reversed(sides) for s in side]
    x = nn.functional.pad(x, flat_sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    windows = []
    for offset in itertools.product(*[range(k) for k in kernel]):
        index = tuple(
            slice(o * d, o * d + (size - 1) * s + 1, s)
            for o, d, s, size in zip(offset, dilation, stride, sizes, strict=True)
        )
        windows.append(x[(slice(None), slice(None), *index)].flatten(2))  # [N, C_in, S]
    return torch.stack(windows, 2).flatten(1, 2).transpose(1, 2)  # [N, C_in·kernel, S] -> [N, S, C_in·kernel]


def record_layers(
    model: nn.Module, x: Any, names: Sequence[str], select: Select | None = None
) -> dict[str, list[LayerRecord]]:
    """Run a copy of `model` once and record, for each use of each named Linear or Conv module, its inputs and ∂f/∂z.

    A zero probe is added to each layer's output, so that later in-place activations do not matter.
    Rows must be independent of each other (no batch statistics)."""
    model = copy.deepcopy(model)
    uses: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            uses[name].append((args[0].detach().clone(), probe))
            return output + probe

        return record

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    f = model(**x) if isinstance(x, Mapping) else model(*(x if isinstance(x, tuple) else (x,)))
    f = f if select is None else select(f)
    flat = [(name, probe) for name, seen in uses.items() for _, probe in seen]
    grads = [torch.autograd.grad(v, [p for _, p in flat], retain_graph=True, allow_unused=True) for v in f.reshape(-1)]
    n = f.shape[0]
    records: dict[str, list[LayerRecord]] = {name: [] for name in names}
    for i, (name, probe) in enumerate(flat):
        layer = model.get_submodule(name)
        full = torch.stack([torch.zeros_like(probe) if g[i] is None else g[i] for g in grads])
        # [N, outputs of the row, N, positions of the row where tokens were flattened into the first axis, ...]
        full = full.reshape(n, -1, n, probe.shape[0] // n, *probe.shape[1:])
        own = torch.stack([full[row, :, row] for row in range(n)])
        inputs = uses[name][len(records[name])][0]
        if isinstance(layer, nn.Linear):
            own = own.reshape(n, own.shape[1], -1, layer.out_features)
            inputs = inputs.reshape(n, -1, layer.in_features)
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            own = own.squeeze(2).flatten(3).transpose(2, 3)
            inputs = patches(layer, inputs)
        records[name].append(LayerRecord(inputs, own.reshape(*f.shape, *own.shape[2:])))
    return records


def join_uses(records: Sequence[LayerRecord]) -> LayerRecord:
    """Several uses of one weight as one use with more shared positions."""
    return LayerRecord(torch.cat([r.inputs for r in records], 1), torch.cat([r.jacobian for r in records], -2))


def homogeneous(inputs: Tensor, bias: bool) -> Tensor:
    """[a; 1] along the last axis where the layer has a trainable bias."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1) if bias else inputs


def output_gradients(record: LayerRecord, columns: Tensor) -> Tensor:
    """g_rns = ∂(U_rn · f_n)/∂z_ns: [R, N, S, out]."""
    n = record.inputs.shape[0]
    d = record.jacobian.reshape(n, -1, *record.jacobian.shape[-2:])
    return torch.einsum("rni,niso->rnso", columns.reshape(*columns.shape[:2], -1), d)


def kronecker_factors(
    record: LayerRecord, columns: Tensor, total: float, *, bias: bool, reduce: bool = False
) -> tuple[Tensor, Tensor]:
    """(A, G) of K-FAC for one layer without groups (Eschenhagen et al. 2023, eqs. 20 and 22).

    expand: A = (1/NS) Σ_ns a aᵀ, G = (1/M) Σ_rns g gᵀ.
    reduce: A = (1/N) Σ_n ā āᵀ with ā the mean over positions, G = (1/M) Σ_rn ĝ ĝᵀ with ĝ the sum over positions."""
    a = homogeneous(record.inputs, bias)
    g = output_gradients(record, columns)
    if reduce:
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    return a.T @ a / len(a), g.T @ g / total


def layer_gradients(record: LayerRecord, columns: Tensor, *, bias: bool) -> Tensor:
    """The unit gradients of [W|b]: Σ_s g_s a_sᵀ, shape [R, N, out, in (+1)]."""
    return torch.einsum("rnso,nsi->rnoi", output_gradients(record, columns), homogeneous(record.inputs, bias))


def layer_block(record: LayerRecord, columns: Tensor, total: float, *, bias: bool) -> Tensor:
    """The exact block of the layer in row-major vec of [W|b]."""
    g = layer_gradients(record, columns, bias=bias).flatten(2).flatten(0, 1)
    return g.T @ g / total


def eigen_corrected(A: Tensor, G: Tensor, gradients: Tensor, total: float) -> Tensor:
    """EKFAC (George et al. 2018): (U_G ⊗ U_A) diag(s) (U_G ⊗ U_A)ᵀ with s the second moments of the unit gradients
    [R, N, out, in] in the eigenbasis of the two factors; row-major vec of [W|b]."""
    U_A, U_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
    rotated = torch.einsum("oj,rnoi,ik->rnjk", U_G, gradients, U_A)
    s = rotated.square().sum((0, 1)) / total
    basis = torch.kron(U_G, U_A)
    return basis @ torch.diag(s.reshape(-1)) @ basis.T


def homogeneous_order(out_features: int, in_features: int, bias: bool) -> Tensor:
    """Index p with flat[p] = row-major vec of [W|b], where flat = concatenation of W and b."""
    weight = torch.arange(out_features * in_features).reshape(out_features, in_features)
    if not bias:
        return weight.reshape(-1)
    last = torch.arange(out_features).unsqueeze(1) + out_features * in_features
    return torch.cat([weight, last], 1).reshape(-1)


def to_parameter_order(block: Tensor, out_features: int, in_features: int, bias: bool) -> Tensor:
    """A block in row-major vec of [W|b], reordered to the concatenation of W and b."""
    order = homogeneous_order(out_features, in_features, bias)
    result = torch.empty_like(block)
    result[order[:, None], order] = block
    return result
