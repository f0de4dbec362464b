"""Every policy head, feed-forward and recurrent: Fisher products, KL, entropy, densities and what environments get."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, distributions

import natgrad as ng
from natgrad.errors import UnsupportedError
from natgrad.linalg import CG
from natgrad.rl import TRPO, Critic, Policy, build, head_for
from natgrad.rl.heads import (
    BernoulliHead,
    CategoricalHead,
    GaussianHead,
    Head,
    MultiCategoricalHead,
    SquashedHead,
)
from natgrad.rl.objective import mean_kl, surrogate
from natgrad.rl.rollout import Samples
from natgrad.testing import families, oracles
from support import assert_close, distance

SIZE, TOLERANCE = 3, 1e-10
BOUNDS = {"low": (-1.0, -2.0), "high": (1.0, 3.0), "shape": (2,)}


@dataclass(frozen=True)
class HeadCase:
    """A head with the formulas that it must agree with, and a torch distribution of the same actions.

    torch: from f [C] and mask [C] of one state to independent distributions whose actions together are one action.
    """

    head: Head
    family: families.Family
    torch: Callable[[Tensor, Tensor | None], list[distributions.Distribution]]
    masked: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _allowed(f: Tensor, mask: Tensor | None) -> distributions.Distribution:
    """Only the allowed classes exist."""
    return distributions.Categorical(logits=f if mask is None else f[mask])


def _decisions(f: Tensor, mask: Tensor | None) -> list[distributions.Distribution]:
    masks = [None, None] if mask is None else mask.split([2, 4])
    return [_allowed(part, m) for part, m in zip(f.split([2, 4]), masks, strict=True)]


def _normals(f: Tensor, mask: Tensor | None) -> list[distributions.Distribution]:
    return [distributions.Normal(m, s.exp()) for m, s in zip(*f.chunk(2), strict=True)]


def _coins(f: Tensor, mask: Tensor | None) -> list[distributions.Distribution]:
    return [distributions.Bernoulli(logits=logit) for logit in f]


MULTI = families.multi_categorical([2, 4])
HEADS = {
    "categorical": HeadCase(CategoricalHead(4), families.categorical(), lambda f, m: [_allowed(f, m)]),
    "categorical, masked": HeadCase(CategoricalHead(4), families.categorical(), lambda f, m: [_allowed(f, m)], True),
    "multi-categorical": HeadCase(MultiCategoricalHead((2, 4)), MULTI, _decisions),
    "multi-categorical, masked": HeadCase(MultiCategoricalHead((2, 4)), MULTI, _decisions, True),
    "bernoulli": HeadCase(BernoulliHead((3,)), families.bernoulli(), _coins),
    "gaussian": HeadCase(GaussianHead(**BOUNDS), families.gaussian_learned(), _normals, options={"log_scale": -0.3}),
    "gaussian, σ of the state": HeadCase(
        GaussianHead(**BOUNDS), families.gaussian_learned(), _normals, options={"state_dependent_scale": True}
    ),
    "squashed": HeadCase(SquashedHead(**BOUNDS), families.gaussian_learned(), _normals),
    "squashed, σ of the state": HeadCase(
        SquashedHead(**BOUNDS), families.gaussian_learned(), _normals, options={"state_dependent_scale": True}
    ),
}
MEMORY = {"feed-forward": False, "recurrent": True}


@dataclass(frozen=True)
class PolicyCase:
    """A float64 policy away from its start, with states, actions and every oracle quantity computed once."""

    case: HeadCase
    policy: Policy
    critic: Critic
    inputs: tuple[Tensor | None, ...]

    @cached_property
    def f(self) -> Tensor:
        with torch.no_grad():
            return self.policy(*self.inputs)

    @cached_property
    def exact(self) -> Tensor:
        """(1/M) Σ Jᵀ Λ J, by the whole Jacobian."""
        return oracles.exact_fisher(oracles.jacobian(self.policy, self.inputs), self.case.family.fisher(self.f))

    def hessian(self, kl: Callable[[Tensor], Tensor]) -> Tensor:
        """∂²/∂θ² of a function of f at the present θ, by backward passes through a backward pass."""
        function, theta = oracles.network_function(self.policy, self.inputs)
        theta = theta.requires_grad_()
        (gradient,) = torch.autograd.grad(kl(function(theta)), theta, create_graph=True)
        assert gradient.abs().max() < 1e-12  # the KL is least where both policies agree
        return torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient])

    @cached_property
    def samples(self) -> Samples:
        likelihood, (observations, mask, starts, memory) = self.policy.head.likelihood, self.inputs
        assert observations is not None
        draws = torch.Generator().manual_seed(3)
        actions = likelihood.sample(self.f, generator=draws)[0]
        values = torch.randn(2, *self.f.shape[:-1], dtype=torch.float64, generator=draws)
        log_probs = -likelihood.nll(self.f, actions)
        return Samples(
            observations, mask, starts, memory, actions, log_probs, values[0], values[1], critic_memory=memory
        )


def _perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)


@cache
def policy_case(name: str, memory: str) -> PolicyCase:
    case, recurrent = HEADS[name], MEMORY[memory]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        policy, critic = build(SIZE, case.head, hidden=(4,), recurrent=recurrent, **case.options)
        policy, critic = policy.double(), critic.double()
        _perturb(policy)
        batch = (2, 4) if recurrent else (7,)
        observations = torch.randn(*batch, SIZE, dtype=torch.float64)
        policy.normaliser.update(2 * observations + 1)  # type: ignore[operator]
        mask = None
        if case.masked:
            mask = torch.rand(*batch, case.head.outputs) < 0.6
            mask[..., [1, -1]] = True  # each decision has an action; some have no other
        starts = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]]) if recurrent else None
        held = torch.randn(2, 4, dtype=torch.float64) if recurrent else None
    return PolicyCase(case, policy, critic, (observations, mask, starts, held))


every_policy = pytest.mark.parametrize("memory", MEMORY)
every_head = pytest.mark.parametrize("name", HEADS)


# Fisher products


@every_policy
@every_head
def test_fisher_product_is_the_hessian_of_the_kl_and_the_gauss_newton_form(name: str, memory: str) -> None:
    p = policy_case(name, memory)
    fisher = ng.fisher(p.policy, p.policy.head.likelihood, p.inputs, structure=ng.MatrixFree())
    vectors = torch.randn(fisher.shape[0], 4, dtype=torch.float64)
    by_formula = p.hessian(lambda new: p.case.family.kl(p.f, new).mean())
    as_measured = p.hessian(lambda new: mean_kl(p.policy, p.f, new))
    assert float(p.exact.norm()) > 1e-2
    assert_close(fisher @ vectors, p.exact @ vectors, TOLERANCE)
    assert_close(fisher @ vectors, by_formula @ vectors, TOLERANCE)
    assert_close(fisher @ vectors, as_measured @ vectors, TOLERANCE)


@every_policy
def test_jacobian_is_that_of_finite_differences(memory: str) -> None:
    """The oracles differentiate the policy itself: its derivatives must be whole, through its memory too."""
    p, h = policy_case("gaussian, σ of the state", memory), 1e-5
    function, theta = oracles.network_function(p.policy, p.inputs)
    v = torch.randn(theta.shape, dtype=torch.float64)
    difference = (function(theta + h * v) - function(theta - h * v)) / (2 * h)
    assert_close(oracles.jacobian(p.policy, p.inputs) @ v, difference.detach(), 1e-7)


@every_policy
@every_head
def test_step_of_trpo_is_the_solution_with_that_matrix(name: str, memory: str) -> None:
    """Through TRPO's own pieces: Δ = t (F + λI)⁻¹ g of the surrogate, with a predicted KL of ½ ΔᵀFΔ."""
    p, damping, max_kl = policy_case(name, memory), 1e-2, 1e-4
    exact, start = p.exact, oracles.flatten(oracles.trainable(p.policy))
    copies = {k: v.clone() for k, v in p.policy.state_dict().items()}
    gradient = oracles.flat_gradient(p.policy, surrogate(p.policy, p.policy(*p.inputs), p.samples))
    algorithm = TRPO(max_kl=max_kl, damping=damping, solver=CG(tolerance=1e-14, max_iterations=500))
    learner = algorithm.learner(p.policy, p.critic, seed=0)
    try:
        metrics = learner.update(p.samples, p.f, 0.0)
        with torch.no_grad():
            new = p.policy(*p.inputs)
        step = oracles.flatten(oracles.trainable(p.policy)) - start
    finally:
        p.policy.load_state_dict(copies)
        learner.optimizer.detach()
    solution = torch.linalg.solve(exact + damping * torch.eye(len(exact), dtype=torch.float64), gradient)
    t = (step @ solution) / (solution @ solution)
    assert t > 0
    assert_close(step, t * solution, 1e-8)
    assert distance(step, (step @ gradient) / (gradient @ gradient) * gradient) > 0.1  # F does turn the gradient
    assert metrics["kl_predicted"] == pytest.approx(float(0.5 * step @ exact @ step), rel=1e-6)
    assert metrics["kl_measured"] == pytest.approx(float(p.case.family.kl(p.f, new).mean()), rel=1e-6)
    assert 0.01 * max_kl < metrics["kl_measured"] <= max_kl


# Distributions


def _states(p: PolicyCase, f: Tensor) -> list[list[distributions.Distribution]]:
    """torch's distributions of every state."""
    mask = p.inputs[1]
    masks = [None] * f[..., 0].numel() if mask is None else list(mask.reshape(-1, f.shape[-1]))
    return [p.case.torch(row, m) for row, m in zip(f.reshape(-1, f.shape[-1]), masks, strict=True)]


@every_policy
@every_head
def test_kl_is_that_of_torchs_distributions(name: str, memory: str) -> None:
    p = policy_case(name, memory)
    shift = 0.7 * torch.randn(p.f.shape, dtype=torch.float64)
    new = p.policy.head.masked(p.f + shift, p.inputs[1])
    pairs = zip(_states(p, p.f), _states(p, new), strict=True)
    wanted = torch.stack([sum(map(distributions.kl_divergence, old, later)) for old, later in pairs])  # type: ignore[arg-type]
    backwards = p.policy.head.likelihood.kl(new, p.f)
    got = p.policy.head.likelihood.kl(p.f, new)
    assert_close(got.reshape(-1), wanted, TOLERANCE)
    assert distance(backwards.reshape(-1), wanted) > 1e-2  # old and new are not to be exchanged
    assert mean_kl(p.policy, p.f, new).item() == pytest.approx(float(wanted.mean()), rel=TOLERANCE)


@every_policy
@pytest.mark.parametrize("name", [name for name in HEADS if not name.startswith("squashed")])
def test_entropy_is_that_of_torchs_distributions(name: str, memory: str) -> None:
    p = policy_case(name, memory)
    wanted = torch.stack([sum(d.entropy() for d in state) for state in _states(p, p.f)])  # type: ignore[misc]
    assert_close(p.policy.head.entropy(p.f).reshape(-1), wanted, TOLERANCE)


@every_policy
@pytest.mark.parametrize("name", ["categorical, masked", "multi-categorical, masked"])
def test_masked_actions_have_no_probability_and_no_gradient(name: str, memory: str) -> None:
    p, mask = policy_case(name, memory), policy_case(name, memory).inputs[1]
    assert mask is not None and (~mask).any()
    head, generator = p.policy.head, torch.Generator().manual_seed(0)
    drawn, best = head.likelihood.sample(p.f, 500, generator=generator), head.mode(p.f)
    sizes = [head.outputs] if isinstance(head, CategoricalHead) else [2, 4]
    one = isinstance(head, CategoricalHead)
    for k, allowed in enumerate(mask.split(sizes, -1)):
        for actions in (drawn, best[None]):
            chosen = (actions if one else actions[..., k]).unsqueeze(-1)
            assert allowed.expand(*chosen.shape[:-1], -1).gather(-1, chosen).all()
    logits = torch.randn(p.f.shape, dtype=torch.float64, requires_grad=True)
    f = head.masked(logits, mask)
    loss = head.likelihood.nll(f, drawn[0]).sum() + head.entropy(f).sum() + head.likelihood.kl(p.f, f).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "squashed"])
def test_actions_that_cannot_be_masked(name: str) -> None:
    head = HEADS[name].head
    f = torch.zeros(2, head.outputs)
    assert head.masked(f, None) is f
    with pytest.raises(UnsupportedError, match=f"{type(head).__name__} has no action masks"):
        head.masked(f, torch.ones_like(f, dtype=torch.bool))


@every_policy
@every_head
def test_mode_is_the_most_probable_action(name: str, memory: str) -> None:
    p = policy_case(name, memory)
    head, likelihood = p.policy.head, p.policy.head.likelihood
    drawn = likelihood.sample(p.f, 300, generator=torch.Generator().manual_seed(0))
    best = likelihood.nll(p.f, head.mode(p.f))
    assert (likelihood.nll(p.f.expand(300, *p.f.shape), drawn) >= best - 1e-12).all()


def test_scale_of_a_gaussian_policy() -> None:
    alone, ruled = (policy_case(name, "feed-forward").f.chunk(2, -1)[1] for name in list(HEADS)[5:7])
    assert (alone == alone[0]).all() and (ruled != ruled[0]).any()
    for options in ({}, {"state_dependent_scale": True}):
        policy, _ = build(SIZE, HEADS["gaussian"].head, log_scale=-0.7, **options)
        log_scale = policy(torch.randn(50, SIZE)).chunk(2, -1)[1]
        assert torch.allclose(log_scale, torch.full_like(log_scale, -0.7), atol=0.05)


# The squashed Gaussian


def squashed(f: Tensor) -> distributions.Distribution:
    """tanh of torch's normal, one action of two components."""
    mean, log_scale = f.chunk(2, -1)
    normal = distributions.Normal(mean, log_scale.exp())
    return distributions.Independent(distributions.TransformedDistribution(normal, distributions.TanhTransform()), 1)


def test_squashed_density_is_that_of_torchs_transformed_normal() -> None:
    head, f = SquashedHead(**BOUNDS), torch.randn(40, 4, dtype=torch.float64) * 0.5
    u = head.likelihood.sample(f, generator=torch.Generator().manual_seed(0))[0]
    assert u.abs().max() > 1.5
    assert_close(head.log_prob(f, u), squashed(f).log_prob(torch.tanh(u)), TOLERANCE)


def test_squashed_density_stays_finite_where_tanh_is_one() -> None:
    head, f = SquashedHead(**BOUNDS), torch.tensor([[30.0, -30.0, 0.0, 0.0]])
    u = torch.tensor([[30.0, -30.0]])
    wanted = -math.log(2 * math.pi) - 4 * (math.log(2) - 30)  # Σ log(1 − tanh²u) = Σ 2 (log 2 − |u|)
    assert head.log_prob(f, u).item() == pytest.approx(wanted, rel=1e-6)
    assert head.entropy(f).isfinite().all()


def _entropy_by_integration(mean: float, log_scale: float) -> float:
    """−∫ p(a) log p(a) da of one component over a = tanh u, in u: p(a) da = p(u) du. Trapezia, of 10⁻³ σ."""
    scale = math.exp(log_scale)
    u = mean + scale * torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    log_p = -0.5 * ((u - mean) / scale).square() - log_scale - 0.5 * math.log(2 * math.pi)
    log_slope = -2 * torch.log(0.5 * (u.exp() + (-u).exp()))  # da/du = 1/cosh²u
    return float(torch.trapezoid(-log_p.exp() * (log_p - log_slope), u))


@pytest.mark.parametrize(("log_scale", "tolerance"), [(-2.0, 1e-10), (-0.5, 1e-10), (0.0, 1e-7), (0.5, 1e-4)])
def test_squashed_entropy_by_integration(log_scale: float, tolerance: float) -> None:
    """Quadrature of 32 nodes is exact to 1e-7 up to σ = 1, where a bounded action begins."""
    means = [0.0, 0.9, -2.5]
    f = torch.tensor([[m, means[0], log_scale, -1.0] for m in means], dtype=torch.float64)
    second = _entropy_by_integration(means[0], -1.0)
    wanted = [_entropy_by_integration(m, log_scale) + second for m in means]
    assert SquashedHead(**BOUNDS).entropy(f).tolist() == pytest.approx(wanted, abs=tolerance)
    more = SquashedHead(**BOUNDS, nodes=100)
    assert more.entropy(f).tolist() == pytest.approx(wanted, abs=max(1e-10, 1e-4 * tolerance))


@every_policy
def test_squashed_entropy_by_sampling(memory: str) -> None:
    p = policy_case("squashed, σ of the state", memory)
    head, n = p.policy.head, 20_000
    assert isinstance(head, SquashedHead)
    u = head.likelihood.sample(p.f, n, generator=torch.Generator().manual_seed(0))
    surprise = -head.log_prob(p.f.expand(n, *p.f.shape), u)
    error = (surprise.mean(0) - head.entropy(p.f)).abs()
    assert (error < 5 * surprise.std(0) / n**0.5).all()


def test_squashed_entropy_is_differentiable() -> None:
    f = torch.tensor([[0.4, -1.0, -0.5, -1.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SquashedHead(**BOUNDS).entropy, f)


# What the environment gets

INFINITE = math.inf
BOXES = {
    "bounded": spaces.Box(np.float32([-1.0, 0.0, -4.0]), np.float32([1.0, 0.1, 8.0])),
    "bounded, of two axes": spaces.Box(-2.0, 5.0, (2, 3), dtype=np.float64),
    "unbounded": spaces.Box(-INFINITE, INFINITE, (3,), dtype=np.float32),
    "mixed": spaces.Box(np.float32([-2.0, -INFINITE, -INFINITE, 0.5]), np.float32([2.0, INFINITE, 1.0, INFINITE])),
}


@pytest.mark.parametrize("name", BOXES)
def test_actions_of_a_box_are_within_its_bounds(name: str) -> None:
    box = BOXES[name]
    head = head_for(box)
    size = math.prod(box.shape)
    assert head.outputs == 2 * size
    given = 5 * torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    actions = head.to_environment(given)
    assert actions.shape == (200, *box.shape) and actions.dtype == box.dtype
    assert all(box.contains(action) for action in actions)
    flat, low, high = actions.reshape(200, -1), box.low.ravel(), box.high.ravel()
    for k in range(size):
        u = given[:, k].double().numpy()
        if np.isfinite([low[k], high[k]]).all():  # −1 and 1 are the bounds, and what lies beyond is clipped
            wanted = np.interp(u, [-1.0, 1.0], [low[k], high[k]])
            assert (u > 1).any() and (flat[u > 1, k] == high[k]).all() and (flat[u < -1, k] == low[k]).all()
        else:
            wanted = np.minimum(np.maximum(u, low[k]), high[k])
        np.testing.assert_allclose(flat[:, k], wanted, rtol=1e-6, atol=1e-6)


def test_squashed_actions_are_tanh_between_the_bounds() -> None:
    box = BOXES["bounded"]
    head = head_for(box, squashed=True)
    assert isinstance(head, SquashedHead)
    given = 5 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    actions = head.to_environment(given)
    assert all(box.contains(action) for action in actions)
    wanted = box.low + (torch.tanh(given.double()).numpy() + 1) / 2 * (box.high - box.low)
    np.testing.assert_allclose(actions, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["unbounded", "mixed"])
def test_squashing_needs_bounds(name: str) -> None:
    with pytest.raises(UnsupportedError, match="needs finite bounds"):
        head_for(BOXES[name], squashed=True)


@pytest.mark.parametrize("start", [0, 5, -3])
def test_discrete_actions_begin_at_their_start(start: int) -> None:
    space = spaces.Discrete(4, start=start)
    head = head_for(space)
    actions = head.to_environment(torch.arange(4))
    assert head.outputs == 4 and actions.tolist() == list(range(start, start + 4))
    assert all(space.contains(action) for action in actions)


@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiDiscrete([2, 4, 3]),
        spaces.MultiDiscrete([2, 4, 3], start=[1, -2, 7]),
        spaces.MultiDiscrete([[2, 3], [4, 1]], start=[[0, 1], [5, -1]]),
    ],
    ids=str,
)
def test_multi_discrete_actions_have_the_shape_and_the_starts_of_their_space(space: spaces.MultiDiscrete) -> None:
    head = head_for(space)
    sizes = space.nvec.ravel().tolist()
    assert head.outputs == sum(sizes)
    f = torch.zeros(300, sum(sizes))
    actions = head.to_environment(head.likelihood.sample(f, generator=torch.Generator().manual_seed(0))[0])
    assert actions.shape == (300, *space.shape)
    assert all(space.contains(action) for action in actions)
    for k, (n, start) in enumerate(zip(sizes, space.start.ravel(), strict=True)):
        assert set(actions.reshape(300, -1)[:, k]) == set(range(start, start + n))


@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_multi_binary_actions(shape: tuple[int, ...]) -> None:
    space = spaces.MultiBinary(shape)
    head = head_for(space)
    f = torch.randn(50, head.outputs)
    for actions in (head.mode(f), head.likelihood.sample(f)[0]):
        given = head.to_environment(actions)
        assert given.shape == (50, *shape) and all(space.contains(action) for action in given)
    assert (head.to_environment(head.mode(f)).reshape(50, -1) == (f > 0).numpy()).all()


@pytest.mark.parametrize(
    "space", [spaces.Box(0, 5, (2,), dtype=np.int64), spaces.Tuple([spaces.Discrete(2)]), spaces.Text(3)], ids=str
)
def test_spaces_without_a_head(space: spaces.Space) -> None:
    with pytest.raises(UnsupportedError, match="have no policy head"):
        head_for(space)
