"""The IDX format of the MNIST family, plain or gzip-compressed."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from natgrad.errors import ArgumentError

# Type code in the third byte of the header -> bytes per element; only unsigned bytes occur in the MNIST family.
_UNSIGNED_BYTE = 0x08
_LARGEST = 1 << 31


def read_idx(path: str | Path) -> Tensor:
    """The uint8 array of an IDX file, e.g. [60000, 28, 28] images or [60000] labels.

    Layout: two zero bytes, a type code, the number of axes, the axes as big-endian 32-bit integers, then the values in
    row-major order. Raises ArgumentError when the file is not that.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(4)
            if len(header) < 4 or header[:2] != b"\0\0" or not 1 <= header[3] <= 4:
                raise ArgumentError(
                    f"{path} is not an IDX file: it begins with the bytes {header.hex(' ') or '(none)'}."
                )
            if header[2] != _UNSIGNED_BYTE:
                raise ArgumentError(
                    f"{path} holds values of IDX type 0x{header[2]:02x}; only unsigned bytes (0x08) are read."
                )
            sizes = file.read(4 * header[3])
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * header[3], 4)]
            count = math.prod(shape)
            if len(sizes) < 4 * header[3] or not 0 < count < _LARGEST:
                raise ArgumentError(f"{path} is damaged: its header gives the shape {shape}.")
            values = file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise ArgumentError(f"{path} cannot be read: {error}. Get the file again.") from error
    if len(values) < count:
        raise ArgumentError(f"{path} is cut short: shape {shape} needs {count} bytes, {len(values)} are there.")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)


def read_mnist_family(name: str, folder: str | Path | None) -> dict[str, Tensor]:
    """train_images, train_labels, test_images, test_labels of ``folder``, checked against each other.

    Accepts the usual file names (``train-images-idx3-ubyte``, dots for the last hyphen too), with or without ``.gz``.
    """
    source = {
        "mnist": "the MNIST database of handwritten digits (LeCun, Cortes, Burges)",
        "fashion-mnist": "the Fashion-MNIST data set (Zalando Research; Debian's package dataset-fashion-mnist)",
    }[name]
    wanted = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
    hint = (
        f"natgrad downloads nothing: get the four IDX files of {source}, named {wanted} (each may end in .gz), put "
        "them in one folder and name it with --data DIR."
    )
    if folder is None:
        raise ArgumentError(f"The task {name!r} needs data files. {hint}")
    root = Path(folder)
    if not root.is_dir():
        raise ArgumentError(f"--data {root}: there is no such folder. {hint}")
    tensors = {}
    for key, stem in (("train", "train"), ("test", "t10k")):
        for kind, axes in (("images", 3), ("labels", 1)):
            base = f"{stem}-{kind}-idx{axes}-ubyte"
            names = [base, base.replace("-idx", ".idx"), base + ".gz", base.replace("-idx", ".idx") + ".gz"]
            found = next((root / candidate for candidate in names if (root / candidate).is_file()), None)
            if found is None:
                raise ArgumentError(f"{root} has no {base} (nor {base}.gz). {hint}")
            tensor = read_idx(found)
            if tensor.dim() != axes:
                raise ArgumentError(f"{found} has {tensor.dim()} axes where {kind} have {axes}; are files mixed up?")
            tensors[f"{key}_{kind}"] = tensor
        if len(tensors[f"{key}_images"]) != len(tensors[f"{key}_labels"]):
            raise ArgumentError(
                f"{root}: {len(tensors[f'{key}_images'])} {key} images but {len(tensors[f'{key}_labels'])} labels."
            )
    return tensors
