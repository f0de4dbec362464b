"""Every Python block of README.md and of docs/ runs, and prints what the page says it prints.

The blocks of a page run in order and share their names. A ```text block right after one is its output: words must be
the same, and numbers agree to 2 % and the last digit shown, which leaves room for other processors and versions of
torch. The README's programs use small real data that a reader would bring along.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad as ng
from natgrad.network import RULES

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<margin> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=margin)```$", re.M | re.S)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    follows: str
    """The text between the block before and this one."""


def blocks(page: str) -> list[Block]:
    text, found, end = (ROOT / page).read_text(encoding="utf-8"), [], 0
    for match in FENCE.finditer(text):
        line = text[: match.start()].count("\n") + 2
        found.append(Block(match["language"], dedent(match["code"]), line, text[end : match.start()]))
        end = match.end()
    return found


def digits(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images[:rows], dtype=torch.float32) / 16, torch.tensor(labels[:rows])


def readme_names() -> dict[str, Any]:
    """What the five programs of the README take for granted."""
    x, y = digits(512)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    policy = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    with torch.no_grad():
        actions = ng.Categorical().sample(policy(x))[0]
        old = ng.Categorical().nll(policy(x), actions)

    @dataclass(frozen=True)
    class Batch:
        observations: torch.Tensor

    def surrogate(policy: nn.Module, batch: Batch) -> torch.Tensor:
        reward = (actions == y).float()
        ratio = (old - ng.Categorical().nll(policy(batch.observations), actions)).exp()
        return -((reward - reward.mean()) * ratio).mean()

    names = {"model": model, "policy": policy, "batch": Batch(x), "surrogate": surrogate, "x": x[:64], "y": y[:64]}
    loader = list(zip(x.split(128), y.split(128), strict=True))
    return {"ng": ng, "torch": torch, "F": F, "loader": loader, "probe": x[:128], **names}


def check_program(number: int, names: dict[str, Any]) -> None:
    """What each of the README's programs must have achieved, beside running."""
    if number in (1, 2):
        assert bool(names["opt"].last.accepted) and names["opt"].last.kl_predicted > 0
    elif number == 3:
        assert 0 < names["opt"].last.kl_measured <= 0.01
        assert names["opt"].last.loss_change_measured < 0
    elif number == 4:
        natural, gradient, fisher = names["natural"], names["gradient"], names["fisher"]
        torch.testing.assert_close(fisher @ natural + 1e-3 * natural, gradient, rtol=1e-3, atol=1e-5)
        assert 0 < names["spectrum"].effective_dimension(1e-3) < names["spectrum"].size == len(gradient)
    else:
        assert names["guard"].last.kl_step <= 1e-3
        records = list(ng.Ledger("run.jsonl").records())
        assert len([record for record in records if record.kind == "update"]) == len(names["loader"])


def numbers_and_words(text: str) -> tuple[list[str], list[str]]:
    return NUMBER.findall(text), NUMBER.sub("#", text).split()


def last_digit(number: str) -> float:
    """What one unit of the last digit shown is worth: 0.01 for 3.25, 1e-5 for 1.3e-04."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def check_output(printed: str, shown: str, where: str) -> None:
    found, wanted = numbers_and_words(printed), numbers_and_words(shown)
    assert found[1] == wanted[1], f"{where} prints\n{printed}"
    for a, b in zip(found[0], wanted[0], strict=True):
        tolerance = 0.02 * abs(float(b)) + 1.01 * last_digit(b) * ("." in b or "e" in b)
        assert abs(float(a) - float(b)) <= tolerance, f"{where}: {a} is not {b} in\n{printed}"


@pytest.fixture
def layer_rules() -> Iterator[None]:
    """Pages may register layer rules; they hold for that page only."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run_and_print_what_the_page_says(page, layer_rules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the files that programs write
    names: dict[str, Any] = readme_names() if page == "README.md" else {}
    names["__name__"] = "__main__"
    found, programs = blocks(page), 0
    for k, block in enumerate(found):
        if block.language != "python":
            continue
        where, printed = f"{page}:{block.line}", io.StringIO()
        code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of ng.audit, which pages show as its messages
            exec(code, names)
        programs += 1
        if page == "README.md":
            check_program(programs, names)
        after = found[k + 1] if k + 1 < len(found) else None
        if after is not None and after.language == "text" and not after.follows.strip():
            check_output(printed.getvalue(), after.code, where)
    assert programs == 5 or page != "README.md"


@pytest.mark.parametrize("page", PAGES)
def test_fences_say_what_they_are(page):
    """So that no Python hides from the test above in a fence without a language."""
    assert {block.language for block in blocks(page)} <= {"python", "text", "sh"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    from typer.testing import CliRunner

    from natgrad.cli.app import app

    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in (b for b in blocks(page) if b.language == "sh"):
        for line in block.code.splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["make"]:
                assert words[1] in targets, line
            elif words[:1] == ["natgrad"]:
                shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"}, color=False)
                assert shown.exit_code == 0, line
                for option in (word for word in words[2:] if word.startswith("-")):
                    assert option in re.sub(r"\x1b\[[\d;]*m", "", shown.output), line
            elif words[:1] == ["python"]:
                assert (ROOT / words[1]).exists() or words[1] == "-m", line
            else:
                assert not words or words[:2] in (["pip", "install"], ["git", "clone"]) or words[0] == "cd", line


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_library_exist(page):
    """Every `ng.name` in the text, also outside of code blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in set(re.findall(r"\bng\.((?:\w+\.)*\w+)", text)):
        value: Any = ng
        for part in name.split("."):
            assert hasattr(value, part), f"{page}: ng.{name}"
            value = getattr(value, part)


def test_relative_links_point_to_something():
    spec = importlib.util.spec_from_file_location("check_links", ROOT / ".ci" / "check_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.broken_links(ROOT) == []


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, name in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", text):
        other = ((ROOT / page).parent / target) if target else ROOT / page
        headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
        assert name in {anchor(heading) for heading in headings}, f"{page}: {target}#{name}"
