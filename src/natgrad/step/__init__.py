"""From a direction to a step: the local model, damping and the searches."""

from natgrad.step.damping import Constant, Damping, FactoredTikhonov, LevenbergMarquardt, Proportional, as_damping
from natgrad.step.local import BlockVector, LocalModel, Probe, Ray, Step, Trial, dot
from natgrad.step.quadratic_fit import QuadraticFit
from natgrad.step.search import Armijo, KLClip, LearningRate, Search
from natgrad.step.trust_region import TrustRegion

__all__ = [
    "Armijo",
    "BlockVector",
    "Constant",
    "Damping",
    "FactoredTikhonov",
    "KLClip",
    "LearningRate",
    "LevenbergMarquardt",
    "LocalModel",
    "Probe",
    "Proportional",
    "QuadraticFit",
    "Ray",
    "Search",
    "Step",
    "Trial",
    "TrustRegion",
    "as_damping",
    "dot",
]
