"""``natgrad inspect`` and ``natgrad plan`` as a user meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from natgrad.cli.app import app
from natgrad.planning import Profile

RATES = {"16": 1e-5, "1024": 1e-2}
MADE_UP = Profile("made up", "0", {"float32": {"8,8": 1e11}}, RATES, RATES, RATES, {"65536": 1e11}, 1e-7)


@pytest.fixture(autouse=True)
def in_a_folder_with_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    MADE_UP.save(Path("p.json"))
    Path("cli_models.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def plain():\n    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))\n"
        "class Gain(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.gain, self.body = nn.Parameter(torch.ones(3)), plain()\n"
        "    def forward(self, x):\n        return self.gain * self.body(x)\n"
        "class Mixed(Gain):\n    def __init__(self):\n        super().__init__()\n"
        "        self.mix = nn.Parameter(torch.eye(3))\n"
        "    def forward(self, x):\n        return super().forward(x) @ self.mix\n"
        "def number():\n    return 3\n"
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.mark.parametrize("reference", ["cli_models:plain", "cli_models.py:plain"])
def test_inspect_shows_every_layer(reference):
    result = run("inspect", reference, "--batch", "8", "--strict")
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("Linear", "Kronecker", "7² × 5²", "6² × 3²", "53 parameters"))


def test_strict_names_what_is_not_covered():
    for given in ((), ("--input", "6")):
        assert run("inspect", "cli_models:Mixed", *given).exit_code == 0
        result = run("inspect", "cli_models:Mixed", "--strict", *given)
        assert result.exit_code == 1 and "mix (no layer rule for Mixed" in result.stderr


def test_strict_lets_vectors_pass_that_belong_to_no_layer():
    """A gain, a class token: there is nothing but a diagonal for them, and the table says so."""
    for given in ((), ("--input", "6")):
        result = run("inspect", "cli_models:Gain", "--strict", *given)
        assert result.exit_code == 0 and "gain: no layer rule for Gain: diagonal" in result.output


WIDE = "from torch import nn\ndef head():\n    return nn.Sequential(nn.Embedding(50257, 8), nn.Linear(8, 50257))\n"


def test_inspect_and_plan_of_a_head_as_wide_as_a_vocabulary():
    Path("wide.py").write_text(WIDE)
    result = run("inspect", "wide.py:head", "--meta", "--batch", "4", "--tokens", "8", "--strict")
    assert result.exit_code == 0, result.output
    words = ("diagonal 50257 × 8²", "9² × diagonal 50257", "output: diagonal (50257 wide", "would take 20.2 GB")
    assert all(word in result.output for word in words)
    result = run("plan", "wide.py:head", "--meta", "--batch", "4", "--max-memory", "20MB", "--profile", "p.json")
    assert result.exit_code == 0 and "recommended" in result.output


def test_json_holds_every_number():
    data = json.loads(run("inspect", "cli_models:Mixed", "--json").output)
    assert data["uncovered"] == ["gain", "mix"] and data["parameters"] == 65
    data = json.loads(run("plan", "cli_models:plain", "--batch", "64", "--profile", "p.json", "--json").output)
    assert data["parameters"] == 53 and len(data["choices"]) == 7 and data["recommended"]


def test_plan_of_models_and_tasks():
    for model in ("cli_models:plain", "diabetes"):
        result = run("plan", model, "--max-overhead", "500%", "--max-memory", "1GB", "--profile", "p.json")
        assert result.exit_code == 0, result.output
        assert "recommended" in result.output and "ng." in result.output


def test_plan_prints_a_program_with_the_task_s_likelihood():
    result = run("plan", "diabetes", "--profile", "p.json", "--max-p99", "1.01", "--max-overhead", "10000%")
    assert result.exit_code == 0, result.output
    assert "import natgrad as ng\n\nlikelihood = ng.Gaussian(scale=None)\noptimizer = ng." in result.output
    assert "ng.Categorical()  # what the model's output means" in run(
        "plan", "cli_models:plain", "--profile", "p.json").output  # fmt: skip


def test_limits_that_nobody_keeps_are_named_and_exit_with_code_1():
    limits = ("--max-overhead", "0.1%", "--max-memory", "10")
    arguments = ("plan", "cli_models:plain", "--batch", "64", *limits, "--profile", "p.json")
    result = run(*arguments)
    assert result.exit_code == 1 and "* recommended" not in result.output
    for text in ("1.001 × SGD's time is kept by none: the least is", "10 B of state is kept by none", "The nearest is"):
        assert text in result.output
    data = json.loads(run(*arguments, "--json").output)
    assert data["recommended"] is None and data["nearest"] in {c["name"] for c in data["choices"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "cli_models:number"), "returned int"),
        (("inspect", "none.py:f"), "no file 'none.py'"),
        (("inspect", "digitz"), "no task 'digitz'"),
        (("inspect", "cli_models:plain", "-s", "kfca"), "did you mean 'kfac'"),
        (("inspect", "cli_models:plain", "--input", "3by3"), "is not the shape of an example"),
        (("plan", "cli_models:plain", "--max-overhead", "little"), "is no share"),
        (("plan", "cli_models:plain", "--max-p99", "0.5"), "max_p99=0.5"),
        (("plan", "cli_models:plain", "--max-memory", "much", "--profile", "p.json"), "max_memory='much'"),
        (("plan", "cli_models:plain", "--profile", "cli_models.py"), "is no device profile"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
