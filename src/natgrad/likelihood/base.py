"""What every likelihood offers: loss, sampling, KL divergence and the Fisher matrix of p(y | f) in f."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.distributions import Distribution

from natgrad.errors import ArgumentError, ShapeError
from natgrad.likelihood._math import promote

# Either the labels y alone or, for `Weighted`, the pair (y, w) of labels and sample weights.
Target = Tensor | tuple[Tensor, Tensor]


class Likelihood(ABC):
    r"""p(y | f): what the output f of a model means.

    Shapes: f is [*batch, C] with *batch = (N, *positions), N the number of examples; one element of *batch is one
    prediction. Every method works per prediction and never averages. The Fisher matrix of one prediction is
    Λ(f) = E_{y ~ p(·|f)}[s sᵀ] with s = ∂nll/∂f, which is also the Hessian in g of KL(p_f ‖ p_g) at g = f.

    Precision: float16 and bfloat16 outputs are upcast to float32, and results are returned in the precision of the
    computation. `nll` and `kl` are differentiable in the outputs (twice); do not differentiate the other methods.
    Methods check shapes only where it is cheap; `check_output` and `check_target` are the thorough, once-per-batch
    checks (looking at the values of the target costs one synchronisation on an accelerator).
    """

    #: True when `weights` depends on the data's labels, so that curvature cannot be had from inputs alone.
    needs_target: bool = False

    @property
    def unweighted(self) -> Likelihood:
        """The likelihood without its weights: what to score sampled labels with (see `Weighted`)."""
        return self

    @abstractmethod
    def distribution(self, f: Tensor) -> Distribution:
        """p(· | f) as a torch distribution of batch shape [*batch] that does not validate its arguments."""

    def nll(self, f: Tensor, y: Target) -> Tensor:
        """−log p(y | f), shape [*batch], in nats and with all constants."""
        return -self.distribution(promote(f)).log_prob(only_labels(y))

    @abstractmethod
    def sample(self, f: Tensor, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """n independent targets y ~ p(· | f), shape [n, *target shape]; draws from `generator` and nothing else.

        Without a generator the global random stream is used, as everywhere in torch. The generator must live on f's
        device.
        """

    @abstractmethod
    def kl(self, f: Tensor, g: Tensor) -> Tensor:
        """KL(p_f ‖ p_g), shape [*batch], in nats."""

    def score(self, f: Tensor, y: Target) -> Tensor:
        """∂nll(f, y)/∂f, shape [*batch, C]: the gradient of the loss, minus the score of statistics."""
        with torch.enable_grad():
            leaf = promote(f).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.nll(leaf, y).sum(), leaf)
        return gradient

    @abstractmethod
    def fisher_factor(self, f: Tensor) -> Tensor:
        """Columns s_k, shape [K, *batch, C], with Σ_k s_k s_kᵀ = Λ(f)."""

    def fisher_matvec(self, f: Tensor, u: Tensor) -> Tensor:
        """Λ(f) u for u of shape [*batch, C]."""
        columns = self.fisher_factor(f)
        return ((columns * promote(u)).sum(-1, keepdim=True) * columns).sum(0)

    def weights(self, f: Tensor, y: Target) -> Tensor | None:
        """Weight of each prediction, shape [*batch]; None means that all are one. Means divide by their sum."""
        return None

    def curvature_weights(self, f: Tensor, y: Target) -> Tensor | None:
        """Factor of Λ in the curvature of the weighted loss, shape [*batch]: `weights` unless a loss says otherwise."""
        return self.weights(f, y)

    def check_output(self, f: Tensor) -> None:
        """Raises ShapeError or ArgumentError unless f is a floating-point tensor [N, *positions, C]."""
        check_floating(self, f)
        if f.ndim < 2:
            raise ShapeError(
                f"{self} needs an output of shape [N, *positions, C], but got {_shape(f)}. The last axis always holds "
                "what one prediction is made of: for a model with one number per example return it as [N, 1], e.g. "
                "output.unsqueeze(-1); for one single example add a batch axis, output.unsqueeze(0)."
            )

    def check_target(self, f: Tensor, y: Target) -> None:
        """Raises ShapeError or ArgumentError unless y is a possible target of output f; looks at the values of y."""
        only_labels(y, self)

    def check_gradient(self, g: Tensor) -> None:  # noqa: B027  (most likelihoods cannot tell)
        """Raises ShapeError where the loss's gradient g at an output shows that its axes mean something else."""


def only_labels(y: Target, likelihood: Likelihood | None = None) -> Tensor:
    """`y` when it is one tensor; a pair (labels, weights) is understood by `Weighted` alone."""
    if isinstance(y, Tensor):
        return y
    name = type(likelihood).__name__ if likelihood is not None else "This likelihood"
    given = "(labels, weights)" if isinstance(y, tuple) else f"of type {type(y).__name__}"
    raise ArgumentError(
        f"{name} takes its target as one tensor, but got a target {given}. To give sample weights or a mask along "
        f"with the labels wrap the likelihood: natgrad.Weighted({name if likelihood is not None else 'likelihood'}()). "
        "Other containers have to be converted with torch.as_tensor."
    )


def check_floating(likelihood: Likelihood, f: Tensor) -> None:
    """Raises ArgumentError unless `f` is a real floating-point tensor."""
    if not isinstance(f, Tensor):
        raise ArgumentError(
            f"{likelihood} needs the model's output as a tensor, but got {type(f).__name__}. If the model returns "
            "a container, pass the tensor inside it, e.g. output.logits."
        )
    if not f.is_floating_point():
        raise ArgumentError(
            f"{likelihood} needs a real floating-point output, but got dtype {f.dtype}. Pass what the last layer "
            "returns (logits, means, log rates), not predicted labels."
        )


def check_elementwise(likelihood: Likelihood, f: Tensor, y: Target, size: int | None = None) -> Tensor:
    """The labels of `y`; raises ShapeError unless they have f's shape, with `size` as last axis where given."""
    labels = only_labels(y, likelihood)
    wanted = f.shape if size is None else (*f.shape[:-1], size)
    if labels.shape != torch.Size(wanted):
        raise ShapeError(
            f"{likelihood} with an output of shape {_shape(f)} needs a target of shape {list(wanted)}, but got "
            f"{_shape(labels)}. No broadcasting is done, because [N] against [N, 1] would silently compare every "
            f"example with every other: use target.reshape({list(wanted)}) if that is what is meant."
        )
    return labels


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
