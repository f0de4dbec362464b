"""Whatever happens while a snapshot is written, the last one that was acknowledged can be loaded."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from crashes import Numbers, exit_code, failing_at, forked, loaded_generation, save_generation

import natgrad as ng
from natgrad.checkpoint import atomic
from natgrad.checkpoint.sealed import unsealed
from natgrad.errors import SnapshotError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def temporary_files(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


Saving = Callable[[Numbers, int], None]


def time_of(save: Saving, model: Numbers) -> float:
    """Seconds that a save takes: within them, a child is killed at a random moment."""
    start = time.perf_counter()
    for _ in range(10):
        save(model.become(0), 0)
    return (time.perf_counter() - start) / 10


def killed_in_mid_save(save: Saving, first: int, delay: float) -> int:
    """A child saves generations ``first``, ``first`` + 1, … until it is killed; the last one that it acknowledged."""
    reading, writing = os.pipe()
    model = Numbers()

    def work() -> None:
        os.write(writing, (first - 1).to_bytes(8, "little"))
        for generation in range(first, first + 10_000):
            save(model.become(generation), generation)
            os.write(writing, generation.to_bytes(8, "little"))

    child = forked(work)
    os.close(writing)
    with open(reading, "rb") as pipe:
        acknowledged = pipe.read(8)  # it has begun
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        acknowledged += pipe.read()
    return int.from_bytes(acknowledged[-8:], "little")


def test_kill_9_in_mid_save_loses_nothing_in_200_tries(tmp_path):
    path, when = tmp_path / "run.safetensors", random.Random(0)
    model, interrupted, generation = Numbers(), 0, 0

    def save(model: Numbers, generation: int) -> None:
        ng.save(path, model, generation=generation)

    window = time_of(save, model)
    for _ in range(200):
        acknowledged = killed_in_mid_save(save, generation + 1, when.uniform(0, window))
        interrupted += bool(temporary_files(tmp_path))
        # Not even the generation before is needed: pytest would make its warning an error.
        generation = ng.load(path, model)["generation"]
        assert generation in (acknowledged, acknowledged + 1)
        assert model.generation() == generation
    assert interrupted >= 20, "the kills do not meet the saves: the test shows nothing"
    ng.save(path, model, generation=generation)
    assert sorted(os.listdir(tmp_path)) == ["run.safetensors", "run.safetensors.previous"]


def test_control_kill_9_destroys_a_file_that_is_written_in_place(tmp_path):
    """The same kills, with torch.save in place of ng.save: the test above can fail."""
    path, when, lost = tmp_path / "run.pt", random.Random(0), 0

    def save(model: Numbers, generation: int) -> None:
        torch.save(model.state_dict(), path)

    window = time_of(save, Numbers())
    for _ in range(40):
        save(Numbers(), 0)
        killed_in_mid_save(save, 1, when.uniform(0, window))
        try:
            torch.load(path, weights_only=True)
        except Exception:
            lost += 1
    assert lost > 0


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("before", ["nothing", "one", "two", "damaged"])
def test_a_crash_before_any_call_leaves_the_old_snapshot_or_the_new(tmp_path, before):
    outcomes, code = set(), 9
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        folder.mkdir()
        path = folder / "run.safetensors"
        for generation in {"nothing": (), "one": (1,), "two": (0, 1), "damaged": (1, 0)}[before]:
            save_generation(path, generation)
        if before == "damaged":  # what a run finds that resumes from the generation before: 1 is the only good one
            damage(path)

        def work(call=call, path=path) -> None:
            with failing_at(call, lambda name: os._exit(9)):
                save_generation(path, 2)

        code = exit_code(forked(work))
        assert code in (0, 9)
        if code == 9 and before == "nothing" and not path.exists():
            outcomes.add("nothing")
            continue
        if before == "damaged":
            with pytest.warns(UserWarning, match="generation before") if not intact(path) else nullcontext():
                found = loaded_generation(path)
        else:
            found = loaded_generation(path)
        assert found == 2 if code == 0 else found in (1, 2)
        outcomes.add(found)
        save_generation(path, 3)  # and the next save cleans up
        assert not temporary_files(folder) and loaded_generation(path) == 3
        if code == 0:  # it has not as many calls
            break
    assert call > 6
    assert outcomes == {"nothing" if before == "nothing" else 1, 2}


def intact(path: Path) -> bool:
    try:
        unsealed(path)
    except SnapshotError:
        return False
    return True


def test_an_error_of_any_call_leaves_the_old_snapshot_or_the_new(tmp_path):
    path = tmp_path / "run.safetensors"
    save_generation(path, 0)
    save_generation(path, 1)
    failed = set()

    def fail(name: str) -> None:
        failed.add(name)
        raise OSError(errno.EIO, "injected")

    for call in itertools.count(1):
        save_generation(path, 1)
        expected = 2
        with failing_at(call, fail) as made:
            try:
                save_generation(path, 2)
            except SnapshotError as error:
                assert "injected" in str(error) and "untouched" in str(error)
                expected = 1
            except UserWarning as warning:  # pytest makes it an error
                assert "is saved" in str(warning)
        if len(made) < call:
            break
        assert loaded_generation(path) == expected, made[-1]
        assert not temporary_files(tmp_path) or made[call - 1] == "unlink"
    assert {"open", "link", "replace", "fsync"} <= failed
    assert not temporary_files(tmp_path)


def test_content_is_on_the_disk_before_its_name_and_its_name_before_the_rotation(tmp_path, monkeypatch):
    path, events = tmp_path / "run", []
    save_generation(path, 1)
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def renamed(old, new) -> None:
        events.append(f"-> {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save_generation(path, 2)
    if not os.path.isdir("/proc/self/fd"):
        events = ["folder" if e == "file" and i else e for i, e in enumerate(events)]
    assert events == ["file", "-> run", "folder", "-> run.previous", "folder"]


def test_a_full_disk_leaves_the_old_snapshot_and_no_rubbish(tmp_path):
    path, model = tmp_path / "run.safetensors", Numbers()
    ng.save(path, model.become(1), generation=1)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(SnapshotError, match=r"could not be written .*Make room"):
            ng.save(path, model.become(2), generation=2)

    assert exit_code(forked(work)) == 0
    assert os.listdir(tmp_path) == ["run.safetensors"]
    assert ng.load(path, model) == {"generation": 1} and model.generation() == 1


def test_control_a_full_disk_destroys_a_file_that_is_written_in_place(tmp_path):
    path = tmp_path / "run.pt"
    torch.save(Numbers().state_dict(), path)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        torch.save(Numbers().state_dict(), path)

    assert exit_code(forked(work)) == 1
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)


def test_a_folder_that_may_not_be_written_in_is_a_clear_error(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:  # by hand: the superuser may write everywhere
        patched.setattr(os, "open", refused)
        with pytest.raises(SnapshotError, match=r"Permission denied.*that you may write in it"):
            save_generation(tmp_path / "run", 1)
    with pytest.raises(SnapshotError, match=r"could not be written .*check that the folder exists"):
        save_generation(tmp_path / "missing" / "run", 1)
    with pytest.raises(SnapshotError, match="is a folder"):
        save_generation(tmp_path, 1)
    assert os.listdir(tmp_path) == []


def test_without_hard_links_the_generation_before_is_copied(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EPERM, "no hard links here")

    path = tmp_path / "run"
    monkeypatch.setattr(os, "link", refused)
    save_generation(path, 1)
    save_generation(path, 2)
    assert loaded_generation(path) == 2 and loaded_generation(atomic.previous(path)) == 1
    assert sorted(os.listdir(tmp_path)) == ["run", "run.previous"]


def test_sweeping_leaves_other_files_and_living_savers_alone(tmp_path):
    path = tmp_path / "run"
    save_generation(tmp_path / "other", 1)
    with atomic._temporary(tmp_path / "other") as (_, others), atomic._temporary(path) as (_, living):
        stale = atomic._fresh_name(path)
        stale.touch()
        (tmp_path / ".natgrad-notes.tmp").touch()
        # Locks are of open files: a saver in another process holds its own.
        assert exit_code(forked(lambda: save_generation(path, 1))) == 0
        assert living.exists() and others.exists() and not stale.exists()
    assert sorted(os.listdir(tmp_path)) == [".natgrad-notes.tmp", "other", "run"]


def test_links_and_permissions_are_kept(tmp_path):
    path, link = tmp_path / "run", tmp_path / "latest"
    save_generation(path, 1)
    path.chmod(0o600)
    link.symlink_to(path)
    save_generation(link, 2)
    assert link.is_symlink() and loaded_generation(path) == 2
    assert path.stat().st_mode & 0o777 == 0o600
