"""The Hessian beside the Fisher: how indefinite it is, where, and what that does to Newton's direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.diagnostics.spectrum import Spectrum, spectrum
from natgrad.diagnostics.subspace import Subspace, krylov_space, whole_space
from natgrad.errors import ArgumentError
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.linalg import DenseMatrix, DiagonalMatrix, LinearOperator, rademacher
from natgrad.linalg.psd import symmetrise
from natgrad.metric import BlockDiagonal, MatrixFree, fisher, hessian
from natgrad.metric.fisher import block_operators
from natgrad.network import Partition, Pass, as_arguments, full_precision, trainable_parameters


@dataclass(frozen=True)
class Directions:
    """What the two matrices make of the gradient g, with a damping λ.

    Attributes:
        newton_cosine: cosine between Newton's direction (H + λI)⁻¹g and g; negative where Newton's step climbs.
        newton_angle: degrees between Newton's direction and the natural gradient (F + λI)⁻¹g.
        saddle_free_angle: degrees between (|H| + λI)⁻¹g and the natural gradient.
        error: ‖(H + λI)d − g‖ / ‖g‖ or the same for F, whichever is larger: 0 up to rounding where the eigenvalues are
            exact. Near 1 the angles mean nothing: take more ``steps`` or more damping.
    """

    newton_cosine: float
    newton_angle: float
    saddle_free_angle: float
    error: float


@dataclass(frozen=True)
class BlockIndefiniteness:
    """Hessian H and Fisher F of one block of parameters, or of all of them.

    Attributes:
        name: the layer; ``"all"`` for the whole.
        size: number of parameters.
        hessian, fisher: their spectra.
        residual: ‖H − F‖ / ‖H‖ in the Frobenius norm.
        residual_error: its standard error; 0 where exact.
        gradient_share: ‖part of g in the span of eigenvectors with negative eigenvalues‖² / ‖g‖².
        gradient_share_bounds: an interval that holds it: the Chebyshev–Markov–Stieltjes bounds of the Gauss quadrature;
            no interval where exact.
        directions: Newton's and the natural direction.
    """

    name: str
    size: int
    hessian: Spectrum
    fisher: Spectrum
    residual: float
    residual_error: float
    gradient_share: float
    gradient_share_bounds: tuple[float, float]
    directions: Directions

    @property
    def indefinite(self) -> bool:
        """Whether a negative eigenvalue was found, beyond rounding; where estimated, its absence proves nothing."""
        return self.hessian.smallest < -self.hessian.tolerance

    @property
    def negative_count(self) -> float:
        """Number of negative eigenvalues of H, beyond rounding; estimated where the spectrum is."""
        return self.hessian.negative_count

    @property
    def negative_count_bounds(self) -> tuple[float, float]:
        """An interval for :attr:`negative_count`: wide where many eigenvalues lie near zero. No interval where exact.

        Each probe's quadrature bounds its own measure (Chebyshev–Markov–Stieltjes); their means, two standard errors
        wider.
        """
        s = self.hessian
        if s.exact:
            return s.negative_count, s.negative_count
        nodes, order = s.nodes.sort(-1)
        upto = torch.nn.functional.pad(s.weights.gather(-1, order).cumsum(-1), (1, 0))
        below = (nodes < -s.tolerance).sum(-1, keepdim=True)
        low = upto.gather(-1, (below - 1).clamp(min=0))
        high = upto.gather(-1, (below + 1).clamp(max=nodes.shape[-1]))
        wider = [2 * float(t.std(correction=1)) / math.sqrt(len(t)) for t in (low, high)]
        return max(float(low.mean()) - wider[0], 0.0), min(float(high.mean()) + wider[1], float(self.size))

    @property
    def negative_share(self) -> float:
        """Share of the eigenvalues of H that are negative."""
        return self.negative_count / self.size


@dataclass(frozen=True)
class IndefinitenessReport:
    """What :func:`indefiniteness` found; prints as a table.

    Attributes:
        damping: λ of the directions.
        whole: all parameters together.
        layers: the diagonal block of each layer. A Hessian whose blocks are all positive definite may be indefinite.
        messages: what a user should know.
    """

    damping: float
    whole: BlockIndefiniteness
    layers: tuple[BlockIndefiniteness, ...]
    messages: tuple[str, ...]

    def __str__(self) -> str:
        w = self.whole
        how = "exact" if w.hessian.exact else f"Lanczos, {w.hessian.nodes.shape[0]} probes"
        ends = [(name, getattr(w.hessian, name), getattr(w.fisher, name)) for name in ("largest", "smallest")]
        errors = {n: (getattr(w.hessian, f"{n}_error"), getattr(w.fisher, f"{n}_error")) for n, _, _ in ends}
        lines = [f"Hessian and Fisher of {w.size} parameters ({how})", f"{'':<24} {'Hessian':>22} {'Fisher':>22}"]
        lines += [f"{n:<24} {_pm(h, errors[n][0]):>22} {_pm(f, errors[n][1]):>22}" for n, h, f in ends]
        count = f"{w.negative_count:.4g}{_between(*w.negative_count_bounds)}"
        d = w.directions
        lines += [
            f"{'negative eigenvalues':<24} {count:>22} {w.fisher.negative_count:>22.4g}",
            f"{'  of the eigenvalues':<24} {w.negative_share:>22.1%} {w.fisher.negative_count / w.size:>22.1%}",
            f"{'  of the sum of |λ|':<24} {w.hessian.negative_mass:>22.1%} {w.fisher.negative_mass:>22.1%}",
            f"‖H − F‖ / ‖H‖ is {_pm(w.residual, w.residual_error)}; of the gradient, {w.gradient_share:.3g}"
            f"{_between(*w.gradient_share_bounds)} lies in the negative eigenspace of H",
            f"with damping {self.damping:g}: cosine of Newton's direction with the gradient {d.newton_cosine:.4f}; "
            f"angle to the natural gradient {d.newton_angle:.1f}°, saddle-free {d.saddle_free_angle:.1f}°"
            + (f" (solves to {d.error:.1g})" if d.error > 1e-3 else ""),
            f"{'layer':<24} {'size':>8} {'smallest':>11} {'largest':>11} {'negative':>9} {'F largest':>11} "
            f"{'residual':>9} {'gradient':>9}",
        ]
        lines += [
            f"{b.name:<24.24} {b.size:>8} {b.hessian.smallest:>11.3g} {b.hessian.largest:>11.3g} "
            f"{b.negative_share:>9.1%} {b.fisher.largest:>11.3g} {b.residual:>9.3g} {b.gradient_share:>9.3g}"
            for b in self.layers
        ]
        return "\n".join([*lines, *(f"! {message}" for message in self.messages)])


def indefiniteness(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    y: Target,
    *,
    damping: float = 1e-3,
    largest_exact: int = 1000,
    steps: int = 64,
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> IndefinitenessReport:
    """Where the Hessian H of the mean negative log-likelihood is not positive semidefinite, beside the Fisher F.

    H = F + R, where R holds the curvature of the network, weighted by the residuals: for likelihoods in their natural
    parameters F is the generalised Gauss–Newton matrix (Martens 2020, §9); for others (a learned Gaussian scale) R has
    the difference of the two, too. F has no negative eigenvalue whatever the batch, H may.

    Up to ``largest_exact`` parameters both matrices are formed, and all numbers are exact up to rounding. Beyond, by
    products: spectra as in :func:`spectrum`, with errors; R by random probes; directions and the gradient's share in
    the Krylov space of the gradient. That costs about ``samples · (steps + 1) + steps`` products with each matrix for
    the whole, and for each layer again (where a layer has fewer parameters than that, or than ``largest_exact``, as
    many products as it has parameters). The model is left as it is.

    Args:
        model, likelihood, x, y: as for :func:`natgrad.hessian`.
        damping: λ > 0 of the directions that are compared.
        largest_exact: largest number of parameters for which matrices are formed, whole or of a layer.
        steps: Lanczos steps.
        samples: random probes, at least 2.
        generator: of the probes (default: a fresh one with a fixed seed).

    Raises:
        ArgumentError: an argument out of range, or as for :func:`natgrad.hessian`.
        NonFiniteError: output or matrix are not finite.
    """
    if not (math.isfinite(damping) and damping > 0):
        raise ArgumentError(f"damping={damping} was given; it must be finite and above 0, for the Fisher is singular.")
    for name, value, least in (("steps", steps, 2), ("samples", samples, 2), ("largest_exact", largest_exact, 0)):
        if value < least:
            raise ArgumentError(f"{name}={value} was given; it must be at least {least}.")
    h = hessian(model, likelihood, x, y, structure=MatrixFree())
    f = fisher(model, likelihood, x, y, structure=MatrixFree())
    block = h.partition.blocks[0]
    g = block.pack(_gradient(model, likelihood, x, y))
    source = generator or torch.Generator(device=g.device).manual_seed(0)
    look = _Look(damping, largest_exact, steps, samples, source)
    layers = Partition(BlockDiagonal().blocks(block.cells), h.partition.order)
    with full_precision(g.device):
        whole = [next(iter(operator.blocks.blocks.values())) for operator in (h, f)]
        if block.size <= largest_exact:
            whole = [DenseMatrix(symmetrise(operator.to_dense()), symmetric=True) for operator in whole]
        parts = [_diagonal_blocks(layers, operator) for operator in whole]
        gradients = dict(zip(parts[0], g.split([b.size for b in layers.blocks]), strict=True))
        found = look("all", whole[0], whole[1], g)
        rows = tuple(look(name, parts[0][name], parts[1][name], gradients[name]) for name in parts[0])
    return IndefinitenessReport(damping, found, rows, tuple(_messages(found, damping)))


def _gradient(model: nn.Module, likelihood: Likelihood, x: Any, y: Target) -> dict[str, Tensor]:
    """The gradient of the summed negative log-likelihood, by parameter name: nothing here depends on its length."""
    args, kwargs = as_arguments(x)
    parameters = trainable_parameters(model)
    observed = Pass.begin(model, args, kwargs)
    with torch.enable_grad(), full_precision(next(iter(parameters.values())).device):
        loss = likelihood.nll(observed.run(), y).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def _diagonal_blocks(partition: Partition, whole: LinearOperator) -> dict[str, LinearOperator]:
    if not isinstance(whole, DenseMatrix):
        return block_operators(partition, whole)
    out: dict[str, LinearOperator] = {}
    start = 0
    for block in partition.blocks:
        part = slice(start, start + block.size)
        out[block.name] = DenseMatrix(whole.matrix[part, part], symmetric=True)
        start += block.size
    return out


@dataclass(frozen=True)
class _Look:
    """How one block is looked at."""

    damping: float
    largest_exact: int
    steps: int
    samples: int
    generator: torch.Generator

    def __call__(self, name: str, h: LinearOperator, f: LinearOperator, g: Tensor) -> BlockIndefiniteness:
        n = h.shape[0]
        g = g.to(h.dtype)
        exact = n <= self.largest_exact
        if exact:
            h, f = (a if isinstance(a, DenseMatrix) else DenseMatrix(symmetrise(a.to_dense()), True) for a in (h, f))
        spaces = [whole_space(a, g) if exact else krylov_space(a, g, self.steps) for a in (h, f)]
        if exact:  # the values are at hand
            spectra = [spectrum(DiagonalMatrix(space.values.to(h.dtype))) for space in spaces]
            difference, norm = torch.linalg.norm(h.to_dense() - f.to_dense()), torch.linalg.norm(h.to_dense())
            residual, residual_error = float(difference / norm), 0.0
        else:
            spectra = [self._spectrum(a) for a in (h, f)]
            residual, residual_error = self._residual(h, f)
        share, bounds = spaces[0].negative_share(spectra[0].tolerance)
        return BlockIndefiniteness(
            name=name,
            size=n,
            hessian=spectra[0],
            fisher=spectra[1],
            residual=residual,
            residual_error=residual_error,
            gradient_share=share,
            gradient_share_bounds=bounds,
            directions=_directions(spaces[0], spaces[1], h, f, g, self.damping),
        )

    def _spectrum(self, a: LinearOperator) -> Spectrum:
        return spectrum(
            a, steps=self.steps, samples=self.samples, largest_exact=self.largest_exact, generator=self.generator
        )

    def _residual(self, h: LinearOperator, f: LinearOperator) -> tuple[float, float]:
        """‖H − F‖ / ‖H‖ and its standard error, from ‖A‖² = E‖Az‖² over Rademacher z."""
        z = rademacher((self.samples, h.shape[0]), h, self.generator)
        hz = h.matvec(z)
        above, below = (hz - f.matvec(z)).square().sum(-1), hz.square().sum(-1)
        squared = above.mean() / below.mean()
        error = (above - squared * below).std(correction=1) / (math.sqrt(self.samples) * below.mean())
        root = float(squared.sqrt())
        return root, float(error) / (2 * root) if root > 0 else 0.0


def _directions(
    h_space: Subspace, f_space: Subspace, h: LinearOperator, f: LinearOperator, g: Tensor, damping: float
) -> Directions:
    newton = h_space.apply(lambda e: 1 / (e + damping))
    saddle_free = h_space.apply(lambda e: 1 / (e.abs() + damping))
    natural = f_space.apply(lambda e: 1 / (e.clamp(min=0.0) + damping))
    g = g.to(newton.dtype)
    length = torch.linalg.vector_norm(g)
    left = [
        torch.linalg.vector_norm(a.matvec(d).to(d.dtype) + damping * d - g) / length
        for a, d in ((h, newton), (f, natural))
    ]
    return Directions(
        newton_cosine=math.cos(math.radians(_angle(newton, g))),
        newton_angle=_angle(newton, natural),
        saddle_free_angle=_angle(saddle_free, natural),
        error=float(torch.stack(left).max()),
    )


def _angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two vectors, to full precision near 0 and 180 (Kahan); NaN where one is zero."""
    a, b = a / torch.linalg.vector_norm(a), b / torch.linalg.vector_norm(b)
    half = torch.atan2(torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(a + b))
    return math.degrees(2 * float(half))


def _pm(value: float, error: float) -> str:
    return f"{value:.4g} ± {error:.1g}" if error else f"{value:.4g}"


def _between(low: float, high: float) -> str:
    return f" ({low:.3g} to {high:.3g})" if high - low > 1e-12 else ""


def _messages(whole: BlockIndefiniteness, damping: float) -> list[str]:
    messages: list[str] = []
    lowest = whole.hessian.smallest
    if whole.indefinite:
        enough = "is enough here" if damping > -lowest else "is not enough"
        messages.append(
            f"The Hessian is indefinite: plain Newton steps need a damping above {-lowest:.3g}, and {damping:g} "
            f"{enough}. SaddleFree() and the Fisher need none for that."
        )
    elif not whole.hessian.exact:
        messages.append(
            "No negative eigenvalue of the Hessian was found. That does not prove that there is none: Ritz values come "
            "from inside the spectrum. More steps and samples look closer."
        )
    if whole.directions.newton_cosine < 0:
        messages.append(
            f"Newton's direction climbs: its cosine with the gradient is {whole.directions.newton_cosine:.3f}. It "
            "leads to a saddle point or a maximum."
        )
    return messages
