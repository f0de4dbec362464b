"""Defects D10 to D18; see test_defects.py, whose other half this is."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import defective
import gymnasium as gym
import numpy as np
import pytest
import torch
from defect_problems import (
    gaussian_head,
    learner_with,
    moved,
    must_fail,
    networks,
    samples_of,
    shrinking,
    vector,
)
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn

from natgrad.errors import ArgumentError
from natgrad.likelihood import Gaussian
from natgrad.linalg import DenseMatrix, Solver
from natgrad.metric import Dense, Kronecker, MatrixFree
from natgrad.metric.running import Refresh
from natgrad.optim import TrustRegionNGD
from natgrad.rl import ACKTR, NPG, PPO, TRPO, Critic, CriticFit, Environments, Policy
from natgrad.rl.critic import CriticFitter
from natgrad.rl.heads import CategoricalHead
from natgrad.rl.normalise import Unchanged
from natgrad.rl.one_step import OneStepLearner, solver_for
from natgrad.rl.ppo import PPOLearner
from natgrad.rl.rollout import Collector, Samples
from natgrad.step import LearningRate, LocalModel, Search, Trial, TrustRegion

# D10


def check_solution_at_every_scale(solver: Solver) -> None:
    """(A + λI)⁻¹ b for b of every size, against LAPACK."""
    root = torch.randn(30, 30, dtype=torch.float64)
    a, b = root @ root.T / 30, torch.randn(30, dtype=torch.float64)
    wanted = torch.linalg.solve(a + 0.3 * torch.eye(30, dtype=torch.float64), b)
    for scale in (1.0, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12):
        x = solver(DenseMatrix(a, symmetric=True), 0.3).matvec(scale * b)
        cosine = float(x / x.norm() @ (wanted / wanted.norm()))
        assert cosine > 0.999, f"gradients of scale {scale}: cosine {cosine:.3f}"


def test_d10_cg_additive_epsilon() -> None:
    ours = solver_for(MatrixFree(), None)
    assert ours is not None
    check_solution_at_every_scale(ours)
    must_fail(check_solution_at_every_scale, defective.AdditiveCG(), match=r"scale (0\.001|0\.0001): cosine 0\.")


# D11


def named_networks() -> tuple[Policy, Critic]:
    """A policy whose modules are called "value" and "critic", and a critic with an "actor" and a "policy"."""

    def body(outputs: int, *names: str) -> nn.Sequential:
        layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)]
        return nn.Sequential(OrderedDict(zip((names[0], "act", names[1]), layers, strict=True)))

    policy = Policy(body(2, "value", "critic"), gaussian_head(2), Unchanged(), log_scale=0.0)
    return policy.double(), Critic(body(1, "actor", "policy"), Unchanged()).double()


def check_all_parameters_move(make: Callable[[Policy, Critic], OneStepLearner | PPOLearner]) -> None:
    policy, critic = named_networks()
    samples, old = samples_of(policy)
    before = {name: p.detach().clone() for m in (policy, critic) for name, p in m.named_parameters()}
    make(policy, critic).update(samples, old, 0.0)
    still = [n for m in (policy, critic) for n, p in m.named_parameters() if torch.equal(p, before[n])]
    assert not still, f"{still} did not move"


def by_name(policy: Policy, critic: Critic) -> OneStepLearner:
    """D11: the policy's parameters are those without "value" in their names."""
    named = [(n, p) for n, p in policy.named_parameters() if "value" not in n]
    optimizer = TrustRegionNGD(named, policy.head.likelihood).attach(policy)  # type: ignore[arg-type]
    return OneStepLearner(policy, optimizer, CriticFit().fitter(critic, 0))


@pytest.mark.parametrize("algorithm", [TRPO(), NPG(), ACKTR(), PPO()], ids=lambda a: type(a).__name__)
def test_d11_parameters_selected_by_name(algorithm: TRPO | NPG | ACKTR | PPO) -> None:
    check_all_parameters_move(lambda policy, critic: algorithm.learner(policy, critic, 0))
    must_fail(check_all_parameters_move, by_name, match="body.value.weight.* did not move")


def check_shared_trunk(make: Callable[[Policy, Critic], OneStepLearner | PPOLearner]) -> None:
    """Either refused, or the radius holds for the whole update, the critic's fit included."""
    trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    policy = Policy(nn.Sequential(trunk, nn.Linear(5, 2)), gaussian_head(2), Unchanged(), log_scale=0.0).double()
    critic = Critic(nn.Sequential(trunk, nn.Linear(5, 1)), Unchanged()).double()
    samples, old = samples_of(policy)
    try:
        make(policy, critic).update(samples, old, 0.0)
    except ArgumentError as error:
        assert "body.0.0.weight" in str(error)
        return
    kl = moved(policy, samples, old)
    assert kl <= 1e-3, f"after the critic's fit KL is {kl:.2g}, the radius 1e-3"


def test_d11_shared_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared_trunk(lambda policy, critic: TRPO(max_kl=1e-3).learner(policy, critic, 0))
    check_shared_trunk(lambda policy, critic: PPO(max_kl=1e-3, lr=1e-2).learner(policy, critic, 0))
    for kind in (OneStepLearner, PPOLearner):
        monkeypatch.setattr(sys.modules[kind.__module__], "check_apart", lambda policy, critic: None)
    for algorithm in (TRPO(max_kl=1e-3), PPO(max_kl=1e-3, lr=1e-2)):
        must_fail(check_shared_trunk, lambda p, c, a=algorithm: a.learner(p, c, 0), match="after the critic's fit")


# D12


class WithUnused(nn.Module):
    """A body whose first parameter is not used."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def check_unused_parameter(make: Callable[[Policy, Critic], OneStepLearner | PPOLearner]) -> None:
    """With an unused parameter the others move as they do without it, and it stays."""
    ends = []
    for unused in (False, True):
        policy, critic = networks(gaussian_head(2))
        samples, old = samples_of(policy)
        inner = policy.body
        if unused:
            policy.body = WithUnused(inner)
        start = vector(inner)
        make(policy, critic).update(samples, old, 0.0)
        ends.append(torch.cat([vector(inner), policy.log_scale.detach()]))
        assert not torch.equal(vector(inner), start)
        assert not unused or torch.equal(policy.body.unused, torch.ones(4).double()), "the unused parameter moved"
    assert torch.allclose(*ends, rtol=1e-9, atol=1e-12), "the others moved differently"


def misaligned(policy: Policy, critic: Critic) -> OneStepLearner:
    learner = TRPO().learner(policy, critic, 0)
    return defective.Misaligned(policy, learner.optimizer, learner.critic)


@pytest.mark.parametrize("algorithm", [TRPO(), NPG(), ACKTR(), PPO()], ids=lambda a: type(a).__name__)
def test_d12_unused_parameter_misaligns(algorithm: TRPO | NPG | ACKTR | PPO) -> None:
    check_unused_parameter(lambda policy, critic: algorithm.learner(policy, critic, 0))
    must_fail(check_unused_parameter, misaligned, match="moved")


# D13


def _steps(search: Search) -> list[tuple[str, bool, Tensor]]:
    """(what is wrong, accepted, Δ) for directions and metrics that have no step."""
    one, found = torch.ones(2, dtype=torch.float64), []
    for name, direction, metric in (
        ("a direction that is NaN", one * math.nan, one),
        ("a direction that is infinite", one * math.inf, one),
        ("a metric that is NaN", one, one * math.nan),
        ("no curvature", one, one * 0.0),
    ):
        local = LocalModel({"a": one}, {"a": DenseMatrix(torch.diag(metric), symmetric=True)}, {}, 0.0)
        step = search(local, {"a": direction}, math.inf, lambda delta: Trial(torch.zeros(())))  # type: ignore[arg-type]
        found.append((name, bool(step.accepted), torch.zeros(2) if step.delta is None else step.delta["a"]))
    return found


def check_no_step_from_nan(search: Search) -> None:
    for name, accepted, delta in _steps(search):
        assert not accepted and not delta.any(), f"{name}: a step was taken"


def check_update_with_nan(kind: type[OneStepLearner]) -> None:
    """One advantage that is NaN: the policy keeps its bits, and the record does not call it a step."""
    policy, critic = networks(gaussian_head(2))
    samples, old = samples_of(policy)
    samples.advantages[3] = math.nan
    start, learner = vector(policy), TRPO().learner(policy, critic, 0)
    metrics = kind(policy, learner.optimizer, learner.critic).update(samples, old, 0.0)
    assert torch.equal(vector(policy), start), "the policy moved"
    assert metrics["accepted"] == 0.0, "a step was taken"


def test_d13_nan_becomes_a_step() -> None:
    check_no_step_from_nan(TrustRegion(0.01))
    must_fail(check_no_step_from_nan, defective.Sanitizing(0.01), match="a step was taken")
    check_update_with_nan(OneStepLearner)
    must_fail(check_update_with_nan, defective.SanitizedAdvantages, match="the policy moved")


# D14 and D15


def check_kl_within_radius(search: Search) -> None:
    """The bandit's surrogate grows with every trial; the first is at a KL of 1.25 of the radius."""
    policy, critic, samples, old = shrinking()
    metrics = learner_with(search, policy, critic).update(samples, old, 0.0)
    kl = moved(policy, samples, old)
    assert metrics["accepted"] and kl > 0
    assert kl <= 0.1, f"KL is {kl:.3f}, the radius 0.1"


def test_d14_line_search_ignores_kl() -> None:
    check_kl_within_radius(TrustRegion(0.1))
    must_fail(check_kl_within_radius, defective.Tolerant(0.1), match="the radius 0.1")
    for seed in range(5):  # whatever the network and the batch
        policy, critic = networks(gaussian_head(2), seed=seed)
        samples, old = samples_of(policy, seed=seed)
        TRPO(max_kl=0.05, damping=1e-4).learner(policy, critic, 0).update(samples, old, 0.0)
        assert 0 < moved(policy, samples, old) <= 0.05


def check_zero_gradient(kind: type[OneStepLearner]) -> None:
    """The first batch has no signal at all; the second one has."""
    policy, critic = networks(gaussian_head(2))
    samples, old = samples_of(policy)
    learner = TRPO().learner(policy, critic, 0)
    learner = kind(policy, learner.optimizer, learner.critic)
    start = vector(policy)
    try:
        metrics = learner.update(replace(samples, advantages=torch.zeros_like(samples.advantages)), old, 0.0)
    except Exception as error:
        raise AssertionError(f"raised {type(error).__name__}") from error
    assert torch.equal(vector(policy), start), "a step without a gradient"
    assert all(math.isfinite(v) for v in metrics.values()), f"not finite: {metrics}"
    assert learner.update(samples, old, 0.0)["accepted"] == 1.0 and not torch.equal(vector(policy), start)


class Alike(gym.Env):
    """Every step gives the same reward; no episode ends."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.normal(size=3).clip(-1, 1).astype(np.float32), {}

    def step(self, action: object) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.np_random.normal(size=3).clip(-1, 1).astype(np.float32), 0.1, False, False, {}


def check_no_signal_no_advantage(kind: type[Collector]) -> None:
    """Where all advantages are the same but for rounding, none is better than another."""
    policy, critic = networks(CategoricalHead(2))
    for p in critic.parameters():
        p.data.zero_()
    list(critic.parameters())[-1].data.fill_(0.7)
    environments = Environments(SyncVectorEnv([Alike] * 3, autoreset_mode=AutoresetMode.DISABLED), seed=0)
    generator = torch.Generator().manual_seed(0)
    collector = kind(environments, policy.float(), critic.float(), horizon=37, gamma=0.9, lam=0.0, generator=generator)
    advantages = collector.samples(collector.collect()).advantages
    assert float(advantages.abs().max()) < 1e-2, f"advantages up to {float(advantages.abs().max()):.2g} from rounding"


def test_d15_zero_gradient_and_factor() -> None:
    check_zero_gradient(OneStepLearner)
    must_fail(check_zero_gradient, defective.UndefinedLosses, match="raised UnboundLocalError")
    check_kl_within_radius(TrustRegion(0.1))
    must_fail(check_kl_within_radius, defective.OneAndAHalf(0.1), match="KL is 0.12")
    check_no_signal_no_advantage(Collector)
    must_fail(check_no_signal_no_advantage, defective.DividesByNothing, match="from rounding")


# D16


def check_score_and_fisher(kind: type[CriticFitter]) -> None:
    """A critic that is one number θ. Its loss, for returns sampled from the Gaussian that the optimizer takes it for,
    has scores (∂loss/∂v of one sample) whose second moment is 1; so is F = −g/Δ of the step that was taken.
    """
    body = nn.Linear(1, 1, bias=False)
    critic = Critic(body, Unchanged()).double()
    fit = CriticFit(
        structure=Dense(), epochs=1, batch=1, lr=1.0, damping=1e-12, search=LearningRate(), average=0.0, momentum=0.0,
        refresh=Refresh(1, 1),
    )  # fmt: skip
    fitter = kind(fit, critic, 0)
    scores, fishers, nothing = [], [], torch.zeros(1, dtype=torch.float64)
    for s in fitter.optimizer.likelihood.sample(torch.zeros(60, 1).double(), generator=_seeded())[0]:
        body.weight.data.zero_()
        critic.returns.mean.zero_()  # normalised returns are the returns
        critic.returns.count.fill_(1e30)
        fitter.update(Samples(nothing[None] + 1, None, None, None, nothing, nothing, nothing, s, None))
        assert body.weight.grad is not None
        scores.append(float(body.weight.grad))
        fishers.append(-scores[-1] / float(body.weight.detach()))
    moment, fisher = float(np.mean(np.square(scores))), float(np.median(fishers))
    assert abs(moment - 1) < 0.4, f"E[score²] = {moment:.2f}"  # 60 samples: standard error 0.18
    assert abs(fisher - 1) < 1e-6, f"F = {fisher:.2f}"


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class WrongScale(CriticFitter):
    """The Fisher matrix is that of a squared error without ½, the loss that with it."""

    def __init__(self, fit: CriticFit, critic: Critic, seed: int) -> None:
        super().__init__(fit, critic, seed)
        self.optimizer._likelihood = Gaussian(0.5)


def test_d16_value_fisher() -> None:
    check_score_and_fisher(CriticFitter)
    must_fail(check_score_and_fisher, defective.SquaredError, match=r"E\[score²\] = [34]\.")
    must_fail(check_score_and_fisher, WrongScale, match=r"E\[score²\] = 0\.2")


# D17


def ppo_batch() -> tuple[Policy, Critic, Samples, Tensor]:
    policy, critic = networks(gaussian_head(2))
    return policy, critic, *samples_of(policy, n=128)


def updated(kind: type[PPOLearner], settings: PPO) -> tuple[PPOLearner, float, dict[str, float]]:
    """After one update: the learner, KL(old ‖ new) on all samples by the oracle, and the record."""
    policy, critic, samples, old = ppo_batch()
    learner = kind(settings, policy, critic, 0)
    metrics = learner.update(samples, old, 0.0)
    return learner, moved(policy, samples, old), metrics


def check_penalty(kind: type[PPOLearner]) -> None:
    """β doubles, halves or stays once, by the KL of all samples: at both edges of the band around the set-point."""
    settings = PPO(clip=None, penalty=0.7, lr=1e-2, epochs=3, batch=32, anneal=False)
    _, kl, _ = updated(PPOLearner, settings)
    for target, factor in ((kl / 1.52, 2.0), (kl / 1.48, 1.0), (kl * 1.48, 1.0), (kl * 1.52, 0.5)):
        learner, _, metrics = updated(kind, replace(settings, target_kl=target))
        wanted = 0.7 * factor
        assert learner.penalty == wanted, f"KL {kl / target:.3f} of the set-point: β is {learner.penalty}, not {wanted}"
        assert metrics.get("penalty", wanted) == wanted


def test_d17_penalty_adapts_per_minibatch() -> None:
    check_penalty(PPOLearner)
    must_fail(check_penalty, defective.AdaptsInside, match="of the set-point: β is")
    must_fail(check_penalty, defective.AdaptsToAPart, match="of the set-point: β is")


# D18


def check_limit(kind: type[PPOLearner]) -> None:
    """The update ends at the last step within the limit, bit for bit, and the critic sees every minibatch."""
    free = PPO(clip=0.2, lr=1e-2, epochs=3, batch=32, anneal=False)
    policy, critic, samples, old = ppo_batch()
    unlimited, path, kls, moments = PPOLearner(free, policy, critic, 0), [], [], []
    step = unlimited.optimizer.step

    def remember() -> None:
        step()
        path.append(vector(policy))
        kls.append(moved(policy, samples, old))
        moments.append(_moments(unlimited))

    unlimited.optimizer.step = remember  # type: ignore[method-assign]
    unlimited.update(samples, old, 0.0)
    allowed = 5
    limit = 0.5 * (max(kls[:allowed]) + kls[allowed])
    assert max(kls[:allowed]) < limit < kls[allowed], kls

    limited, kl, metrics = updated(kind, replace(free, max_kl=limit))
    assert kl <= limit, f"KL is {kl:.4f}, the limit {limit:.4f}"
    assert torch.equal(vector(limited.policy), path[allowed - 1]), "not the policy of the last step within the limit"
    assert torch.equal(_moments(limited), moments[allowed - 1]), "the refused step is in the optimizer's moments"
    assert metrics["kl_refused"] == pytest.approx(kls[allowed], rel=1e-12), "not the policy's KL on all samples"
    assert metrics["minibatch_steps"] == allowed, "another number of steps is reported"
    taken = {int(s["step"]) for s in limited.critic_optimizer.state.values()}
    assert taken == {12}, f"the critic took {taken} of 12 steps"


def _moments(learner: PPOLearner) -> Tensor:
    states = [learner.optimizer.state[p] for p in learner.policy.parameters()]
    return torch.cat([s[name].reshape(-1) for s in states for name in ("exp_avg", "exp_avg_sq", "step")])


def test_d18_kl_limit_of_ppo() -> None:
    check_limit(PPOLearner)
    must_fail(check_limit, defective.ChecksBefore, match="KL is .* the limit")
    must_fail(check_limit, defective.ChecksAPart, match="KL is|not the policy|all samples")
    must_fail(check_limit, defective.UndoesRoughly, match="not the policy")
    must_fail(check_limit, defective.KeepsTheMoments, match="moments")
    must_fail(check_limit, defective.StopsTheCritic, match="the critic took")


def test_d18_first_step_refused() -> None:
    """Natural gradient in the place of Adam: nothing of the update is left, and the next one can go further."""
    policy, critic, samples, old = ppo_batch()
    settings = PPO(max_kl=1e-9, structure=Kronecker(), lr=1.0, batch=32, anneal=False)
    learner, start = PPOLearner(settings, policy, critic, 0), vector(policy)
    for _ in range(2):
        metrics = learner.update(samples, old, 0.0)
        assert metrics["minibatch_steps"] == 0 and metrics["accepted"] == 0 and metrics["kl_refused"] > 1e-9
        assert torch.equal(vector(policy), start)
    learner.settings = replace(settings, max_kl=1.0)
    assert learner.update(samples, old, 0.0)["minibatch_steps"] == 40
