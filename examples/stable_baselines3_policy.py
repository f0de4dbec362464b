"""A2C of Stable-Baselines3 with a natural-gradient trust region, beside its own RMSprop at its best rate, on CartPole.

The likelihood has two parts: the action is categorical, and the return is Gaussian around the critic's value, of which
SB3's value loss is the negative logarithm.

    python examples/stable_baselines3_policy.py
"""

from __future__ import annotations

from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env

import natgrad as ng
from natgrad.rl.stable_baselines3 import NaturalPolicy, likelihood_for

RATES = (3e-3, 1e-2, 3e-2)  # of RMSprop, A2C's own choice; the best on seed 0 is taken
SCALE = 20.0  # standard deviation of a return around the critic's value


def agent(rmsprop: float | None = None, seed: int = 0) -> A2C:
    options = {"n_steps": 32, "gae_lambda": 0.95, "normalize_advantage": True, "seed": seed, "device": "cpu"}
    envs = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
    if rmsprop is not None:
        return A2C("MlpPolicy", envs, learning_rate=rmsprop, policy_kwargs={"net_arch": [32]}, **options)
    natural = {
        "likelihood": likelihood_for(envs.action_space, SCALE),
        "max_kl": 0.05,
        "damping": 0.01,
        "structure": ng.Dense(),
    }
    policy = {"net_arch": [32], "optimizer_class": ng.TrustRegionNGD, "optimizer_kwargs": natural}
    options |= {"learning_rate": 1.0, "vf_coef": 0.5 / SCALE**2, "max_grad_norm": float("inf")}
    return A2C(NaturalPolicy, envs, policy_kwargs=policy, **options)


def score(model: A2C, steps: int = 40) -> float:
    """Train for ``steps`` optimizer steps, and return the mean return of the last 100 episodes."""
    model.learn(steps * model.n_steps * model.n_envs)
    return sum(episode["r"] for episode in model.ep_info_buffer) / len(model.ep_info_buffer)


def main(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, list[float]]:
    """Train on each seed, and return the scores of both optimizers."""
    best = max(RATES, key=lambda rate: score(agent(rate)))
    scores = {}
    for name, rate in (("TrustRegionNGD", None), (f"RMSprop({best})", best)):
        scores[name] = [score(agent(rate, seed)) for seed in seeds]
        print(f"{name}: mean return of the last 100 episodes {', '.join(f'{s:.0f}' for s in scores[name])}")
    return scores


if __name__ == "__main__":
    main()
