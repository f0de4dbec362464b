"""`natgrad rl` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import natgrad as ng
from natgrad import rl
from natgrad.cli.app import app
from natgrad.cli.rl_settings import choose, radius_of
from natgrad.errors import ArgumentError
from natgrad.report.learned import Learning
from natgrad.rl.presets import DEFAULTS

SMALL = ("--steps", "256", "--seeds", "2", "--environments", "2", "--horizon", "64", "--episodes", "2", "--every", "1")
NAVE = """
import os
import gymnasium as gym
import numpy as np

class Corridor(gym.Env):
    '''Ten steps; the reward is the action. Raises or blinds where the process is told to.'''
    metadata = {"render_modes": []}
    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.taken += 1
        if self.np_random.random() < float(os.environ.get("FAULTS", 0)):
            raise ValueError("the [motor] broke")
        seen = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return seen, float(action), self.taken == 10, False, {}

gym.register("Corridor-v0", entry_point=Corridor)
"""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["rl", *arguments, "--no-tensorboard"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return rl.load(folder).state_dict()


def untimed(records) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_learns_evaluates_films_and_reports():
    result = run("CartPole-v1", *SMALL)
    assert result.exit_code == 0, result.output
    folder = Path("runs/CartPole-v1-trpo")
    found = Learning.load(folder / "learning.json")
    assert [(r.seed, len(r.records), r.failure) for r in found.runs] == [(0, 2, None), (1, 2, None)]
    assert found.radius is not None and found.radius.hard and found.radius.value == 0.01
    for r in found.runs:
        policy = rl.load(folder / f"seed-{r.seed}")
        expected = rl.evaluate(policy, "CartPole-v1", episodes=2)
        assert r.evaluation is not None and r.evaluation.returns == expected.returns
        assert max(r.column("kl")) <= 0.01
    assert found.film is not None and found.film.episode_return in [
        r.evaluation.returns[0] for r in found.runs if r.evaluation is not None
    ]
    from PIL import Image

    with Image.open(folder / found.film.animation) as movie:
        assert movie.n_frames > 2  # type: ignore[attr-defined]
    assert (folder / found.film.strip).is_file()
    page = (folder / "report.html").read_text()
    assert "trpo on CartPole-v1" in page and "None of 4 updates exceeded the radius 0.01" in page
    assert str(folder / "report.html") in result.output.replace("\n", "")


def test_the_same_command_goes_on_bit_for_bit():
    assert run("CartPole-v1", *SMALL, "--out", "whole").exit_code == 0
    shorter = ("--steps", "128", *SMALL[2:])
    assert run("CartPole-v1", *shorter, "--out", "parts").exit_code == 0
    result = run("CartPole-v1", *SMALL, "--out", "parts")
    assert result.exit_code == 0 and result.output.count("goes on, bit for bit: 128 steps") == 2
    for seed in (0, 1):
        whole, parts = weights(Path(f"whole/seed-{seed}")), weights(Path(f"parts/seed-{seed}"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    one, other = Learning.load("whole/learning.json"), Learning.load("parts/learning.json")
    assert [untimed(r.records) for r in one.runs] == [untimed(r.records) for r in other.runs]
    again = run("CartPole-v1", *SMALL, "--out", "parts")
    assert again.exit_code == 0 and again.output.count("is complete") == 2
    changed = run("CartPole-v1", *SMALL, "--out", "parts", "--gamma", "0.9")
    assert changed.exit_code == 2 and "is of another run" in changed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CartPol-v1",), "cannot be made"),
        (("some_module:Thing-v0",), "--import-code"),
        (("no_such_module:Thing-v0", "--import-code"), "No module named 'no_such_module'"),
        (("CartPole-v1", "--algo", "sarsa"), "There is no algorithm 'sarsa'"),
        (("CartPole-v1", "--structure", "round"), "There is no structure 'round'"),
        (("CartPole-v1", "--seeds", "0"), "--seeds must be at least 1"),
        (("CartPole-v1", "--steps", "0"), "--steps must be at least 1"),
        (("CartPole-v1", "--episodes", "-1"), "--episodes must be at least 0"),
        (("CartPole-v1", "--mode", "thread"), "--mode must be sync or async"),
        (("CartPole-v1", "--gamma", "1.5"), "gamma must lie between 0 and 1"),
        (("CartPole-v1", "--algo", "npg", "--max-kl", "0.1"), "target_kl"),
        (("CartPole-v1", "--max-kl", "-1"), "max_kl must be positive, got -1.0"),
        (("CartPole-v1", "--squashed"), "squashed is for continuous actions"),
        (("CartPole-v1", "--set", "lam"), "not name=value"),
        (("CartPole-v1", "--set", "lamb=0.9"), "There is no setting 'lamb'"),
        (("CartPole-v1", "--set", "lam=high"), "not a number"),
        (("CartPole-v1", "--set", "lam=true"), "lam takes float, not True"),
        (("CartPole-v1", "--set", "structure=1"), "structure is no plain value"),
        (("CartPole-v1", "--device", "gpuu"), "--device 'gpuu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output and len(result.stderr.strip().splitlines()) == 1


def test_unwritable_folder_is_found_before_training(monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("training must not begin")

    monkeypatch.setattr("natgrad.cli.rl_run.run_seeds", never)
    Path("file").write_text("in the way")
    result = run("CartPole-v1", "--out", "file/run")
    assert result.exit_code == 2 and "cannot be written to file/run" in result.stderr


def test_an_own_environment_that_draws_nothing_needs_the_flag_and_has_no_film():
    Path("nave.py").write_text(NAVE)
    assert run("nave:Corridor-v0", *SMALL).exit_code == 2
    result = run("nave:Corridor-v0", *SMALL, "--import-code", "--out", "own")
    assert result.exit_code == 0, result.output
    found = Learning.load("own/learning.json")
    assert found.film is None and "renders to nothing" in found.no_film
    assert "renders to nothing" in result.output and "renders to nothing" in Path("own/report.html").read_text()
    assert not list(Path("own").glob("film.*"))


def test_a_seed_that_fails_keeps_its_checkpoint_and_the_others_go_on(monkeypatch):
    Path("broken.py").write_text(NAVE.replace("Corridor-v0", "Broken-v0"))
    monkeypatch.setenv("FAULTS", "0.004")
    result = run("broken:Broken-v0", *SMALL[:2], "--seeds", "3", *SMALL[4:], "--import-code", "--out", "own")
    found = Learning.load("own/learning.json")
    failed = [r for r in found.runs if r.failure]
    assert 0 < len(failed) < 3, "the seeds of this test must have both"
    assert result.exit_code == 1 and f"Seed {failed[0].seed}" in result.stderr, "a script must see it"
    assert all("the [motor] broke" in (r.failure or "") for r in failed)
    assert "the [motor] broke" in result.output
    monkeypatch.setenv("FAULTS", "1")
    result = run("broken:Broken-v0", *SMALL, "--import-code", "--out", "none")
    assert result.exit_code == 1 and "Every seed failed" in result.stderr
    assert "the [motor] broke" in Path("none/report.html").read_text()


def start(*arguments: str) -> subprocess.Popen[str]:
    program = "import torch; torch.set_num_threads(1); from natgrad.cli import main; main()"
    command = [sys.executable, "-c", program, "rl", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_stopped_runs_keep_what_is_done_and_go_on_bit_for_bit(how):
    options = ("--environments", "2", "--horizon", "32", "--episodes", "1", "--every", "2", "--no-tensorboard")
    process = start("CartPole-v1", *options, "--steps", "1000000", "--seeds", "2", "--out", "stopped")
    wait_for(Path("stopped/seed-0/checkpoint.safetensors"), process)
    process.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    checkpoint = ng.load("stopped/seed-0/checkpoint.safetensors")
    done = len(checkpoint["history"])
    if how == "interrupt":
        assert process.returncode == 130 and "Interrupted" in err
        found = Learning.load("stopped/learning.json")
        assert found.interrupted and len(found.runs[0].records) == done and len(found.runs) == 1
        assert Path("stopped/report.html").is_file() and rl.load("stopped/seed-0")
    else:
        assert process.returncode == -signal.SIGKILL and done >= 2
    steps = str(64 * (done + 2))
    for folder in ("stopped", "whole"):
        result = run("CartPole-v1", *options[:-1], "--steps", steps, "--seeds", "1", "--out", folder)
        assert result.exit_code == 0, result.output
    one, other = weights(Path("whole/seed-0")), weights(Path("stopped/seed-0"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_event_files_hold_every_record_once_after_resuming():
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ("128", "256"):
        arguments = ["rl", "CartPole-v1", "--steps", steps, "--seeds", "1", *SMALL[4:], "--out", "logged"]
        assert CliRunner().invoke(app, [*arguments, "--tensorboard"]).exit_code == 0
    events = accumulator.EventAccumulator("logged/seed-0")
    events.Reload()
    records = Learning.load("logged/learning.json").runs[0].records
    seen = [(event.step, event.value) for event in events.Scalars("trpo/kl")]
    assert [step for step, _ in seen] == [r["steps"] for r in records] == [128, 256]
    np.testing.assert_allclose([value for _, value in seen], [r["kl"] for r in records], rtol=1e-6)
    assert len(events.Scalars("trpo/evaluation")) == 1


def test_options_replace_settings_and_what_is_in_use_is_shown():
    direct = {"max_kl": 0.02, "gamma": None, "environments": 3, "recurrent": True}
    chosen = choose("trpo", "CartPole-v1", "gram", direct, ["damping=0.3", "critic.epochs=2", "hidden=(8, 4)"])
    algorithm, setup = DEFAULTS["trpo"]
    assert isinstance(algorithm, rl.TRPO) and isinstance(chosen.algorithm, rl.TRPO)
    critic = replace(algorithm.critic, epochs=2)
    assert chosen.algorithm == rl.TRPO(max_kl=0.02, damping=0.3, structure=ng.Gram(), critic=critic)
    assert chosen.setup == replace(setup, environments=3, recurrent=True, hidden=(8, 4))
    assert "defaults of trpo" in chosen.source and "max_kl" in chosen.source and "gamma" not in chosen.source
    assert "tuned for Pendulum-v1" in choose("trpo", "Pendulum-v1", None, {}, []).source
    clipped = choose("ppo", "CartPole-v1", None, {}, ["clip=none", "penalty=1"])
    assert clipped.algorithm == rl.PPO(clip=None, penalty=1)
    with pytest.raises(ArgumentError, match="int"):
        choose("trpo", "CartPole-v1", None, {}, ["backtracks=1.5"])


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (rl.TRPO(max_kl=0.03), ("max_kl", 0.03, True)),
        (rl.ACKTR(), ("max_kl", rl.ACKTR().max_kl, True)),
        (rl.NPG(target_kl=0.04), ("target_kl", 0.04, False)),
        (rl.PPO(), None),
        (rl.PPO(max_kl=0.05, penalty=1.0), ("max_kl", 0.05, True)),
        (rl.PPO(penalty=1.0, target_kl=0.06), ("target_kl", 0.06, False)),
    ],
)
def test_the_radius_that_the_report_compares_with(algorithm, expected):
    found = radius_of(algorithm)
    assert (None if found is None else (found.name, found.value, found.hard)) == expected


@pytest.mark.parametrize("structure", ["gram", "kronecker", "eigen-kronecker", "dense", "block-diagonal", "diagonal"])
def test_every_structure_keeps_to_the_radius(structure):
    steps = ("--steps", "128", "--seeds", "1", *SMALL[4:8], "--episodes", "0", "--set", "hidden=(8,)")
    result = run("CartPole-v1", *steps, "--structure", structure, "--out", "one")
    assert result.exit_code == 0, result.output
    found = Learning.load("one/learning.json")
    assert 0 < found.runs[0].records[0]["kl"] <= 0.01
    assert found.runs[0].evaluation is None
    assert (
        json.loads(Path("one/learning.json").read_text())["algorithm_settings"]["structure"]
        .lower()
        .startswith(structure.replace("-", ""))
    )
