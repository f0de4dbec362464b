"""Reinforcement learning by natural gradient: NPG, TRPO, ACKTR and PPO on Gymnasium environments."""

from __future__ import annotations

from natgrad.errors import MissingExtraError

try:
    import gymnasium  # noqa: F401
except ImportError as error:
    raise MissingExtraError("natgrad.rl needs Gymnasium. Install the extra: pip install 'natgrad[rl]'.") from error

from natgrad.rl.acktr import ACKTR, acktr
from natgrad.rl.advantage import advantages
from natgrad.rl.algorithm import Algorithm, Learner, Setup
from natgrad.rl.critic import CriticFit
from natgrad.rl.environments import Environments
from natgrad.rl.evaluate import Evaluation, evaluate
from natgrad.rl.npg import NPG, npg
from natgrad.rl.policy import Critic, Policy, build
from natgrad.rl.ppo import PPO, ppo
from natgrad.rl.spaces import head_for
from natgrad.rl.store import load, save
from natgrad.rl.training import Training
from natgrad.rl.trpo import TRPO, trpo
from natgrad.rl.vector import make

__all__ = [
    "ACKTR",
    "NPG",
    "PPO",
    "TRPO",
    "Algorithm",
    "Critic",
    "CriticFit",
    "Environments",
    "Evaluation",
    "Learner",
    "Policy",
    "Setup",
    "Training",
    "acktr",
    "advantages",
    "build",
    "evaluate",
    "head_for",
    "load",
    "make",
    "npg",
    "ppo",
    "save",
    "trpo",
]
