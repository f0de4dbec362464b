"""The programs in examples/ run as they are and do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"natgrad_example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_classification_learns_the_digits(capsys):
    assert load("classification").main() > 0.95
    printed = capsys.readouterr().out
    predicted = [float(value) for value in re.findall(r"predicted to make (\S+)", printed)]
    assert len(predicted) == 4 and max(predicted) <= 1e-3


def test_regression_beats_its_start_on_patients_it_has_not_seen():
    before, after = load("regression").main()
    assert after < 1.1 < before - 0.3


def test_the_policy_learns_and_stays_within_its_trust_region():
    example = load("contextual_bandit")
    reward, largest = example.main()
    assert reward > 0.7
    assert 0.1 * example.MAX_KL < largest <= example.MAX_KL


def test_fisher_scoring_of_the_own_likelihood_is_done_in_ten_steps():
    losses = load("own_likelihood").main()
    best = losses["NGD"][-1]
    assert losses["NGD"][10] - best < 1e-3
    assert losses["Adam"][10] - best > 0.2
    assert losses["Adam"][0] == losses["KFAC"][0] == losses["NGD"][0] > best + 0.5


def test_the_paths_of_the_picture_coincide_for_natural_gradient_only(tmp_path):
    pytest.importorskip("contourpy")
    picture = tmp_path / "invariance.svg"
    gaps = load("invariance").main(str(picture))
    assert gaps["Natural gradient"] < 1e-12
    assert gaps["Gradient descent"] > 1
    assert picture.read_text().startswith("<svg")


def test_both_structures_balance_the_pole_within_their_trust_region():
    example = load("reinforcement_learning")
    for score, largest in example.main().values():
        assert score >= 475
        assert 0.1 * example.MAX_KL < largest <= example.MAX_KL


def test_examples_are_short_and_all_of_them_are_tested():
    programs = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    here = "".join(path.read_text() for path in [Path(__file__), *(Path(__file__).parent / "trainers").glob("*.py")])
    for name, text in programs.items():
        assert len(text.splitlines()) <= 100, name
        assert f'load("{name}")' in here, f"no test runs examples/{name}.py"
