"""Insight into curvature: its spectrum, and what an approximation makes of a model beside the exact matrix."""

from natgrad.diagnostics.audit import AuditReport, BlockAudit, audit
from natgrad.diagnostics.spectrum import Spectrum, spectrum

__all__ = ["AuditReport", "BlockAudit", "Spectrum", "audit", "spectrum"]
