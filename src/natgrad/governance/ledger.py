"""An append-only record of what was done to a model, in which any later change shows.

One JSON object per line. Each record carries the SHA-256 of its own canonical text and of the record before it, so that
an edited, removed, inserted or reordered record breaks the chain. A chain alone cannot show that its *end* was cut off:
keep the head (``Ledger.head``) somewhere else, and give it to ``verify``. It is evidence against later tampering and
silent loss, not against a writer who records untrue measurements.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import numbers
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from natgrad.errors import ArgumentError, LedgerError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; one writer per ledger is then the user's care
    fcntl = None

FORMAT = "natgrad-ledger/1"
GENESIS = "0" * 64
"""``previous`` of the first record."""

_FIELDS = ("data", "hash", "kind", "previous", "sequence", "time")
_RESERVED = ("genesis", "recovery")
_HASH = re.compile(r"[0-9a-f]{64}")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical(value: Any) -> bytes:
    """The one text of a JSON value: keys sorted, no spaces, ASCII, shortest floats that read back the same."""
    return _ENCODER.encode(value).encode()


@dataclass(frozen=True)
class Record:
    """One line of a ledger.

    Attributes:
        sequence: 0, 1, 2, …
        time: when it was written, UTC, ISO 8601.
        kind: what it is: ``"genesis"``, ``"update"``, …
        data: what it says. Numbers that JSON does not know are the texts "NaN", "Infinity" and "-Infinity".
        previous: hash of the record before it.
        hash: SHA-256, in hexadecimal, of the canonical text of all other fields.
    """

    sequence: int
    time: str
    kind: str
    data: Mapping[str, Any]
    previous: str
    hash: str

    @staticmethod
    def make(sequence: int, kind: str, data: Mapping[str, Any], previous: str) -> Record:
        """The next record, sealed; ``data`` must be plain."""
        time = datetime.now(UTC).isoformat(timespec="microseconds")
        fields = {"sequence": sequence, "time": time, "kind": kind, "data": data, "previous": previous}
        return Record(**fields, hash=hashlib.sha256(canonical(fields)).hexdigest())

    @property
    def line(self) -> bytes:
        """The record as it stands in the file, with its newline."""
        return canonical({name: getattr(self, name) for name in _FIELDS}) + b"\n"


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        ok: whether every complete line is what was written, in order, and the pinned head was found.
        records: number of good records before the first problem.
        head: hash of the last good record.
        line: number of the first bad line, from 1; None where none is bad.
        problem: what is wrong with it.
        torn: bytes of a last line that a crash cut short; such a record was never acknowledged. No problem in itself:
            the next append moves them into a record of kind ``"recovery"``.
    """

    ok: bool
    records: int
    head: str
    line: int | None = None
    problem: str = ""
    torn: bytes = b""

    def __str__(self) -> str:
        if not self.ok:
            where = f"line {self.line}: " if self.line is not None else ""
            return f"BROKEN: {where}{self.problem} ({self.records} good records before it)"
        text = f"ok: {self.records} records, head {self.head}"
        if self.torn:
            text += f"; the last line was cut short by a crash ({len(self.torn)} bytes, no complete record)"
        return text


class Ledger:
    """An append-only, hash-chained file of JSON lines. Several processes may append to one file in turn.

    Nothing is opened before it is needed, and nothing is held open between calls. The first append verifies the whole
    file, and later ones whatever others have appended since.

    Args:
        path: the file; it is made with its first record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._chain = _Chain()
        self._size = 0  # bytes of the file that have been verified, all of them complete lines

    @property
    def head(self) -> str:
        """Hash of the last record that this object has written or verified: pin it where the file's writer cannot."""
        return self._chain.head

    def append(self, kind: str, data: Mapping[str, Any]) -> Record:
        """Write one record, and return when it is on the disk.

        Args:
            kind: what the record is.
            data: text keys; values of text, numbers (0-d tensors too), truth values, None, lists and mappings of them.

        Raises:
            ArgumentError: ``data`` holds something else.
            LedgerError: the file is not the intact ledger it was, or it cannot be written. Nothing was recorded.
        """
        plain = _plain(dict(data), "data")
        if not isinstance(kind, str) or not kind or kind in _RESERVED:
            raise ArgumentError(
                f"kind={kind!r} was given; it must be a text, such as 'update', and none of {_RESERVED}."
            )
        try:
            with self._opened() as file:
                self._catch_up(file)
                return self._write(file, kind, plain)
        except OSError as error:
            raise LedgerError(
                f"The ledger {self.path} cannot be written ({error}). Nothing was recorded: make room, or check the "
                "folder and its permissions, before going on."
            ) from error

    def records(self) -> Iterator[Record]:
        """The records in order, each verified before it is given.

        Raises:
            LedgerError: at the first line that is not intact, after all good ones.
        """
        yield from read(self.path)

    def verify(self, *, head: str | None = None) -> Verification:
        """Check the whole file; see :func:`verify`."""
        return verify(self.path, head=head)

    def _opened(self) -> IO[bytes]:
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 (the caller closes it)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            if new:
                _sync_folder(self.path.parent)
        except BaseException:
            file.close()
            raise
        return file

    def _catch_up(self, file: IO[bytes]) -> None:
        """Verify what is new since the last append; move a torn line into a record of its own."""
        size = os.fstat(file.fileno()).st_size
        if size < self._size:
            raise LedgerError(
                f"The ledger {self.path} has become shorter: {size} bytes, of which {self._size} had been verified. "
                "Its end was cut off, or the file was replaced. Nothing more is appended: keep it, and start another."
            )
        if size == self._size:
            return
        file.seek(self._size)
        torn = b""
        with open(os.dup(file.fileno()), "rb") as reader:
            for line in reader:
                if not line.endswith(b"\n"):
                    torn = line
                    break
                problem = self._chain.take(line)
                if problem:
                    raise LedgerError(_broken(self.path, self._chain.lines + 1, problem))
                self._size += len(line)
        if torn:
            # Longer than what it replaces and holds: a crash in the midst of it leaves a torn line again.
            self._write(file, "recovery", {"torn": torn.hex()}, torn)

    def _write(self, file: IO[bytes], kind: str, data: Mapping[str, Any], torn: bytes = b"") -> Record:
        """Append a record, in the place of a torn line where there is one; after a failure the file is as before."""
        line = b""
        chain = copy.copy(self._chain)
        if chain.count == 0:
            genesis = Record.make(0, "genesis", {"format": FORMAT}, GENESIS)
            chain.accept(genesis)
            line = genesis.line
        record = Record.make(chain.count, kind, data, chain.head)
        chain.accept(record)
        line += record.line
        file.seek(self._size)
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(self._size + len(torn))
            file.seek(self._size)
            file.write(torn)
            raise
        self._size += len(line)
        self._chain = chain
        return record


def verify(path: str | os.PathLike[str], *, head: str | None = None) -> Verification:
    """Check every line of a ledger: its text, its own hash, its link to the line before, its number.

    Args:
        path: the file.
        head: a hash that was noted earlier. It must be among the records: else the end was cut off, or the whole file
            was written anew.

    Raises:
        LedgerError: the file cannot be read.
    """
    chain, torn, seen = _Chain(), b"", head is None or head == GENESIS
    for line in _lines(path):
        if not line.endswith(b"\n"):
            torn = line
            break
        problem = chain.take(line)
        if problem:
            return Verification(False, chain.count, chain.head, chain.lines + 1, problem)
        seen = seen or chain.head == head
    if not seen:
        problem = f"no record has the pinned hash {head}: the end was cut off, or the file is another one"
        return Verification(False, chain.count, chain.head, None, problem, torn)
    return Verification(True, chain.count, chain.head, torn=torn)


def read(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a ledger in order, each verified before it is given; a torn last line is left out.

    Raises:
        LedgerError: the file cannot be read, or at the first line that is not intact.
    """
    chain = _Chain()
    for line in _lines(path):
        if not line.endswith(b"\n"):
            return
        problem = chain.take(line)
        if problem:
            raise LedgerError(_broken(path, chain.lines + 1, problem))
        assert chain.last is not None
        yield chain.last


class _Chain:
    """Follows a chain record by record."""

    def __init__(self) -> None:
        self.count, self.head, self.lines = 0, GENESIS, 0
        self.last: Record | None = None

    def accept(self, record: Record) -> None:
        self.count, self.head, self.last, self.lines = record.sequence + 1, record.hash, record, self.lines + 1

    def take(self, line: bytes) -> str:
        """Accept one complete line; what is wrong with it, or an empty text."""
        record = _parse(line)
        if isinstance(record, str):
            return record
        if self.count == 0 and (record.kind != "genesis" or record.data.get("format") != FORMAT):
            return f"a ledger of this version begins with a record of kind 'genesis' and format {FORMAT!r}"
        if record.sequence != self.count:
            return f"it has sequence number {record.sequence} where {self.count} is due: records are missing or moved"
        if record.previous != self.head:
            return "it does not follow from the record before it: one of the two was changed, or one is missing"
        self.accept(record)
        return ""


def _parse(line: bytes) -> Record | str:
    """The record of a line, or what is wrong with the line by itself."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(fields, dict) or tuple(sorted(fields)) != _FIELDS:
        return f"it does not have the fields {', '.join(_FIELDS)}"
    types = {"sequence": int, "time": str, "kind": str, "data": dict, "previous": str, "hash": str}
    if not all(type(fields[name]) is kind for name, kind in types.items()) or not _HASH.fullmatch(fields["hash"]):
        return "a field has the wrong type"
    record = Record(**fields)
    try:
        same = record.line == line
    except (ValueError, RecursionError):
        same = False
    if not same:
        return "its text is not the canonical one: it was edited"
    sealed = canonical({name: fields[name] for name in _FIELDS if name != "hash"})
    if hashlib.sha256(sealed).hexdigest() != record.hash:
        return "its content does not have the hash it carries: it was edited"
    return record


def _plain(value: Any, where: str) -> Any:
    """``value`` in JSON's own types; numbers that JSON does not know become texts."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ArgumentError(f"{where} is a tensor of shape {tuple(value.shape)}; a ledger takes single numbers.")
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else "NaN" if math.isnan(number) else f"{'-' * (number < 0)}Infinity"
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise ArgumentError(f"{where} has the key {strange[0]!r}; the keys of a record must be texts.")
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ArgumentError(
        f"{where} is of type {type(value).__name__}; a ledger takes texts, numbers, truth values, None, and lists and "
        "mappings of them."
    )


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise LedgerError(f"The ledger {os.fspath(path)} cannot be read ({error}). Check the path.") from error


def _broken(path: str | os.PathLike[str], line: int, problem: str) -> str:
    return (
        f"The ledger {os.fspath(path)} is broken: line {line}: {problem}. Nothing is appended to a broken ledger. Keep "
        "the file as evidence, and start another."
    )


def _sync_folder(folder: Path) -> None:
    """Make the new file's name durable, where the system lets one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
