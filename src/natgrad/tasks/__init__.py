"""Tasks on real data, and the engine that compares optimizers on them."""

from __future__ import annotations

from natgrad.tasks.builtin import BUILTIN
from natgrad.tasks.registry import load_task
from natgrad.tasks.results import Comparison
from natgrad.tasks.task import Metric, Task

__all__ = ["BUILTIN", "Comparison", "Metric", "Task", "load_task"]
