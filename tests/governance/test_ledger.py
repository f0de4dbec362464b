"""The ledger against an independent reading of its file, mutations of every kind, crashes and full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import multiprocessing
import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import natgrad as ng
from natgrad.errors import ArgumentError, LedgerError
from natgrad.governance import ledger as module
from natgrad.governance import read, verify


def filled(path: Path, n: int = 4) -> ng.Ledger:
    ledger = ng.Ledger(path)
    for i in range(n):
        ledger.append("update", {"step": i, "kl": 0.125 * i, "note": "ünïcode <b>"})
    return ledger


def sealed(fields: dict[str, Any]) -> str:
    """The hash of a record, written out: SHA-256 of sorted, compact JSON of all other fields."""
    rest = {k: v for k, v in fields.items() if k != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_file_is_json_lines_chained_by_sha256(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "run.jsonl")
    lines = (tmp_path / "run.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    previous = "0" * 64
    for i, line in enumerate(lines):
        fields = json.loads(line)
        assert fields["sequence"] == i
        assert fields["previous"] == previous
        assert fields["hash"] == sealed(fields)
        assert fields["time"].endswith("+00:00")
        previous = fields["hash"]
    assert [json.loads(line)["kind"] for line in lines] == ["genesis"] + ["update"] * 4
    assert json.loads(lines[2])["data"] == {"kl": 0.125, "note": "ünïcode <b>", "step": 1}
    assert ledger.head == previous
    report = ledger.verify()
    assert report.ok and report.records == 5 and report.head == previous and report.torn == b""
    assert str(report) == f"ok: 5 records, head {previous}"


def test_records_read_back_and_a_new_object_continues_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = filled(path, 2)
    second = ng.Ledger(path)
    record = second.append("note", {"by": "a person"})
    assert record.sequence == 3 and record.previous == first.head
    first.append("update", {"step": 2})  # notices what the other has written
    assert [(r.sequence, r.kind) for r in second.records()] == [
        (0, "genesis"), (1, "update"), (2, "update"), (3, "note"), (4, "update"),
    ]  # fmt: skip
    assert verify(path).ok


def test_values_become_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    data = {
        "nan": math.nan, "up": math.inf, "down": -math.inf, "tensor": torch.tensor(0.5, dtype=torch.float64),
        "numpy": np.float32(0.25), "count": np.int64(3), "flag": True, "none": None, "list": (1, [2.5]),
        "map": {"a": 1}, "big": 2**70, "tiny": 5e-324,
    }  # fmt: skip
    ng.Ledger(path).append("update", data)
    *_, record = read(path)
    assert dict(record.data) == {
        "nan": "NaN", "up": "Infinity", "down": "-Infinity", "tensor": 0.5, "numpy": 0.25, "count": 3, "flag": True,
        "none": None, "list": [1, [2.5]], "map": {"a": 1}, "big": 2**70, "tiny": 5e-324,
    }  # fmt: skip
    assert verify(path).ok


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"x": object()}, r"data\['x'\].*object"),
        ({"x": [{3: 1}]}, r"data\['x'\]\[0\].*3"),
        ({"x": torch.ones(2)}, r"shape \(2,\)"),
        ({"x": b"bytes"}, "bytes"),
    ],
)
def test_values_that_are_no_json_are_named_and_nothing_is_written(tmp_path: Path, data: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        ng.Ledger(tmp_path / "run.jsonl").append("update", data)
    assert not (tmp_path / "run.jsonl").exists()


@pytest.mark.parametrize("kind", ["", "genesis", "recovery", 3])
def test_kinds_of_its_own_are_reserved(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(ArgumentError, match="kind="):
        ng.Ledger(tmp_path / "run.jsonl").append(kind, {})


# Tampering.


def mutate(lines: list[bytes], rng: random.Random) -> list[bytes]:
    """One change that leaves complete lines: a flipped bit, an edit, a removal, a copy, a swap or an insertion."""
    lines = list(lines)
    kind, i = rng.choice(["flip", "forge", "remove", "copy", "swap", "insert", "space"]), rng.randrange(len(lines))
    if kind == "flip":
        line, at = bytearray(lines[i]), rng.randrange(len(lines[i]))
        line[at] ^= 1 << rng.randrange(8)
        lines[i] = bytes(line)
    elif kind == "forge":  # an edit with its own hash made right; the next record gives it away
        fields = json.loads(lines[i])
        fields["data"] = {**fields["data"], "kl": rng.random()}
        fields["hash"] = sealed(fields)
        lines[i] = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    elif kind == "remove":
        del lines[i]
    elif kind == "copy":
        lines.insert(rng.randrange(len(lines)), lines[i])
    elif kind == "swap":
        j = (i + rng.randrange(1, len(lines))) % len(lines)
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "insert":
        lines.insert(i, rng.choice([b"\n", b"{}\n", b"[1]\n", b"null\n", b"\xff\xfe\n"]))
    else:
        lines[i] = lines[i].replace(b",", b", ", 1)
    return lines


def test_no_mutation_goes_unnoticed_beside_a_pinned_head(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    head = filled(path, 6).head
    lines = path.read_bytes().splitlines(keepends=True)
    rng = random.Random(0)
    for trial in range(1500):
        changed = mutate(lines, rng)
        path.write_bytes(b"".join(changed))
        report = verify(path, head=head)
        if changed == lines:
            assert report.ok
            continue
        assert not report.ok, (trial, changed)
        shorter = min(len(lines), len(changed))
        first = next((i for i in range(shorter) if lines[i] != changed[i]), shorter)
        # The line that was changed, or where that fits in itself (a forged one, the end cut off), what follows it.
        assert report.line in (None, first + 1, first + 2), (trial, report)
        assert report.records in (first, first + 1)
        assert "BROKEN" in str(report)


def test_flipped_byte_is_found_where_it_is_and_nothing_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    filled(path)
    whole = bytearray(path.read_bytes())
    at = whole.index(b'"kl":0.25') + 5
    whole[at] ^= 1
    path.write_bytes(whole)
    report = verify(path)
    assert not report.ok and report.line == 4 and report.records == 3
    assert "edited" in report.problem
    with pytest.raises(LedgerError, match=r"line 4.*edited"):
        ng.Ledger(path).append("update", {})
    assert path.read_bytes() == bytes(whole)
    good = []
    with pytest.raises(LedgerError, match="line 4"):
        for record in read(path):
            good.append(record.sequence)
    assert good == [0, 1, 2]


def test_a_chain_alone_cannot_see_that_its_end_was_cut_off_but_the_pinned_head_does(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ledger = filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert verify(path).ok
    report = verify(path, head=ledger.head)
    assert not report.ok and report.line is None and "cut off" in report.problem
    assert verify(path, head=json.loads(lines[2])["hash"]).ok  # an older pin is still there
    with pytest.raises(LedgerError, match="shorter"):
        ledger.append("update", {})


def test_a_ledger_written_anew_has_another_head(tmp_path: Path) -> None:
    head = filled(tmp_path / "a.jsonl").head
    filled(tmp_path / "b.jsonl")
    assert not verify(tmp_path / "b.jsonl", head=head).ok


def test_a_broken_chain_between_two_appends_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ledger = filled(path)
    with open(path, "ab") as file:
        file.write(b'{"sequence": 5}\n')
    with pytest.raises(LedgerError, match="line 6"):
        ledger.append("update", {})
    with pytest.raises(LedgerError, match="line 6"):  # and stays noticed
        ledger.append("update", {})


def test_another_kind_of_file_is_not_taken_for_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(LedgerError, match=r"line 1.*not JSON"):
        ng.Ledger(path).append("update", {})
    assert path.read_text() == "hello\n"
    fields = {"data": {"format": "natgrad-ledger/9"}, "kind": "genesis", "previous": "0" * 64, "sequence": 0}
    fields["time"] = "2026-01-01T00:00:00.000000+00:00"
    fields["hash"] = sealed(fields)
    path.write_text(json.dumps(fields, sort_keys=True, separators=(",", ":")) + "\n")
    assert "version" in verify(path).problem


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"nowhere\.jsonl"):
        verify(tmp_path / "nowhere.jsonl")
    with pytest.raises(LedgerError, match=r"no/such"):
        ng.Ledger(tmp_path / "no" / "such" / "folder.jsonl").append("update", {})
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    report = verify(empty)
    assert report.ok and report.records == 0 and report.head == "0" * 64
    ng.Ledger(empty).append("update", {})
    assert verify(empty).records == 2


# Crashes.


def test_a_line_torn_at_any_byte_is_reported_kept_and_continued(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    filled(whole, 3)
    content = whole.read_bytes()
    starts = [0] + [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(0, len(content), 7):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        start = max(s for s in starts if s <= cut)
        torn = content[start:cut]
        report = verify(path)
        assert report.ok and report.torn == torn and report.records == starts.index(start)
        assert ("crash" in str(report)) == bool(torn)
        assert len(list(read(path))) == report.records
        ng.Ledger(path).append("update", {"after": "crash"})
        report = verify(path)
        assert report.ok and report.torn == b""
        kinds = [r.kind for r in read(path)]
        assert kinds[-1] == "update"
        if torn:
            recovery = list(read(path))[-2]
            assert recovery.kind == "recovery" and bytes.fromhex(recovery.data["torn"]) == torn
        else:
            assert "recovery" not in kinds
        assert path.read_bytes().startswith(content[:start])


def test_torn_text_that_is_not_text_at_all(tmp_path: Path) -> None:
    """After a power cut a file may end in zeros or in anything."""
    path = tmp_path / "run.jsonl"
    filled(path)
    with open(path, "ab") as file:
        file.write(b"\x00" * 500 + b"\xff")
    assert len(verify(path).torn) == 501
    ng.Ledger(path).append("update", {})
    assert verify(path).ok and verify(path).records == 7


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    ledger = filled(path)
    for tail in (b"", b'{"torn'):
        with open(path, "ab") as file:
            file.write(tail)
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "fsync", _no_space)
            with pytest.raises(LedgerError, match="No space"):
                ledger.append("update", {"step": 9})
        assert path.read_bytes() == before
    ledger.append("update", {"step": 9})
    assert [r.kind for r in read(path)][-2:] == ["recovery", "update"]
    assert verify(path).ok


def _no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_real_full_device_is_an_error(tmp_path: Path) -> None:
    os.symlink("/dev/full", tmp_path / "full.jsonl")
    with pytest.raises(LedgerError, match="cannot be written"):
        ng.Ledger(tmp_path / "full.jsonl").append("update", {})


def test_every_append_is_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "run.jsonl", []
    real = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(module.os, "fsync", watched)
    ledger = filled(path, 1)
    size = path.stat().st_size
    assert size in synced
    ledger.append("update", {})
    assert synced[-1] == path.stat().st_size > size


def test_a_record_out_of_number_is_found_though_its_links_and_hash_are_right(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    filled(path)
    *rest, last = path.read_bytes().splitlines(keepends=True)
    fields = json.loads(last)
    fields["sequence"] = 7
    fields["hash"] = sealed(fields)
    forged = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    path.write_bytes(b"".join([*rest, forged]))
    report = verify(path)
    assert not report.ok and report.line == 5 and "sequence number 7" in report.problem


def test_a_writer_waits_for_another(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "run.jsonl"
    ledger = filled(path)
    before = path.read_bytes()
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=ledger.append, args=("update", {"step": 9}))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and path.read_bytes() == before
    thread.join(10)
    assert not thread.is_alive() and verify(path).records == 6


def _append_many(path: Path, name: str) -> None:
    ledger = ng.Ledger(path)
    for i in range(25):
        ledger.append("update", {"by": name, "i": i})


def test_two_processes_may_write_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert verify(path).ok and verify(path).records == 51
    for name in "ab":
        assert [r.data["i"] for r in read(path) if r.data.get("by") == name] == list(range(25))
