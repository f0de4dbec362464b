"""The device profile: measured in time, kept in the user's cache, refused when damaged."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from natgrad.errors import ArgumentError
from natgrad.planning import Profile, cache_folder, measure, profile_of
from natgrad.planning import profile as module
from natgrad.planning.profile import VERSION, _interpolated, _scaled
from natgrad.planning.work import gemm, inverse, memory

SIMPLE = Profile(
    "d", "0",
    {"float32": {"8,8": 1e9, "8,512": 2e9, "512,512": 4e9}, "bfloat16": {"8,8": 8e9}}, {"16": 1e-6, "64": 64e-6},
    {"16": 1e-5}, {"16": 1e-5}, {"1000": 1e9, "100000": 1e10}, 1e-6,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> tuple[Profile, float]:
    started = time.perf_counter()
    found = measure("cpu", seconds=0.6)
    return found, time.perf_counter() - started


def test_measuring_ends_in_time_and_finds_every_rate(measured):
    found, seconds = measured
    assert seconds < 6  # asked for 0.6; the bound is for busy machines
    assert found.version == VERSION and "threads" in found.device
    assert len(found.gemm["float32"]) > 5 and found.gemm["bfloat16"]
    for table in (*found.gemm.values(), found.inverse, found.eigh, found.qr, found.bandwidth):
        assert table and all(value > 0 for value in table.values())
    assert all({"16", "64", "256"} <= set(table) for table in (found.inverse, found.eigh, found.qr))
    assert 1e-8 < found.call < 1e-3
    assert found.eigh["256"] > found.inverse["256"] > found.inverse["16"]


def test_saved_and_loaded(measured, tmp_path):
    path = tmp_path / "deep" / "p.json"
    measured[0].save(path)
    assert Profile.load(path) == measured[0]
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]
    assert profile_of("cpu", path) == measured[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"version": VERSION + 1}, f"version {VERSION + 1}, not {VERSION}"),
        (lambda d: d | {"gemm": {}}, "is no device profile"),
        (lambda d: d | {"call": -1.0}, "is no device profile"),
        (lambda d: {k: v for k, v in d.items() if k != "eigh"}, "is no device profile"),
        (lambda d: [1, 2], "is no device profile"),
    ],
)
def test_damaged_files_are_refused_by_name(measured, tmp_path, change, message):
    path = tmp_path / "p.json"
    measured[0].save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ArgumentError, match=message):
        Profile.load(path)
    with pytest.raises(ArgumentError, match=r"p\.json"):
        profile_of("cpu", path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ArgumentError, match="no device profile at"):
        Profile.load(tmp_path / "none.json")


def test_measured_once_and_then_read_from_the_cache(monkeypatch, tmp_path, measured):
    monkeypatch.setenv("NATGRAD_CACHE", str(tmp_path / "cache"))
    calls = []
    monkeypatch.setattr(module, "measure", lambda device: calls.append(device) or measured[0])
    assert profile_of("cpu") == profile_of("meta") == measured[0]
    assert len(calls) == 1
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("{")
    assert profile_of("cpu") == measured[0] and len(calls) == 2, "a damaged cache is measured anew"
    assert Profile.load(kept) == measured[0]


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, measured):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NATGRAD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(module, "measure", lambda device: measured[0])
    assert profile_of("cpu") == measured[0]
    with pytest.raises(ArgumentError, match="cannot be written"):
        profile_of("cpu", tmp_path / "file" / "p.json")


def test_the_folder_is_the_platform_s(monkeypatch, tmp_path):
    for name in ("NATGRAD_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "natgrad"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "natgrad"
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "natgrad"
    monkeypatch.setattr(module.sys, "platform", "win32")
    assert cache_folder() == tmp_path / "AppData" / "Local" / "natgrad" / "Cache"
    monkeypatch.setenv("NATGRAD_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_seconds_of_operations():
    assert SIMPLE.seconds([memory(250, 1)]) == pytest.approx(1e-6 + 1000 / 1e9)
    assert SIMPLE.seconds([memory(25_000, 1, count=3)]) == pytest.approx(3 * (1e-6 + 1e5 / 1e10))
    assert SIMPLE.seconds([gemm(8, 8, 4000)]) == pytest.approx(1e-6 + 2 * 64 * 4000 / 1e9)
    assert SIMPLE.seconds([gemm(8, 512, 512)]) == pytest.approx(1e-6 + 2 * 8 * 512 * 512 / 2e9)
    assert SIMPLE.seconds([gemm(8, 8, 4000)], torch.bfloat16) < SIMPLE.seconds([gemm(8, 8, 4000)])
    assert SIMPLE.seconds([inverse(128)]) == pytest.approx(1e-6 + 128**3 / 4e9)


def test_between_measured_sizes_in_logarithms():
    table = {"10": 1.0, "1000": 100.0}
    assert _interpolated(table, 100) == pytest.approx(10.0)
    assert (_interpolated(table, 1), _interpolated(table, 5000)) == (1.0, 100.0)
    # Beyond them with the power of the last two, but no less than 2.5 and no more than 3.
    assert _scaled(table, 2000) == pytest.approx(100 * 2**2.5)
    assert _scaled({"10": 1.0, "20": 2**2.8}, 80) == pytest.approx(2**2.8 * 4**2.8)
    assert _scaled({"10": 1.0, "20": 16.0}, 40) == pytest.approx(16 * 8)
    assert _scaled({"10": 1.0}, 20) == pytest.approx(8)


def test_no_inverse_is_faster_than_products():
    assert SIMPLE.seconds([inverse(16)]) == pytest.approx(1e-6 + 16**3 / 4e9)
