"""Does a structure do on this model, on this batch, what one expects of it? A comparison with the exact Fisher."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.linalg import CG, BlockDiagonalMatrix, LinearOperator
from natgrad.metric import Diagonal, Estimate, Exact, Fisher, MonteCarlo, Structure, check_finite_output
from natgrad.metric.fisher import parameter_function
from natgrad.network import (
    Block,
    Linearization,
    Partition,
    Pass,
    Tape,
    as_arguments,
    full_precision,
    record,
    trainable_parameters,
)
from natgrad.step import Damping, as_damping

# Cosines above this say that the preconditioner changes nothing but the length.
_PLAIN = 0.999
# A trace this far from the exact one is a scale error rather than an approximation.
_SCALE = 5.0


@dataclass(frozen=True)
class BlockAudit:
    """One block of the structure beside the exact Fisher restricted to the same parameters.

    Attributes:
        name: the block.
        size: number of parameters.
        trace: trace of the structure's block.
        trace_exact: trace of the exact block.
        direction_cosine: cosine between the structure's damped natural gradient and the exact block's.
        direction_scale: length of the structure's direction over the exact one's.
        gradient_cosine: cosine between the structure's direction and the plain gradient.
    """

    name: str
    size: int
    trace: float
    trace_exact: float
    direction_cosine: float
    direction_scale: float
    gradient_cosine: float

    @property
    def trace_ratio(self) -> float:
        """Structure over exact; 1 is perfect, and NaN where both vanish."""
        return self.trace / self.trace_exact if self.trace_exact else (float("nan") if not self.trace else float("inf"))


@dataclass(frozen=True)
class AuditReport:
    """What :func:`audit` found.

    Attributes:
        structure: name of the audited structure.
        damping: λ in use.
        blocks: one row per block.
        direction_cosine: cosine between the structure's natural gradient and the exact one, over all parameters.
        kl_predicted: ½ ΔᵀFΔ of the structure for a step along its direction.
        kl_exact: the same for the exact Fisher.
        kl_measured: mean KL(old ‖ new) measured after that step.
        messages: what a user should know; empty where all is well.
    """

    structure: str
    damping: float
    blocks: tuple[BlockAudit, ...]
    direction_cosine: float
    kl_predicted: float
    kl_exact: float
    kl_measured: float
    messages: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{'block':<28} {'size':>9} {'trace ratio':>12} {'cos exact':>10} {'length':>8} {'cos gradient':>13}"
        lines = [f"audit of {self.structure} with damping {self.damping:g}", head]
        lines += [
            f"{b.name:<28.28} {b.size:>9} {b.trace_ratio:>12.4g} {b.direction_cosine:>10.4f} {b.direction_scale:>8.3g} "
            f"{b.gradient_cosine:>13.4f}"
            for b in self.blocks
        ]
        lines.append(
            f"all blocks: cos exact {self.direction_cosine:.4f}; KL predicted {self.kl_predicted:.3g}, exact quadratic "
            f"{self.kl_exact:.3g}, measured {self.kl_measured:.3g}"
        )
        return "\n".join([*lines, *(f"! {message}" for message in self.messages)])


def audit(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    y: Target | None = None,
    *,
    structure: Structure,
    estimate: Estimate = MonteCarlo(),
    damping: float | Damping = 1e-3,
    step_kl: float = 1e-4,
    generator: torch.Generator | None = None,
) -> AuditReport:
    """Compare what ``structure`` makes of this model and batch with the exact Fisher matrix.

    The exact matrix is never formed: traces come from exact per-example squares, directions from conjugate gradients
    on products ``JᵀΛJv``. Warns where a block's preconditioner is effectively plain gradient descent, or where its
    scale is far from the exact one. The model is left as it is.

    Args:
        model, likelihood, x: as for :func:`natgrad.fisher`.
        y: labels of the batch; sampled from the model where not given.
        structure, estimate: what is audited.
        damping: λ, or a rule such as ``FactoredTikhonov``.
        step_kl: the KL divergence, by the exact quadratic model, of the step at which predictions are checked.
        generator: of sampled labels.

    Returns:
        A report that prints as a table.
    """
    args, kwargs = as_arguments(x)
    observed, tape = Pass.begin(model, args, kwargs), record(model, x)
    assert tape.output is not None
    check_finite_output(tape.output)
    likelihood.check_output(tape.output)
    generator = generator or torch.Generator(device=tape.output.device).manual_seed(0)
    with full_precision(tape.output.device):
        report = _compare(
            observed, tape, likelihood, y, Fisher(estimate, structure), as_damping(damping), step_kl, generator
        )
    for message in report.messages:
        warnings.warn(message, UserWarning, stacklevel=2)
    return report


def _compare(
    observed: Pass,
    tape: Tape,
    likelihood: Likelihood,
    y: Target | None,
    metric: Fisher,
    rule: Damping,
    step_kl: float,
    generator: torch.Generator,
) -> AuditReport:
    structure, estimate = metric.structure, metric.estimate
    assert tape.output is not None
    f = tape.output.detach()
    partition = metric.partition(observed.model, metric.examine(tape, likelihood, generator))
    needs_labels = likelihood.needs_target or estimate.needs_target
    labels = y if y is not None or needs_labels else likelihood.sample(f, 1, generator=generator)[0]
    if metric.replayed:
        statistics = metric.products(observed, likelihood, y, partition, generator=generator)
    else:
        statistics = metric.statistics(tape, likelihood, y, partition, generator=generator)
    operators = metric.operators(partition, statistics)

    exact = Fisher(Exact(), Diagonal())
    cells = Partition(exact.blocks(partition.cells), partition.order)
    diagonal = exact.operators(cells, exact.statistics(tape, likelihood, y, cells, generator=generator))
    traces = {b.name: sum(float(diagonal[n].trace()) for n in b.parameters) for b in partition.blocks}

    product = _ExactFisher(observed, likelihood, y)
    gradient = partition.pack(product.gradient(labels))
    whole = Block("*", partition.cells)
    directions, rows = {}, []
    for block in partition.blocks:
        g = gradient[block.name]
        directions[block.name] = rule.inverse(operators[block.name], None).matvec(g)
        wanted = _solve(product.restricted(block), g, float(rule.amount(operators[block.name])))
        rows.append(_row(block, operators[block.name], traces[block.name], directions[block.name], wanted, g))
    flat_gradient = torch.cat([gradient[b.name] for b in partition.blocks])
    flat_direction = torch.cat([directions[b.name] for b in partition.blocks])
    full = product.restricted(whole)
    exact_direction = _solve(full, flat_gradient, rule.value)
    predicted, quadratic, measured = _predictions(
        product, likelihood, partition, operators, full, directions, flat_direction, y, step_kl
    )
    return AuditReport(
        structure=structure.name,
        damping=rule.value,
        blocks=tuple(rows),
        direction_cosine=_cosine(flat_direction, exact_direction),
        kl_predicted=predicted,
        kl_exact=quadratic,
        kl_measured=measured,
        messages=tuple(_messages(rows, rule.value)),
    )


class _ExactFisher:
    """Products with the true Fisher of one observed pass, whole or restricted to a block."""

    def __init__(self, observed: Pass, likelihood: Likelihood, y: Target | None) -> None:
        self.observed, self.likelihood = observed, likelihood
        self.linearization = Linearization(observed)
        self.output = self.linearization.output.detach()
        weights = None if y is None else likelihood.curvature_weights(self.output, y)
        self.weights = weights
        plain = None if y is None else likelihood.weights(self.output, y)
        self.normaliser = self.output[..., 0].numel() if plain is None else plain.sum()

    def gradient(self, labels: Any) -> dict[str, Tensor]:
        """Gradient of the mean negative log-likelihood."""
        score = self.likelihood.score(self.output, labels)
        return self.linearization.vjp(score / self.normaliser)

    def restricted(self, block: Block) -> LinearOperator:
        """``v ↦ (F v)`` restricted to the parameters of ``block``."""
        zeros = {n: torch.zeros_like(p) for n, p in self.linearization.parameters.items()}

        def product(v: Tensor) -> Tensor:
            pushed = self.linearization.jvp({**zeros, **block.unpack(v)})
            u = self.likelihood.fisher_matvec(self.output, pushed)
            if self.weights is not None:
                u = u * self.weights[..., None]
            return block.pack(self.linearization.vjp(u / self.normaliser))

        return parameter_function(block, product, next(iter(self.linearization.parameters.values())))


def _solve(operator: LinearOperator, g: Tensor, damping: float) -> Tensor:
    return operator.solve(g, damping=damping, solver=CG(tolerance=1e-6, max_iterations=500))


def _row(
    block: Block, operator: LinearOperator, trace_exact: float, direction: Tensor, wanted: Tensor, g: Tensor
) -> BlockAudit:
    length = float(torch.linalg.vector_norm(wanted))
    return BlockAudit(
        name=block.name,
        size=block.size,
        trace=float(operator.trace()),
        trace_exact=trace_exact,
        direction_cosine=_cosine(direction, wanted),
        direction_scale=float(torch.linalg.vector_norm(direction)) / length if length else float("nan"),
        gradient_cosine=_cosine(direction, g),
    )


def _predictions(
    product: _ExactFisher,
    likelihood: Likelihood,
    partition: Partition,
    operators: Mapping[str, LinearOperator],
    full: LinearOperator,
    directions: Mapping[str, Tensor],
    flat: Tensor,
    y: Target | None,
    step_kl: float,
) -> tuple[float, float, float]:
    """KL of a step along the direction: by the structure, by the exact quadratic model, and measured."""
    curvature = float(full.quad(flat))
    if not curvature > 0:
        return 0.0, 0.0, 0.0
    s = (2 * step_kl / curvature) ** 0.5
    predicted = 0.5 * s * s * float(BlockDiagonalMatrix(operators).quad(flat))
    parameters = trainable_parameters(product.observed.model)
    moved = {n: parameters[n].detach() - s * d for n, d in partition.unpack(directions).items()}
    with torch.no_grad():
        kl = likelihood.kl(product.output, product.observed.run(moved))
    weights = None if y is None else likelihood.weights(product.output, y)
    total = kl.sum() if weights is None else torch.where(weights == 0, 0.0, kl * weights).sum()
    return predicted, step_kl, float(total / product.normaliser)


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return float(torch.dot(a, b) / scale) if scale > 0 else float("nan")


def _messages(rows: list[BlockAudit], damping: float) -> list[str]:
    messages: list[str] = []
    plain = [b.name for b in rows if b.size > 1 and b.gradient_cosine > _PLAIN]
    if plain:
        first = next(b for b in rows if b.name == plain[0])
        messages.append(
            f"The preconditioner of {', '.join(plain)} is effectively plain gradient descent: its direction is the "
            f"gradient's (cosine {first.gradient_cosine:.6f}). The damping {damping:g} is far above the curvature "
            f"(mean eigenvalue {first.trace_exact / first.size:.3g}); lower it, or use Proportional damping."
        )
    scaled = [b.name for b in rows if b.trace_exact > 0 and not 1 / _SCALE < b.trace_ratio < _SCALE]
    if scaled:
        messages.append(
            f"The trace of {', '.join(scaled)} differs from the exact Fisher's by more than {_SCALE:g} times. Expect "
            "damping and predicted KL to be off by as much; EigenKronecker has the exact trace, and more samples of "
            "MonteCarlo lower its noise."
        )
    return messages
