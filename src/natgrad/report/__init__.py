"""Reports: a self-contained HTML page with a JSON of its numbers, and the charts it is made of (``report.figures``)."""

from __future__ import annotations

from natgrad.report.comparison import write_comparison
from natgrad.report.learning import write_learning

__all__ = ["write_comparison", "write_learning"]
