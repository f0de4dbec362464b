"""Saved policies come back bit for bit; what is damaged is said clearly."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rl_environments import Spaces
from torch import nn

import natgrad.rl as rl
from natgrad.errors import ArgumentError, NonFiniteError, SnapshotError
from natgrad.rl import store
from natgrad.rl.heads import GaussianHead, SquashedHead
from natgrad.rl.normalise import RunningMoments, Unchanged
from natgrad.rl.policy import Policy

BOUNDED = spaces.Box(np.array([-2.0, 0.0], dtype=np.float32), np.array([3.0, 0.5], dtype=np.float32))
HALF_BOUNDED = spaces.Box(np.array([0.0, -np.inf]), np.array([np.inf, 2.5]), dtype=np.float64)
HEADS = {
    "categorical": rl.head_for(spaces.Discrete(3, start=-1)),
    "multi-categorical": rl.head_for(spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [-2, 5]])),
    "bernoulli": rl.head_for(spaces.MultiBinary([2, 2])),
    "gaussian": rl.head_for(BOUNDED),
    "half bounded": rl.head_for(HALF_BOUNDED),
    "squashed": rl.head_for(BOUNDED, squashed=True),
    "squashed, 8 nodes": SquashedHead((-1.0,), (1.0,), (1,), nodes=8),
}
SHAPES = {
    "plain": {},
    "memory": {"recurrent": True, "hidden": (7,)},
    "raw, scale of its own": {"normalise": False, "state_dependent_scale": True, "log_scale": -0.5},
    "linear": {"hidden": ()},
    "double": {},
}


def made(head, shape: str) -> Policy:
    options = {"hidden": (6, 5)} | SHAPES[shape]
    if not isinstance(head, GaussianHead):
        options.pop("state_dependent_scale", None)
    policy, _ = rl.build(4, head, **options)
    if shape == "double":
        for p in policy.parameters():
            p.data = p.data.double()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    policy.normaliser.update(3 + 2 * torch.randn(50, 4))
    return policy


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_policy_comes_back_bit_for_bit(tmp_path, head, shape):
    policy = made(head, shape)
    back = rl.load(rl.save(policy, tmp_path / "new" / "folder", environment="Any-v0", seed=3))
    assert back.head == policy.head and type(back.head) is type(policy.head)
    ours, theirs = policy.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    x = torch.randn(10, 4, dtype=next(policy.parameters()).dtype)
    starts = torch.zeros(10)
    for seed in (None, 0):
        results = []
        for p in (policy, back):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            results.append(p.act(x, memory=p.start(10), starts=starts, generator=generator))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        np.testing.assert_array_equal(*(head.to_environment(r[0]) for r in results))
    assert store.about(tmp_path / "new" / "folder") == {"environment": "Any-v0", "seed": 3}


def test_the_description_is_json_of_the_standard(tmp_path):
    """Infinite bounds included: other programs read no ``Infinity``."""
    rl.save(made(HEADS["half bounded"], "plain"), tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads((tmp_path / "policy.json").read_text(), parse_constant=refuse)
    assert content["head"]["kind"] == "GaussianHead" and content["network"]["hidden"] == [6, 5]


def test_the_limit_of_the_normaliser_is_kept(tmp_path):
    policy = made(HEADS["categorical"], "plain")
    policy.normaliser.limit = 0.5
    x = 100 * torch.randn(5, 4)
    assert torch.equal(rl.load(rl.save(policy, tmp_path))(x), policy(x))


@pytest.fixture
def folder(tmp_path):
    return rl.save(made(HEADS["gaussian"], "plain"), tmp_path)


def test_what_is_missing_is_named(folder, tmp_path_factory):
    with pytest.raises(SnapshotError, match=r"policy\.json cannot be read"):
        rl.load(tmp_path_factory.mktemp("empty"))
    (folder / "policy.safetensors").unlink()
    with pytest.raises(SnapshotError, match=r"policy\.safetensors"):
        rl.load(folder)


@pytest.mark.parametrize("at", [0, 9, 500, -1])
def test_a_flipped_bit_of_the_weights_is_noticed(folder, at):
    content = bytearray((folder / "policy.safetensors").read_bytes())
    content[at] ^= 4
    (folder / "policy.safetensors").write_bytes(content)
    with pytest.raises(SnapshotError, match=r"policy\.safetensors"):
        rl.load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: "",
        lambda c: "{",
        lambda c: "[1, 2]",
        lambda c: "\x00",
        lambda c: c | {"head": 3},
        lambda c: {"head": c["head"]},
        lambda c: c | {"head": c["head"] | {"kind": "Path"}},
        lambda c: c | {"head": c["head"] | {"kind": ["GaussianHead"]}},
        lambda c: c | {"head": c["head"] | {"colour": 1}},
        lambda c: c | {"head": c["head"] | {"low": None}},
        lambda c: c | {"head": c["head"] | {"low": [1.0]}},
        lambda c: c | {"head": c["head"] | {"kind": "SquashedHead", "low": ["-inf", 0.0]}},
        lambda c: c | {"network": {}},
        lambda c: c | {"network": c["network"] | {"hidden": [6, -5]}},
        lambda c: c | {"network": c["network"] | {"hidden": [6, "5"]}},
        lambda c: c | {"network": c["network"] | {"hidden": [6, 4]}},
        lambda c: c | {"network": c["network"] | {"dtype": "float63"}},
        lambda c: c | {"network": c["network"] | {"dtype": "nn"}},
        lambda c: c | {"network": c["network"] | {"recurrent": True, "hidden": []}},
        lambda c: c | {"network": c["network"] | {"observations": 5}},
        lambda c: c | {"network": c["network"] | {"extra": 5}},
    ],
)
def test_a_damaged_description_is_an_error_that_names_the_file(folder, damage):
    damaged = damage(json.loads((folder / "policy.json").read_text()))
    (folder / "policy.json").write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(SnapshotError, match=str(folder)):
        rl.load(folder)


def test_a_policy_that_is_not_finite_is_not_saved(folder):
    before = (folder / "policy.safetensors").read_bytes()
    policy = made(HEADS["gaussian"], "plain")
    with torch.no_grad():
        policy.log_scale[1] = float("nan")
    with pytest.raises(NonFiniteError, match="log_scale of the policy is not finite; nothing was saved"):
        rl.save(policy, folder)
    assert (folder / "policy.safetensors").read_bytes() == before


def test_a_body_of_ones_own_is_not_taken_for_another(tmp_path):
    """The same shapes with another nonlinearity would come back as another policy."""
    head = HEADS["categorical"]
    relu = Policy(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), head, RunningMoments(4))
    wide = Policy(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)), head, Unchanged())
    tanh = Policy(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), head, RunningMoments(4))
    for policy in (relu, wide, tanh.double().half()):
        with pytest.raises(ArgumentError, match="a body of its own is saved by"):
            rl.save(policy, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
    with pytest.raises(ArgumentError, match="plain finite values"):
        rl.save(made(head, "plain"), tmp_path / "policy", score=float("nan"))
    with pytest.raises(ArgumentError, match="plain finite values"):
        rl.save(made(head, "plain"), tmp_path / "policy", what=object())


def test_a_policy_from_disk_acts_as_the_trained_one(tmp_path):
    environment = partial(Spaces, spaces.Box(-1, 1, (2,)), BOUNDED)
    setup = rl.Setup(environments=2, horizon=16, hidden=(8,))
    policy = rl.trpo(environment, steps=64, setup=setup).policy
    evaluations = [rl.evaluate(p, environment, episodes=3) for p in (policy, rl.load(rl.save(policy, tmp_path)))]
    assert evaluations[0] == evaluations[1]
