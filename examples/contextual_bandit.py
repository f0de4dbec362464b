"""A policy that never moves further than its trust region: a contextual bandit in the manner of TRPO.

The policy sees a digit and names it; the reward is 1 for the right name and 0 for any other, and the right name itself
is never shown. Each round samples actions, and takes one step on the surrogate of Schulman et al. 2015,
mean(advantage · π(a|s) / π_old(a|s)). The step goes as far as the *measured* mean KL(π_old ‖ π) allows.

    python examples/contextual_bandit.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import natgrad as ng

MAX_KL = 0.02


def main(rounds: int = 30) -> tuple[float, float]:
    """Train, print the reward, and return the last rounds' mean reward and the largest KL of any step."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, truth = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    policy = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    likelihood = ng.Categorical()
    optimizer = ng.TrustRegionNGD(policy, likelihood, max_kl=MAX_KL, damping=1e-2)

    rewards, largest = [], 0.0
    for round_ in range(rounds):
        batch = torch.randint(len(x), (256,))
        observations = x[batch]
        with torch.no_grad():
            old = policy(observations)
            actions = likelihood.sample(old)[0]
            old_nll = likelihood.nll(old, actions)
        reward = (actions == truth[batch]).float()
        advantage = reward - reward.mean()
        rewards.append(float(reward.mean()))

        def closure(
            observations: Tensor = observations,
            actions: Tensor = actions,
            old_nll: Tensor = old_nll,
            advantage: Tensor = advantage,
        ) -> tuple[Tensor, Tensor]:
            logits = policy(observations)
            ratio = (old_nll - likelihood.nll(logits, actions)).exp()
            return -(advantage * ratio).mean(), logits

        optimizer.step(closure)
        step = optimizer.last
        if step is not None:
            largest = max(largest, float(step.kl_measured or 0))
            if round_ % 10 == 0:
                print(f"round {round_:2}: reward {rewards[-1]:.2f}, KL {step.kl_measured:.4f} of {MAX_KL}")
    final = sum(rewards[-5:]) / 5
    print(f"reward of the last five rounds {final:.2f} (guessing gives 0.10); largest KL of a step {largest:.4f}")
    return final, largest


if __name__ == "__main__":
    main()
