"""A run that was stopped, or killed, ends with the bits of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crashes import exit_code, forked
from long_run import network, run
from safetensors.torch import load_file

import natgrad as ng

STEPS = 8


def tensors(path: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every tensor of a snapshot, the optimizer's among them."""
    found = load_file(path)
    return {n: (t.dtype, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in found.items()}


def test_resume_in_a_fresh_process_is_bitwise(tmp_path):
    arguments = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        run(tmp_path / f"whole {name}", STEPS, dtype)
        run(tmp_path / name, STEPS // 2, dtype)
        assert tensors(tmp_path / name) != tensors(tmp_path / f"whole {name}")
        arguments += [str(tmp_path / name), name]
    program = Path(__file__).with_name("long_run.py")
    subprocess.run([sys.executable, program, str(STEPS), *arguments], check=True, timeout=300)
    for name in ("float32", "bfloat16"):
        assert tensors(tmp_path / name) == tensors(tmp_path / f"whole {name}")
        stored = load_file(tmp_path / name).items()
        # Whatever the parameters are:
        assert {t.dtype for n, t in stored if n.startswith("optimizer.state.0.weight.average")} == {torch.float32}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_resume_after_many_kills_is_bitwise(tmp_path):
    """kill -9 at random moments of training and saving, until the run has ended."""
    whole, killed, when, kills = tmp_path / "whole", tmp_path / "killed", random.Random(0), 0
    run(tmp_path / "warm", STEPS, torch.float32)
    started = time.perf_counter()
    run(whole, STEPS, torch.float32)
    seconds = time.perf_counter() - started
    while not killed.exists() or ng.load(killed)["step"] < STEPS:
        child = forked(lambda: run(killed, STEPS, torch.float32) and None)
        time.sleep(seconds * when.uniform(0.1, 0.6) * (1 + kills / 20))  # on a busy machine too there is progress
        os.kill(child, signal.SIGKILL)
        kills += exit_code(child) == -signal.SIGKILL
    assert kills >= 2
    assert tensors(killed) == tensors(whole)


def test_resume_depends_on_what_is_saved(tmp_path):
    """The control: without the optimizer's state the bits differ."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, STEPS, torch.float32)
    run(parts, STEPS // 2, torch.float32)
    model = network(torch.float32)
    extras = ng.load(parts, model)
    fresh = ng.KFAC(model, ng.Categorical(), lr=0.5, damping=ng.LevenbergMarquardt(ng.FactoredTikhonov(1e-2)))
    ng.save(parts, model, fresh, **extras)
    run(parts, STEPS, torch.float32)
    assert tensors(parts) != tensors(whole)
