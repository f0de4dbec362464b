"""A policy that diverges ends training with a clear error; no NaN is ever saved, and the last checkpoint stays."""

from __future__ import annotations

import pytest
import torch
from gymnasium import spaces

import natgrad.rl as rl
from natgrad.errors import NonFiniteError

SMALL = rl.Setup(environments=2, horizon=16, hidden=(8,))
ALGORITHMS = [rl.NPG(), rl.TRPO(), rl.ACKTR(), rl.PPO(epochs=2)]
NAMES = [type(a).__name__ for a in ALGORITHMS]


def finite(training: rl.Training) -> bool:
    return all(bool(torch.isfinite(v).all()) for v in training.modules.state_dict().values())


def assert_kept(training: rl.Training, content: bytes, error: BaseException) -> None:
    """The checkpoint is that of before, all finite, and a training goes on from it."""
    assert training.path.read_bytes() == content
    assert f"{training.path}, is kept" in str(error)
    folder, steps = training.path.parent, training.taken + 32
    again = rl.Training("CartPole-v1", training.algorithm, steps=steps, setup=SMALL, folder=folder, every=1)
    assert finite(again) and again.resumed


@pytest.mark.parametrize("where", ["policy", "critic"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=NAMES)
def test_parameters_that_are_not_finite_end_training(tmp_path, algorithm, bad, where):
    """Also huge ones, whose outputs overflow."""
    training = rl.Training("CartPole-v1", algorithm, steps=10_000, setup=SMALL, folder=tmp_path, every=1)
    records = iter(training)
    next(records)
    next(records)
    content, history = training.path.read_bytes(), len(training.history)
    with torch.no_grad():
        for p in (training.policy if where == "policy" else training.critic).parameters():
            p.view(-1)[:] = bad
    with pytest.raises(NonFiniteError) as caught:
        for _ in records:
            pass
    assert len(training.history) - history <= (2 if bad == 1e38 else 0)
    if len(training.history) == history:
        assert_kept(training, content, caught.value)


@pytest.mark.parametrize(
    "algorithm",
    [
        rl.PPO(lr=1e30, anneal=False, clip=None, max_kl=1e30),
        rl.PPO(lr=1e37, anneal=False),
    ],
    ids=["PPO", "PPO-clip"],
)
def test_a_rate_that_is_far_too_large_ends_training_with_an_error(tmp_path, algorithm):
    training = rl.Training("CartPole-v1", algorithm, steps=10_000, setup=SMALL, folder=tmp_path, every=1)
    with pytest.raises(NonFiniteError, match="finite") as caught:
        for record in training:
            assert finite(training), record
    message = str(caught.value)
    assert "is kept" in message if training.history else "There is no checkpoint yet" in message
    assert training.path.exists() == bool(training.history)
    if training.history:
        steps = training.taken + 32
        again = rl.Training("CartPole-v1", algorithm, steps=steps, setup=SMALL, folder=tmp_path, every=1)
        assert finite(again) and len(again.history) == len(training.history)


def test_without_a_folder_the_error_says_that_nothing_was_kept():
    training = rl.Training("CartPole-v1", rl.TRPO(), steps=100, setup=SMALL)
    with torch.no_grad():
        training.policy.body[0].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"Before update 1 policy\.body\.0\.weight is not finite.*no checkpoints"):
        training.run()


def test_a_policy_that_overflows_while_it_acts_is_noticed():
    """Its parameters are finite; its logits are not."""
    head = rl.head_for(spaces.Discrete(2))
    policy, critic = rl.build(4, head, hidden=(8,))
    training = rl.Training("CartPole-v1", rl.TRPO(), steps=100, setup=SMALL, networks=(policy, critic))
    with torch.no_grad():
        policy.body[-1].weight.fill_(3e38)
        policy.body[0].bias.fill_(9.0)
    with pytest.raises(NonFiniteError, match="The policy's output is not finite"):
        training.run()
    with pytest.raises(NonFiniteError, match="The policy's output is not finite"):
        rl.evaluate(policy, "CartPole-v1", episodes=2)
