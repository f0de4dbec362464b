"""The methods of the field, each a choice of metric, damping and search under its usual name."""

from __future__ import annotations

import math

from torch import Tensor, nn

from natgrad.likelihood import Likelihood
from natgrad.linalg import CG, SaddleFree, Solver
from natgrad.metric import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Estimate,
    Exact,
    Fisher,
    Gram,
    Hessian,
    Kronecker,
    MatrixFree,
    MonteCarlo,
    Structure,
    SubBatch,
)
from natgrad.metric.running import Refresh
from natgrad.optim.optimizer import NaturalGradient
from natgrad.step import (
    Armijo,
    Damping,
    FactoredTikhonov,
    KLClip,
    LevenbergMarquardt,
    QuadraticFit,
    Search,
    TrustRegion,
)


class NGD(NaturalGradient):
    """Exact natural gradient: the whole true Fisher matrix of the batch, for models of up to a few thousand parameters.

    The full step ``lr=1`` is right near a solution and far too long elsewhere, so its predicted KL is clipped; with
    ``search=LearningRate()`` the step is what ``lr`` says. ``average=0`` uses the batch's own matrix at every step. See
    :class:`NaturalGradient` for the other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        estimate: Estimate = Exact(),
        solver: Solver | None = None,
        search: Search = KLClip(0.1),
        average: float = 0.0,
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, momentum=momentum, weight_decay=weight_decay,
            metric=Fisher(estimate, Dense()), solver=solver, search=search, average=average, refresh=Refresh(1, 1),
            seed=seed, maximize=maximize,
        )  # fmt: skip


class DiagonalNGD(NaturalGradient):
    """Natural gradient with the diagonal of the Fisher matrix, from per-example gradients at sampled labels.

    See :class:`NaturalGradient` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 0.1,
        damping: float | Damping = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        estimate: Estimate = MonteCarlo(),
        search: Search = KLClip(1e-3),
        average: float = 0.95,
        refresh: Refresh = Refresh(1, 1),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, momentum=momentum, weight_decay=weight_decay,
            metric=Fisher(estimate, Diagonal()), search=search, average=average, refresh=refresh,
            seed=seed, maximize=maximize,
        )  # fmt: skip


class BlockNGD(NaturalGradient):
    """Natural gradient with one dense Fisher block per layer, for layers of up to a few thousand parameters.

    See :class:`NaturalGradient` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        estimate: Estimate = MonteCarlo(),
        search: Search = QuadraticFit(max_kl=0.1),
        average: float = 0.95,
        refresh: Refresh = Refresh(1, 10),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, momentum=momentum, weight_decay=weight_decay,
            metric=Fisher(estimate, BlockDiagonal()), search=search, average=average, refresh=refresh,
            seed=seed, maximize=maximize,
        )  # fmt: skip


class KFAC(NaturalGradient):
    """K-FAC (Martens & Grosse 2015): a Kronecker-factored Fisher block per layer.

    Args:
        structure: ``Kronecker()`` (expand) or ``Kronecker.reduce()``.
        estimate: ``MonteCarlo()`` for the true Fisher; ``Empirical()`` saves a backward pass and is another matrix.

    See :class:`NaturalGradient` for the other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = FactoredTikhonov(1e-3),
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        estimate: Estimate = MonteCarlo(),
        structure: Structure = Kronecker(),
        search: Search = QuadraticFit(max_kl=0.1),
        average: float = 0.95,
        refresh: Refresh = Refresh(1, 10),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, momentum=momentum, weight_decay=weight_decay,
            metric=Fisher(estimate, structure), search=search, average=average, refresh=refresh,
            seed=seed, maximize=maximize,
        )  # fmt: skip


class AdaptiveKFAC(NaturalGradient):
    """K-FAC whose rate, momentum and damping follow from the loss itself (Martens & Grosse 2015, §6.4–§7).

    Rate and momentum of every step minimise the quadratic model with the exact Fisher matrix (``QuadraticFit``, here on
    a quarter of the batch), without a radius: nothing depends on how many outputs the nats of an example come from.
    Levenberg–Marquardt damping judges every fifth step by the change of the loss. Factors are estimated on an eighth
    of the batch, and renewed at every step of the burn-in.

    Parts have 125 and 250 examples at least, or are the whole batch. The loss is measured: use a closure, or call
    ``observe(output, target)`` before ``backward()``. :func:`natgrad.iterate_average` averages away what gradient noise
    leaves in the last iterates.

    See :class:`KFAC` and :class:`NaturalGradient` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = LevenbergMarquardt(
            FactoredTikhonov(1e-2), factor=(20 / 19) ** 5, every=5, minimum=1e-3
        ),
        weight_decay: float = 0.0,
        estimate: Estimate = MonteCarlo(),
        structure: Structure = Kronecker(sampling=SubBatch(1 / 8, least=125)),
        search: Search = QuadraticFit(fraction=1 / 4),
        average: float = 0.95,
        refresh: Refresh = Refresh(1, 10, burn_in=3),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, weight_decay=weight_decay, metric=Fisher(estimate, structure),
            search=search, average=average, refresh=refresh, seed=seed, maximize=maximize,
        )  # fmt: skip


class EKFAC(NaturalGradient):
    """EKFAC (George et al. 2018): K-FAC's eigenbasis with second moments measured in it, at every step.

    See :class:`KFAC` and :class:`NaturalGradient` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        estimate: Estimate = MonteCarlo(),
        structure: Structure = EigenKronecker(),
        search: Search = QuadraticFit(max_kl=0.1),
        average: float = 0.95,
        refresh: Refresh = Refresh(1, 10),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, momentum=momentum, weight_decay=weight_decay,
            metric=Fisher(estimate, structure), search=search, average=average, refresh=refresh,
            seed=seed, maximize=maximize,
        )  # fmt: skip


class GramNGD(NaturalGradient):
    """Exact solve of the batch's own Fisher matrix through the Gram matrix of its rows (Woodbury).

    With the default ``MonteCarlo()`` the matrix has one row per example and sample; ``Exact()`` takes one per example
    and output. The cheapest choice where the batch is smaller than the layers are wide.

    See :class:`NaturalGradient` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = 1e-1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        estimate: Estimate = MonteCarlo(),
        solver: Solver | None = None,
        search: Search = QuadraticFit(max_kl=0.1),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, momentum=momentum, weight_decay=weight_decay,
            metric=Fisher(estimate, Gram()), solver=solver, search=search, refresh=Refresh(1, 1),
            seed=seed, maximize=maximize,
        )  # fmt: skip


class HessianFree(NaturalGradient):
    """Hessian-free optimization (Martens 2010): the Gauss–Newton matrix by its products, solved by conjugate gradients.

    Damping follows Levenberg–Marquardt and a step must lower the loss, so the loss is measured: use a closure, or call
    ``observe(output, target)`` before ``backward()``.

    See :class:`NaturalGradient` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = LevenbergMarquardt(1e-1),
        weight_decay: float = 0.0,
        solver: Solver | None = CG(tolerance=1e-3, max_iterations=50),
        search: Search = Armijo(),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, weight_decay=weight_decay,
            metric=Fisher(Exact(), MatrixFree()), solver=solver, search=search, refresh=Refresh(1, 1),
            seed=seed, maximize=maximize,
        )  # fmt: skip


class GaussNewton(NaturalGradient):
    """Damped Gauss–Newton (Levenberg–Marquardt) with the dense matrix of the batch.

    For natgrad's likelihoods the generalised Gauss–Newton matrix and the Fisher matrix are the same (Martens 2020, §9).
    Damping follows the reduction ratio and a step must lower the loss, so the loss is measured: use a closure, or call
    ``observe(output, target)`` before ``backward()``.

    See :class:`NaturalGradient` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = LevenbergMarquardt(1e-2),
        weight_decay: float = 0.0,
        structure: Structure = Dense(),
        solver: Solver | None = None,
        search: Search = Armijo(),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, weight_decay=weight_decay,
            metric=Fisher(Exact(), structure), solver=solver, search=search, average=0.0, refresh=Refresh(1, 1),
            seed=seed, maximize=maximize,
        )  # fmt: skip


class Newton(NaturalGradient):
    """Newton's method with the Hessian H of the observed batch, which may be indefinite where the Fisher is not.

    What is done about negative curvature is the solver's choice:

    * ``SaddleFree()``, the default: the direction is ``(|H| + λI)⁻¹ g``, with the magnitudes of H's eigenvalues
      (Dauphin et al. 2014). It always descends, and leaves saddle points. Where H is positive definite it is Newton's,
      so that near such a minimum ``lr=1`` and ``damping=0`` converge quadratically.
    * ``None``, or a solver such as ``natgrad.linalg.Cholesky()``: the direction is ``(H + λI)⁻¹ g``, and where that
      matrix is not positive definite the step is an error that says so. Raise the damping, or use the Fisher.

    H says nothing about how far a step may go: where its eigenvalues nearly vanish a full step is too long, whatever
    their signs. By default the step is shortened until the measured KL is at most 0.1 and the loss falls;
    ``search=LearningRate()`` takes it as it is.

    Needs the labels: a closure that returns ``(loss, output, target)``, or ``observe(output, target)``; weights of a
    ``Weighted`` likelihood count in H as they do in its loss. With ``maximize`` the default is Newton's ascent, too,
    since |−H| = |H|; the other solvers then climb in the metric H + λI, which is not Newton's.

    Args:
        structure: ``Dense()``, ``BlockDiagonal()``, ``Diagonal()``, or ``MatrixFree()``, with which ``SaddleFree``
            works in a Krylov space of its ``steps`` dimensions.

    See :class:`NaturalGradient` for the other arguments, and :func:`natgrad.diagnostics.indefiniteness` for a report on
    where H fails.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = 1e-3,
        weight_decay: float = 0.0,
        structure: Structure = Dense(),
        solver: Solver | None = SaddleFree(),
        search: Search = TrustRegion(0.1),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model, likelihood, lr=lr, damping=damping, weight_decay=weight_decay,
            metric=Hessian(structure), solver=solver, search=search, refresh=Refresh(1, 1),
            seed=seed, maximize=maximize,
        )  # fmt: skip


class TrustRegionNGD(NaturalGradient):
    """Natural gradient with a hard KL radius, as in TRPO (Schulman et al. 2015).

    The direction comes from conjugate gradients on the exact Fisher matrix; the step goes to the boundary of the trust
    region and back until the *measured* mean KL(old ‖ new) is within ``max_kl`` and the loss, where it is known, falls.

    Args:
        max_kl: the radius, in nats per prediction.
        damping: λ of the solve.
        lr: longest multiple of the direction; ``inf`` always goes to the boundary.
        backtracks: how often the step may be halved.

    See :class:`NaturalGradient` for the other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        max_kl: float = 0.01,
        damping: float | Damping = 0.1,
        lr: float | Tensor = math.inf,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        estimate: Estimate = Exact(),
        structure: Structure = MatrixFree(),
        solver: Solver | None = None,
        backtracks: int = 10,
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        if solver is None and isinstance(structure, MatrixFree):
            solver = CG(tolerance=1e-6, max_iterations=20)
        super().__init__(
            model, likelihood, lr=lr, damping=damping, momentum=momentum, weight_decay=weight_decay,
            metric=Fisher(estimate, structure), solver=solver, search=TrustRegion(max_kl, backtracks),
            refresh=Refresh(1, 1), seed=seed, maximize=maximize,
        )  # fmt: skip
