"""A snapshot that is damaged, of another kind or of another model is refused before anything is changed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.checkpoint import sealed
from natgrad.errors import ArgumentError, MissingExtraError, SnapshotError


def network(seed: int = 0, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def trained(seed: int = 0, make=torch.optim.AdamW) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = network(seed)
    optimizer = make(model.parameters())
    F.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def path(tmp_path):
    """A snapshot."""
    model, optimizer = trained()
    ng.save(tmp_path / "run", model, optimizer, step=3)
    return tmp_path / "run"


class Untouched:
    """A model and an optimizer that must be as they were."""

    def __init__(self, make=torch.optim.AdamW) -> None:
        self.model, self.optimizer = trained(1, make)
        self._before = self._content()

    def _content(self) -> bytes:
        return pickle.dumps((self.model.state_dict(), self.optimizer.state_dict(), self.optimizer.defaults))

    def check(self) -> None:
        assert self._content() == self._before


@pytest.fixture
def untouched():
    given = Untouched()
    yield given
    given.check()


def test_a_flipped_bit_anywhere_is_found(path, untouched):
    """In every byte of a small file (lengths, names, padding, digest, tensors), and here and there in a larger one."""
    small, damaged, where = path.with_name("small"), path.with_name("damaged"), random.Random(0)
    large = path.read_bytes()
    ng.save(small, nn.Linear(2, 2).double(), step=3, mask=torch.tensor([True, False, True]))
    places = [(small.read_bytes(), i) for i in range(len(small.read_bytes()))]
    places += [(large, where.randrange(len(large))) for _ in range(500)] + [(large, len(large) - 1)]
    for data, place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << where.randrange(8)
        damaged.write_bytes(flipped)
        with pytest.raises(SnapshotError):
            ng.load(damaged, untouched.model, untouched.optimizer)
    with pytest.raises(SnapshotError, match=r"damaged: its bytes are not those that were written"):
        ng.load(damaged, untouched.model, untouched.optimizer)


def test_control_safetensors_alone_does_not_see_it(path):
    """What the test above flips would be loaded by safetensors: the digest is what finds it."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert load_file(path)


def test_other_changes_are_found(path, untouched):
    data = path.read_bytes()
    swapped = bytearray(data)
    swapped[-8:-4], swapped[-4:] = data[-4:], data[-8:-4]
    zeroed = data[:-64] + bytes(64)
    for changed in (bytes(swapped), zeroed, data + b"\0", data[:-1], data[:8] + b" " + data[8:], data[::-1]):
        assert changed != data
        path.write_bytes(changed)
        with pytest.raises(SnapshotError):
            ng.load(path, untouched.model, untouched.optimizer)


def test_a_file_that_was_cut_short_anywhere_is_found(path, untouched):
    data = path.read_bytes()
    cut = path.with_name("cut")
    for length in range(0, len(data), 23):
        cut.write_bytes(data[:length])
        with pytest.raises(SnapshotError, match=r"cut short|does not begin as a snapshot"):
            ng.load(cut, untouched.model, untouched.optimizer)
    with pytest.raises(SnapshotError, match=f"has {length:,} bytes, and {len(data):,} were written"):
        ng.load(cut, untouched.model, untouched.optimizer)


class Bomb:
    """What a malicious file is made of."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 2, 4, "torch", "old torch"])
def test_pickles_are_refused_unread(tmp_path, untouched, protocol):
    path, mark = tmp_path / "run", tmp_path / "executed"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
    else:
        torch.save({"model": Bomb(mark)}, path, _use_new_zipfile_serialization=protocol == "torch")
    expected = "does not begin as" if protocol == 0 else "torch.save or pickle.*never does"
    with pytest.raises(SnapshotError, match=expected):
        ng.load(path, untouched.model, untouched.optimizer)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # the control: it would have done it
    assert mark.exists()


def test_other_files_are_named_for_what_they_are(tmp_path, untouched):
    def refused(path, match: str) -> None:
        with pytest.raises(SnapshotError, match=match):
            ng.load(path, untouched.model, untouched.optimizer)

    path = tmp_path / "run"
    refused(path, r"There is no file .*Check the path")
    refused(tmp_path, r"cannot be read .*[Dd]irectory")
    refused("/dev/zero", "no ordinary file")
    for content in (b"", b"{}", b"\x7fELF" + bytes(100), b"natgrad" * 10, b"\xff" * 8 + b"{" + bytes(20)):
        path.write_bytes(content)
        refused(path, "another kind of file")
    path.write_bytes((10**7).to_bytes(8, "little") + b'{"a":1}')
    refused(path, "cut short")
    path.write_bytes((7).to_bytes(8, "little") + b'{"a":1 ')
    refused(path, "damaged: its header")
    save_file(network().state_dict(), path)
    refused(path, r"without natgrad's checksum \(it begins with .*0.*weight")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read(path, untouched):
    shutil.copy(path, path.with_name("run.previous"))
    path.chmod(0)
    with pytest.raises(SnapshotError, match="cannot be read"):
        ng.load(path, untouched.model, untouched.optimizer)


def resealed(path, change) -> None:
    """Change the header of a snapshot, and give it the right digest: somebody's doing, no accident."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    content = json.loads(header["__metadata__"]["natgrad.content"])
    change(header, content)
    header["__metadata__"]["natgrad.content"] = json.dumps(content)
    header["__metadata__"]["natgrad.sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    blank = len(text).to_bytes(8, "little") + text + data[end:]
    seal = f'"natgrad.sha256":"{hashlib.sha256(blank).hexdigest()}"'.encode()
    path.write_bytes(blank.replace(b'"natgrad.sha256":"' + b"0" * 64 + b'"', seal))


def first_slot(content) -> list:
    """[key, record] of the first value of the first parameter's state."""
    return content["optimizer"]["slots"][0][1]["dict"][0]


FORGERIES = {
    "newer format": lambda h, c: h["__metadata__"].update({"natgrad.format": "natgrad-snapshot/2"}),
    "no content": lambda h, c: c.clear(),
    "offsets beyond the file": lambda h, c: h["model.0.weight"].update(data_offsets=[0, 10**12]),
    "shape beyond its bytes": lambda h, c: h["model.0.weight"].update(shape=[10**9]),
    "huge strides": lambda h, c: c["extras"].update(
        {"step": {"tensor": "model.0.weight", "stride": [1, 2**40]}},
    ),
    "no such tensor": lambda h, c: c["model"]["state"].update({"0.weight": {"tensor": "nowhere"}}),
    "no such kind": lambda h, c: c["extras"].update({"step": {"object": "os.system"}}),
    "no kind at all": lambda h, c: c["extras"].update({"step": {}}),
    "a dtype of another module": lambda h, c: c["extras"].update({"step": {"dtype": "os"}}),
    "a key that is a list": lambda h, c: c["extras"].update({"step": {"dict": [[[1], 2]]}}),
    "names that are a number": lambda h, c: c["optimizer"].update(names=3),
    "groups that are a text": lambda h, c: c["optimizer"].update(rest={"dict": [["param_groups", "x"]]}),
    "state that is a text": lambda h, c: first_slot(c).__setitem__(1, "x") or c["optimizer"].update(names=[["0"]]),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_forged_files_are_errors_and_nothing_worse(path, untouched, forge):
    resealed(path, lambda header, content: None)
    assert ng.load(path) == {"step": 3}  # the forger's seal holds
    resealed(path, forge)
    with pytest.raises(SnapshotError):
        ng.load(path, untouched.model, untouched.optimizer)


def test_deeply_nested_forgery(path, untouched):
    resealed(path, lambda header, content: content["extras"].update(step="DEEP"))
    data = path.read_bytes()
    deep = b"[" * 100_000 + b"]" * 100_000
    end = 8 + int.from_bytes(data[:8], "little")
    header = re.sub(rb'"natgrad.sha256":"\w{64}"', b'"natgrad.sha256":"' + b"0" * 64 + b'"', data[8:end])
    header = header.replace(b'\\"DEEP\\"', deep)
    blank = len(header).to_bytes(8, "little") + header + data[end:]
    digest = hashlib.sha256(blank).hexdigest().encode()
    path.write_bytes(blank.replace(b'sha256":"' + b"0" * 64, b'sha256":"' + digest))
    with pytest.raises(SnapshotError, match="right checksum"):
        ng.load(path, untouched.model, untouched.optimizer)


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "overwritten"])
def test_the_generation_before_steps_in_with_a_warning(path, harm):
    model, optimizer = trained(2)
    ng.save(path, model, optimizer, step=4)
    data = bytearray(path.read_bytes())
    if harm == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "gone":
        path.unlink()
    else:
        torch.save(model.state_dict(), path)
    other, resumed = trained(1)
    with pytest.warns(UserWarning, match=r"The generation before it is intact and was taken: .*run\.previous") as seen:
        assert ng.load(path, other, resumed) == {"step": 3}
    assert seen[0].filename == __file__
    assert torch.equal(other[0].weight, trained(0)[0][0].weight)
    path.with_name("run.previous").write_bytes(data[:100])
    with pytest.raises(SnapshotError, match=r"run(?!\.previous)"):
        ng.load(path, other, resumed)


def test_an_intact_snapshot_of_another_model_never_falls_back(path, untouched):
    ng.save(path, network(width=7), torch.optim.AdamW(network(width=7).parameters()), step=4)
    with pytest.raises(SnapshotError, match="another model"):
        ng.load(path, untouched.model, untouched.optimizer)


def test_another_model_is_told_by_names_shapes_and_dtypes(path, untouched):
    def told(model: nn.Module) -> str:
        before = [t.clone() for t in model.state_dict().values()]
        with pytest.raises(SnapshotError) as caught:
            ng.load(path, model, untouched.optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
        return str(caught.value)

    assert "0.weight: shape (6, 4) in the file, (7, 4) in the model" in told(network(width=7))
    assert "0.weight: torch.float32 in the file, torch.bfloat16 in the model" in told(network().bfloat16())
    text = told(nn.Sequential(*network()[:2], nn.Linear(6, 3, bias=False), nn.LayerNorm(3)))
    assert "missing in the file: 3.weight" in text and "missing in the model: 2.bias" in text
    wrapped = told(nn.ModuleDict({"module": network()}))
    assert "missing in the file: module.0.weight" in wrapped and "DistributedDataParallel" in wrapped
    many = told(nn.Sequential(*(nn.Linear(4, 4) for _ in range(20))))
    assert "more" in many and len(many.splitlines()) < 15
    tied = network()
    tied[2].weight = nn.Parameter(torch.zeros(3, 6))
    same = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    ng.save(path, same)
    same[1].weight = same[0].weight
    assert "0.weight and 1.weight: one tensor in the model, two different ones" in told(same)


def test_another_optimizer_is_told(path, untouched):
    def told(optimizer) -> str:
        before = pickle.dumps(optimizer.state_dict())
        with pytest.raises(SnapshotError) as caught:
            ng.load(path, untouched.model, optimizer)
        assert pickle.dumps(optimizer.state_dict()) == before
        return str(caught.value)

    model = untouched.model
    assert "AdamW in the file, SGD given" in told(torch.optim.SGD(model.parameters()))
    assert "groups of 4 parameters in the file, of 2 given" in told(torch.optim.AdamW(model[0].parameters()))
    halves = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    assert "groups of 4 parameters in the file, of 2 + 2 given" in told(torch.optim.AdamW(halves))
    weight, bias, *rest = model.parameters()
    assert "parameter 1: 0.bias in the file, one of no name given" in told(
        torch.optim.AdamW([weight, nn.Parameter(torch.zeros(6)), *rest])
    )
    assert "parameter 0: 0.weight in the file, 2.bias given" in told(
        torch.optim.AdamW([rest[1], weight, bias, nn.Parameter(rest[0])])
    )
    with pytest.raises(SnapshotError, match=r"parameter 0: shape \(6, 4\) in the file, \(7, 4\) given"):
        ng.load(path, optimizer=torch.optim.AdamW(network(width=7).parameters()))


def test_what_was_not_saved_cannot_be_loaded(tmp_path, untouched):
    ng.save(tmp_path / "x", step=1)
    with pytest.raises(SnapshotError, match="holds no model"):
        ng.load(tmp_path / "x", untouched.model)
    with pytest.raises(SnapshotError, match="holds no optimizer"):
        ng.load(tmp_path / "x", optimizer=untouched.optimizer)


class Failing(nn.Linear):
    """Loads, and then thinks better of it."""

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        raise ValueError("not today.")


class HalfLoaded(torch.optim.AdamW):
    def load_state_dict(self, state_dict):
        before = self.param_groups[0]["lr"]
        super().load_state_dict(state_dict)
        if before == 0.5:
            raise ValueError("not today.")


def test_a_load_that_fails_half_way_is_undone(tmp_path):
    for last, make, lr in ((Failing, torch.optim.AdamW, 0.1), (nn.Linear, HalfLoaded, 0.5)):
        model = nn.Sequential(nn.Linear(4, 4), last(4, 4))
        optimizer = make(model.parameters(), lr=lr)
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        ng.save(tmp_path / "x", model, optimizer)
        optimizer.step()
        before = pickle.dumps((model.state_dict(), optimizer.state_dict()))
        with pytest.raises(SnapshotError, match=r"not today. Model and optimizer are as they were"):
            ng.load(tmp_path / "x", model, optimizer)
        assert pickle.dumps((model.state_dict(), optimizer.state_dict())) == before


def test_an_optimizer_of_another_metric_changes_nothing(tmp_path):
    def kfac(seed: int, structure):
        model = network(seed)
        optimizer = ng.NaturalGradient(model, ng.Categorical(), metric=ng.Fisher(structure=structure))
        F.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        optimizer.step()
        return model, optimizer

    ng.save(tmp_path / "x", *kfac(0, ng.Kronecker()))
    model, optimizer = kfac(1, ng.Dense())
    before = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(SnapshotError, match=r"could not be loaded: .* metric"):
        ng.load(tmp_path / "x", model, optimizer)
    assert pickle.dumps((model.state_dict(), optimizer.state_dict())) == before


def test_bad_arguments_and_a_missing_extra(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="path=3"):
        ng.save(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="path=None"):
        ng.load(None)  # type: ignore[arg-type]
    ng.save(tmp_path / "x", step=1)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    for call in (lambda: ng.save(tmp_path / "y", step=1), lambda: ng.load(tmp_path / "x")):
        with pytest.raises(MissingExtraError, match=r"natgrad\[checkpoint\]"):
            call()


def test_the_digest_is_what_the_documentation_says(path):
    """Over the whole file, with the digest's own digits as zeros; here by another way than the library's."""
    data = path.read_bytes()
    digest = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["natgrad.sha256"]
    assert data.count(digest.encode()) == 1
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert sealed.FORMAT == "natgrad-snapshot/1"
