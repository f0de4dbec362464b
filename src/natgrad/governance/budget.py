"""A hard limit on how far an update moves a model, around any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.errors import ArgumentError, BudgetError, ShapeError
from natgrad.governance.decision import AtLimit, BudgetReport, Decision
from natgrad.governance.ledger import Ledger
from natgrad.governance.probe import ProbeMeter, ProbeSet
from natgrad.governance.snapshot import OptimizerSnapshot, assign, between, copied, differing, movable
from natgrad.likelihood import Likelihood

_STATE = "kl_budget"
# The budget counts as spent when this share of it is left. Steps that spend a part of what is left never end.
_FLOOR = 0.01
# Of the shortening that the secant predicts, so that the next trial lies inside the limit; and the range of one cut.
_SAFETY, _LEAST_CUT, _MOST_CUT = 0.95, 0.95, 1e-3


@dataclass(frozen=True)
class _Trial:
    """The model's state at one point of the way from old to new, and how far that is."""

    scale: float
    output: Tensor
    step: float
    reference: float


class KLBudget(Optimizer):
    """Wraps any torch optimizer so that no update moves the model further than allowed.

    After the optimizer's own step, mean KL(old ‖ new) and mean KL(new ‖ reference) are measured on a probe set, exactly
    (all of the output distribution, no sampling of labels), with the model in evaluation mode. An update beyond a limit
    is shortened along its own direction until it is within, or undone bit for bit. What is measured is what is applied:
    the limits hold for the numbers as stored, whatever their precision. They hold on the probe set; for other inputs
    it is a sample.

    "Old" is the model as it was after the last ``step()``: running statistics that moved in between belong to the
    update, and are shortened and undone with it. Where someone else changed *parameters* in between, the model as it is
    then becomes the new "old", and the ledger records the change as ``"outside"``. It counts against the budget to the
    reference, which is always measured, never added up. A budget is spent when less than 1 % of it is left; from then
    on ``step()`` does nothing, but undo what moved running statistics.

    The optimizer's state (momentum, moments, counters) is its own after an accepted or a shortened update, and put back
    after an undone one. Shortening does not change it: the gradients that were seen were seen.

    Schedulers, gradient scalers and trainers take it in the optimizer's place: it has the same groups and state. It
    waits for the device at every step.

    Args:
        optimizer: does the updates. Parameters of it that are outside ``model`` (a value head) move and are undone with
            the rest.
        model: the network that is guarded.
        likelihood: what its output means.
        probe: inputs, or a :class:`ProbeSet` with weights.
        per_step: limit of KL(old ‖ new) for each update; None for no limit.
        to_reference: limit of KL(new ‖ reference), where the reference is the model now; None for no limit.
        ledger: where every update is recorded, before ``step()`` returns. If that fails, the update is undone.
        at_limit: ``"shrink"``, ``"skip"`` or ``"halt"``.
        backtracks: how often an update may be shortened.

    Raises:
        ArgumentError: an argument that will not do; a model whose output on the probe set is not reproducible, or whose
            precision is too coarse for the limits.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        likelihood: Likelihood,
        probe: Any,
        *,
        per_step: float | None = None,
        to_reference: float | None = None,
        ledger: Ledger | None = None,
        at_limit: AtLimit | str = AtLimit.SHRINK,
        backtracks: int = 10,
    ) -> None:
        _check(optimizer, model, likelihood, per_step, to_reference, ledger, backtracks)
        try:
            self._at_limit = AtLimit(at_limit)
        except ValueError:
            raise ArgumentError(f"at_limit={at_limit!r} was given; it is one of {[str(a) for a in AtLimit]}.") from None
        self._optimizer, self._model = optimizer, model
        self._per_step, self._to_reference, self._backtracks = per_step, to_reference, backtracks
        super().__setstate__({})  # hooks of its own; groups, state and defaults are the optimizer's
        self._meter = ProbeMeter(model, likelihood, probe if isinstance(probe, ProbeSet) else ProbeSet(probe))
        self._known = copied(movable(model, optimizer))
        self._output = self._reference = self._meter.output()
        self._check_resolution()
        self._ledger = ledger
        self._steps, self._path, self._exhausted = 0, 0.0, False
        self.last: BudgetReport | None = None
        self._note("budget", self._description())

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Let the optimizer take a step, and keep of it what the limits allow.

        Args:
            closure: handed on to the optimizer.

        Returns:
            What the optimizer's step returns; None, without trying one, when the budget is spent.

        Raises:
            BudgetError: ``at_limit`` is ``"halt"``, and the update went beyond a limit or the budget is spent.
            LedgerError: the update could not be recorded.

        Whatever is raised, also by the optimizer or the closure: the update has been undone.
        """
        self._rebase()
        if self._exhausted:
            return self._refuse()
        state = OptimizerSnapshot.take(self._optimizer)
        try:
            result = self._optimizer.step() if closure is None else self._optimizer.step(closure)
            report, taken, values = self._decide()
            if taken is None:
                self._undo(state)
            elif values:
                assign(movable(self._model, self._optimizer), values)
            self._note("update", {**asdict(report), "lr": [g.get("lr") for g in self.param_groups]})
        except BaseException:
            self._undo(state)
            raise
        self._settle(report, taken)
        if not report.accepted and self._at_limit is AtLimit.HALT:
            raise BudgetError(
                f"Update {report.step} was undone: {report.reason}. Lower the learning rate, raise the limit, or use "
                "at_limit='shrink'."
            )
        return result

    def _decide(self) -> tuple[BudgetReport, _Trial | None, dict[str, Tensor]]:
        """What to do with the step that was just taken, and the values to assign where it is shortened."""
        proposed = self._measure(1.0, {})
        trial, values, cuts, reason = proposed, {}, 0, self._violation(proposed)
        if reason and self._at_limit is AtLimit.SHRINK:
            new = copied(movable(self._model, self._optimizer))
            while self._violation(trial) and cuts < self._backtracks:
                cuts += 1
                scale = trial.scale * self._cut(trial)
                values = {n: between(old, new[n], scale) for n, old in self._known.items() if n in new}
                trial = self._measure(scale, values)
        taken = None if self._violation(trial) else trial
        if taken is None and cuts:
            reason = f"{reason}; after {cuts} cuts, at {trial.scale:.3g} of it: {self._violation(trial)}"
        decision = Decision.REJECTED if taken is None else Decision.SHRUNK if cuts else Decision.ACCEPTED
        return self._report(decision, reason, proposed, taken, cuts), taken, values

    def _measure(self, scale: float, values: Mapping[str, Tensor]) -> _Trial:
        """How far the model is with ``values`` in place of what it holds."""
        output = self._meter.output({n: v for n, v in values.items() if not n.startswith("optimizer[")})
        return _Trial(scale, output, self._meter.kl(self._output, output), self._meter.kl(output, self._reference))

    def _violation(self, trial: _Trial) -> str:
        """Which limit a trial is beyond; an empty text where it is within all."""
        if not math.isfinite(trial.step) or not math.isfinite(trial.reference):
            return f"KL(old ‖ new) is {trial.step} and KL(new ‖ reference) {trial.reference}"
        if self._per_step is not None and trial.step > self._per_step:
            return f"KL(old ‖ new) is {trial.step:.4g}, above per_step={self._per_step:g}"
        if self._to_reference is not None and trial.reference > self._to_reference:
            return f"KL(new ‖ reference) is {trial.reference:.4g}, above to_reference={self._to_reference:g}"
        return ""

    def _cut(self, trial: _Trial) -> float:
        """Factor by which to shorten a trial: √KL is near linear in the length, so follow its secant."""
        if not math.isfinite(trial.step) or not math.isfinite(trial.reference):
            return 0.1
        start = self._meter.kl(self._output, self._reference)
        cuts = [1.0]
        for limit, at, origin in ((self._per_step, trial.step, 0.0), (self._to_reference, trial.reference, start)):
            if limit is not None and at > limit:
                room, rise = math.sqrt(limit) - math.sqrt(min(origin, limit)), math.sqrt(at) - math.sqrt(origin)
                cuts.append(room / rise if rise > 0 else 0.0)
        return min(max(_SAFETY * min(cuts), _MOST_CUT), _LEAST_CUT)

    def _report(
        self, decision: Decision, reason: str, proposed: _Trial | None, taken: _Trial | None, cuts: int
    ) -> BudgetReport:
        reference = self._meter.kl(self._output, self._reference) if taken is None else taken.reference
        moved = 0.0 if taken is None else taken.step
        scale = 0.0 if taken is None else taken.scale
        predicted = getattr(getattr(self._optimizer, "last", None), "kl_predicted", None)
        return BudgetReport(
            step=self._steps + 1,
            decision=decision,
            reason=reason,
            scale=scale,
            backtracks=cuts,
            kl_step=moved,
            kl_proposed=0.0 if proposed is None else proposed.step,
            kl_predicted=None if predicted is None or proposed is None else scale**2 * float(predicted),
            kl_reference=reference,
            budget_left=None if self._to_reference is None else self._to_reference - reference,
            path_length=self._path + math.sqrt(2 * moved),
        )

    def _undo(self, state: OptimizerSnapshot) -> None:
        now = movable(self._model, self._optimizer)
        assign(now, {n: v for n, v in self._known.items() if n in now})
        state.restore()

    def _settle(self, report: BudgetReport, taken: _Trial | None) -> None:
        """Make the present state the one that the next update starts from."""
        self.last, self._steps, self._path = report, report.step, report.path_length
        if taken is not None:
            self._output = taken.output
            for name, t in movable(self._model, self._optimizer).items():
                self._known[name].copy_(t.detach())
        self._exhausted = report.budget_left is not None and report.budget_left < _FLOOR * (self._to_reference or 0.0)

    def _refuse(self) -> None:
        """Keep the model where it is; running statistics that a training pass has moved are put back."""
        now = dict(self._model.named_buffers())
        assign(now, {n: v for n, v in self._known.items() if n in now})
        if self.last is None or self.last.decision is not Decision.EXHAUSTED:
            reason = f"less than {_FLOOR:.0%} of to_reference={self._to_reference:g} is left"
            report = self._report(Decision.EXHAUSTED, reason, None, None, 0)
            self._note("update", asdict(report))
            self.last, self._steps = report, report.step
        if self._at_limit is AtLimit.HALT:
            raise BudgetError(
                f"The budget is spent: {self.last.reason}. Stop here, or start a new budget from this model on purpose."
            )

    def _rebase(self) -> None:
        """Start from the present parameters where someone else has changed them, and say so."""
        now = movable(self._model, self._optimizer)
        buffers = dict(self._model.named_buffers())
        if not differing(
            {n: t for n, t in now.items() if n not in buffers},
            {n: t for n, t in self._known.items() if n not in buffers},
        ):
            return
        before, known = self._output, copied(now)
        output = self._meter.output()
        kl = {"kl_step": self._meter.kl(before, output), "kl_reference": self._meter.kl(output, self._reference)}
        self._note("outside", {"after_step": self._steps, **kl})
        self._known, self._output = known, output

    def _check_resolution(self) -> None:
        """Refuse limits that the model's own noise or rounding would decide about."""
        again = self._meter.output()
        noise = self._meter.kl(self._output, again)
        finest = 4 * torch.finfo(torch.promote_types(again.dtype, torch.float32)).eps
        for name, limit in (("per_step", self._per_step), ("to_reference", self._to_reference)):
            if limit is not None and not noise < 0.1 * limit:
                raise ArgumentError(
                    f"{name}={limit:g} was given, but two evaluations of the unchanged model on the probe set differ "
                    f"by a KL of {noise:.3g}: it draws random numbers in evaluation mode, or keeps a state. Make it "
                    "deterministic, or raise the limit to well above that."
                )
            if limit is not None and limit < finest:
                raise ArgumentError(
                    f"{name}={limit:g} was given, below what a KL in this precision resolves ({finest:.2g}). Raise "
                    "the limit, or evaluate the model in float64."
                )

    # The record

    def _note(self, kind: str, data: Mapping[str, Any]) -> None:
        if self._ledger is not None:
            self._ledger.append(kind, data)

    def _description(self) -> dict[str, Any]:
        return {
            "per_step": self._per_step,
            "to_reference": self._to_reference,
            "at_limit": str(self._at_limit),
            "backtracks": self._backtracks,
            "optimizer": type(self._optimizer).__qualname__,
            "likelihood": repr(self._meter.likelihood),
            "probe_sha256": self._meter.digest,
            "probe_predictions": self._meter.predictions,
            "unit": "nats per prediction",
            "torch": torch.__version__,
        }

    @property
    def exhausted(self) -> bool:
        """Whether the budget to the reference is spent: time to leave the training loop."""
        return self._exhausted

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer inside."""
        return self._optimizer

    # What schedulers, scalers and trainers ask of an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizer's groups themselves: a scheduler that changes them changes the optimizer."""
        return self._optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The optimizer's state itself."""
        return self._optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's defaults."""
        return self._optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's."""
        self._optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the optimizer's."""
        self._optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and, under ``"kl_budget"``, the reference outputs and what has been spent."""
        own = {
            "reference": self._reference,
            "probe_sha256": self._meter.digest,
            "steps": self._steps,
            "path_length": self._path,
            "exhausted": self._exhausted,
        }
        return {**self._optimizer.state_dict(), _STATE: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, so that a resumed run is measured against the original reference.

        A state of the bare optimizer is taken too; the reference then stays the model this guard was made with. Load
        the model's own state before.

        Raises:
            ArgumentError: the state is of another probe set.
        """
        state = dict(state_dict)
        own = state.pop(_STATE, None)
        if own is not None:
            reference = own["reference"].to(self._reference.device)
            if own["probe_sha256"] != self._meter.digest:
                raise ArgumentError(
                    "The state is of a budget with another probe set, on which its reference was measured. Give the "
                    "same probe inputs and weights, or start a new budget on purpose."
                )
            if reference.shape != self._reference.shape:
                raise ShapeError(
                    f"The state's reference outputs have shape {tuple(reference.shape)}, but the model's have "
                    f"{tuple(self._reference.shape)}."
                )
        self._optimizer.load_state_dict(state)
        self._known, self._output = copied(movable(self._model, self._optimizer)), self._meter.output()
        if own is not None:
            self._reference = reference.to(self._output.dtype, copy=True)
            self._steps, self._path, self._exhausted = own["steps"], own["path_length"], own["exhausted"]
            self.last = None
            kl = self._meter.kl(self._output, self._reference)
            self._note("resume", {"after_step": self._steps, "kl_reference": kl})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __repr__(self) -> str:
        limits = f"per_step={self._per_step}, to_reference={self._to_reference}, at_limit={str(self._at_limit)!r}"
        return f"KLBudget({limits}) of {self._optimizer!r}"


def _check(
    optimizer: Any,
    model: Any,
    likelihood: Any,
    per_step: float | None,
    to_reference: float | None,
    ledger: Any,
    backtracks: int,
) -> None:
    wanted = (("optimizer", optimizer, Optimizer), ("model", model, nn.Module), ("likelihood", likelihood, Likelihood))
    for name, value, kind in wanted:
        if not isinstance(value, kind):
            raise ArgumentError(f"{name} is of type {type(value).__name__}; it must be a {kind.__name__}.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ArgumentError("The optimizer has no parameter of the model, so its updates cannot move the model.")
    if ledger is not None and not isinstance(ledger, Ledger):
        raise ArgumentError(f"ledger is of type {type(ledger).__name__}; for a file use ng.Ledger(path).")
    for name, limit in (("per_step", per_step), ("to_reference", to_reference)):
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise ArgumentError(f"{name}={limit} was given; it is a KL in nats, positive and finite, or None.")
    if per_step is None and to_reference is None and ledger is None:
        raise ArgumentError("Neither per_step nor to_reference nor a ledger was given, so there is nothing to guard.")
    if backtracks < 0:
        raise ArgumentError(f"backtracks={backtracks} was given; it must be at least 0.")
