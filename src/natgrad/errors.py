"""Every error natgrad raises: each message states the symptom, its likely causes and the remedy."""

from __future__ import annotations


class NatgradError(Exception):
    """Base of all natgrad errors."""


class ArgumentError(NatgradError, ValueError):
    """An argument has a value that natgrad cannot work with."""


class ShapeError(ArgumentError):
    """Two things that must agree in shape do not."""


class NotPositiveDefiniteError(NatgradError, ArithmeticError):
    """A matrix that must be positive definite is not, and damping within reason did not make it so."""


class NonFiniteError(NatgradError, ArithmeticError):
    """NaN or infinity where finite numbers are required."""


class ConvergenceError(NatgradError, ArithmeticError):
    """An iteration ended without an answer of the required quality."""


class StaleTapeError(NatgradError, RuntimeError):
    """An output was observed that does not belong to a recorded forward pass."""


class NotObservedError(NatgradError, RuntimeError):
    """A step was asked for, but the curvature it needs was never observed."""


class UnsupportedError(NatgradError, NotImplementedError):
    """A combination that has no meaning or no implementation; the message names what to use instead."""


class LedgerError(NatgradError, RuntimeError):
    """A ledger is not the intact chain it must be, or cannot be read or written."""


class BudgetError(NatgradError, RuntimeError):
    """An update would exceed its KL budget, or the budget is spent, and the policy is to halt."""


class MissingExtraError(NatgradError, ImportError):
    """A feature needs an optional dependency; the message names the extra to install."""


class SnapshotError(NatgradError, RuntimeError):
    """A snapshot cannot be written, is damaged or missing, or does not fit what it is to be loaded into."""


class EnvironmentFault(NatgradError, RuntimeError):
    """An environment raised, or gave what no environment may give (NaN rewards, wrong shapes)."""
