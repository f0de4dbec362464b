"""Hard limits on how far updates move a model, and an account of them that can be verified."""

from natgrad.governance.budget import KLBudget
from natgrad.governance.decision import AtLimit, BudgetReport, Decision
from natgrad.governance.ledger import Ledger, Record, Verification, read, verify
from natgrad.governance.probe import ProbeSet

__all__ = [
    "AtLimit",
    "BudgetReport",
    "Decision",
    "KLBudget",
    "Ledger",
    "ProbeSet",
    "Record",
    "Verification",
    "read",
    "verify",
]
