"""What may become of an update, and the account of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class AtLimit(StrEnum):
    """What happens to an update that would go beyond a limit."""

    SHRINK = "shrink"
    """Go as far along it as the limits allow; if nowhere on it is allowed, undo it."""
    SKIP = "skip"
    """Undo it, and go on with the next one."""
    HALT = "halt"
    """Undo it, and raise BudgetError."""


class Decision(StrEnum):
    """What became of an update."""

    ACCEPTED = "accepted"
    SHRUNK = "shrunk"
    REJECTED = "rejected"
    """Undone, bit for bit: parameters, buffers and the optimizer's state."""
    EXHAUSTED = "exhausted"
    """Not tried: the budget to the reference is spent."""


@dataclass(frozen=True)
class BudgetReport:
    """One update: what was proposed, what was measured, what was decided. KL in nats per prediction, on the probe set.

    Attributes:
        step: number of the update, from 1.
        decision: what became of it.
        reason: why it was not taken as proposed; empty where it was.
        scale: s in θ_old + s (θ_new − θ_old); 0 where undone.
        backtracks: how often it was shortened.
        kl_step: mean KL(old ‖ new) of the update as taken.
        kl_proposed: the same of the update as the optimizer proposed it.
        kl_predicted: what the optimizer's metric predicts for the update as taken; None where it does not say.
        kl_reference: mean KL(new ‖ reference) of the model as it now is.
        budget_left: ``to_reference`` less that; None without such a budget.
        path_length: Σ √(2 KL) over all updates, the length of the way that was gone. No bound on ``kl_reference``: at
            finite steps neither this nor the sum of the steps' KL is one.
    """

    step: int
    decision: Decision
    reason: str
    scale: float
    backtracks: int
    kl_step: float
    kl_proposed: float
    kl_predicted: float | None
    kl_reference: float
    budget_left: float | None
    path_length: float

    @property
    def accepted(self) -> bool:
        """Whether the model moved (or would have: a step of length zero is accepted)."""
        return self.decision in (Decision.ACCEPTED, Decision.SHRUNK)
