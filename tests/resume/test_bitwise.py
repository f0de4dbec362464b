"""A run that is stopped, saved and continued in a fresh process is, to the bit, the run that was not stopped."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resume_runs as runs
import torch
from torch import Tensor

import natgrad as ng


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees of tensors and plain values differ: dtype, shape, a bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{path}/{i}")]
    same = a.hex() == b.hex() if isinstance(a, float) and isinstance(b, float) else type(a) is type(b) and a == b
    return [] if same else [f"{path}: {a!r} is not {b!r}"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outcomes of the runs that were not stopped, and of those that another process continued, by name."""
    folder = tmp_path_factory.mktemp("resume")
    checkpoints, whole = {}, {}
    torch.set_num_threads(1)
    for combination in runs.COMBINATIONS:
        model, optimizer = combination.start()
        try:
            runs.train(model, optimizer, 0, runs.CUT)
            checkpoints[combination.name] = copy.deepcopy(runs.saved(model, optimizer))
            whole[combination.name] = runs.outcome(model, optimizer, runs.train(model, optimizer, runs.CUT, runs.END))
        except Exception as error:  # reported by the test of this combination
            whole[combination.name] = {"error": f"{type(error).__name__}: {error}"}
            checkpoints.pop(combination.name, None)
    torch.save(checkpoints, folder / "saved.pt")
    subprocess.run(
        [sys.executable, str(Path(runs.__file__)), str(folder / "saved.pt"), str(folder / "results.pt")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    return whole, torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("combination", runs.COMBINATIONS, ids=lambda c: c.name)
def test_resume_in_a_fresh_process_is_bitwise(resumed, combination):
    expected, actual = resumed[0][combination.name], resumed[1].get(combination.name)
    assert "error" not in expected, expected["error"]
    assert actual is not None and "error" not in actual, actual
    assert differences(expected, actual) == []
    assert any(bool((t != 0).any()) for t in expected["model"].values())


@pytest.mark.parametrize("combination", runs.COMBINATIONS, ids=lambda c: c.name)
def test_resume_trains_before_and_after(resumed, combination):
    """A run that stands still would be resumed by anything."""
    model, _ = combination.start()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = resumed[0][combination.name]["model"]
    assert not torch.equal(start["0.weight"], end["0.weight"])
    assert len(set(resumed[0][combination.name]["losses"])) > 1
    assert all(bool(torch.isfinite(t).all()) for t in end.values())


@pytest.mark.parametrize("combination", [c for c in runs.COMBINATIONS if c.controlled], ids=lambda c: c.name)
def test_bitwise_resume_needs_the_optimizers_state(resumed, combination):
    """The control: without it the comparison fails."""
    expected, forgetful = resumed[0][combination.name], resumed[1][combination.name + "-forgetful"]
    assert any(line.startswith("/model") for line in differences(expected, forgetful))


@pytest.mark.parametrize("preset", runs.PRESETS)
def test_resume_bitwise_refuses_momentum_where_there_is_none(preset):
    """Beside a search that fits it, or in a preset that has no such argument."""
    model, _ = runs.Combination("KFAC", "default", "float32").start()
    if preset in runs.WITHOUT_MOMENTUM:
        with pytest.raises(TypeError, match="momentum"):
            runs.PRESETS[preset](model, ng.Categorical(), momentum=0.9)
    elif preset in runs.FITS:
        with pytest.raises(ng.errors.ArgumentError, match=r"momentum.*QuadraticFit"):
            runs.PRESETS[preset](model, ng.Categorical(), momentum=0.9)
    else:
        assert runs.PRESETS[preset](model, ng.Categorical(), momentum=0.9).param_groups[0]["momentum"] == 0.9


def test_the_comparison_sees_one_bit():
    a = {"state": {0: {"m": torch.zeros(3)}}, "losses": [1.0]}
    for b in (
        {"state": {0: {"m": torch.tensor([0.0, 0.0, 1e-45])}}, "losses": [1.0]},
        {"state": {0: {"m": torch.zeros(3, dtype=torch.bfloat16)}}, "losses": [1.0]},
        {"state": {0: {}}, "losses": [1.0]},
        {"state": {0: {"m": torch.zeros(3)}}, "losses": [1.0000000000000002]},
    ):
        assert differences(a, b)
    assert differences(a, a) == []
