"""Before running: what an optimizer would do with every layer, and what every structure takes of memory and time."""

from natgrad.planning.choice import Choice
from natgrad.planning.inspection import Inspection, LayerRow, inspect
from natgrad.planning.planner import Plan, plan, predict
from natgrad.planning.profile import Profile, cache_folder, measure, profile_of

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
    "predict",
    "profile_of",
]
