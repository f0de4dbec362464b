"""Parameter groups: the same as optimizers of their own, added in mid-training, each with its radius; and SGD."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract_problems import backward, batch, exact_fisher, flat, net, run, values
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ArgumentError, NatgradError
from natgrad.linalg import CG
from support import assert_close

EVERY_STEP = ng.Refresh(1, 1)
METRICS: dict[str, dict[str, Any]] = {
    "kfac": {"metric": ng.Fisher(ng.Exact(), ng.Kronecker())},
    "kfac sampled": {"metric": ng.Fisher(ng.MonteCarlo(), ng.Kronecker()), "seed": 3},
    "kfac clipped": {"metric": ng.Fisher(ng.Exact(), ng.Kronecker()), "search": ng.KLClip(1e-3)},
    "ekfac": {"metric": ng.Fisher(ng.Exact(), ng.EigenKronecker())},
    "dense": {"metric": ng.Fisher(ng.Exact(), ng.Dense()), "average": 0.0},
    "matrix-free": {
        "metric": ng.Fisher(ng.Exact(), ng.MatrixFree()),
        "solver": CG(tolerance=1e-14, max_iterations=100),
    },
    "euclidean": {"metric": ng.Euclidean()},
}
FIRST = {"lr": 0.3, "damping": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
SECOND = {"lr": 0.1, "damping": 1e-1, "momentum": 0.5, "weight_decay": 0.0}


def layers(model: nn.Module) -> tuple[list[Any], list[Any]]:
    return list(model[0].parameters()), list(model[2].parameters())


def kinds(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Weights and biases, as trainers divide them: the parameters of each layer are in two groups."""
    named = list(model.named_parameters())
    return [p for n, p in named if n.endswith("weight")], [p for n, p in named if n.endswith("bias")]


def optimizer_of(model: nn.Module, params: Any, options: dict[str, Any]) -> ng.NaturalGradient:
    return ng.NaturalGradient(params, ng.Categorical(), refresh=EVERY_STEP, **options).attach(model)


class Apart:
    """Optimizers of one part of the parameters each, that step at the same place.

    Each has a copy of the model: one that moved the parameters of another would move the place where that one's
    matrix-free products are taken.
    """

    def __init__(self) -> None:
        self.members: list[tuple[nn.Module, ng.NaturalGradient]] = []

    def add(self, model: nn.Module, split: Any, part: int, options: dict[str, Any]) -> None:
        model = copy.deepcopy(model)
        self.members.append((model, optimizer_of(model, split(model)[part], options)))

    def run(self, seeds: Any) -> None:
        for seed in seeds:
            for model, optimizer in self.members:
                run(model, [optimizer], [seed])
            moved = [[id(p) for g in optimizer.param_groups for p in g["params"]] for _, optimizer in self.members]
            for together in zip(*(model.parameters() for model, _ in self.members), strict=True):
                movers = [p for p, own in zip(together, moved, strict=True) if id(p) in own]
                for p in together if movers else ():
                    p.data.copy_(movers[0].detach())

    @property
    def parameters(self) -> torch.Tensor:
        return flat(self.members[0][0])


@pytest.mark.parametrize("split", [layers, kinds])
@pytest.mark.parametrize("name", METRICS)
def test_two_groups_are_two_optimizers(name, split):
    together, apart = net(), Apart()
    first, second = split(together)
    both = optimizer_of(together, [{"params": first, **FIRST}, {"params": second, **SECOND}], METRICS[name])
    apart.add(net(), split, 0, {**METRICS[name], **FIRST})
    apart.add(net(), split, 1, {**METRICS[name], **SECOND})
    run(together, [both], range(5))
    apart.run(range(5))
    assert_close(flat(together), apart.parameters, 1e-10)
    assert float((flat(together) - flat(net())).norm()) > 0.1


@pytest.mark.parametrize("option", ["lr", "damping", "momentum", "weight_decay"])
def test_every_option_of_a_group_matters(option):
    """A group with one option of its own is another run; so the comparison above compares something."""
    runs = []
    for special in (FIRST, {**FIRST, option: SECOND[option]}):
        model = net()
        groups = [{"params": layers(model)[0], **FIRST}, {"params": layers(model)[1], **special}]
        run(model, [optimizer_of(model, groups, METRICS["kfac"])], range(3))
        runs.append(flat(model))
    assert float((runs[0] - runs[1]).norm()) > 1e-4


def test_a_step_of_dense_groups_written_out():
    """θ_g ← (1 − η_g w_g) θ_g − η_g (F_gg + λ_g I)⁻¹ g_g with the diagonal blocks of the exact Fisher matrix."""
    model = net()
    x, _ = batch(0)
    fisher, before = exact_fisher(model, x), flat(model)
    groups = [{"params": layers(model)[0], **FIRST}, {"params": layers(model)[1], **SECOND}]
    optimizer = optimizer_of(model, groups, METRICS["dense"])
    backward(model, [optimizer], 0)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    expected = before.clone()
    for part, option in ((slice(0, 16), FIRST), (slice(16, 31), SECOND)):
        block = fisher[part, part] + option["damping"] * torch.eye(fisher[part, part].shape[0], dtype=torch.float64)
        expected[part] *= 1 - option["lr"] * option["weight_decay"]
        expected[part] -= option["lr"] * torch.linalg.solve(block, gradient[part])
    assert_close(flat(model), expected, 1e-9)


def test_groups_that_differ_in_weight_decay_alone_share_their_curvature():
    """As trainers divide: the natural gradient is that of one group, and each parameter decays as its group says."""
    one, two = net(), net()
    options = {**METRICS["dense"], "lr": 0.1, "damping": 1e-2}
    plain = optimizer_of(one, one.parameters(), options)
    weights, biases = kinds(two)
    divided = optimizer_of(two, [{"params": weights, "weight_decay": 0.5}, {"params": biases}], options)
    before = values(one)
    run(one, [plain], [0])
    run(two, [divided], [0])
    for name, value in values(two).items():
        shrink = 1 - 0.1 * 0.5 if name.endswith("weight") else 1.0
        assert_close(value, shrink * before[name] + (values(one)[name] - before[name]), 1e-10)
    assert len(divided.coverage()) == 4


@pytest.mark.parametrize("name", ["kfac", "dense", "matrix-free", "euclidean"])
def test_a_group_added_in_mid_training(name):
    """As an optimizer of its own from there on; the group that was there notices nothing."""
    together, apart = net(), Apart()
    together[0].requires_grad_(False)
    apart.add(together, layers, 1, {**METRICS[name], **SECOND})
    both = optimizer_of(together, layers(together)[1], {**METRICS[name], **SECOND})
    start = flat(together)[:16]
    run(together, [both], range(3))
    apart.run(range(3))
    assert torch.equal(flat(together)[:16], start)
    together[0].requires_grad_(True)
    both.add_param_group({"params": layers(together)[0], **FIRST})
    apart.members[0][0][0].requires_grad_(True)
    apart.add(copy.deepcopy(together), layers, 0, {**METRICS[name], **FIRST})
    run(together, [both], range(3, 7))
    apart.run(range(3, 7))
    assert_close(flat(together), apart.parameters, 1e-10)
    assert not torch.equal(flat(together)[:16], start)


def test_a_group_added_takes_the_defaults():
    model = net()
    optimizer = optimizer_of(model, layers(model)[1], {**METRICS["kfac"], **SECOND})
    optimizer.add_param_group({"params": layers(model)[0]})
    assert all(optimizer.param_groups[1][name] == value for name, value in SECOND.items())


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("momentum", 1.5), ("weight_decay", -0.1), ("damping", -1e-3), ("max_kl", 0.1), ("lr", "fast")],
)
def test_a_group_that_will_not_do_is_refused_and_not_kept(option, value):
    model = net()
    optimizer = optimizer_of(model, layers(model)[1], METRICS["kfac"])
    with pytest.raises(ArgumentError, match=option):
        optimizer.add_param_group({"params": layers(model)[0], option: value})
    assert len(optimizer.param_groups) == 1
    run(model, [optimizer], [0])


def test_the_same_parameter_twice_is_refused():
    model = net()
    optimizer = ng.KFAC(model, ng.Categorical())
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": layers(model)[0]})


def test_parameters_of_another_module_are_refused():
    model = net()
    optimizer = optimizer_of(model, layers(model)[1], METRICS["kfac"])
    with pytest.raises(NatgradError, match="belong"):
        optimizer.add_param_group({"params": list(net().parameters())})
        run(model, [optimizer], [0])


@pytest.mark.parametrize("name", ["kfac", "dense"])
def test_each_group_has_its_own_radius(name):
    """With a rate far too large every group goes to its radius: ½ Δᵀ(F_gg + λI)Δ = max_kl, with the blocks in use."""
    model = net()
    x, _ = batch(0)
    radii = (1e-3, 1e-5)
    options = {**METRICS[name], "search": ng.KLClip(1e-2), "damping": 1e-3, "lr": 1e3}
    groups = [{"params": p, "max_kl": kl} for p, kl in zip(layers(model), radii, strict=True)]
    structure = {"kfac": ng.Kronecker(), "dense": ng.Dense()}[name]
    before = flat(model)
    blocks = []
    for i in (0, 2):
        part = copy.deepcopy(model).requires_grad_(False)
        part[i].requires_grad_(True)
        blocks.append(ng.fisher(part, ng.Categorical(), x, structure=structure, estimate=ng.Exact()).to_dense())
    run(model, [optimizer_of(model, groups, options)], [0])
    change = flat(model) - before
    for block, part, radius in zip(blocks, (slice(0, 16), slice(16, 31)), radii, strict=True):
        delta = change[part]
        used = 0.5 * (delta @ (block.to(delta.dtype) @ delta) + 1e-3 * delta @ delta)
        assert_close(used, torch.tensor(radius, dtype=torch.float64), 1e-6)


def test_a_radius_for_the_whole_step_is_one():
    model = net()
    options = {**METRICS["dense"], "search": ng.TrustRegion(1e-2)}
    groups = [{"params": p, "max_kl": kl} for p, kl in zip(layers(model), (1e-3, 1e-5), strict=True)]
    optimizer = optimizer_of(model, groups, options)
    before = flat(model)
    with pytest.raises(ArgumentError, match="max_kl"):
        run(model, [optimizer], [0])
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("rates", [(0.3, 0.1), (10.0, 0.5)])
def test_groups_under_one_measured_radius(rates):
    """Different rates shape the direction; the measured KL of the whole step keeps within the radius."""
    model = net()
    x, _ = batch(0)
    options = {**METRICS["dense"], "search": ng.TrustRegion(1e-3), "damping": 1e-2}
    groups = [{"params": p, "lr": lr} for p, lr in zip(layers(model), rates, strict=True)]
    optimizer = optimizer_of(model, groups, options)
    for seed in range(4):
        x, _ = batch(seed)
        old = model(x).detach().log_softmax(-1)
        backward(model, [optimizer], seed)
        optimizer.step()
        new = model(x).detach().log_softmax(-1)
        kl = float((old.exp() * (old - new)).sum(-1).mean())
        assert 0 < kl <= 1e-3
        assert optimizer.metrics()["natgrad/kl_measured"] == pytest.approx(kl, rel=1e-6)


def test_a_group_that_climbs_beside_one_that_descends():
    together, apart = net(), net()
    options = {**METRICS["kfac"], "lr": 0.1}
    first, second = layers(together)
    both = optimizer_of(together, [{"params": first, "maximize": True}, {"params": second}], options)
    first, second = layers(apart)
    up, down = optimizer_of(apart, first, {**options, "maximize": True}), optimizer_of(apart, second, options)
    run(together, [both], range(3))
    run(apart, [up, down], range(3))
    assert_close(flat(together), flat(apart), 1e-10)


@pytest.mark.parametrize("name", METRICS)
def test_maximize_is_descent_of_the_negated_loss(name):
    """The curvature is that of the likelihood, whichever way the loss is taken."""
    runs = []
    for maximize in (True, False):
        model = net()
        optimizer = ng.NaturalGradient(
            model, ng.Categorical(), lr=0.05, momentum=0.9, maximize=maximize, **METRICS[name]
        )
        for seed in range(4):
            x, y = batch(seed)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss if maximize else -loss).backward()
            optimizer.step()
        runs.append(flat(model))
    assert torch.equal(*runs)


# SGD to the bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", ["module", "parameters", "named", "groups"])
def test_euclidean_is_sgd_to_the_bit(form, dtype):
    ours, theirs = net(dtype=dtype), net(dtype=dtype)

    def given(model: nn.Module) -> Any:
        first, second = layers(model)
        return {
            "module": model.parameters(),
            "parameters": model.parameters(),
            "named": model.named_parameters(),
            "groups": [
                {"params": first, "lr": 0.03, "momentum": 0.5},
                {"params": second, "maximize": True},
            ],
        }[form]

    common = {"lr": 0.0731, "momentum": 0.9}
    optimizer = ng.NaturalGradient(
        ours if form == "module" else given(ours), ng.Categorical(), metric=ng.Euclidean(), **common
    )
    if form != "module":
        optimizer.attach(ours)
    sgd = torch.optim.SGD(given(theirs), **common)
    run(ours, [optimizer], range(8), dtype)
    run(theirs, [sgd], range(8), dtype)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["momentum"], sgd.state[q]["momentum_buffer"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_euclidean_maximize_is_sgds_to_the_bit(momentum):
    ours, theirs = net(), net()
    optimizer = ng.NaturalGradient(
        ours, ng.Categorical(), metric=ng.Euclidean(), lr=0.1, momentum=momentum, maximize=True
    )
    run(ours, [optimizer], range(6))
    run(theirs, [torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, maximize=True)], range(6))
    assert torch.equal(flat(ours), flat(theirs))


# Accumulation


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [1, 3, 8], [1] * 12])
@pytest.mark.parametrize("name", ["kfac", "kfac clipped", "ekfac", "dense", "matrix-free", "euclidean"])
def test_micro_batches_of_groups_are_the_big_batch(name, sizes):
    runs = []
    for split in ([12], sizes):
        model = net()
        groups = [{"params": layers(model)[0], **FIRST}, {"params": layers(model)[1], **SECOND}]
        optimizer = optimizer_of(model, groups, METRICS[name])
        for seed in range(3):
            x, y = batch(seed, 12)
            optimizer.zero_grad()
            for a, b in zip(x.split(split), y.split(split), strict=True):
                (F.cross_entropy(model(a), b) * len(a) / 12).backward()
            optimizer.step()
        runs.append(flat(model))
    assert_close(runs[0], runs[1], 1e-10)


def test_groups_resume_with_their_options():
    """Options, and which groups share blocks, are part of the state."""
    model = net()
    groups = [{"params": layers(model)[0], **FIRST}, {"params": layers(model)[1], **SECOND}]
    optimizer = optimizer_of(model, groups, METRICS["kfac"])
    run(model, [optimizer], range(3))
    again = copy.deepcopy(model)
    resumed = optimizer_of(again, [{"params": p} for p in layers(again)], METRICS["kfac"])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, [optimizer], range(3, 6))
    run(again, [resumed], range(3, 6))
    assert torch.equal(flat(model), flat(again))
