"""Before running: what an optimizer would do with every layer, and what every structure takes of memory and time."""

from natgrad.plan.inspection import Inspection, LayerRow, inspect
from natgrad.plan.planner import Choice, Plan, plan
from natgrad.plan.profile import Profile, cache_folder, measure, profile_of

__all__ = [
    "Choice",
    "Inspection",
    "LayerRow",
    "Plan",
    "Profile",
    "cache_folder",
    "inspect",
    "measure",
    "plan",
    "profile_of",
]
