"""The command line as a user meets it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from natgrad.cli import main
from natgrad.cli.app import app
from natgrad.cli.compare import parse_seconds
from natgrad.cli.display import table
from natgrad.cli.doctor import extras
from natgrad.errors import ArgumentError
from natgrad.tasks import BUILTIN, Comparison
from natgrad.tasks.optimizers import OPTIMIZERS


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_compare_writes_report_and_numbers():
    result = run("compare", "diabetes", "--optimizers", "sgd, adamw", "--seeds", "2", "--steps", "5", "--threads", "1")
    assert result.exit_code == 0, result.output
    folder = Path("runs/diabetes")
    found = Comparison.load(folder / "comparison.json")
    assert [(r.optimizer, r.seed, r.steps) for r in found.runs] == [
        ("sgd", 0, 5),
        ("adamw", 0, 5),
        ("sgd", 1, 5),
        ("adamw", 1, 5),
    ]
    assert found.machine.threads == 1
    page = (folder / "report.html").read_text()
    assert "diabetes" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert str(folder / "report.html") in result.output
    assert "4/4" in result.output and "adamw" in result.output and "steps to" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "digitz"), "no task 'digitz' (did you mean 'digits'"),
        (("compare", "digits", "-o", "kfca"), "no optimizer 'kfca' (did you mean 'kfac'"),
        (("compare", "digits", "-o", ","), "No optimizer was given"),
        (("compare", "digits", "--budget", "soon"), "'soon' is not a time"),
        (("compare", "digits", "--budget", "5s", "--steps", "3"), "not both"),
        (("compare", "digits", "--steps", "0"), "at least 1"),
        (("compare", "digits", "--seeds", "0"), "--seeds must be at least 1"),
        (("compare", "digits", "--threads", "0"), "--threads must be at least 1"),
        (("compare", "digits", "--device", "gpuu"), "--device 'gpuu'"),
        (("compare", "fashion-mnist"), "Fashion-MNIST"),
        (("compare", "digits", "--data", "."), "leave --data out"),
        (("compare", "no_module:task"), "no module 'no_module'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output and len(result.stderr.strip().splitlines()) == 1


def test_unwritable_folder_is_found_before_training(monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("the task must not even be loaded")

    monkeypatch.setattr("natgrad.tasks.registry.load_task", never)
    Path("file").write_text("in the way")
    result = run("compare", "digits", "--out", "file/report")
    assert result.exit_code == 2 and "cannot be written to file/report" in result.stderr


def test_a_user_s_task_from_the_current_folder(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_cli_task.py").write_text(
        "import torch\nfrom torch import nn\nfrom natgrad.likelihood import Gaussian\n\n"
        "def line():\n    '''A [bold] line.'''\n    x = torch.linspace(-1, 1, 40).unsqueeze(1)\n"
        "    return nn.Linear(1, 1), Gaussian(scale=1.0), (x, 3 * x), (x, 3 * x)\n"
    )
    result = run("compare", "my_cli_task:line", "-o", "sgd", "--seeds", "1", "--steps", "3")
    assert result.exit_code == 0, result.output
    assert "A [bold] line." in result.output
    assert Path("runs/my_cli_task-line/report.html").is_file()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("open('no-such-file.csv')", "FileNotFoundError: [Errno 2] No such file or directory: 'no-such-file.csv'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise KeyError", "KeyError"),
    ],
)
def test_an_exception_in_the_user_s_function_is_one_line(monkeypatch, statement, reason):
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"my_raising_task_{abs(hash(statement))}"
    Path(f"{name}.py").write_text(f"def task():\n    {statement}\n")
    result = run("compare", f"{name}:task", "--steps", "1")
    assert result.exit_code == 2
    assert result.stderr == f"Error: {name}:task failed at line 2 of {name}.py: {reason}\n"
    assert "Traceback" not in result.output


def test_failed_runs_are_shown_and_all_failed_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_bad_task.py").write_text(
        "import torch\nfrom torch import nn\nfrom natgrad.likelihood import Gaussian\n\n"
        "class Bad(nn.Linear):\n    def forward(self, x):\n        if self.training:\n"
        "            raise RuntimeError('no training today')\n        return super().forward(x)\n\n"
        "def task():\n    x = torch.linspace(-1, 1, 40).unsqueeze(1)\n"
        "    return Bad(1, 1), Gaussian(scale=1.0), (x, x), (x, x)\n"
    )
    result = run("compare", "my_bad_task:task", "-o", "sgd,adamw", "--seeds", "1", "--steps", "3")
    assert result.exit_code == 1
    assert result.output.count("no training today") >= 2
    assert Path("runs/my_bad_task-task/comparison.json").is_file()


@pytest.mark.parametrize(("optimizers", "radius"), [("sgd", False), ("sgd,kfac", True)])
def test_a_radius_is_explained_where_there_is_one(optimizers, radius):
    result = run("compare", "diabetes", "-o", optimizers, "--seeds", "1", "--steps", "2")
    assert ("max_kl: KL of a step" in result.output) == radius


def test_tuning_says_what_it_tried():
    result = run("compare", "diabetes", "-o", "sgd", "--seeds", "1", "--steps", "4", "--tune")
    assert result.exit_code == 0 and "†" in result.output and "default setting times 0.03" in result.output
    data = json.loads(Path("runs/diabetes/comparison.json").read_text())
    assert data["settings"]["tuning"]["steps"] == 4 and data["runs"][0]["tuned"]


def test_tasks_lists_everything():
    result = run("tasks")
    assert result.exit_code == 0
    assert all(name in result.output for name in [*BUILTIN, *OPTIMIZERS, "module:function"])


def test_doctor_names_versions_and_extras():
    result = run("doctor")
    assert result.exit_code == 0
    for word in ("natgrad", "torch", "threads", "GFLOP/s", "extra tasks", "extra report", "scikit-learn"):
        assert word in result.output
    assert {"tasks", "report", "cli"} <= set(extras()) and "dev" not in extras()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("60s", 60), ("1.5m", 90), ("2min", 120), ("1h", 3600), ("500ms", 0.5), (" 3 S ", 3), (".5s", 0.5)],
)
def test_times(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-3s", "3 days", "0", "nan", "inf", "1e3"])
def test_no_times(text):
    with pytest.raises(ArgumentError, match="is not a time"):
        parse_seconds(text)


def test_missing_command_line_packages_name_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("natgrad.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "pip install 'natgrad[cli]'" in capsys.readouterr().err


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = run("compare", "digits", "-o", "sgd", "--steps", "1")
    assert result.exit_code == 2 and "natgrad[tasks]" in result.stderr


def test_as_a_program():
    code = "from natgrad.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", "diabetes", "-o", "sgd", "--seeds", "1", "--steps", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "report.html" in done.stdout


@pytest.mark.parametrize("width", [90, 140])
def test_table_says_how_many_seeds_reached_the_target(width):
    run("compare", "diabetes", "-o", "sgd,adamw", "--seeds", "3", "--steps", "3")
    found = Comparison.load("runs/diabetes/comparison.json")
    first, second = found.summary
    partly = replace(first, reached=2, steps_to_target=2.0, seconds_to_target=0.25)
    never = replace(second, reached=1, steps_to_target=None, seconds_to_target=None)
    for rows, counts in (((partly, never), ["2 of 3"] * 2), ((replace(partly, reached=3), never), [])):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table(replace(found, summary=rows), width))
        text = console.export_text()
        assert re.findall(r"\((\d of \d)\)", text) == counts
        assert "…" not in text and max(len(line) for line in text.splitlines()) <= width
        if counts:
            assert "2 (2 of 3)" in text and "0.25 (2 of 3)" in text


@pytest.mark.parametrize("width", [72, 100, 140])
def test_numbers_are_never_cut_to_fit_the_terminal(width):
    run("compare", "diabetes", "-o", "sgd,kfac", "--seeds", "1", "--steps", "3")
    found = Comparison.load("runs/diabetes/comparison.json")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(found, width))
    text = console.export_text()
    assert ("max_kl 0." in text and "lr 0.01" in text) == (width > 72), "the setting is named, where there is room"
    assert "…" not in text and max(len(line) for line in text.splitlines()) <= width
    for row in found.summary:
        assert f"{row.train_loss:.4g}" in text


def test_the_package_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "natgrad", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "compare" in done.stdout
