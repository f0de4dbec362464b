"""The categorical likelihood: softmax classification and token prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from natgrad.errors import ArgumentError, ShapeError
from natgrad.likelihood._math import promote, relative_entropy
from natgrad.likelihood.base import Likelihood, Target, only_labels


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""y ~ Categorical(softmax(f)), f logits of shape [*batch, C]; its nll is cross entropy.

    Targets: class indices, integer, shape [*batch]; or class probabilities ("soft targets"), floating point, shape
    [*batch, C], for which nll is −Σ_c t_c log p_c. Soft targets change nll and score only: Λ and samples are those of
    the model's own distribution.

    With p = softmax(f): score = p − e_y, Λ = diag(p) − ppᵀ, factor column k = √p_k (e_k − p). Logits may be −∞ (masked
    classes).
    """

    def distribution(self, f: Tensor) -> Distribution:
        return torch.distributions.Categorical(logits=promote(f), validate_args=False)

    def nll(self, f: Tensor, y: Target) -> Tensor:
        labels = _labels(self, f, y)
        log_p = torch.log_softmax(promote(f), dim=-1)
        if not labels.is_floating_point():
            try:
                return -log_p.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
            except (RuntimeError, IndexError):
                self.check_target(f, y)  # an index out of range has a better message there
                raise
        soft = labels.to(log_p.dtype)
        # 0 · log 0 = 0: a class the target excludes may be masked in the logits.
        return -torch.where(soft == 0, 0.0, soft * log_p).sum(-1)

    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        p = torch.softmax(promote(f.detach()), dim=-1)
        batch = f.shape[:-1]
        if p.numel() == 0:
            return torch.zeros((n, *batch), dtype=torch.int64, device=f.device)
        drawn = torch.multinomial(p.reshape(-1, f.shape[-1]), n, replacement=True, generator=generator)
        return drawn.movedim(-1, 0).reshape(n, *batch)

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        log_p, log_q = torch.log_softmax(promote(f), dim=-1), torch.log_softmax(promote(g), dim=-1)
        return relative_entropy(log_p, log_q).sum(-1)

    def score(self, f: Tensor, y: Target) -> Tensor:
        labels = _labels(self, f, y)
        p = torch.softmax(promote(f), dim=-1)
        if labels.is_floating_point():
            soft = labels.to(p.dtype)
            return p * soft.sum(-1, keepdim=True) - soft
        index = labels.long().unsqueeze(-1)
        return p.scatter_add(-1, index, p.new_full((), -1.0).expand(index.shape))

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        p = torch.softmax(promote(f), dim=-1)
        weighted = p * promote(u)
        return weighted - p * weighted.sum(-1, keepdim=True)

    def fisher_factor(self, f: Tensor) -> Tensor:
        # √p from log p: it stays positive where p itself underflows.
        log_p = torch.log_softmax(promote(f), dim=-1)
        root = (0.5 * log_p).exp()
        columns = torch.diag_embed(root) - root.unsqueeze(-1) * log_p.exp().unsqueeze(-2)
        return columns.movedim(-2, 0)

    def check_output(self, f: Tensor) -> None:
        super().check_output(f)
        if f.shape[-1] < 2:
            raise ShapeError(
                f"{self} needs at least two classes on the last axis of the output, but got shape {list(f.shape)}. "
                "A model with one logit per example has a natgrad.Bernoulli likelihood."
            )

    def check_gradient(self, g: Tensor) -> None:
        # Of a function of softmax(f) it sums to zero over the classes. A part of it nearly always tells already.
        if g.ndim < 3 or not _centred(g[:2, ..., :64], 1) or _centred(g, -1):
            return
        raise ShapeError(
            f"The gradient of the loss at an output of shape {list(g.shape)} sums to zero over axis 1, and not over "
            "the last axis, where Categorical looks for the classes: they seem to be on axis 1, where "
            "torch.nn.CrossEntropyLoss takes them. Say so before loss.backward(): opt.observe(output.movedim(1, -1))."
        )

    def check_target(self, f: Tensor, y: Target) -> None:
        labels = _labels(self, f, y)
        if labels.numel() == 0:
            return
        classes = f.shape[-1]
        low, high = labels.aminmax()
        if not labels.is_floating_point():
            if bool((low < 0) | (high >= classes)):
                raise ArgumentError(
                    f"Labels lie between {int(low)} and {int(high)}, but an output with {classes} classes (shape "
                    f"{list(f.shape)}) needs labels from 0 to {classes - 1}. If one label marks positions to be left "
                    "out, say so: natgrad.Weighted(natgrad.Categorical(), ignore_index=-100). Labels that start at 1 "
                    "have to be shifted."
                )
            return
        total = labels.double().sum(-1)
        error = (total - 1).abs().max()
        if bool((low < 0) | ~(error < 1e-2)):
            raise ArgumentError(
                f"Soft targets must be probabilities over the {classes} classes, but their smallest value is "
                f"{float(low):.3g} and their sum over the last axis is off one by up to {float(error):.3g}. Normalise "
                "them (softmax of teacher logits, target / target.sum(-1, keepdim=True)); for integer labels use "
                "dtype int64; to weight examples use natgrad.Weighted."
            )


def _centred(g: Tensor, axis: int) -> bool:
    """Whether sums over ``axis`` vanish to rounding; that of zeros says nothing and counts as no."""
    size = g.double().abs().sum(axis).max()
    tolerance = 2e-2 if g.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return bool((size > 0) & (g.double().sum(axis).abs().max() <= tolerance * size))


def _labels(likelihood: Categorical, f: Tensor, y: Target) -> Tensor:
    """The labels of `y` after the checks that cost nothing: dtype and shape."""
    labels = only_labels(y, likelihood)
    batch = f.shape[:-1]
    if labels.dtype == torch.bool or labels.is_complex():
        raise ArgumentError(
            f"Labels of dtype {labels.dtype} are neither class indices (integers) nor class probabilities (floats). "
            "Convert them, e.g. target.long(); for one yes/no decision per logit use natgrad.Bernoulli."
        )
    if labels.is_floating_point():
        if labels.shape == f.shape:
            return labels
        hint = "Class indices must be integers: target.long()." if labels.shape == batch else _where_classes(f)
        raise ShapeError(
            f"A floating-point target holds class probabilities and needs the output's shape {list(f.shape)}, but "
            f"got {list(labels.shape)}. {hint}"
        )
    if labels.shape != batch:
        if labels.shape == f.shape:
            hint = "One-hot labels have to be class indices, target.argmax(-1), or floats, target.float()."
        elif labels.shape == (*batch, 1):
            hint = "Drop the last axis: target.squeeze(-1)."
        else:
            hint = _where_classes(f)
        raise ShapeError(
            f"An output of shape {list(f.shape)} (classes on the last axis) needs class indices of shape "
            f"{list(batch)}, but got {list(labels.shape)}. {hint}"
        )
    return labels


def _where_classes(f: Tensor) -> str:
    if f.ndim < 3:
        return "Output and target must have the same number of examples."
    return (
        "If the classes are on axis 1, as torch.nn.CrossEntropyLoss takes them, move them last: output.movedim(1, -1)."
    )
