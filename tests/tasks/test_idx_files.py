"""IDX files, written here byte by byte."""

from __future__ import annotations

import gzip
import struct

import pytest
import torch

from natgrad.errors import ArgumentError
from natgrad.tasks import load_task
from natgrad.tasks.idx import read_idx
from natgrad.tasks.task import validate


def idx_bytes(values: torch.Tensor, kind: int = 8) -> bytes:
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, kind, values.dim(), *values.shape)
    return header + bytes(values.flatten().tolist())


def write_family(folder, suffix=".gz", dot=False):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for stem, rows in (("train", 40), ("t10k", 12)):
        images = torch.randint(0, 256, (rows, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (rows,), generator=generator, dtype=torch.uint8)
        for kind, tensor in (("images", images), ("labels", labels)):
            hyphen = "." if dot else "-"
            name = f"{stem}-{kind}{hyphen}idx{tensor.dim()}-ubyte{suffix}"
            content = idx_bytes(tensor)
            (folder / name).write_bytes(gzip.compress(content) if suffix else content)
            made[stem, kind] = tensor
    return made


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (2, 2, 2, 2)])
def test_values_come_back(tmp_path, shape, compressed):
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.uint8).reshape(shape)
    path = tmp_path / ("a.gz" if compressed else "a")
    path.write_bytes(gzip.compress(idx_bytes(values)) if compressed else idx_bytes(values))
    assert torch.equal(read_idx(path), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "0x0d"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "cut short"),
        (b"\0\0\x08\x02\0\0\0\x05", "damaged"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "damaged"),
    ],
)
def test_foreign_and_damaged_files(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        read_idx(path)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(b"this is no gzip file")
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_idx(path)
    path.write_bytes(gzip.compress(idx_bytes(torch.zeros(3000, dtype=torch.uint8)))[:-12])
    with pytest.raises(ArgumentError, match=r"cannot be read|cut short"):
        read_idx(path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize(("suffix", "dot"), [(".gz", False), ("", False), ("", True)])
def test_task_from_files(tmp_path, name, suffix, dot):
    made = write_family(tmp_path, suffix, dot)
    task = load_task(name, tmp_path)
    assert task.train_rows == 40 and task.test_rows == 12
    assert torch.equal(task.train[0], made["train", "images"].float().unsqueeze(1) / 255)
    assert torch.equal(task.test[1], made["t10k", "labels"].long())
    validate(task)


def test_the_autoencoder_of_fashion_mnist(tmp_path):
    made = write_family(tmp_path, "")
    task = load_task("fashion-mnist-autoencoder", tmp_path)
    assert torch.equal(task.train[0], made["train", "images"].float().flatten(1) / 255)
    assert task.train[1] is task.train[0] and task.test_rows == 12
    widths = [m.in_features for m in task.model(0) if hasattr(m, "in_features")]
    assert widths == [784, 1000, 500, 250, 30, 250, 500, 1000]
    validate(task)


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-autoencoder"])
def test_missing_files_say_where_they_come_from(tmp_path, name):
    wanted = r"(?s)Fashion-MNIST.*dataset-fashion-mnist.*train-images-idx3-ubyte.*--data DIR"
    for data in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(ArgumentError, match=wanted):
            load_task(name, data)


def test_images_and_labels_must_agree(tmp_path):
    write_family(tmp_path, "")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(torch.zeros(11, dtype=torch.uint8)))
    with pytest.raises(ArgumentError, match="12 test images but 11 labels"):
        load_task("mnist", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(torch.zeros(12, 1, 1, dtype=torch.uint8)))
    with pytest.raises(ArgumentError, match="3 axes where labels have 1"):
        load_task("mnist", tmp_path)
