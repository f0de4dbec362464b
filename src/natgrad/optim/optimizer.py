"""The optimizer: observes training passes, keeps curvature, and turns gradients into natural-gradient steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from natgrad.distributed import Replicas, StatisticsSum
from natgrad.errors import ArgumentError, ConvergenceError, NonFiniteError, NotObservedError, UnsupportedError
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.linalg import Solver
from natgrad.metric import Euclidean, Fisher, Metric, Statistics
from natgrad.metric.running import Refresh
from natgrad.network import (
    BlockVector,
    Partition,
    RandomState,
    full_precision,
    trainable_parameters,
)
from natgrad.optim.checks import check_arguments, parse_evaluation
from natgrad.optim.curvature import Curvature
from natgrad.optim.examination import CoverageRow, Examination, coverage_rows
from natgrad.optim.observer import Observation, Observer, unwrapped
from natgrad.optim.probe import ModelProbe
from natgrad.step import Damping, LearningRate, LocalModel, QuadraticFit, Search, Step, as_damping
from natgrad.step.local import largest, rejected

Closure = Callable[[], Any]
_NOTE = "natgrad"


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
    does: there it is part of the loss, so that the bound holds for the whole change.

    A gradient that is not finite changes nothing: not the parameters, not the averages.

    Args:
        model: the network. Its trainable parameters are optimized.
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
        refresh: how often statistics and inverses are renewed.
        seed: of the sampled labels and signs; the global random streams are never touched.

    Raises:
        ArgumentError: an argument out of range; the message names it.

    Attributes:
        last: what the last step did (a :class:`natgrad.step.Step` without its vectors), None before the first.
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
        metric: Metric = Fisher(),
        solver: Solver | None = None,
        search: Search = LearningRate(),
        average: float = 0.95,
        refresh: Refresh = Refresh(),
        seed: int = 0,
    ) -> None:
        check_arguments(model, likelihood, lr, momentum, weight_decay, average, search)
        self.last: Step | None = None
        self._likelihood, self._metric, self._solver, self._search = likelihood, metric, solver, search
        self._damping, self._decay, self._refresh = as_damping(damping), average, refresh
        self._model, self._replicas = Replicas.of(model)
        self._whole = StatisticsSum(self._replicas)
        parameters = trainable_parameters(self._model)
        self._device = next(iter(parameters.values())).device
        self._seed, self._generator = seed, torch.Generator(device=self._device)
        self._curvature: Curvature | None = None
        self._examination = Examination()
        self._steps = 0
        self._unknown = False  # whether a pass was seen whose output could not be told
        self._changed = False  # whether blocks changed (a parameter was frozen or unfrozen) since the last statistics
        wrapper = model if model is not self._model else None
        self._observer = Observer(self._model, self._wants_tape, self._on_pass, wrapper)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": False}
        super().__init__(list(parameters.values()), defaults)
        self.param_groups[0][_NOTE] = ""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise UnsupportedError(
                "natgrad takes its parameters from the model: unfreeze them with requires_grad_(True) and they are "
                "picked up at the next step. Several parameter groups are not supported yet."
            )
        super().add_param_group(param_group)

    # Observation

    def _wants_tape(self) -> bool:
        metric = self._metric
        return metric.needs_observation and not metric.replayed and self._statistics_due()

    def _statistics_due(self) -> bool:
        if not self._metric.needs_observation:
            return False
        if not self._metric.averaged or self._refresh.statistics_due(self._steps) or self._curvature is None:
            return True
        return self._changed or self._curvature.partition.order != tuple(trainable_parameters(self._model))

    def _on_pass(self, observation: Observation, output: Tensor) -> None:
        """Statistics right after the forward pass, while its graph is whole; later where the target is needed."""
        needs_target = self._metric.needs_target or self._likelihood.needs_target
        if observation.tape is not None and not needs_target:
            self._take_statistics(observation, output)

    def _take_statistics(self, observation: Observation, output: Tensor) -> None:
        self._likelihood.check_output(output)
        if not any(o.statistics is not None for o in self._observer.observations):
            self._reseed()
        with full_precision(self._device), observation.differentiating(output) as tape:
            observation.skipped = not self._examination.possible(tape, output)
            if observation.skipped:
                return
            with torch.enable_grad():
                self._examination.examine(self._metric, self._likelihood, tape, output, self._generator)
            curvature = self._curvature_for(self._partition())
            bases = dict(curvature.bases)
            for other in self._observer.observations:
                bases |= getattr(other.statistics, "bases", {})
            observation.statistics = self._metric.statistics(
                tape, self._likelihood, observation.target, curvature.partition, generator=self._generator, bases=bases
            )
        observation.tape = None  # the layers' inputs are no longer needed

    def _reseed(self) -> None:
        """Start the sampled labels and signs of a step: they depend on nothing but seed, step and process."""
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
        observation = self._observer.find(output)
        if target is not None:
            self._likelihood.check_output(output)
            self._likelihood.check_target(output, target)
            observation.target = target
        observation.explicit = True
        if observation.tape is not None and observation.statistics is None:
            ready = target is not None or not (self._metric.needs_target or self._likelihood.needs_target)
            if ready:
                self._take_statistics(observation, unwrapped(output))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; passes whose gradients are thus discarded do not count for the next step either."""
        super().zero_grad(set_to_none)
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
        loss, again, random = self._evaluate(closure)
        observations = self._take_observations()
        gradients = self._gradients()
        if not gradients or not self._ready(observations, gradients):
            return loss
        try:
            with full_precision(self._device):
                curvature = self._update_curvature(observations, gradients)
                step, direction = self._search_step(curvature, gradients, observations, loss, again, random)
        except (ConvergenceError, NonFiniteError):
            if bool(_all_finite(gradients)):
                raise
            self.last = _skipped(self._damping)
            return loss
        self._apply(step, direction)
        self._steps += 1
        for p in self.param_groups[0]["params"]:
            if p in self.state:
                self.state[p]["step"] = torch.tensor(float(self._steps))
        if not self.param_groups[0].get(_NOTE):
            self._note_state()  # torch.distributed.checkpoint saves and loads only what is there
        return loss

    @torch.no_grad()
    def precondition_(self) -> None:
        """Replace every ``.grad`` by the natural gradient ``(F + λI)⁻¹ g``, for another optimizer to apply.

        A gradient that is not finite becomes zero.
        """
        observations = self._take_observations()
        gradients = self._gradients()
        if not gradients or not self._ready(observations, gradients):
            return
        try:
            with full_precision(self._device):
                curvature = self._update_curvature(observations, gradients)
                direction = self._precondition(curvature, gradients)
        except (ConvergenceError, NonFiniteError):
            if bool(_all_finite(gradients)):
                raise
            for grad in gradients.values():
                grad.zero_()
            return
        finite = _all_finite(direction)
        for name, value in curvature.partition.unpack(direction).items():
            if name in gradients:
                gradients[name].copy_(torch.where(finite, value, 0.0))
        self._steps += 1

    def _take_observations(self) -> list[Observation]:
        self._unknown = self._observer.unknown
        observations = self._observer.take()
        if self._replicas.size > 1 and self._statistics_due():
            self._examination, agreed = self._examination.shared(self._replicas)
            for observation in observations:  # seen with blocks that other processes do not have
                observation.skipped = observation.skipped or not agreed
        return observations

    def _evaluate(self, closure: Closure | None) -> tuple[Any, Closure | None, RandomState | None]:
        if closure is None:
            return None, None, None
        random = RandomState.capture(self._device)
        with torch.enable_grad(), self._observer.forced():
            result = closure()
        evaluation = parse_evaluation(result)
        if evaluation is None:
            return result, None, None
        loss, output, target = evaluation
        if not loss.requires_grad:
            raise ArgumentError(
                "The closure's loss has no graph: it was detached, computed under no_grad, or the closure already "
                "called backward(). Return (loss, output) straight from the computation."
            )
        if self._observer.reached(output):
            raise ArgumentError(
                "The closure called backward() and returned (loss, output). Return them without calling backward(): "
                "step() does it, and may evaluate the closure again."
            )
        self.zero_grad()
        with torch.enable_grad():
            self.observe(output, target)
            # The closure may have run the model more than once; the output it returned is what counts.
            self._observer.keep(self._observer.find(output))
            loss.backward()

        kind = self._device.type
        casting = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

        def again() -> tuple[Tensor, Tensor]:
            with self._observer.paused(), torch.autocast(kind, **casting):
                value = parse_evaluation(closure())
            assert value is not None
            return value[0], value[1]

        return loss.detach(), again, random

    def _gradients(self) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for name, p in trainable_parameters(self._model).items():
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
        skipped, absent = bool(observations) and all(o.skipped for o in observations), not observations
        if needed:
            skipped, absent = self._replicas.any(skipped, absent)
        if skipped:
            self.last = _skipped(self._damping)
            return False
        if not needed or not absent or (not self._metric.needs_observation and not self._needs_probe()):
            return True
        if not any(bool(g.any()) for g in gradients.values()):
            return False
        if self._unknown:
            raise NotObservedError(
                "step() found gradients, and a training pass of the model was seen, but not which tensor in what it "
                "returned the likelihood reads. Call opt.observe(output) before loss.backward(), or return "
                "(loss, output) from a closure."
            )
        raise NotObservedError(
            "step() found gradients, but no training pass of the model was observed since the last step. Run the model "
            "in training mode (model.train()) and not through a copy; if it was compiled after the optimizer was made, "
            "give the optimizer the compiled model; or pass a closure that returns (loss, output)."
        )

    def _partition(self) -> Partition:
        names = tuple(trainable_parameters(self._model))
        if self._curvature is not None and self._curvature.partition.order == names and not self._examination.stale:
            return self._curvature.partition
        return self._metric.partition(self._model, self._examination.uncovered)

    def _curvature_for(self, partition: Partition) -> Curvature:
        if self._curvature is None or self._curvature.partition is not partition:
            parameters = trainable_parameters(self._model)
            known = {id(p) for p in self.param_groups[0]["params"]}
            self.param_groups[0]["params"] += [p for p in parameters.values() if id(p) not in known]
            if self._curvature is not None:
                self._curvature.forget_all_but(partition)
                self._changed = True
                for observation in self._observer.observations:  # seen with other blocks
                    observation.skipped = observation.statistics is not None
            self._curvature = Curvature(self._metric, partition, parameters, self.state, self._decay, self._replicas)
            self._examination.stale = False
        return self._curvature

    def _update_curvature(self, observations: list[Observation], gradients: dict[str, Tensor]) -> Curvature:
        if self._curvature is not None and any(o.statistics is not None for o in observations):
            curvature = self._curvature  # with the blocks of the observed pass, whatever was (un)frozen since
        else:
            curvature = self._curvature_for(self._partition())
        if self._statistics_due() and observations:
            statistics = self._statistics(observations, curvature.partition)
            curvature.update(self._whole(statistics, curvature.bases), _all_finite(gradients))
            self._changed = False
        if curvature.needs_refresh or self._refresh.inverse_due(self._steps):
            curvature.refresh(self._damping, self._solver)
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

    def _needs_probe(self) -> bool:
        return self._search.needs_probe or self._damping.needs_loss

    def _precondition(self, curvature: Curvature, gradients: dict[str, Tensor]) -> BlockVector:
        vectors = self._pack(curvature.partition, gradients)
        direction = {name: curvature.inverses[name].matvec(v).to(v.dtype) for name, v in vectors.items()}
        moved = curvature.partition.unpack(direction)
        if len(moved) == len(gradients):
            return direction
        # A parameter without gradient stays where it is, even where its block couples it to others.
        return self._pack(curvature.partition, {n: d for n, d in moved.items() if n in gradients})

    @staticmethod
    def _pack(partition: Partition, tensors: dict[str, Tensor]) -> BlockVector:
        """Vectors of the blocks that have any gradient; a missing one inside such a block counts as zero."""
        shapes = partition.shapes
        out: BlockVector = {}
        for block in partition.blocks:
            present = [n for n in block.parameters if n in tensors]
            if present:
                like = tensors[present[0]]
                whole = {n: tensors[n] if n in tensors else like.new_zeros(shapes[n]) for n in block.parameters}
                out[block.name] = block.pack(whole)
        return out

    def _search_step(
        self,
        curvature: Curvature,
        gradients: dict[str, Tensor],
        observations: list[Observation],
        loss: Any,
        again: Closure | None,
        random: RandomState | None,
    ) -> tuple[Step, BlockVector]:
        group, partition = self.param_groups[0], curvature.partition
        lr, decay = group["lr"], group["weight_decay"]
        # QuadraticFit fits the momentum of every step; what a scheduler cycles in the group is not added to it.
        momentum = 0.0 if isinstance(self._search, QuadraticFit) else group["momentum"]
        parameters = trainable_parameters(self._model)
        if group["maximize"]:
            gradients = {n: -g for n, g in gradients.items()}
        if decay and self._search.needs_probe:
            gradients = {n: g + decay * parameters[n] for n, g in gradients.items()}
        averaged = self._with_momentum(gradients, momentum)
        direction = self._precondition(curvature, averaged)
        gradient = self._pack(partition, gradients)
        probe = None
        if self._needs_probe():
            penalty = decay if self._search.needs_probe else 0.0
            probe = ModelProbe(
                self._model, partition, self._likelihood, observations, again, random, penalty, self._replicas
            )
            loss = probe.loss() if again is None else probe.averaged(loss) + probe.penalty()
            if loss is None and self._damping.needs_loss:
                raise NotObservedError(
                    f"{type(self._damping).__name__} follows the measured change of the loss, and the loss is not "
                    "known. Call opt.observe(output, target) before loss.backward(), or give step() a closure."
                )
        local = LocalModel(
            gradient,
            {n: curvature.operators[n] for n in direction},
            {n: curvature.inverses[n] for n in direction},
            self._damping.value,
            loss=loss if isinstance(loss, Tensor) else None,
            previous=self._previous(partition, direction),
            block_damping={n: self._damping.amount(curvature.operators[n]) for n in direction},
        )
        step = self._search(local, direction, lr, probe)
        if momentum and step.delta is not None:
            self._keep_momentum(averaged, gradients)  # a rejected step leaves no trace in it
        if self._damping.needs_loss:
            if step.delta is not None and step.loss_change_measured is None and probe is not None:
                step = step.measured(probe(step.delta), local.loss)
            self._damping = self._damping.update(step)
        return step, direction

    def _with_momentum(self, gradients: dict[str, Tensor], momentum: float) -> dict[str, Tensor]:
        """``m ← μ m + g``, not kept yet."""
        if not momentum:
            return gradients
        parameters = trainable_parameters(self._model)
        averaged: dict[str, Tensor] = {}
        for name, g in gradients.items():
            before = self.state[parameters[name]].get("momentum")
            averaged[name] = g.clone() if before is None else before * momentum + g
        return averaged

    def _keep_momentum(self, averaged: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Keep ``averaged`` for the next step; what was there stays where the gradient is not finite."""
        parameters = trainable_parameters(self._model)
        finite = _all_finite(gradients)
        for name, m in averaged.items():
            state = self.state[parameters[name]]
            state["momentum"] = torch.where(finite, m, state.get("momentum", torch.zeros_like(m)))

    def _previous(self, partition: Partition, direction: BlockVector) -> BlockVector | None:
        if not isinstance(self._search, QuadraticFit):
            return None
        parameters = trainable_parameters(self._model)
        found = {n: self.state[p]["previous"] for n, p in parameters.items() if "previous" in self.state[p]}
        if not found:
            return None
        vectors = self._pack(partition, found)
        return {name: vectors.get(name, torch.zeros_like(d)) for name, d in direction.items()}

    def _apply(self, step: Step, direction: BlockVector) -> None:
        group = self.param_groups[0]
        assert self._curvature is not None
        parameters = dict(self._model.named_parameters())
        keep = isinstance(self._search, QuadraticFit)
        if step.delta is not None:
            change = self._curvature.partition.unpack(step.delta)
            accepted = torch.as_tensor(step.accepted, device=self._device)
            if group["weight_decay"] and not self._search.needs_probe:
                shrink = 1 - group["lr"] * group["weight_decay"]
                for p in (parameters[name] for name in change):
                    # Not in p's own precision: bfloat16 knows nothing between 0.996 and 1.
                    factor = torch.as_tensor(shrink, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
                    p.mul_(torch.where(accepted, factor, torch.ones_like(factor)))
            if isinstance(self._metric, Euclidean) and isinstance(self._search, LearningRate):
                # One fused multiply-add, as torch.optim.SGD does it: the same bits.
                for name, d in self._curvature.partition.unpack(direction).items():
                    parameters[name].add_(torch.where(accepted, d, 0.0), alpha=-float(group["lr"]))
                change = {}
            for name, delta in change.items():
                parameters[name].add_(delta.to(parameters[name].dtype))
                if keep:
                    self.state[parameters[name]]["previous"] = delta
        self.last = replace(step, delta=None)

    # Reports

    def coverage(self) -> list[CoverageRow]:
        """How every trainable parameter is treated, and why; before the first observed pass: as far as types tell."""
        return coverage_rows(self._metric, self._partition())

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step for any logger. Waits for the device."""
        if self.last is None:
            return {}
        step = self.last
        values = {
            "lr": step.lr,
            "accepted": step.accepted,
            "damping": step.damping,
            "backtracks": step.backtracks,
            "kl_predicted": step.kl_predicted,
            "kl_measured": step.kl_measured,
            "loss_change_predicted": step.loss_change_predicted,
            "loss_change_measured": step.loss_change_measured,
            "ratio": step.ratio,
        }
        return {f"natgrad/{name}": float(value) for name, value in values.items() if value is not None}

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
        """Tensors by parameter, and in the parameter group one text with what else a resumed run needs.

        Loads with ``weights_only=True`` and through ``torch.distributed.checkpoint``, which knows only tensors under
        parameters and plain values in groups.
        """
        self._note_state()
        return super().state_dict()

    def _note_state(self) -> None:
        """Write what is not a tensor of a parameter where checkpoints look: as a text in the group."""
        self.param_groups[0][_NOTE] = json.dumps(
            {
                "metric": repr(self._metric),
                "steps": self._steps,
                "seed": self._seed,
                "damping": dict(self._damping.state()),
                **self._examination.state(),
            }
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave. Dtypes are kept, where torch's own method would cast them.

        Raises:
            ArgumentError: the state is of another metric, or its tensors are missing.
        """
        incoming = {**state_dict, "param_groups": [dict(g) for g in state_dict["param_groups"]]}
        own = json.loads(incoming["param_groups"][0].get(_NOTE) or "null")
        if own is not None:
            self._check_saved(own, state_dict["state"])
        super().load_state_dict(incoming)
        parameters = [p for g in self.param_groups for p in g["params"]]
        order = [i for g in incoming["param_groups"] for i in g["params"]]
        for p, i in zip(parameters, order, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(device=p.device if value.dim() else value.device, copy=True)
        if own is not None:
            self._steps, self._seed, self._examination = own["steps"], own["seed"], Examination.restored(own)
            self._damping = self._damping.restored(own["damping"])
        self._curvature = None
        if any("step" in s for s in self.state.values()) and (
            self._examination.uncovered is not None or self._metric.replayed
        ):
            self._curvature_for(self._partition())

    def _check_saved(self, own: dict[str, Any], state: dict[Any, Any]) -> None:
        if own["metric"] != repr(self._metric):
            raise ArgumentError(
                f"The state is of an optimizer with metric {own['metric']}, and this one has {self._metric!r}. Their "
                "averages do not fit each other: load it into an optimizer with the same metric, or start afresh."
            )
        if own["steps"] and not state:
            raise ArgumentError(
                f"The state is of an optimizer that has taken {own['steps']} steps, but holds no tensors. "
                "torch.distributed.checkpoint loads only what the optimizer already has: take one step before loading."
            )


def _all_finite(tensors: dict[str, Tensor]) -> Tensor:
    """Whether every entry is finite, 0-d; no wait for the device."""
    return torch.isfinite(largest(tensors))


def _skipped(damping: Damping) -> Step:
    """The record of a step that was not taken because its gradient is not finite."""
    return rejected(damping.value, "the gradient is not finite", tried=False, predicted=math.nan)
