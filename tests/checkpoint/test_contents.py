"""What goes into a snapshot comes out of it, bit for bit."""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.checkpoint.tree import Unpacker
from natgrad.errors import ArgumentError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


def bits(tensor: Tensor) -> tuple:
    """Dtype, shape and every bit."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, bytes(raw.tolist())


def random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    """Of every pattern, NaN with payload and negative zero among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def through(path, **extras):
    ng.save(path, **extras)
    return ng.load(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_dtype(tmp_path, dtype):
    given = {"a": random_bits(dtype, 5, 7), "none": random_bits(dtype, 0, 3), "number": random_bits(dtype, 2)[1]}
    found = through(tmp_path / "x", values=given)["values"]
    for name, value in given.items():
        assert bits(found[name]) == bits(value), name


def test_layouts(tmp_path):
    a = torch.arange(24.0).reshape(2, 3, 4)
    complex_values = torch.randn(3, dtype=torch.complex64)
    given = {
        "transposed": a.mT,
        "permuted": a.permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "sliced": a[:, 1:, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "of one": torch.randn(1, 3, 1).permute(2, 1, 0),
        "conjugate": complex_values.conj(),
        "negative": complex_values.conj().imag,
        "wide": torch.randn(3, 2, dtype=torch.complex128).T,
    }
    found = through(tmp_path / "x", values=given)["values"]
    for name, value in given.items():
        assert torch.equal(found[name], value) and bits(found[name]) == bits(value.resolve_conj().resolve_neg()), name
    # Where memory is filled without gaps its order decides which kernel runs, and so the last bit of a product.
    for name in ("transposed", "permuted", "channels last", "wide"):
        assert found[name].stride() == given[name].stride(), name


def test_tensors_met_twice_are_stored_once_and_stay_one(tmp_path):
    a = torch.randn(100)
    found = through(tmp_path / "x", values=[a, a, a[:50], a.view(10, 10)])["values"]
    assert found[0] is found[1]
    assert torch.equal(found[2], a[:50]) and torch.equal(found[3], a.view(10, 10))
    found[0].zero_()
    assert torch.equal(found[2], a[:50])
    assert len(load_file(tmp_path / "x")) == 3


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 2**100, 0.1, -0.0, 5e-324, math.inf, -math.inf, 1 - 2j),
        *("", 'é中\N{GRINNING FACE}\0\ud800"\\</script>', '"natgrad.sha256":"' + "0" * 64 + '"'),
        *(b"", b"\0\xff", [], (), {}, [[1], (2, (3,))], {"a": {1: "one", None: 0, (1, 2): [True]}}),
        *({"tensor": "model.weight"}, {"tuple": [1]}, Counter({3: 2, 5: 1})),
        *(torch.bfloat16, torch.device("cuda", 1)),
    ],
    ids=repr,
)
def test_plain_values(tmp_path, value):
    found = through(tmp_path / "x", value=value)["value"]
    assert found == value and type(found) is type(value)
    if isinstance(value, float):
        assert struct.pack("<d", found) == struct.pack("<d", value)


def test_values_that_become_plainer(tmp_path):
    given = {"float": np.float64(0.1), "int": np.int32(3), "ordered": OrderedDict(a=1), "size": torch.Size([2])}
    assert through(tmp_path / "x", **given) == {"float": 0.1, "int": 3, "ordered": {"a": 1}, "size": (2,)}
    assert math.isnan(through(tmp_path / "x", nan=math.nan)["nan"])


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, np.zeros(2), math.sqrt, torch.zeros(2, device="meta"), torch.eye(2).to_sparse()],
    ids=lambda v: type(v).__name__,
)
def test_values_that_no_snapshot_holds_are_named(tmp_path, value):
    with pytest.raises(ArgumentError, match=r"extras.settings.deep.1 is "):
        ng.save(tmp_path / "x", settings={"deep": [0, value]})
    assert not list(tmp_path.iterdir())


def test_a_list_within_itself_and_texts_without_end_are_errors(tmp_path):
    endless: list = []
    endless.append(endless)
    with pytest.raises(ArgumentError, match="deep"):
        ng.save(tmp_path / "x", endless=endless)
    with pytest.raises(ArgumentError, match="as tensors"):
        ng.save(tmp_path / "x", text="x" * 60_000_000)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("codes", torch.randint(255, (3,), dtype=torch.uint8))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.embedding(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models(tmp_path, dtype):
    model, other = Tied().to(dtype), Tied().to(dtype)
    model(torch.arange(7))  # running statistics
    ng.save(tmp_path / "x", model)
    assert ng.load(tmp_path / "x", other) == {}
    for name, value in model.state_dict().items():
        assert bits(other.state_dict()[name]) == bits(value), name
    assert other.head.weight is other.embedding.weight
    # Any reader of safetensors finds the weights under the model's own names.
    stored = load_file(tmp_path / "x")
    assert {n.removeprefix("model.") for n in stored} == set(model.state_dict()) - {"head.weight"}
    assert torch.equal(stored["model.embedding.weight"], model.embedding.weight)


class Counting(nn.Linear):
    """A module with state that is no tensor, and a version of its own."""

    _version = 7
    calls = 0
    loaded_version = None

    def get_extra_state(self):
        return {"calls": self.calls, "kinds": ("a", 1)}

    def set_extra_state(self, state):
        assert state["kinds"] == ("a", 1)
        self.calls = state["calls"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        self.loaded_version = local_metadata["version"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_extra_state_and_versions_of_modules(tmp_path):
    model, other = nn.Sequential(Counting(2, 2)), nn.Sequential(Counting(2, 2))
    model[0].calls = 5
    ng.save(tmp_path / "x", model)
    ng.load(tmp_path / "x", other)
    assert other[0].calls == 5 and other[0].loaded_version == 7


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def split(model: nn.Module, **first) -> list[dict]:
    weights = [p for p in model.parameters() if p.dim() == 2]
    return [{"params": weights, **first}, {"params": [p for p in model.parameters() if p.dim() == 1]}]


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "AdamW, named": lambda m: torch.optim.AdamW(m.named_parameters(), lr=0.01),
    "AdamW, tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01), capturable=False),
    "Adam, groups": lambda m: torch.optim.Adam(split(m, lr=0.3, betas=(0.5, 0.9), tags=["a", None, True]), lr=0.01),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True, momentum=0.5),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
    "KFAC": lambda m: ng.KFAC(m, ng.Categorical(), refresh=ng.Refresh(1, 3)),
    "EKFAC": lambda m: ng.EKFAC(m, ng.Categorical()),
    "GramNGD": lambda m: ng.GramNGD(m, ng.Categorical()),
    "HessianFree": lambda m: ng.HessianFree(m, ng.Categorical()),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    dtype = next(model.parameters()).dtype
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(16, 4, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            output = model(x)
            if hasattr(optimizer, "observe"):
                optimizer.observe(output, y)
            loss = F.cross_entropy(output.float(), y)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def states(optimizer) -> list:
    """State and groups as values that can be compared bit for bit."""

    def plain(value):
        if isinstance(value, Tensor):
            return bits(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resume_of_any_optimizer_is_bitwise(tmp_path, make, dtype):
    model, other = network(0, dtype), network(1, dtype)
    optimizer, resumed = make(model), make(other)
    train(model, optimizer, range(4))
    ng.save(tmp_path / "x", model, optimizer)
    expected = states(optimizer)
    train(other, resumed, range(1))  # a state that must go
    ng.load(tmp_path / "x", other, resumed)
    assert states(resumed) == expected
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert bits(p) == bits(q)


class Mixed(torch.optim.SGD):
    """State of other dtypes than its parameters, which torch's own loading would cast."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {
                "wide": torch.full_like(p, math.pi, dtype=torch.float64),
                "index": torch.tensor([2**40 + 1]),
                "bytes": torch.tensor([255], dtype=torch.uint8),
                "name": "mixed",
                "nested": {"wide": [torch.tensor([0.1], dtype=torch.float64), (1, "two", None)]},
                "step": torch.tensor(3.0),
            }


def test_no_dtype_of_any_state_is_cast(tmp_path):
    model, other = network(0, torch.bfloat16), network(1, torch.bfloat16)
    optimizer, resumed = Mixed(model.parameters(), lr=0.1), Mixed(other.parameters(), lr=0.2)
    optimizer.step()
    ng.save(tmp_path / "x", model, optimizer)
    ng.load(tmp_path / "x", other, resumed)
    assert states(resumed) == states(optimizer)
    # The control: torch casts them.
    resumed.load_state_dict(optimizer.state_dict())
    assert states(resumed) != states(optimizer)


def test_state_goes_by_the_names_of_parameters_not_by_their_places(tmp_path):
    model, other = network(0), network(0)
    first, second = model[0].parameters(), model[2].parameters()
    optimizer = torch.optim.AdamW([*second, *first])  # as after unfreezing the first layer late
    train(model, optimizer, range(3))
    ng.save(tmp_path / "x", model, optimizer)
    resumed = torch.optim.AdamW(other.parameters())
    ng.load(tmp_path / "x", other, resumed)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert bits(p) == bits(q)
    assert "optimizer.state.2.weight.exp_avg" in load_file(tmp_path / "x")


SCHEDULERS = {
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(tmp_path, schedule):
    def run(model, optimizer, scheduler, seeds):
        rates = []
        for seed in seeds:
            train(model, optimizer, range(seed, seed + 1))
            scheduler.step(*[1.0] * (type(scheduler).__name__ == "ReduceLROnPlateau"))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    def fresh():
        model = network(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, schedule(optimizer)

    first, second = fresh(), fresh()
    run(*first, range(4))
    ng.save(tmp_path / "x", *first[:2], scheduler=first[2].state_dict())
    second[2].load_state_dict(ng.load(tmp_path / "x", *second[:2])["scheduler"])
    assert run(*first, range(4, 10)) == run(*second, range(4, 10))


def test_random_streams(tmp_path):
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    ng.save(tmp_path / "x", random=torch.get_rng_state(), own=generator.get_state())
    expected = torch.randn(3), torch.randn(3, generator=generator)
    found = ng.load(tmp_path / "x")
    torch.set_rng_state(found["random"])
    generator.set_state(found["own"])
    assert torch.equal(torch.randn(3), expected[0]) and torch.equal(torch.randn(3, generator=generator), expected[1])


def test_parts_may_be_left_out(tmp_path):
    model, optimizer = network(0), None
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    ng.save(tmp_path / "x", model, optimizer, step=1)
    assert ng.load(tmp_path / "x") == {"step": 1}
    other = network(1)
    assert ng.load(str(tmp_path / "x"), other) == {"step": 1}
    assert bits(other[0].weight) == bits(model[0].weight)
    resumed = torch.optim.AdamW(other.parameters())
    ng.load(tmp_path / "x", optimizer=resumed)
    assert states(resumed) == states(optimizer)


def test_saving_and_loading_leave_no_trace(tmp_path):
    """Not in the random stream, the gradients or what is saved."""
    model = network(0)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    ng.save(tmp_path / "x", model, optimizer)
    before = states(optimizer), torch.get_rng_state(), [p.grad.clone() for p in model.parameters()]
    ng.save(tmp_path / "y", model, optimizer)
    ng.load(tmp_path / "x", model, optimizer)
    assert states(optimizer) == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[2], strict=True))
    # Nothing that was loaded shares memory with anything else.
    found, again = ng.load(tmp_path / "x", model, optimizer), states(optimizer)
    optimizer.state[model[0].weight]["exp_avg"].zero_()
    ng.load(tmp_path / "x", model, optimizer)
    assert found == {} and states(optimizer) == again


def test_what_is_loaded_owns_its_memory(tmp_path):
    model = network(0)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    shared = optimizer.state[model[0].weight]["exp_avg"]
    ng.save(tmp_path / "x", model, optimizer, average=shared, odd=torch.ones(3, dtype=torch.uint8))
    found = ng.load(tmp_path / "x", model, optimizer)
    loaded = optimizer.state[model[0].weight]["exp_avg"]
    assert torch.equal(found["average"], loaded)
    found["average"].zero_()
    assert loaded.any()
    # As torch allocates it: kernels may round otherwise where memory is aligned otherwise.
    tensors = [t for slot in optimizer.state.values() for t in slot.values()]
    assert all(t.data_ptr() % 64 == 0 for t in [*tensors, *found.values()])


def test_numbers_return_to_the_device_they_were_on():
    """A stand-in for an accelerator: the record says where a tensor was, and meta is the device it goes to."""
    stored = {"number": torch.tensor(2.0), "vector": torch.ones(2)}
    unpacker = Unpacker(stored, torch.device("meta"))
    assert unpacker.decode({"tensor": "number", "device": "cuda"}).is_meta
    assert Unpacker(stored, torch.device("meta")).decode({"tensor": "number"}).item() == 2.0
    assert unpacker.decode({"tensor": "vector", "device": "cuda"}).device.type == "cpu"  # load_state_dict moves it


def test_a_guard_around_an_optimizer(tmp_path):
    def fresh(seed):
        model = network(seed)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        guard = ng.KLBudget(torch.optim.AdamW(model.parameters(), lr=0.1), model, ng.Categorical(), x, per_step=1e-3)
        return model, guard

    (model, guard), (other, resumed) = fresh(0), fresh(1)
    train(model, guard, range(3))
    ng.save(tmp_path / "x", model, guard)
    ng.load(tmp_path / "x", other, resumed)
    assert states(resumed) == states(guard)
    train(model, guard, range(3, 5))
    train(other, resumed, range(3, 5))
    assert bits(model[0].weight) == bits(other[0].weight)


@pytest.mark.parametrize("use", [ng.save, ng.load], ids=["save", "load"])
def test_model_and_optimizer_exchanged_are_told_their_order(use, tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    for given in ((optimizer, model), (None, model), (model.state_dict(), optimizer)):
        with pytest.raises(ArgumentError, match=r"the order is \(path, model, optimizer\)"):
            use(tmp_path / "run", *given)
    assert not list(tmp_path.iterdir())
