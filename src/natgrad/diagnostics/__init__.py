"""Insight into curvature: what an approximation makes of a model, beside the exact matrix."""

from natgrad.diagnostics.audit import AuditReport, BlockAudit, audit

__all__ = ["AuditReport", "BlockAudit", "audit"]
