"""The optimizer: observes training passes, keeps curvature, and turns gradients into natural-gradient steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from natgrad.distributed import Replicas, StatisticsSum
from natgrad.errors import ArgumentError, ConvergenceError, NonFiniteError, NotObservedError, UnsupportedError
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.linalg import LinearOperator, Solver
from natgrad.metric import Bases, Euclidean, Fisher, Hessian, Metric, Moments, Sampling, Statistics
from natgrad.metric.running import Refresh, Staggered
from natgrad.metric.sampling import Share
from natgrad.network import BlockVector, Partition, Pass, Tape, fresh_casts, full_precision, trainable_parameters
from natgrad.optim import state as checkpoint
from natgrad.optim.axes import moved
from natgrad.optim.capture import Capture
from natgrad.optim.checks import (
    check_arguments,
    check_likelihood,
    check_members,
    check_module,
    check_parameters,
    check_parts,
    check_real,
)
from natgrad.optim.closures import Closure, Evaluation, evaluate
from natgrad.optim.curvature import Curvature
from natgrad.optim.examination import CoverageRow, Examination, coverage_rows
from natgrad.optim.finite import all_finite, clear_unless_finite, fits, skipped
from natgrad.optim.groups import (
    Group,
    check_group,
    check_values,
    common,
    damping_of,
    divisions,
    group_of,
    reference_rate,
    search_of,
    set_division,
    together,
)
from natgrad.optim.loading import check_places, matched, names_in, take_over
from natgrad.optim.momentum import Momentum, factors
from natgrad.optim.naming import names_here
from natgrad.optim.observer import Observation, Observer, before_conversions, unwrapped
from natgrad.optim.penalty import curvature_of_penalty, in_loss, penalised, shrink
from natgrad.optim.preconditioning import at_rates, preconditioned, preconditioned_vectors
from natgrad.optim.probe import ModelProbe
from natgrad.step import Damping, LearningRate, LevenbergMarquardt, LocalModel, QuadraticFit, Search, Step, as_damping
from natgrad.step.local import explained, joined, rejected

Parameters = nn.Module | Iterable[Any]
_COPIED = (
    "_last", "_likelihood", "_metric", "_solver", "_search", "_damping", "_decay", "_refresh", "_seed", "_examination",
    "_steps", "_follows", "_changed", "_unknown", "_model", "_wrapper",
)  # fmt: skip


class NaturalGradient(torch.optim.Optimizer):
    r"""Natural gradient descent, ``θ ← θ − lr (F(θ) + λI)⁻¹ ∇L(θ)`` (Amari 1998).

    Used like any torch optimizer. A hook on ``model`` observes each training pass (gradients enabled, training mode);
    passes whose output no backward pass reaches are not counted, several passes before a step accumulate::

        opt = ng.NaturalGradient(model, ng.Categorical(), lr=0.1)
        for x, y in loader:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()

    With a closure, ``step(closure)`` evaluates ``(loss, output)`` or ``(loss, output, target)``, runs the backward pass
    itself and may evaluate the closure again without gradients.

    Scale: the metric is the mean over predictions of the Fisher matrix of the likelihood, whatever reduction the loss
    has; ``damping`` is in the same unit. A gradient of the mean negative log-likelihood and ``lr=1`` is the full
    natural-gradient (for generalised linear models: Fisher-scoring) step.

    Momentum averages the gradient before it is preconditioned, ``m ← μ m + g``, so that the predicted KL is that of
    the whole step. Weight decay is decoupled (``θ ← (1 − lr·w) θ``), except where the search measures what a step
    does (TrustRegion, Armijo, QuadraticFit): there it is part of the loss, ``½ w ‖θ‖²``, with its gradient and with its
    curvature ``w I`` beside the metric, so that the steps lead to the minimum of the sum.

    A gradient that is not finite changes nothing: not the parameters, not the averages.

    Parameter groups may differ in ``lr``, ``damping``, ``momentum``, ``weight_decay``, ``max_kl`` and ``maximize``.
    Groups that differ in weight decay alone share blocks of curvature. Others do not: with ``LearningRate`` or
    ``KLClip`` they step as optimizers of their own would; searches that measure judge the step of all groups at once.

    Args:
        model: the network: its trainable parameters are optimized, also those that become trainable later. Or, as
            torch's optimizers take them, parameters, ``(name, parameter)`` pairs or groups; call :meth:`attach` then.
        likelihood: what the model's output means.
        lr: learning rate; with a :class:`TrustRegion` it is the longest multiple of the direction (``inf`` allowed).
        damping: λ, a number or a rule (``Constant``, ``Proportional``, ``FactoredTikhonov``, ``LevenbergMarquardt``).
        momentum: μ in [0, 1).
        weight_decay: w ≥ 0.
        metric: what is inverted: ``Fisher(estimate, structure)``, ``Hessian(structure)`` or ``Euclidean()``. With
            ``Euclidean`` the optimizer is SGD exactly (damping has nothing to act on).
        solver: how; None is each structure's own method.
        search: from a direction to a step.
        average: weight of the past in the running averages of curvature, in [0, 1).
        refresh: how often statistics and inverses are renewed (``Refresh``), or the latter evenly (``Staggered``).
        seed: of the sampled labels and signs; the global random streams are never touched.
        maximize: climb the loss instead of descending it.

    Raises:
        ArgumentError: an argument out of range; the message names it.
    """

    matches_by_name = True
    """Whether ``load_state_dict`` finds parameters by their names, also such as were frozen when it was made."""

    _placed: list[list[str]] | None = None  # names of the parameters whose state was loaded by place, before attach

    def __init__(
        self,
        model: Parameters,
        likelihood: Likelihood,
        *,
        lr: float | Tensor = 1.0,
        damping: float | Damping = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        metric: Metric = Fisher(),
        solver: Solver | None = None,
        search: Search = LearningRate(),
        average: float = 0.95,
        refresh: Refresh = Refresh(),
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        check_likelihood(likelihood)
        check_parts(metric, solver, search, refresh)
        check_arguments(lr, momentum, weight_decay, average, search, seed, maximize)
        self._last: Step | None = None
        self._likelihood, self._metric, self._solver, self._search = likelihood, metric, solver, search
        self._damping, self._decay, self._refresh, self._seed = as_damping(damping), average, refresh, seed
        self._examination = Examination()
        self._steps = 0
        self._model: nn.Module | None = None
        self._wrapper: nn.Module | None = None
        self._follows = isinstance(model, nn.Module)  # whether parameters that become trainable join
        self._unbound()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": self._damping.value,
            "max_kl": getattr(search, "max_kl", None),
            "maximize": maximize,
        }
        if isinstance(model, nn.Module):
            super().__init__(check_parameters(Replicas.of(model)[0]), defaults)
            self.attach(model)
        else:
            super().__init__(model, defaults)

    def _unbound(self) -> None:
        # The parameters and their groups, while a step is taken.
        self._during: tuple[dict[str, nn.Parameter], dict[str, Group]] | None = None
        self._curvature: Curvature | None = None
        self._unknown = False  # whether a pass was seen whose output could not be told
        self._changed = False  # whether blocks changed (a parameter was frozen or unfrozen) since the last statistics

    def attach(self, model: nn.Module) -> NaturalGradient:
        """Observe ``model``, whose parameters this optimizer was made with; returns the optimizer.

        For optimizers made from parameters, before the first pass. Attaching again moves the observation to another
        module that holds the same parameters; its first pass is examined anew.

        Raises:
            ArgumentError: ``model`` is no module, or a parameter of the groups does not belong to it.
        """
        check_module(model)
        inner, replicas = Replicas.of(model)
        check_members(inner, (p for group in self.param_groups for p in group["params"]))
        check_places(self._placed, self.param_groups, inner)
        if self._model is not None:
            self._observer.detach()
        self._examination = self._examination.carried(self._model, inner)
        self._model, self._placed, self._replicas, self._whole = inner, None, replicas, StatisticsSum(replicas)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._device = parameters[0].device
        self._generator = torch.Generator(device=self._device)
        self._wrapper = model if model is not inner else None
        self._observer = Observer(inner, self._due, self._on_pass, self._wrapper, self._likelihood.check_gradient)
        self._unbound()
        if self._examination.uncovered is not None and any("step" in s for s in self.state.values()):
            self._curvature_for(self._partition())
        return self

    def detach(self) -> None:
        """Stop observing the module; :meth:`attach` starts again."""
        if self._model is not None:
            self._observer.detach()
            self._model, self._examination.again = None, True

    @property
    def _network(self) -> nn.Module:
        if self._model is None and hasattr(self, "_observer"):
            raise NotObservedError(
                "detach() has been called, so no module is observed, and curvature comes from its passes. Call "
                "optimizer.attach(model) to go on."
            )
        if self._model is None:
            raise NotObservedError(
                "This optimizer was made from parameters and does not know their module, so it cannot observe the "
                "forward pass that curvature comes from. Call optimizer.attach(model) before the first pass."
            )
        return self._model

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_real(enumerate(group["params"]))
            check_group(group, self._search)
            if self._model is not None:
                check_members(self._model, group["params"])
        except (ArgumentError, UnsupportedError):
            self.param_groups.pop()
            raise
        if checkpoint.DIVISION not in group:
            set_division(self.param_groups[:-1], group)
        group.setdefault(checkpoint.NOTE, "")
        self._changed = True

    def _named(self) -> dict[str, nn.Parameter]:
        """The trainable parameters that this optimizer moves, by their names in the module."""
        if self._during is not None:
            return self._during[0]
        trainable = trainable_parameters(self._network)
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        if self._follows and not all(id(p) in owned for p in trainable.values()):
            place = {id(p): i for i, p in enumerate(self._network.parameters())}
            joined = self.param_groups[0]["params"] + [p for p in trainable.values() if id(p) not in owned]
            self.param_groups[0]["params"] = sorted(joined, key=lambda p: place[id(p)])  # as if made with them
            return trainable
        return {name: p for name, p in trainable.items() if id(p) in owned}

    # Observation

    def _due(self) -> bool:
        """Whether statistics are to be taken from the next pass itself."""
        return not self._metric.replayed and self._statistics_due()

    def _statistics_due(self) -> bool:
        if not self._metric.needs_observation:
            return False
        if not self._metric.averaged or self._refresh.statistics_due(self._steps) or self._curvature is None:
            return True
        return self._changed or self._curvature.partition.order != tuple(self._named())

    def _on_pass(self, observation: Observation, output: Tensor) -> None:
        """Statistics right after the forward pass, while its graph is whole; later where the target is needed."""
        needs_target = self._metric.needs_target or self._likelihood.needs_target
        if observation.due and not needs_target:
            self._take_statistics(observation, output)

    def _take_statistics(self, observation: Observation, output: Tensor) -> None:
        self._likelihood.check_output(output)
        if not any(o.statistics is not None or o.capture is not None for o in self._observer.observations):
            self._reseed()
        with full_precision(self._device):
            part, share = self._part(observation, output)
            with observation.differentiating(output) if part is None else part.again() as tape:
                observation.skipped = not self._examined(observation.observed, tape)
                if observation.skipped:
                    return
                curvature = self._curvature_for(self._partition())
                statistics = self._metric.statistics(
                    tape, self._likelihood, observation.target, curvature.partition, generator=self._generator,
                    bases=self._bases(curvature), share=share,
                )  # fmt: skip
        observation.record(statistics)

    def _examined(self, observed: Pass, tape: Tape) -> bool:
        """Learn what a pass shows; False where it is the first one, and not finite."""
        if not self._examination.possible(tape):
            return False
        with torch.enable_grad():
            known = None if self._curvature is None else self._curvature.partition
            if self._examination.examine(self._metric, self._likelihood, tape, self._generator, known):
                self._reseed()  # so that the labels are those of a step without an examination
            if self._metric.sub_batch is not None or self._fit_fraction < 1.0:
                self._examination.divide(observed, tape)
        return True

    def _part(self, observation: Observation, output: Tensor) -> tuple[Pass, Share] | tuple[None, None]:
        """A part of the pass's batch, where the metric wants one and it is known that the model can be run on it."""
        wanted, n = self._metric.sub_batch, len(output)
        division = self._examination.division
        if wanted is None or division is None or division.whole:
            return None, None
        index = wanted.picks(self._generator).of(n, self._device)
        part = None if index is None else division.part(observation.observed, n, index)
        return (None, None) if part is None or index is None else (part, Share(index, output.detach()))

    def _bases(self, curvature: Curvature) -> Bases:
        """Eigenbases in use; none before the first step, where what is laid out for a checkpoint means nothing."""
        return dict(curvature.bases) if self._steps else {}

    def _reseed(self) -> None:
        """Start the sampled labels and signs of a step: they depend on seed, step, process and the step's passes."""
        words = np.random.SeedSequence((self._seed, self._steps, self._replicas.rank)).generate_state(1)
        self._generator.manual_seed(int(words[0]))

    def observe(self, output: Tensor, target: Target | None = None) -> None:
        """Say explicitly which output the loss is made of, between the forward pass and ``backward()``.

        Needed where the model returns something from which the output cannot be told, and where the curvature depends
        on the labels (``Empirical``, ``Hessian``, masks and class weights of ``Weighted``).

        Args:
            output: what the model's last training pass returned, or the tensor inside it.
            target: the labels of the batch.

        Raises:
            StaleTapeError: ``output`` is not of a pass recorded since the last step.
        """
        self._network  # noqa: B018  (an error where there is none)
        observation = self._observer.find(output)
        if target is not None:
            self._likelihood.check_output(output)
            self._likelihood.check_target(output, target)
            observation.target = target
        observation.explicit = True
        if observation.due and observation.statistics is None:
            ready = target is not None or not (self._metric.needs_target or self._likelihood.needs_target)
            if ready and not self._captured(observation):
                self._take_statistics(observation, unwrapped(output))

    def _captured(self, observation: Observation) -> bool:
        """Leave the statistics of a pass to the loss's own backward pass, where that may bring them."""
        curvature, tape, metric = self._curvature, observation.tape, self._metric
        source, f = None if observation.source is None else observation.source(), observation.output
        settled = curvature is not None and self._examination.settled and curvature.partition is self._partition()
        if not (metric.from_loss and settled) or observation.reached or tape is None or source is None or f is None:
            return False
        assert curvature is not None and isinstance(metric, Fisher)
        if not Capture.possible(tape, curvature.partition):
            return False
        if not any(o.statistics is not None or o.capture is not None for o in self._observer.observations):
            self._reseed()
        if observation.capture is not None:
            observation.capture.close()
        target, bases, seen = observation.target, self._bases(curvature), weakref.ref(observation)

        def then(take: Callable[[Observation], None]) -> None:
            if (of := seen()) is not None:
                take(of)

        observation.capture = Capture(
            tape, curvature.partition.cells, before_conversions(source),
            factor=lambda: metric.estimate.factor(self._likelihood, f, target, self._generator),
            reader=lambda factor: metric.structure.reader(tape, factor, self._generator, bases),
            done=lambda statistics: then(lambda of: of.record(statistics)),
            own=lambda: then(self._take_late),
        )  # fmt: skip
        return True

    def _take_late(self, observation: Observation) -> None:
        """Statistics that the loss's backward pass does not bring: from the graph, while that pass has not used it."""
        observation.capture, within = None, torch._C._current_graph_task_id() != -1
        source = observation.source() if within and observation.source is not None else None
        assert observation.output is not None
        with torch.enable_grad():
            if source is None:
                observation.tape = None  # it is run again
            output = observation.output if source is None else moved(source, observation.axes)
            self._take_statistics(observation, output)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; passes whose gradients are thus discarded do not count for the next step either."""
        super().zero_grad(set_to_none)
        if self._model is not None:
            self._observer.forget_reached()

    # The step

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: evaluates the model and returns ``(loss, output)`` or ``(loss, output, target)`` without calling
                ``backward``. A closure of torch's kind (calls ``backward``, returns the loss) is called once.

        Returns:
            The closure's loss, or None.

        Raises:
            NotObservedError: curvature is needed and no training pass was observed.
        """
        if self._model is None:
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            if self._idle():
                return loss
        self._network  # noqa: B018  (an error where there is none)
        for group in self.param_groups:  # whatever a schedule has made of it
            check_values(group)
        evaluation = evaluate(closure, self._observer, self._device, self.zero_grad, self.observe)
        with fresh_casts(), torch.inference_mode(False), torch.no_grad(), self._settled():  # replays need a graph
            self._take_step(evaluation)
        return evaluation.loss

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Which parameters are whose does not change inside, and is looked up once."""
        named = self._named()
        self._during = named, group_of(self.param_groups, named)
        try:
            yield
        finally:
            self._during = None

    def _take_step(self, evaluation: Evaluation) -> None:
        observations = self._take_observations()
        gradients = self._gradients()
        if not gradients or not self._ready(observations, gradients):
            return
        try:
            with full_precision(self._device):
                curvature = self._update_curvature(observations, gradients, in_loss(self._search, self._groups()))
                step, direction = self._search_step(curvature, gradients, observations, evaluation)
        except (ConvergenceError, NonFiniteError):
            if bool(all_finite(gradients)):
                raise
            self._last = skipped(self._damping)
            return
        self._apply(step, direction, gradients)
        curvature.release()
        self._steps += 1
        self._count()

    def _idle(self) -> bool:
        """Whether there is no gradient at all."""
        return not any(p.grad is not None and bool(p.grad.any()) for g in self.param_groups for p in g["params"])

    def _count(self) -> None:
        """Every parameter has a state of its own: torch.distributed.checkpoint wants one of each."""
        for p in self._named().values():
            self.state[p]["step"] = torch.tensor(float(self._steps), dtype=torch.float32)
        if not self.param_groups[0].get(checkpoint.NOTE):
            self._note_state()  # torch.distributed.checkpoint saves and loads only what is there

    def _prime(self, gradients: dict[str, Tensor]) -> None:
        """Lay out the whole state without any data: torch.distributed.checkpoint loads into what is there."""
        if self.state:
            return
        curvature = self._curvature_for(self._partition())
        if self._metric.averaged:
            empty = self._metric.no_statistics(self._network, curvature.partition)
            assert isinstance(empty, Moments)
            decay = in_loss(self._search, self._groups())
            curvature.prime(empty, self._dampings(curvature.partition, decay), self._solver)
        parameters = self._named()
        Momentum(self.state, parameters, factors(self._groups(), self._search)).prime(gradients, self._fitted)
        self._count()

    @torch.no_grad()
    def precondition_(self) -> None:
        """Replace every ``.grad`` by the natural gradient ``(F + λI)⁻¹ g``, for another optimizer to apply.

        A gradient that is not finite becomes zero.
        """
        self._network  # noqa: B018  (an error where there is none)
        observations = self._take_observations()
        gradients = self._gradients()
        if not gradients:
            return
        if not self._ready(observations, gradients):
            clear_unless_finite(gradients)
            return
        try:
            with full_precision(self._device):
                curvature = self._update_curvature(observations, gradients, {})
                direction = preconditioned(curvature, gradients)
        except (ConvergenceError, NonFiniteError):
            if bool(all_finite(gradients)):
                raise
            clear_unless_finite(gradients)
            return
        finite = all_finite(direction)
        for name, value in curvature.partition.unpack(direction).items():
            if name in gradients:
                gradients[name].copy_(torch.where(finite, value, 0.0))
        self._steps += 1

    def _take_observations(self) -> list[Observation]:
        self._unknown = self._observer.unknown
        observations = self._observer.take()
        for observation in observations:
            if observation.capture is not None:  # no backward pass, or only a part of one, has gone through the layers
                observation.capture.close()
                self._take_late(observation)
        if self._replicas.size > 1 and self._statistics_due():
            self._examination, agreed = self._examination.shared(self._replicas)
            for observation in observations:  # seen with blocks that other processes do not have
                observation.skipped = observation.skipped or not agreed
        return observations

    def _gradients(self) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for name, p in self._named().items():
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise UnsupportedError(f"The gradient of {name} is sparse, which natgrad does not support.")
                gradients[name] = p.grad
        strange = [n for n in sorted(self._examination.unreached) if n in gradients and bool(gradients[n].any())]
        if strange and self._statistics_due():
            raise UnsupportedError(
                f"{', '.join(strange[:5])} {'and others have' if len(strange) > 5 else 'has'} a gradient, but the "
                "observed output does not depend on it, so the metric knows nothing about it. Either the loss has a "
                "part that is not made of this output (freeze those parameters here, and train them with an optimizer "
                "of their own), or reentrant activation checkpointing hides it (use use_reentrant=False)."
            )
        # One that is reached for the first time while no statistics are due waits for them.
        return {n: g for n, g in gradients.items() if n not in strange}

    def _ready(self, observations: list[Observation], gradients: dict[str, Tensor]) -> bool:
        """Whether a step can be taken: none for zero gradients without any observation, none where all is NaN."""
        needed = self._statistics_due() or self._needs_probe() or self._metric.replayed
        poisoned, absent = bool(observations) and all(o.skipped for o in observations), not observations
        if needed:
            poisoned, absent = self._replicas.any(poisoned, absent)
        if poisoned:
            self._last = skipped(self._damping)
            return False
        if not needed or not absent or (not self._metric.needs_observation and not self._needs_probe()):
            return True
        if not any(bool(g.any()) for g in gradients.values()):
            self._prime(gradients)
            return False
        if self._unknown:
            raise NotObservedError(
                "step() found gradients, and a training pass of the model was seen, but not which tensor in what it "
                "returned the likelihood reads. Call opt.observe(output) before loss.backward(), or return "
                "(loss, output) from a closure."
            )
        raise NotObservedError(
            "step() found gradients, but no training pass of the model was observed since the last step. Run the model "
            "in training mode (model.train()) and not through a copy; if it is compiled, give the optimizer what "
            "torch.compile(model) returned; or pass a closure that returns (loss, output)."
        )

    def _groups(self) -> dict[str, Group]:
        """The group of each parameter, by name."""
        if self._during is not None:
            return self._during[1]
        return group_of(self.param_groups, self._named())

    def _partition(self) -> Partition:
        groups = self._groups()
        if (
            self._curvature is not None
            and self._curvature.partition.order == tuple(groups)
            and not self._examination.stale
        ):
            return self._curvature.partition
        parts = divisions(groups)
        if parts is None and len(groups) < len(trainable_parameters(self._network)):
            parts = [frozenset(groups)]
        return self._metric.partition(self._network, self._examination.uncovered, parts)

    def _dampings(self, partition: Partition, decay: dict[str, float]) -> dict[str, Any]:
        """The damping rule of each block, for a loss that includes ``decay``."""
        groups = self._groups()
        rules = {b.name: damping_of(groups[b.parameters[0]], self._damping) for b in partition.blocks}
        return penalised(rules, partition, decay, groups, self._named(), self._metric)

    def _curvature_for(self, partition: Partition) -> Curvature:
        if self._curvature is None or self._curvature.partition is not partition:
            if self._curvature is not None:
                self._curvature.forget_all_but(partition)
                self._changed, self._whole = True, StatisticsSum(self._replicas)
                for observation in self._observer.observations:  # seen with other blocks
                    observation.skipped = observation.statistics is not None
            self._curvature = Curvature(self._metric, partition, self._named(), self.state, self._decay, self._replicas)
            self._examination.stale = False
        return self._curvature

    def _update_curvature(
        self, observations: list[Observation], gradients: dict[str, Tensor], decay: dict[str, float]
    ) -> Curvature:
        if self._curvature is not None and any(o.statistics is not None for o in observations):
            curvature = self._curvature  # with the blocks of the observed pass, whatever was (un)frozen since
        else:
            curvature = self._curvature_for(self._partition())
        if self._statistics_due() and observations:
            statistics = self._statistics(observations, curvature.partition)
            curvature.update(self._whole(statistics), all_finite(gradients))
            self._changed = False
        if curvature.needs_refresh or self._refresh.inverse_due(self._steps):
            curvature.refresh(self._dampings(curvature.partition, decay), self._solver)
        elif isinstance(self._refresh, Staggered):
            number = self._refresh.share_due(self._steps)
            if number is not None and (due := curvature.share(number, self._refresh.inverse)):
                curvature.refresh(self._dampings(curvature.partition, decay), self._solver, due)
        return curvature

    def _statistics(self, observations: list[Observation], partition: Partition) -> Statistics:
        total: Statistics | None = None
        if self._metric.replayed:
            self._reseed()
        for observation in observations:
            if observation.skipped:
                continue
            if self._metric.replayed:
                with torch.enable_grad():
                    found: Any = self._metric.products(
                        observation.observed, self._likelihood, observation.target, partition, generator=self._generator
                    )
            else:
                found = observation.statistics
            if found is None:
                raise NotObservedError(
                    "The curvature of the observed pass needs its labels. Call opt.observe(output, target) before "
                    "loss.backward(), or return (loss, output, target) from the closure."
                )
            total = found if total is None else total + found
        assert total is not None
        return total

    @property
    def _fitted(self) -> bool:
        """Whether the search fits the momentum of every step, and so needs the step before."""
        return isinstance(self._search, QuadraticFit)

    @property
    def _fit_fraction(self) -> float:
        """Of a batch's examples, those on which a fit takes the exact curvature."""
        return self._search.fraction if isinstance(self._search, QuadraticFit) else 1.0

    def _fit_part(self, observation: Observation) -> tuple[Pass, Tensor] | None:
        """The examples on which a fit takes the exact curvature, and their indices; None for all."""
        division, output = self._examination.division, observation.output
        if self._fit_fraction == 1.0 or division is None or division.whole or output is None:
            return None
        # A stream of its own: the labels' stands elsewhere after a step without statistics than in a resumed run.
        words = np.random.SeedSequence((self._seed, self._steps, self._replicas.rank, 1)).generate_state(1)
        generator = torch.Generator(device=self._device).manual_seed(int(words[0]))
        assert isinstance(self._search, QuadraticFit)
        index = Sampling(self._fit_fraction, self._search.least).picks(generator).of(len(output), self._device)
        part = None if index is None else division.part(observation.observed, len(output), index)
        return None if part is None or index is None else (part, index)

    def _needs_probe(self) -> bool:
        return self._search.needs_probe or self._damping.needs_loss

    def _search_step(
        self,
        curvature: Curvature,
        gradients: dict[str, Tensor],
        observations: list[Observation],
        evaluation: Evaluation,
    ) -> tuple[Step, BlockVector]:
        """The step, and the direction it was found along, before rates of groups that differ."""
        partition, groups, parameters = curvature.partition, self._groups(), self._named()
        gradients = {n: -g if groups[n]["maximize"] else g for n, g in gradients.items()}
        decay = in_loss(self._search, groups)
        gradients = {n: g + decay[n] * parameters[n] if n in decay else g for n, g in gradients.items()}
        momentum, fitted = Momentum(self.state, parameters, factors(groups, self._search)), self._fitted
        averaged = momentum.averaged(gradients)
        gradient = partition.pack_present(gradients)
        same = all(averaged[n] is g for n, g in gradients.items())  # without momentum
        vectors = gradient if same else partition.pack_present(averaged)
        direction = preconditioned_vectors(curvature, averaged, vectors)
        probe, loss = None, None
        if self._needs_probe():
            sign = -1.0 if common(self.param_groups, "maximize", "the loss is measured.") else 1.0
            probe = ModelProbe(
                self._network, partition, self._likelihood, observations, evaluation.again, evaluation.random, decay,
                sign, self._replicas, self._fit_part,
            )  # fmt: skip
            known = evaluation.again is not None
            loss = probe.averaged(evaluation.loss) + probe.penalty() if known else probe.loss()
            if loss is None and self._damping.needs_loss:
                raise NotObservedError(
                    f"{type(self._damping).__name__} follows the measured change of the loss, and the loss is not "
                    "known. Call opt.observe(output, target) before loss.backward(), or give step() a closure."
                )
        penalty = curvature_of_penalty(partition, decay, parameters, curvature.operators)
        steps = []
        measured = self._needs_probe()
        if measured and hasattr(self._search, "max_kl"):
            common(self.param_groups, "max_kl", "one KL is measured for the whole step. Give them one radius.")
        for members in together(partition, direction, groups, measured):
            vectors = {name: direction[name] for name in members}
            of = [groups[n] for block in partition.blocks if block.name in members for n in block.parameters]
            dampings = {name: damping_of(groups[members[name]], self._damping) for name in members}
            reference = reference_rate(of)
            local = LocalModel(
                {name: gradient[name] for name in members},
                {name: self._curvature_of_loss(curvature.operators[name], groups[members[name]]) for name in members},
                {name: curvature.inverses[name] for name in members},
                next(iter(dampings.values())).value,
                loss=loss if isinstance(loss, Tensor) else None,
                previous=momentum.previous(partition, vectors, set(gradients)) if fitted else None,
                block_damping={name: dampings[name].amount(curvature.operators[name]) for name in members},
                penalty=penalty,
            )
            search = search_of(of[0], self._search)
            steps.append(search(local, at_rates(partition, vectors, groups, reference), reference, probe))
        step = joined(steps)
        if step.delta is not None:
            momentum.keep(averaged, all_finite(averaged))  # a rejected step leaves no trace in it
        if self._damping.needs_loss:
            due = not isinstance(self._damping, LevenbergMarquardt) or self._damping.due
            if due and step.delta is not None and step.loss_change_measured is None and probe is not None:
                step = step.measured(probe(step.delta), loss if isinstance(loss, Tensor) else None)
            if bool(all_finite(gradients)):  # a poisoned batch says nothing about λ
                self._adapt_damping(step)
        return step, direction

    def _curvature_of_loss(self, operator: LinearOperator, group: Group) -> LinearOperator:
        """The curvature of what is minimised: of −loss where it is maximised, if the metric is that of the loss."""
        return -1.0 * operator if group["maximize"] and isinstance(self._metric, Hessian) else operator

    def _adapt_damping(self, step: Step) -> None:
        """Let the rule judge the step; every group's λ follows it."""
        for group in self.param_groups:
            group["damping"] = damping_of(group, self._damping).update(step).value
        self._damping = self._damping.update(step)

    def _apply(self, step: Step, direction: BlockVector, gradients: dict[str, Tensor]) -> None:
        assert self._curvature is not None
        parameters, groups, partition = self._named(), self._groups(), self._curvature.partition
        keep = self._fitted
        if step.delta is not None:
            # A parameter without gradient stays, whatever its block, its weight decay or its last step say.
            change = {n: d for n, d in partition.unpack(step.delta).items() if n in gradients}
            addable = fits(parameters, change, step.delta)
            if isinstance(step.accepted, Tensor):
                step = replace(step, accepted=step.accepted & addable)
            elif not bool(addable):
                self._last = rejected(step.damping, "the sum of parameters and step overflows", tried=False)
                return
            accepted = torch.as_tensor(step.accepted, device=self._device)
            if not self._search.needs_probe:
                for name in change:
                    shrink(parameters[name], groups[name], accepted)
            if isinstance(self._metric, Euclidean) and isinstance(self._search, LearningRate):
                # One fused multiply-add, as torch.optim.SGD does it: the same bits.
                found = partition.unpack(direction)
                for name, d in ((name, found[name]) for name in change):
                    parameters[name].add_(torch.where(accepted, d, 0.0), alpha=-float(groups[name]["lr"]))
                change = {}
            for name, delta in change.items():
                parameters[name].add_(torch.where(accepted, delta, 0.0).to(parameters[name].dtype))
                if keep:
                    self.state[parameters[name]]["previous"] = delta
        self._last = replace(step, delta=None)

    # Reports

    def coverage(self) -> list[CoverageRow]:
        """How every trainable parameter is treated, and why; before the first observed pass: as far as types tell."""
        return coverage_rows(
            self._metric, self._partition(), "" if self._metric.sub_batch is None else self._examination.undivided
        )

    @property
    def last(self) -> Step | None:
        """What the last step did, without its vectors; None before the first. On a CPU it says why it was rejected."""
        return None if self._last is None else explained(self._last)  # here: the step itself reads no value

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step for any logger. Waits for the device."""
        if self.last is None:
            return {}
        return self.last.numbers()

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood the optimizer was made with."""
        return self._likelihood

    @property
    def damping(self) -> Damping:
        """The damping rule as it stands now."""
        return self._damping

    # State

    def state_dict(self) -> dict[str, Any]:
        """Tensors by parameter, and in the parameter groups plain values with what else a resumed run needs.

        Loads with ``weights_only=True`` and through ``torch.distributed.checkpoint``, which knows only tensors under
        parameters and plain values in groups.
        """
        self._note_state()
        return checkpoint.described(super().state_dict(), self.param_groups, self._model)

    def _note_state(self) -> None:
        self.param_groups[0][checkpoint.NOTE] = checkpoint.note(
            self._metric, self._steps, self._seed, self._damping, self._examination
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, all of it or nothing.

        Parameters are matched by their names in the module, so that one unfrozen late gets its own state back. Dtypes
        are kept, where torch's own method would cast them; only where the parameter itself has another dtype than when
        it was saved its tensors are cast.

        Raises:
            ArgumentError: the state is of another optimizer, metric or model, damaged, or its tensors are missing.
        """
        before = dict(vars(self))
        try:
            self._load(checkpoint.whole(state_dict))
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = checkpoint.whole(hook(self, state_dict) or state_dict)
        own = checkpoint.parsed(state_dict, self._metric, self._damping)
        if self._model is not None:
            self._named()  # what was unfrozen since then joins
        match = matched(state_dict, self.param_groups, self._model, self._follows)
        take_over(self, match)
        self._placed = names_in(match.state_dict) if self._model is None else None
        if own is not None:
            self._steps, self._seed = own.steps, own.seed
            self._examination = own.examination.renamed(names_here(self._model))
            self._damping = own.damping
        self._curvature = None
        known = self._examination.uncovered is not None or self._metric.replayed
        if known and self._model is not None and any("step" in s for s in self.state.values()):
            if match.fresh:  # blocks that they change start afresh, as when they are unfrozen during a run
                was = {n: group for n, group in self._groups().items() if n not in match.fresh}
                parts = divisions(was) or [frozenset(was)]
                self._curvature_for(self._metric.partition(self._model, self._examination.uncovered, parts))
            self._curvature_for(self._partition())
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """All but what is bound to this process and to the module's hooks; the module goes along.

        ``copy.deepcopy((model, optimizer))`` gives an optimizer that observes the copied model.
        """
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _COPIED if name in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" not in state:  # torch's load_state_dict sets groups and tensors in this way, too
            return
        model, self._model = self._model, None
        self._unbound()
        if model is not None:
            self.attach(self._wrapper or model)
