"""Tabular softmax policies, where natural policy gradient has a closed form: π_new ∝ π_old exp(η A).

Kakade 2002; Agarwal, Kakade, Lee & Mahajan 2021, lemma 15. The Fisher matrix is singular along logits that move
together in one state. The gradient has no part there, so that conjugate gradients without damping, a pseudo-inverse,
and a damping far below the other eigenvalues all give the step; what rounding adds along constants moves no
probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.linalg import CG, Cholesky, Eigh
from natgrad.rl import NPG, TRPO, Critic, Policy
from natgrad.rl.heads import CategoricalHead
from natgrad.rl.normalise import Unchanged
from natgrad.rl.rollout import Samples

TOLERANCE, TINY = 1e-10, 1e-14
SEEDS = range(4)
# How F⁺g is found: a structure, a solver and a damping. Woodbury's identity divides by λ, which costs as many digits as
# λ has zeros: it is allowed what the best λ leaves.
SOLVED = CG(tolerance=2e-14, max_iterations=100)
WAYS: dict[str, tuple[Any, Any, float]] = {
    "conjugate gradients": (ng.MatrixFree(), SOLVED, 0.0),
    "cholesky, tiny damping": (ng.Dense(), Cholesky(), TINY),
    "pseudo-inverse": (ng.Dense(), Eigh(floor=1e-13), 0.0),
    "gram matrix": (ng.Gram(), None, 1e-9),
}
ALLOWED = {way: 1e-6 if way == "gram matrix" else TOLERANCE for way in WAYS}


@dataclass(frozen=True)
class MDP:
    """A random Markov decision process; of one state it is a bandit.

    transitions: [S, A, S]. rewards: [S, A]. start: [S], the first state's distribution.
    """

    transitions: Tensor
    rewards: Tensor
    start: Tensor
    gamma: float

    @classmethod
    def random(cls, states: int, actions: int, seed: int, gamma: float = 0.9) -> MDP:
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(states, actions, states, dtype=torch.float64, generator=g)
        rewards = torch.randn(states, actions, dtype=torch.float64, generator=g)
        start = torch.softmax(torch.randn(states, dtype=torch.float64, generator=g), 0)
        return cls(torch.softmax(2 * noise, -1), rewards, start, gamma)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rewards.shape  # type: ignore[return-value]

    def _flow(self, policy: Tensor) -> Tensor:
        """I − γ P_π, [S, S]."""
        moves = torch.einsum("sa,sat->st", policy, self.transitions)
        return torch.eye(len(moves), dtype=moves.dtype) - self.gamma * moves

    def value(self, policy: Tensor) -> Tensor:
        """V_π [S], by a linear solve."""
        return torch.linalg.solve(self._flow(policy), (policy * self.rewards).sum(-1))

    def performance(self, policy: Tensor) -> Tensor:
        """(1 − γ) E V_π(s_0): the expected reward under the discounted visitation."""
        return (1 - self.gamma) * self.start @ self.value(policy)

    def advantages(self, policy: Tensor) -> Tensor:
        """A_π = Q_π − V_π, [S, A]."""
        value = self.value(policy)
        return self.rewards + self.gamma * self.transitions @ value - value.unsqueeze(-1)

    def visitation(self, policy: Tensor) -> Tensor:
        """d_π [S] = (1 − γ) Σ_t γᵗ P(s_t = s)."""
        return (1 - self.gamma) * torch.linalg.solve(self._flow(policy).T, self.start)

    def tilted(self, policy: Tensor, eta: float | Tensor) -> Tensor:
        """The closed form: π exp(η A), normalised."""
        weights = policy * torch.exp(eta * self.advantages(policy))
        return weights / weights.sum(-1, keepdim=True)


PROBLEMS = {
    **{f"bandit {seed}": MDP.random(1, 5, seed, gamma=0.0) for seed in SEEDS},
    **{f"process {seed}": MDP.random(4, 3, seed) for seed in SEEDS},
    "far-sighted": MDP.random(6, 2, 9, gamma=0.99),
}


@dataclass(frozen=True)
class Table:
    """A softmax policy whose logits are a table [S, A], behind the networks' own interface."""

    counts: Tensor  # [S, A]: probabilities are in these proportions

    @cached_property
    def policy(self) -> Policy:
        states, actions = self.counts.shape
        body = nn.Linear(states, actions, bias=False, dtype=torch.float64)
        with torch.no_grad():
            body.weight.copy_(self.counts.log().T)
        return Policy(body, CategoricalHead(actions), Unchanged())

    @property
    def states(self) -> Tensor:
        """Every state once, as one-hot rows."""
        return torch.eye(len(self.counts), dtype=torch.float64)

    @property
    def probabilities(self) -> Tensor:
        with torch.no_grad():
            return torch.softmax(self.policy(self.states), -1)


def table(mdp: MDP, seed: int = 0) -> Table:
    return Table(torch.randint(1, 6, mdp.shape, generator=torch.Generator().manual_seed(seed)).double())


def natural_step(
    mdp: MDP, made: Table, way: str, eta: float, weights: Tensor | None = None, metric: Any = None
) -> Tensor:
    """One step on the performance itself, by natgrad's optimizer; the Fisher matrix weighs states by visitation."""
    structure, solver, damping = WAYS[way]
    weights = mdp.visitation(made.probabilities) if weights is None else weights
    labels = torch.zeros(len(made.counts), dtype=torch.int64)
    optimizer = ng.NaturalGradient(
        made.policy,
        ng.Weighted(ng.Categorical()),
        lr=eta,
        damping=damping,
        metric=ng.Fisher(ng.Exact(), structure) if metric is None else metric,
        solver=solver if metric is None else None,
        average=0.0,
        refresh=ng.Refresh(1, 1),
    )

    def closure() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        f = made.policy(made.states)
        return -mdp.performance(torch.softmax(f, -1)), f, (labels, weights)

    optimizer.step(closure)
    optimizer.detach()
    return made.probabilities


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_natural_gradient_of_the_performance_is_the_exponential_tilt(name: str, way: str) -> None:
    """Several steps in a row: the gradient is autograd's, through the linear solve; no advantage enters it."""
    mdp, eta = PROBLEMS[name], 0.7
    made = table(mdp)
    for _ in range(3):
        before = made.probabilities
        wanted = mdp.tilted(before, eta)
        after = natural_step(mdp, made, way, eta)
        assert (wanted - before).abs().max() > 1e-3
        torch.testing.assert_close(after, wanted, rtol=0, atol=ALLOWED[way])
        assert mdp.performance(after) > mdp.performance(before)


def test_other_weights_and_other_metrics_give_no_tilt() -> None:
    """The controls: the closed form needs the Fisher matrix, and the states weighted as the gradient weighs them."""
    mdp, way = PROBLEMS["process 0"], "conjugate gradients"
    wanted = mdp.tilted(table(mdp).probabilities, 0.7)
    uniform = torch.full((mdp.shape[0],), 0.25, dtype=torch.float64)
    for options in ({"weights": uniform}, {"metric": ng.Euclidean()}):
        assert (natural_step(mdp, table(mdp), way, 0.7, **options) - wanted).abs().max() > 1e-3


def samples_of(mdp: MDP, made: Table, repeats: Sequence[int]) -> Samples:
    """Samples in which actions occur exactly as often as the policy takes them, states in proportion to ``repeats``."""
    totals = made.counts.sum(-1).long()
    times = torch.tensor(repeats) * math.lcm(*totals.tolist()) // totals
    state, action = torch.cartesian_prod(*map(torch.arange, mdp.shape)).unbind(-1)
    every = (times.unsqueeze(-1) * made.counts.long()).reshape(-1)
    state, action = state.repeat_interleave(every), action.repeat_interleave(every)
    p = made.probabilities
    advantages = mdp.advantages(p)[state, action]
    returns = advantages + mdp.value(p)[state]
    return Samples(made.states[state], None, None, None, action, p[state, action].log(), advantages, returns, None)


def updated(algorithm: NPG | TRPO, made: Table, samples: Samples) -> dict[str, float]:
    """One update by the algorithm's own learner."""
    critic = Critic(nn.Linear(len(made.counts), 1), Unchanged()).double()
    learner = algorithm.learner(made.policy, critic, seed=0)
    with torch.no_grad():
        old = made.policy(*samples.inputs)
    metrics = learner.update(samples, old, 0.0)
    learner.optimizer.detach()
    return metrics


SMALL = {
    **{f"bandit {seed}": MDP.random(1, 5, seed, gamma=0.0) for seed in SEEDS},
    **{f"process {seed}": MDP.random(2, 3, seed) for seed in SEEDS},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SMALL)
def test_npg_on_samples_is_the_exponential_tilt(name: str, way: str) -> None:
    """Actions occur in the samples exactly as often as the policy takes them; how often states do cancels out."""
    mdp, eta = SMALL[name], 0.7
    structure, solver, damping = WAYS[way]
    made = table(mdp)
    samples = samples_of(mdp, made, range(1, mdp.shape[0] + 1))
    wanted = mdp.tilted(made.probabilities, eta)
    updated(NPG(target_kl=1e9, lr=eta, damping=damping, structure=structure, solver=solver), made, samples)
    torch.testing.assert_close(made.probabilities, wanted, rtol=0, atol=ALLOWED[way])


@pytest.mark.parametrize("kind", [NPG, TRPO])
@pytest.mark.parametrize("name", SMALL)
def test_steps_of_a_given_kl_are_tilts_of_some_length(name: str, kind: type[NPG] | type[TRPO]) -> None:
    """log π_new − log π_old = t A + c(s) with one t for all states, and t is what ½ t² E A² = KL says."""
    mdp, radius = SMALL[name], 1e-3
    made = table(mdp)
    samples, before = samples_of(mdp, made, [1] * mdp.shape[0]), made.probabilities
    advantages = mdp.advantages(before)
    bound = {"target_kl": radius} if kind is NPG else {"max_kl": radius}
    metrics = updated(kind(damping=0.0, solver=SOLVED, **bound), made, samples)  # type: ignore[arg-type]
    length = (2 * radius / samples.advantages.square().mean()).sqrt() / 2 ** metrics.get("backtracks", 0.0)
    torch.testing.assert_close(made.probabilities, mdp.tilted(before, length), rtol=0, atol=TOLERANCE)
    assert advantages.abs().max() * length > 1e-2
