"""Packed K-FAC: the run of the whole matrices in half the memory, resumed to the bit, also from the other storage."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim_problems import flat
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError
from natgrad.linalg.packed import unfold, width_of
from natgrad.testing.zoo import Case, case

HALF = torch.bfloat16
STORAGES = {"plain": ng.Unpacked(), "packed": ng.Packed(least=2), "bfloat16": ng.Packed(HALF, least=2)}
PRESETS = {"kfac": (ng.KFAC, ng.Kronecker), "ekfac": (ng.EKFAC, ng.EigenKronecker)}
WIDTHS = ng.WidthLimits(full=2, blocks=4, block=3)


def optimizer_of(model: nn.Module, storage: str, preset: str = "kfac", **options: Any) -> Any:
    make, structure = PRESETS[preset]
    kept = {"refresh": ng.Staggered(1, 3), "lr": 0.05, "search": ng.KLClip(1e-2), **options}
    widths = kept.pop("widths", ng.WidthLimits())
    return make(model, ng.Categorical(), structure=structure(storage=STORAGES[storage], widths=widths), **kept)


def train(found: Case, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        output = found()
        target = torch.arange(step, step + output[..., 0].numel()) % output.shape[-1]
        F.cross_entropy(output.flatten(0, -2), target).backward()
        optimizer.step()


def factors(optimizer: Any) -> dict[tuple[int, str], Tensor]:
    """Averaged factors and inverses in the state; not the eigenvalues, which are no symmetric matrix."""
    prefixes = ("average.input", "average.output", "inverse.kronecker.")
    return {
        (i, key): t
        for i, slot in optimizer.state_dict()["state"].items()
        for key, t in slot.items()
        if key.startswith(prefixes)
    }


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "name", ["mlp", "conv2d_groups", "embedding_padding", "tied_embedding", "attention", "raw_parameter", "lstm"]
)
def test_a_packed_run_is_the_run_of_whole_matrices(name, preset):
    runs = {}
    for storage in ("plain", "packed"):
        found = case(name)
        optimizer = optimizer_of(found.model, storage, preset)
        train(found, optimizer, 0, 8)
        runs[storage] = flat(found.model), factors(optimizer)
    torch.testing.assert_close(runs["packed"][0], runs["plain"][0], rtol=1e-9, atol=1e-11)
    folded = 0
    for place, whole in runs["plain"][1].items():
        kept = runs["packed"][1][place]
        square = whole.dim() > 1 and whole.shape[-1] == whole.shape[-2] > 1
        assert (width_of(kept.shape) == whole.shape[-1]) if square else kept.shape == whole.shape
        folded += square
        if square:
            torch.testing.assert_close(unfold(kept), whole, rtol=1e-7, atol=1e-10)
    assert folded >= 2


@pytest.mark.parametrize("preset", PRESETS)
def test_blocks_of_wide_sides_are_packed_too(preset):
    runs = {}
    for storage in ("plain", "packed"):
        found = case("mlp")
        optimizer = optimizer_of(found.model, storage, preset, widths=WIDTHS)
        train(found, optimizer, 0, 6)
        runs[storage] = flat(found.model), factors(optimizer)
    torch.testing.assert_close(runs["packed"][0], runs["plain"][0], rtol=1e-9, atol=1e-11)
    assert any(t.dim() == 4 and width_of(t.shape) for t in runs["packed"][1].values())


@pytest.mark.parametrize("cut", [2, 5])
@pytest.mark.parametrize("storage", ["packed", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, HALF])
def test_resumed_bit_for_bit(preset, storage, cut, dtype):
    """Between renewals, so that what was loaded is what the next steps use."""
    found = case("mlp")
    found = Case("mlp", found.model.to(dtype), found.x.to(dtype), None, frozenset())
    optimizer = optimizer_of(found.model, storage, preset)
    train(found, optimizer, 0, cut)
    other = copy.deepcopy(found.model)
    resumed = optimizer_of(other, storage, preset)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(found, optimizer, cut, cut + 4)
    train(Case("mlp", other, found.x, None, frozenset()), resumed, cut, cut + 4)
    assert torch.equal(flat(found.model), flat(other))
    assert all(torch.equal(t, factors(resumed)[place]) for place, t in factors(optimizer).items())
    inverses = {t.dtype for (_, key), t in factors(optimizer).items() if key.startswith("inverse.")}
    assert (HALF in inverses) == (storage == "bfloat16" and preset == "kfac")
    averages = {t.dtype for (_, key), t in factors(optimizer).items() if key.startswith("average.")}
    assert averages == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("name", ["mlp", "conv2d_groups", "tied_embedding"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("here,there", [("plain", "packed"), ("packed", "plain"), ("bfloat16", "plain")])
def test_a_state_of_the_other_storage_is_converted(here, there, preset, name):
    found = case(name)
    optimizer = optimizer_of(found.model, here, preset)
    train(found, optimizer, 0, 5)
    other = copy.deepcopy(found.model)
    resumed = optimizer_of(other, there, preset)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    fresh = case(name)
    shaped = optimizer_of(fresh.model, there, preset)
    train(fresh, shaped, 0, 1)
    assert {p: t.shape for p, t in factors(resumed).items()} == {p: t.shape for p, t in factors(shaped).items()}
    assert HALF not in {t.dtype for t in factors(resumed).values()}
    train(found, optimizer, 5, 9)
    train(Case(name, other, found.x, found.select, found.tags), resumed, 5, 9)
    rtol = 1e-9 if here != "bfloat16" else 1e-2
    torch.testing.assert_close(flat(other), flat(found.model), rtol=rtol, atol=rtol)


def test_a_snapshot_keeps_folded_tensors_and_their_dtypes(tmp_path):
    found = case("mlp")
    optimizer = optimizer_of(found.model, "bfloat16")
    train(found, optimizer, 0, 5)
    ng.save(tmp_path / "run.safetensors", found.model, optimizer)
    again = case("mlp")
    resumed = optimizer_of(again.model, "bfloat16")
    ng.load(tmp_path / "run.safetensors", again.model, resumed)
    before, after = factors(optimizer), factors(resumed)
    assert before.keys() == after.keys()
    assert all(after[p].dtype == t.dtype and torch.equal(after[p], t) for p, t in before.items())
    train(found, optimizer, 5, 9)
    train(again, resumed, 5, 9)
    assert torch.equal(flat(found.model), flat(again.model))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("storage", ["packed", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stepped", [False, True])
def test_distributed_checkpoint(stepped, preset, storage, tmp_path):
    found, again = case("mlp"), case("mlp", seed=7)
    optimizer, resumed = (optimizer_of(f.model, storage, preset) for f in (found, again))
    train(found, optimizer, 0, 5)
    train(again, resumed, 0, int(stepped))
    saved = {"model": found.model.state_dict(), "optimizer": get_optimizer_state_dict(found.model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    empty = {"model": again.model.state_dict(), "optimizer": get_optimizer_state_dict(again.model, resumed)}
    dcp.load(empty, checkpoint_id=tmp_path, no_dist=True)
    again.model.load_state_dict(empty["model"])
    set_optimizer_state_dict(again.model, resumed, empty["optimizer"])
    again = Case("mlp", again.model, found.x, found.select, found.tags)
    train(found, optimizer, 5, 9)
    train(again, resumed, 5, 9)
    assert torch.equal(flat(found.model), flat(again.model))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_refuses_the_other_storage(tmp_path):
    """It loads into the tensors that are there, and says that their sizes differ."""
    found, again = case("mlp"), case("mlp", seed=7)
    optimizer, resumed = optimizer_of(found.model, "plain"), optimizer_of(again.model, "packed")
    train(found, optimizer, 0, 2)
    train(again, resumed, 0, 2)
    dcp.save({"optimizer": get_optimizer_state_dict(found.model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    before = factors(resumed)
    with pytest.raises(dcp.api.CheckpointException, match=r"(?i)size"):
        empty = {"optimizer": get_optimizer_state_dict(again.model, resumed)}
        dcp.load(empty, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(t, before[place]) for place, t in factors(resumed).items())


def test_the_error_of_bfloat16_inverses_has_its_bound():
    """|L' ⊗ R' − L ⊗ R| ≤ ((1 + u)² − 1) |L| ⊗ |R| entry by entry, u = 2⁻⁸, of the inverse that is in use."""
    found = {}
    for storage in ("plain", "bfloat16"):
        model = case("mlp")
        optimizer = optimizer_of(model.model, storage)
        train(model, optimizer, 0, 1)  # the same averages
        found[storage] = {name: i.to_dense() for name, i in optimizer._curvature.inverses.items()}
    u, off = 2.0**-8, 0.0
    for name, exact in found["plain"].items():
        error = (found["bfloat16"][name] - exact).abs()
        assert bool((error <= ((1 + u) ** 2 - 1 + 1e-6) * exact.abs()).all()), name
        off = max(off, float(error.max()))
    assert off > 0


def test_bytes_of_the_state():
    """Held against both factors and their eigenvectors in float32, W1's number in the benchmarks."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(300, 257), nn.Tanh(), nn.Linear(257, 160)), torch.randn(8, 300)
    square = 4 * 2 * (301**2 + 257**2 + 258**2 + 160**2)
    for storage, most in ((ng.Unpacked(), 1.0), (ng.Packed(), 0.505), (ng.Packed(HALF), 0.38)):
        network = copy.deepcopy(model)
        optimizer = ng.KFAC(network, ng.Categorical(), structure=ng.Kronecker(storage=storage))
        F.cross_entropy(network(x), torch.arange(8)).backward()
        optimizer.step()
        kept = sum(t.nbytes for slot in optimizer.state.values() for k, t in slot.items() if k[:3] in ("ave", "inv"))
        assert most - 0.01 < kept / square <= most


def test_narrow_matrices_stay_whole():
    found = case("mlp")
    optimizer = ng.KFAC(found.model, ng.Categorical(), structure=ng.Kronecker(storage=ng.Packed()))
    train(found, optimizer, 0, 2)
    assert all(t.shape[-1] == t.shape[-2] for t in factors(optimizer).values())


def test_other_storages_are_refused():
    with pytest.raises(ArgumentError, match="bfloat16"):
        ng.Packed(torch.float16)
    with pytest.raises(ArgumentError, match="≥ 2"):
        ng.Packed(least=1)
    with pytest.raises(ArgumentError, match=r"ng\.Packed"):
        ng.Kronecker(storage="packed")  # type: ignore[arg-type]
