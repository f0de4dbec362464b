"""Hard limits on how far updates move a model, and an account of them that can be verified."""

from natgrad.governance.ledger import Ledger, Record, Verification, read, verify

__all__ = ["Ledger", "Record", "Verification", "read", "verify"]
