"""Files that are replaced as a whole or not at all, with the generation before kept beside them.

At every moment, of a crash too, ``path`` is a complete file, the old or the new one, and so is ``path + ".previous"``:
it is renewed only when the new file is safely on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: a file in use cannot be removed there anyway
    fcntl = None


def previous(path: Path) -> Path:
    """Where the generation before ``path`` is kept."""
    return path.with_name(path.name + ".previous")


def replace_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Make ``pieces`` the content of ``path``, and what it held before that of ``path + ".previous"``.

    Returns when the new content is on the disk. Removes what killed calls for the same ``path`` have left behind.

    Raises:
        OSError: the file cannot be written; ``path`` and the generation before it are as they were.
    """
    sweep(path)
    with _temporary(path) as (file, name):
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        with _second_name(path) as old:
            if old is not None:
                shutil.copymode(path, name)
            if fcntl is None:
                file.close()  # there, open files cannot be renamed
            os.replace(name, path)
            _settle(path, old)


def sweep(path: Path) -> None:
    """Remove temporary files for ``path`` that no living process holds locked."""
    pattern = re.compile(re.escape(_prefix(path)) + r"[0-9a-f]{16}\.tmp")
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        with suppress(OSError), open(path.parent / name, "rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.close()
            os.unlink(path.parent / name)


def _prefix(path: Path) -> str:
    """Of its temporary files' names: of one length, however long the name of ``path``."""
    return f".natgrad-{hashlib.sha256(path.name.encode(errors='surrogateescape')).hexdigest()[:16]}-"


def _fresh_name(path: Path) -> Path:
    return path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside ``path``, locked while it is open; removed at the end, unless it was renamed."""
    name = _fresh_name(path)
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file, name
    finally:
        _remove(name)


def _remove(name: Path) -> None:
    """Where it cannot be removed, the next save sweeps it."""
    with suppress(OSError):
        os.unlink(name)


@contextmanager
def _second_name(path: Path) -> Iterator[Path | None]:
    """Another name for the file at ``path``, to find it by when ``path`` is another; None where there is no file."""
    name = _fresh_name(path)
    try:
        if not path.exists():
            yield None
            return
        try:
            os.link(path, name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, name)
            _sync(name)
        yield name
    finally:
        _remove(name)


def _settle(path: Path, old: Path | None) -> None:
    """Make the new name safe, and only then let the generation before it take the place of the one before that."""
    try:
        _sync_folder(path.parent)
        if old is not None:
            os.replace(old, previous(path))
            _sync_folder(path.parent)
    except OSError as error:
        warnings.warn(
            f"{path} is saved, but its folder could not be brought up to date ({error}): the generation before it may "
            "not be kept. Check the disk.",
            UserWarning,
            stacklevel=4,
        )


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is."""
    if os.name == "nt":
        return
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot, nor need, do it
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
