"""TRPO on CartPole with two ways to invert the Fisher matrix: conjugate gradients, and K-FAC.

Both take a step of the same length in KL along their direction F⁻¹g, and measure that length on all states. The
environments come from a vectorised CartPole of Gymnasium; any other ``VectorEnv`` will do, and so does an id or a
function that makes one environment.

    python examples/reinforcement_learning.py
"""

from __future__ import annotations

import gymnasium as gym
import torch

import natgrad as ng
from natgrad import rl
from natgrad.metric import Structure

MAX_KL = 0.02
STRUCTURES = {"conjugate gradients": ng.MatrixFree(), "K-FAC": ng.Kronecker()}


def train(structure: Structure, steps: int) -> rl.Training:
    environments = gym.make_vec("CartPole-v1", num_envs=16, vectorization_mode="vector_entry_point")
    algorithm = rl.TRPO(max_kl=MAX_KL, structure=structure)
    setup = rl.Setup(horizon=128, gamma=0.98, hidden=(32, 32))
    return rl.Training(environments, algorithm, steps=steps, setup=setup).run()


def main(steps: int = 60_000) -> dict[str, tuple[float, float]]:
    """Train with each structure, and return the mean return of 20 episodes and the largest KL of an update."""
    results = {}
    for name, structure in STRUCTURES.items():
        training = train(structure, steps)
        score = rl.evaluate(training.policy, "CartPole-v1", episodes=20).mean
        largest = max(record["kl"] for record in training.history)
        curve = ", ".join(f"{record['return']:.0f}" for record in training.history[::4])
        print(f"{name}: return {curve}; {score:.0f} of 500 after {steps:,} steps; largest measured KL {largest:.4f}")
        results[name] = (score, largest)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # for networks this small more threads only wait for each other
    main()
