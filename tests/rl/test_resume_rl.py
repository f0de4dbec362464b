"""Training that is killed goes on, in a fresh process, as if nothing had happened: bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rl_runs
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from rl_environments import Masked, Random, SecretlyRandom, Spaces

import natgrad as ng
import natgrad.rl as rl
from natgrad.errors import ArgumentError, SnapshotError
from natgrad.rl.environments import Environments

SMALL = rl.Setup(environments=2, horizon=16, hidden=(8,))


def same_bits(a: Any, b: Any) -> bool:
    """NaN is the same as NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a.hex() == b.hex() if isinstance(a, float) else a == b


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcomes of the runs that one process began, until it was killed, and another finished."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, rl_runs.__file__, str(folder), str(folder / "results.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    names = list(rl_runs.RUNS)
    last = f"{names[len(names) // 2]} 5"  # half of the runs have done five updates, the others four
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == last:
                process.kill()
                break
        process.stdout.read()
    assert process.returncode == -9
    assert not (folder / "results.pt").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", rl_runs.RUNS)
def test_a_killed_run_goes_on_bit_for_bit(resumed, name):
    training = rl_runs.RUNS[name].start(None).run()
    expected, found = rl_runs.outcome(training), resumed[name]
    assert found.pop("resumed") is True and expected.pop("resumed") is None
    assert len(expected["history"]) == rl_runs.UPDATES
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert [key for key in theirs if not same_bits(ours[key], theirs[key])] == []
    assert same_bits(found, expected)
    assert len({record["kl"] for record in expected["history"]}) > 1  # it moved


MASKED = partial(Masked, spaces.MultiDiscrete([3, 2], start=[1, 0]))
SHORT = partial(Spaces, spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (2,)))


def act(environments: Environments, t: int) -> np.ndarray:
    """An action that is allowed, another one each time."""
    if environments.mask is None:
        return np.random.default_rng(t).uniform(-1, 1, (environments.n, 2)).astype(np.float32)
    weights = np.random.default_rng(t).random(environments.mask.shape) * environments.mask
    return np.stack([weights[:, :3].argmax(1) + 1, weights[:, 3:].argmax(1)], 1)


@pytest.mark.parametrize("steps", [0, 1, 6, 23])
@pytest.mark.parametrize("made", [MASKED, SHORT], ids=["masked", "continuous"])
@pytest.mark.parametrize("kind", ["sync", "async", "sync NEXT_STEP", "async NEXT_STEP"])
def test_environments_come_back_to_their_states(kind, made, steps):
    """Of episodes of different lengths, some of them just begun, with the masks; and go on as they would have."""

    def fresh() -> Environments:
        if "NEXT_STEP" in kind:
            vector = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[kind.split()[0]]
            return Environments(vector([made] * 4, autoreset_mode=AutoresetMode.NEXT_STEP), 9)
        return Environments(rl.make(made, 4, mode=kind), 9)

    first, second = fresh(), fresh()
    for t in range(steps):
        first.step(act(first, t))
    first.take_finished()
    for t in range(3):
        second.step(act(second, 100 + t))  # it was somewhere else
    second.take_finished()
    assert second.load_state_dict(first.state_dict())
    for t in range(10):
        for name in ("observations", "starts", "mask"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        actions = act(first, 200 + t)
        ours, theirs = first.step(actions), second.step(actions)
        for name in vars(ours):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert first.take_finished() == second.take_finished()
    first.close()
    second.close()


@pytest.mark.parametrize(
    "environment",
    [
        Random,
        SecretlyRandom,
        lambda: SyncVectorEnv([rl_runs.cartpole] * 2, autoreset_mode=AutoresetMode.SAME_STEP),
        lambda: CartPoleVectorEnv(2),
    ],
    ids=["observations", "rewards", "resets itself", "custom"],
)
def test_environments_that_do_not_come_back_are_noticed(tmp_path, environment):
    """There is a warning, and training goes on with new episodes."""

    def start(steps: int) -> rl.Training:
        made = environment() if not isinstance(environment, type) else environment
        return rl.Training(made, rl.TRPO(), steps=steps, setup=SMALL, folder=tmp_path)

    first = start(64).run()
    with pytest.warns(UserWarning, match="could not be brought back to the states of the checkpoint"):
        second = start(96)
    assert second.resumed is False and second.environments.starts.all()
    assert same_bits(dict(second.modules.state_dict()), dict(first.modules.state_dict()))
    assert len(second.run().history) >= 3


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = rl.trpo("CartPole-v1", steps=96, setup=SMALL, folder=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    second = rl.trpo("CartPole-v1", steps=96, setup=SMALL, folder=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert same_bits(second.history, first.history) and second.resumed is True
    assert same_bits(rl_runs.outcome(second)["networks"], rl_runs.outcome(first)["networks"])


def test_more_steps_extend_a_finished_run(tmp_path):
    whole = rl.trpo("CartPole-v1", steps=192, setup=SMALL)
    rl.trpo("CartPole-v1", steps=96, setup=SMALL, folder=tmp_path)
    longer = rl.trpo("CartPole-v1", steps=192, setup=SMALL, folder=tmp_path)
    expected, found = rl_runs.outcome(whole), rl_runs.outcome(longer)
    assert len(found["history"]) == 6 and found["resumed"] is True
    assert same_bits(found | {"resumed": None}, expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"environment": "CartPole-v0"}, "environment is 'CartPole-v1' there and 'CartPole-v0' here"),
        ({"algorithm": rl.TRPO(max_kl=0.02)}, "algorithm is"),
        ({"algorithm": rl.NPG()}, "algorithm is"),
        ({"setup": rl.Setup(environments=2, horizon=16, hidden=(8,), gamma=0.9)}, "gamma is 0.99 there and 0.9 here"),
        ({"setup": rl.Setup(environments=2, horizon=16, hidden=(9,))}, "hidden is"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:gymnasium.*", "ignore:.*out of date:UserWarning")
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    given = {"environment": "CartPole-v1", "algorithm": rl.TRPO(), "steps": 64, "setup": SMALL, "folder": tmp_path}
    rl.Training(**given).run()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    given |= change
    networks = rl.build(4, rl.head_for(spaces.Discrete(2)), hidden=given["setup"].hidden)
    weights = {name: value.clone() for name, value in networks[0].state_dict().items()}
    with pytest.raises(SnapshotError, match=f"is of another run: {named}.*Name another folder"):
        rl.Training(**given, networks=networks)
    assert same_bits(dict(networks[0].state_dict()), weights)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_vector_environment_of_another_size_is_another_run(tmp_path):
    """What counts is how many environments there are, not the number that the set-up would make."""

    def start(n: int, setup: int) -> rl.Training:
        vector = SyncVectorEnv([rl_runs.cartpole] * n)
        options = rl.Setup(environments=setup, horizon=16, hidden=(8,))
        return rl.Training(vector, rl.TRPO(), steps=16 * n, setup=options, folder=tmp_path)

    start(3, 2).run()
    with pytest.raises(SnapshotError, match="is of another run: environments is 3 there and 2 here"):
        start(2, 2)
    assert start(3, 5).resumed is True


def test_a_file_that_is_no_checkpoint_of_a_training_is_refused(tmp_path):
    ng.save(tmp_path / "checkpoint.safetensors", torch.nn.Linear(2, 2), step=3)
    with pytest.raises(SnapshotError, match=r"is no checkpoint of natgrad\.rl"):
        rl.Training("CartPole-v1", rl.TRPO(), steps=10, setup=SMALL, folder=tmp_path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    whole = rl.trpo("CartPole-v1", steps=192, setup=SMALL)
    rl.Training("CartPole-v1", rl.TRPO(), steps=128, setup=SMALL, folder=tmp_path, every=1).run()
    path = tmp_path / "checkpoint.safetensors"
    for name in (path, Path(f"{path}.previous")):
        content = bytearray(name.read_bytes())
        content[-100] ^= 1
        if name == path:
            name.write_bytes(content)
            with pytest.warns(UserWarning, match="The generation before it is intact"):
                training = rl.Training("CartPole-v1", rl.TRPO(), steps=192, setup=SMALL, folder=tmp_path, every=100)
            assert len(training.history) == 3 and training.resumed is True
            training.close()
        name.write_bytes(content)
    with pytest.raises(SnapshotError, match="checkpoint"):
        rl.Training("CartPole-v1", rl.TRPO(), steps=192, setup=SMALL, folder=tmp_path)
    assert len(whole.history) == 6


def test_the_global_random_streams_are_left_alone(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    training = rl.trpo("CartPole-v1", steps=64, setup=SMALL, folder=tmp_path)
    rl.trpo("CartPole-v1", steps=96, setup=SMALL, folder=tmp_path)
    rl.evaluate(training.policy, "CartPole-v1", episodes=2, deterministic=False)
    rl.load(rl.save(training.policy, tmp_path / "policy"))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_bad_settings_are_refused(tmp_path):
    for options, message in (({"steps": 0}, "steps"), ({"steps": 5, "every": 0}, "every")):
        with pytest.raises(ArgumentError, match=f"{message} must be at least 1, got 0"):
            rl.Training("CartPole-v1", rl.TRPO(), setup=SMALL, **options)
    training = rl.Training("CartPole-v1", rl.TRPO(), steps=10, setup=SMALL)
    with pytest.raises(ArgumentError, match="has no folder"):
        training.save()
    assert isinstance(training.environments.vector, gym.vector.VectorEnv)
