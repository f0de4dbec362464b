"""Insight into curvature: its spectrum, and what an approximation makes of a model beside the exact matrix,
and the Hessian beside the Fisher."""

from natgrad.diagnostics.audit import AuditReport, BlockAudit, audit
from natgrad.diagnostics.indefiniteness import (
    BlockIndefiniteness,
    Directions,
    IndefinitenessReport,
    indefiniteness,
)
from natgrad.diagnostics.spectrum import Spectrum, spectrum

__all__ = [
    "AuditReport",
    "BlockAudit",
    "BlockIndefiniteness",
    "Directions",
    "IndefinitenessReport",
    "Spectrum",
    "audit",
    "indefiniteness",
    "spectrum",
]
