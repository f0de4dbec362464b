"""Several processes, each with a copy of the model and its own part of every batch."""

from natgrad.distributed.ownership import computed_by_owners, owners
from natgrad.distributed.replicas import Replicas
from natgrad.distributed.sync import StatisticsSum

__all__ = ["Replicas", "StatisticsSum", "computed_by_owners", "owners"]
