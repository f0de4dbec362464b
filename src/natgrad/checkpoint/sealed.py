"""The file: safetensors, with the SHA-256 of all its bytes in its own metadata.

safetensors notices a file that was cut short, but no flipped bit. The digest is taken over the whole file with the 64
digits of the digest itself as zeros, so that there is no byte, be it of a tensor, a name, a length or padding, whose
change would not show. It protects from damage and mix-ups, not from somebody who can compute a digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from natgrad.errors import ArgumentError, MissingExtraError, SnapshotError

FORMAT = "natgrad-snapshot/1"
MAX_HEADER = 100_000_000
"""Bytes; safetensors reads no longer one."""

_BLANK = b"0" * 64
# Quotes inside names and texts are escaped in the header: only the metadata's own key can read like this.
_SEAL = re.compile(rb'"natgrad.sha256":"([0-9a-f]{64})"')
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def sealed(tensors: dict[str, Tensor], content: str) -> list[bytes | memoryview]:
    """The bytes of the file, in pieces.

    Args:
        tensors: contiguous, on the CPU, sharing no memory.
        content: what else to keep.

    Raises:
        ArgumentError: ``content`` is longer than a header can be.
    """
    if len(content) > MAX_HEADER // 2:
        raise ArgumentError(
            f"The values beside the tensors take {len(content):,} characters, more than the {MAX_HEADER // 2:,} that a "
            "snapshot can hold. Give long lists of numbers as tensors."
        )
    metadata = {"natgrad.format": FORMAT, "natgrad.content": content, "natgrad.sha256": _BLANK.decode()}
    data = memoryview(_safetensors().save(tensors, metadata))
    start, stop = _find_seal(bytes(data[: _header_end(data)]))
    digest = hashlib.sha256(data).hexdigest().encode()
    return [data[:start], digest, data[stop:]]


def unsealed(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors and the content of a file, after every byte of it was checked.

    Raises:
        SnapshotError: it is not an intact snapshot; the message says in what way.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        header = _read_header(path, file)
        start, stop = _find_seal(header)
        if start < 0:
            raise _foreign(path, header)
        file.seek(0)
        data = file.read()
    seal, digest = data[start:stop], hashlib.sha256()
    for piece in (memoryview(data)[:start], _BLANK, memoryview(data)[stop:]):
        digest.update(piece)
    if digest.hexdigest().encode() != seal:
        raise _damaged(path, header, len(data))
    try:
        metadata = json.loads(header[8:])["__metadata__"]
        if metadata["natgrad.format"] != FORMAT:
            raise SnapshotError(
                f"{path} is a snapshot of format {metadata['natgrad.format']!r}, and this version of natgrad reads "
                f"{FORMAT!r}. It was written by another version: load it with that one."
            )
        return _safetensors().load(data), metadata["natgrad.content"]
    except (ValueError, KeyError, TypeError, RecursionError, _safetensors_error()) as error:
        raise SnapshotError(
            f"{path} has the right checksum, but not the form of a snapshot ({error}). natgrad does not write such "
            "files: it was made by another program. Nothing was loaded."
        ) from error


def _header_end(data: bytes | memoryview) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _find_seal(header: bytes) -> tuple[int, int]:
    """Where the digest stands in the file; (-1, -1) where there is none, or more than one."""
    found = list(_SEAL.finditer(header))
    return found[0].span(1) if len(found) == 1 else (-1, -1)


def _read_header(path: Path, file: IO[bytes]) -> bytes:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise SnapshotError(f"{path} is no ordinary file. Give the path that ng.save wrote to.")
    start = file.read(10)
    if start.startswith(_PICKLES):
        raise SnapshotError(
            f"{path} is a file of torch.save or pickle, not a snapshot. Loading one can run code that is hidden in it, "
            "so natgrad never does: read it with torch.load(path, weights_only=True), and write snapshots with ng.save."
        )
    end = _header_end(start)
    if len(start) < 10 or start[8:9] != b"{" or end > MAX_HEADER + 8:
        raise SnapshotError(
            f"{path} ({status.st_size:,} bytes) does not begin as a snapshot does. It is another kind of file, or "
            "its beginning is damaged. Give a file that ng.save wrote."
        )
    if end > status.st_size:
        raise _cut_short(path, status.st_size, f"its header alone takes {end:,}")
    return start + file.read(end - len(start))


def _foreign(path: Path, header: bytes) -> SnapshotError:
    try:
        names = list(json.loads(header[8:]))
    except (ValueError, RecursionError):
        return SnapshotError(f"{path} is damaged: its header cannot be read. {_REMEDY}")
    return SnapshotError(
        f"{path} is a safetensors file without natgrad's checksum (it begins with {', '.join(names[:3])}). It was not "
        "written by ng.save, or is damaged: read weights of other origin with safetensors.torch.load_file."
    )


def _damaged(path: Path, header: bytes, size: int) -> SnapshotError:
    try:
        entries: dict[str, Any] = json.loads(header[8:])
        entries.pop("__metadata__")
        wanted = len(header) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size < wanted:
            return _cut_short(path, size, f"{wanted:,} were written")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        pass
    return SnapshotError(
        f"{path} is damaged: its bytes are not those that were written (the SHA-256 differs). The disk, the memory or "
        f"a transfer has changed it. {_REMEDY}"
    )


def _cut_short(path: Path, size: int, wanted: str) -> SnapshotError:
    return SnapshotError(f"{path} was cut short: it has {size:,} bytes, and {wanted}. Copy it again. {_REMEDY}")


_REMEDY = "Nothing was loaded. Take another copy of it, or an earlier snapshot."


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError(
            "Snapshots need safetensors, which is not installed. Install it with: pip install natgrad[checkpoint]"
        ) from error
    return safetensors.torch


def _safetensors_error() -> type[Exception]:
    _safetensors()
    from safetensors import SafetensorError

    return SafetensorError
