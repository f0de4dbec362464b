"""Real data that every Python installation has: the source text of the standard library.

What it holds depends on the Python version, so numbers compare within one version; the machine facts of a report name
it. Tests, installed packages and files that are not UTF-8 are left out.
"""

from __future__ import annotations

import math
import re
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from natgrad.errors import ArgumentError

# Printable ASCII and the newline; tabs become spaces, anything else the last symbol.
ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127)) + "\x00"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
FEATURES = (
    "log lines",
    "log characters",
    "share of blank lines",
    "share of comment lines",
    "log class statements",
    "log import statements",
    "log returns",
    "log docstring quotes",
    "mean line length",
    "mean indent",
)


@cache
def sources(top_level_only: bool) -> tuple[str, ...]:
    """Texts of the library's .py files that have at least one line, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.glob("*.py") if top_level_only else root.rglob("*.py"))
    texts = []
    for path in paths:
        if _SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            texts.append(text)
    if len(texts) < 20:
        raise ArgumentError(
            f"Only {len(texts)} source files of the standard library are in {root}. This Python was installed without "
            "its sources (as some embedded and zipped builds are): use another interpreter for this task."
        )
    return tuple(texts)


def definition_counts() -> tuple[Tensor, Tensor]:
    """Features [files, 10] and the number of functions that each file defines [files, 1], both float32.

    A count regression: how many functions has a module, given its size and other marks of its style? Features are
    standardised over the files; none of them counts ``def``. Of files with equal features (codecs generated from one
    template) the first is kept, so that none is both in a training and in a test set.
    """
    rows: dict[tuple[float, ...], int] = {}
    for text in sources(top_level_only=False):
        rows.setdefault(_features(text), count_definitions(text))
    features = torch.tensor(list(rows), dtype=torch.float64)
    features = (features - features.mean(0)) / features.std(0)
    return features.float(), torch.tensor(list(rows.values()), dtype=torch.float32).unsqueeze(1)


def count_definitions(text: str) -> int:
    """Lines that begin with ``def`` or ``async def``."""
    return len(re.findall(r"^[ \t]*(?:async[ ]+)?def\s", text, re.MULTILINE))


def _features(text: str) -> tuple[float, ...]:
    """The FEATURES of one file."""
    lines = text.splitlines()
    total = len(lines)
    stripped = [line.strip() for line in lines]
    return (
        math.log1p(total),
        math.log1p(len(text)),
        sum(not line for line in stripped) / total,
        sum(line.startswith("#") for line in stripped) / total,
        math.log1p(sum(line.startswith("class ") for line in stripped)),
        math.log1p(sum(line.startswith(("import ", "from ")) for line in stripped)),
        math.log1p(sum(line.startswith("return") for line in stripped)),
        math.log1p(text.count('"""')),
        len(text) / total,
        sum(len(line) - len(line.lstrip()) for line in lines) / total,
    )


def character_windows(characters: int, context: int) -> tuple[Tensor, Tensor]:
    """int64 windows [n, context + 1] for training and for testing, from the top-level modules.

    Whole files are dealt out in a fixed random order: about one character in ten to the test set, then up to
    ``characters`` to training, so that no test window continues a training file.
    """
    texts = sources(top_level_only=True)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    train, test = [], []
    room_test, room_train = characters // 10, characters
    for index in order:
        text = texts[index]
        if room_test > 0:
            test.append(text[:room_test])
            room_test -= len(text)
        elif room_train > 0:
            train.append(text[:room_train])
            room_train -= len(text)
    return _windows("".join(train), context), _windows("".join(test), context)


def encode(text: str) -> Tensor:
    """int64 indices into ALPHABET, one per character."""
    lookup = torch.full((128,), len(ALPHABET) - 1, dtype=torch.int64)
    for index, character in enumerate(ALPHABET[:-1]):
        lookup[ord(character)] = index
    lookup[ord("\t")] = lookup[ord(" ")]
    codes = torch.frombuffer(bytearray(text.encode("ascii", errors="replace")), dtype=torch.uint8)
    return lookup[codes.long().clamp(max=127)]


def _windows(text: str, context: int) -> Tensor:
    codes = encode(text)
    count = (len(codes) - 1) // context
    if count < 1:
        raise ArgumentError(f"The text has {len(text)} characters, too few for one window of {context + 1}.")
    return codes[: count * context + 1].unfold(0, context + 1, context)
