"""Weights, masks and label smoothing around another likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from natgrad.errors import ArgumentError, ShapeError, UnsupportedError
from natgrad.likelihood._math import promote
from natgrad.likelihood.base import Likelihood, Target
from natgrad.likelihood.categorical import Categorical
from natgrad.likelihood.distribution import FromDistribution


@dataclass(frozen=True, init=False, eq=False)
class Weighted(Likelihood):
    r"""The weighted loss Σ nll(f, y) / Σ weights(f, y) and its curvature, around another likelihood.

    weights: a function of the labels y to weights [*batch].
    ignore_index: predictions with this label have weight 0, and the label is never looked up.
    class_weights: one weight per class, applied to the true label; Categorical only.
    label_smoothing: ε of torch's cross_entropy; Categorical only.
    Sample weights or a mask come with the target, which is then a pair (y, w) with w of shape [*batch]; all weights
    multiply. Labels of weight zero may be anything, NaN or out of range.

    Convention. A weighted log-likelihood is not a likelihood; the curvature is the generalised Gauss–Newton matrix of
    the weighted mean loss, in which Λ of every prediction is that of the model's distribution times the weight of its
    TRUE label. With ℓ = `nll`, w = `weights`: Σℓ/Σw is `torch.nn.functional.cross_entropy(weight=, label_smoothing=,
    ignore_index=, reduction="mean")`, and Σ `curvature_weights` · JᵀΛJ / Σw is its GGN. The two kinds of weights
    differ only where class weights meet label smoothing, (1 − ε) w_y + ε mean(class_weights) against w_y, or soft
    targets t, Σ_c w_c t_c against 1 (torch divides by the number of predictions there).

    `nll` and `score` include the weights and the smoothing. `distribution`, `sample`, `kl`, `fisher_matvec` and
    `fisher_factor` do not: they are those of `unweighted`, and whoever sums them over predictions multiplies by
    the weights (a factor by their square root). Sampled labels are drawn from the model, never smoothed or
    ignored; score them with `unweighted.score` and the square root of the true label's weight.
    """

    likelihood: Likelihood
    function: Callable[[Tensor], Tensor] | None
    ignore_index: int | None
    class_weights: Tensor | None
    label_smoothing: float
    needs_target: bool

    def __init__(
        self,
        likelihood: Likelihood,
        *,
        weights: Callable[[Tensor], Tensor] | None = None,
        ignore_index: int | None = None,
        class_weights: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        if not isinstance(likelihood, Likelihood) or isinstance(likelihood, Weighted):
            raise ArgumentError(
                f"likelihood must be an unweighted natgrad likelihood, but got {likelihood!r}. Give all weights to one "
                "Weighted, e.g. Weighted(Categorical(), ignore_index=-100, class_weights=w)."
            )
        if weights is not None and not callable(weights):
            raise ArgumentError(
                f"weights must be a function from labels to weights [*batch], but got {type(weights).__name__}. "
                "Weights of single examples go with the target, as a pair (y, w); weights of classes are class_weights."
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ArgumentError(f"label_smoothing must be at least 0 and below 1, but got {label_smoothing}.")
        if (label_smoothing or class_weights is not None) and not isinstance(likelihood, Categorical):
            raise UnsupportedError(
                f"class_weights and label_smoothing are defined for Categorical, but the likelihood is {likelihood}. "
                "Use weights=, a function of the labels; smoothed binary targets can be given as numbers in (0, 1)."
            )
        if class_weights is not None:
            class_weights = torch.as_tensor(class_weights).detach()
            _check_weights("class_weights", class_weights)
        only_smooths = bool(label_smoothing) and weights is None and ignore_index is None and class_weights is None
        values = {
            "likelihood": likelihood,
            "function": weights,
            "ignore_index": ignore_index,
            "class_weights": class_weights,
            "label_smoothing": float(label_smoothing),
            "needs_target": not only_smooths,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def unweighted(self) -> Likelihood:
        return self.likelihood

    def distribution(self, f: Tensor) -> Distribution:
        return self.likelihood.distribution(f)

    def nll(self, f: Tensor, y: Target) -> Tensor:
        """Weighted, smoothed −log p(y | f), shape [*batch]; zero where the weight is zero."""
        target, weight = self._loss_target(f, y)
        value = self.likelihood.nll(f, target)
        return value if weight is None else torch.where(weight == 0, 0.0, weight * value)

    def score(self, f: Tensor, y: Target) -> Tensor:
        """The gradient of `nll`, weights and smoothing included, shape [*batch, C]."""
        target, weight = self._loss_target(f, y)
        value = self.likelihood.score(f, target)
        return value if weight is None else torch.where(weight.unsqueeze(-1) == 0, 0.0, weight.unsqueeze(-1) * value)

    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        return self.likelihood.sample(f, n, generator=generator)

    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        """KL(p_f ‖ p_g) without weights, shape [*batch]."""
        return self.likelihood.kl(f, g)

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        return self.likelihood.fisher_matvec(f, u)

    def fisher_factor(self, f: Tensor) -> Tensor:
        return self.likelihood.fisher_factor(f)

    def weights(self, f: Tensor, y: Target) -> Tensor | None:
        """w [*batch], the normaliser's weights; None where all are one."""
        labels, outer = self._split(f, y)
        table = self._table(f)
        if table is None or labels.is_floating_point():
            return outer
        return _times(table[labels.long()], outer)

    def curvature_weights(self, f: Tensor, y: Target) -> Tensor | None:
        """Factor of Λ in the GGN of the weighted loss, [*batch]: the sum of the weighted, smoothed target."""
        labels, outer = self._split(f, y)
        table = self._table(f)
        if table is None:
            return outer
        if labels.is_floating_point():
            own = (labels.to(table.dtype) * table).sum(-1)
        else:
            own = table[labels.long()]
        return _times((1 - self.label_smoothing) * own + self.label_smoothing * table.mean(), outer)

    def check_output(self, f: Tensor) -> None:
        self.likelihood.check_output(f)
        if self.class_weights is not None and self.class_weights.shape != f.shape[-1:]:
            raise ShapeError(
                f"class_weights has shape {list(self.class_weights.shape)}, but the output, of shape {list(f.shape)}, "
                f"has {f.shape[-1]} classes. Give one weight per class, in the order of the logits."
            )

    def check_gradient(self, g: Tensor) -> None:
        self.likelihood.check_gradient(g)

    def check_target(self, f: Tensor, y: Target) -> None:
        if isinstance(y, tuple) and len(y) == 2 and isinstance(y[1], Tensor):
            _check_sample_weights(f, y[1])
        labels, _ = self._split(f, y)
        self.likelihood.check_target(f, labels)
        weight = self.weights(f, y)
        if weight is not None:
            _check_weights("The weight of a prediction", weight)

    def _table(self, f: Tensor) -> Tensor | None:
        return None if self.class_weights is None else self.class_weights.to(f.device, promote(f).dtype)

    def _split(self, f: Tensor, y: Target) -> tuple[Tensor, Tensor | None]:
        """Labels that are safe to look up, and all weights but the class weights."""
        labels, weight = _unpack(y)
        if weight is not None:
            if weight.shape != f.shape[:-1]:
                _check_sample_weights(f, weight)
            weight = weight.to(promote(f).dtype)
        if self.ignore_index is not None:
            if labels.is_floating_point() or labels.shape != f.shape[:-1]:
                raise ArgumentError(
                    f"ignore_index={self.ignore_index} needs integer labels of shape {list(f.shape[:-1])}, but got "
                    f"{labels.dtype} of shape {list(labels.shape)}. For other targets give a mask with them: the "
                    "target (y, mask)."
                )
            keep = (labels != self.ignore_index).to(promote(f).dtype)
            weight = keep if weight is None else weight * keep
        if weight is not None:
            dropped = (weight == 0).reshape(weight.shape + (1,) * (labels.ndim - weight.ndim))
            labels = torch.where(dropped, self._stand_in(f, labels), labels)
        if self.function is not None:
            own = self.function(labels)
            if not isinstance(own, Tensor) or own.shape != f.shape[:-1]:
                raise ShapeError(
                    f"weights(y) must return one weight per prediction, shape {list(f.shape[:-1])}, but for labels of "
                    f"shape {list(labels.shape)} it returned "
                    f"{list(own.shape) if isinstance(own, Tensor) else type(own).__name__}."
                )
            weight = _times(own.to(promote(f).dtype), weight)
        return labels, weight

    def _stand_in(self, f: Tensor, labels: Tensor) -> Tensor | int:
        """Labels that can be used in place of dropped ones, whose loss and score have to be finite."""
        if isinstance(self.likelihood, FromDistribution):
            # 0 may lie outside the support
            drawn = self.likelihood.sample(f, generator=torch.Generator().manual_seed(0))[0]
            return drawn if drawn.shape == labels.shape else labels
        return torch.nan_to_num(labels, 0.0, 0.0, 0.0) if labels.is_floating_point() else 0

    def _loss_target(self, f: Tensor, y: Target) -> tuple[Tensor, Tensor | None]:
        """(t, w) with weighted nll = w · nll(f, t), where t is dense only if smoothing or soft targets need it."""
        labels, outer = self._split(f, y)
        table, epsilon = self._table(f), self.label_smoothing
        if not labels.is_floating_point() and not epsilon:
            return labels, outer if table is None else _times(table[labels.long()], outer)
        if not epsilon and table is None:
            return labels, outer
        soft = labels.to(promote(f).dtype)
        if not labels.is_floating_point():
            soft = torch.zeros_like(f, dtype=soft.dtype).scatter(-1, labels.long().unsqueeze(-1), 1.0)
        soft = (1 - epsilon) * soft + epsilon / f.shape[-1]
        return soft if table is None else soft * table, outer


def _unpack(y: Target) -> tuple[Tensor, Tensor | None]:
    if isinstance(y, Tensor):
        return y, None
    if isinstance(y, (tuple, list)) and len(y) == 2 and all(isinstance(part, Tensor) for part in y):
        return y[0], y[1]
    parts = [type(part).__name__ for part in y] if isinstance(y, (tuple, list)) else type(y).__name__
    raise ArgumentError(
        f"The target of Weighted is a tensor y or a pair of tensors (y, w), w a weight per prediction, but got {parts}."
    )


def _times(own: Tensor, outer: Tensor | None) -> Tensor:
    """own · outer, zero where outer is zero whatever `own` is."""
    return own if outer is None else torch.where(outer == 0, 0.0, own * outer)


def _check_sample_weights(f: Tensor, w: Tensor) -> None:
    if w.shape != f.shape[:-1]:
        raise ShapeError(
            f"An output of shape {list(f.shape)} has predictions of shape {list(f.shape[:-1])}, but the sample weights "
            f"have shape {list(w.shape)}. Give one weight per prediction, e.g. w.unsqueeze(-1).expand(...) where a "
            "weight holds for a whole sequence."
        )
    _check_weights("The sample weight w of the target (y, w)", w)


def _check_weights(name: str, w: Tensor) -> None:
    """Raises ArgumentError unless all weights are finite and at least 0."""
    if w.numel() == 0 or w.dtype == torch.bool:
        return
    low, high = (float(bound) for bound in w.aminmax())
    if not (low >= 0 and math.isfinite(high)):
        raise ArgumentError(
            f"{name} must be finite and not negative, but values lie between {low:.4g} and {high:.4g}. A negative "
            "weight would make the curvature indefinite; use 0 to leave a prediction out."
        )
