"""Operation counts against torch's own counter on the operations as they run, and against the table of formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from planned import single, wide
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import natgrad as ng
from natgrad.metric import Fisher
from natgrad.network import recording
from natgrad.planning.costs import block_application, block_refresh, costs_of, fit_of, layer_statistics
from natgrad.planning.inspection import passes_of
from natgrad.planning.layers import assumed, seen
from natgrad.planning.shapes import block_shapes, geometries, on_meta
from natgrad.planning.work import eigh, flops_of, gemm, gram, inverse, memory


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))


CASES = {
    "rows": (lambda: wide(24, 40, 10), lambda: torch.randn(16, 24)),
    "positions": (sequence, lambda: torch.randn(6, 5, 12)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)),
        lambda: torch.randn(5, 3, 6, 6),
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 4, 3)),
        lambda: torch.randn(7, 4, 5),
    ),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 3)), lambda: torch.randn(5, 4)),
}


@pytest.fixture(params=CASES)
def model_and_inputs(request):
    make, draw = CASES[request.param]
    return make(), draw()


def test_passes_seen_without_memory_are_those_that_run(model_and_inputs):
    model, x = model_and_inputs
    _, passes = passes_of(model, None, None, x)
    column = torch.randn_like(model(x))
    assert flops_of(passes.forward) == counted(lambda: model(x))
    if isinstance(model[0], nn.Conv1d):
        return  # torch's counter takes no notice of groups in the backward pass
    output = model(x)
    assert flops_of(passes.backward) == counted(lambda: output.backward(column))


def test_passes_taken_for_granted_agree_with_those_seen():
    model = wide(24, 40, 10)
    meta = on_meta(model)
    found = geometries(meta)
    one, other = assumed(found, 16, 1), seen(meta, found, torch.randn(16, 24))
    # Biases are sums where a pass is seen, and a column of the product where it is taken for granted.
    for passes in ("forward", "backward", "sampled"):
        assert flops_of(getattr(one, passes)) == pytest.approx(flops_of(getattr(other, passes)), rel=0.05)
    assert [layer.rows for layer in one.layers] == [layer.rows for layer in other.layers] == [16] * 3


@pytest.mark.parametrize(
    "structure", [ng.Kronecker(), ng.Kronecker.reduce(), ng.Diagonal(), ng.BlockDiagonal()], ids=str
)
def test_statistics_are_the_operations_that_run(model_and_inputs, structure):
    model, x = model_and_inputs
    metric, likelihood = Fisher(ng.MonteCarlo(), structure), ng.Categorical() if x.dim() else None
    meta, passes = passes_of(model, None, None, x)
    shapes = block_shapes(meta, structure)
    costs = costs_of(passes, shapes, structure)
    with recording(model) as tape:
        tape.output = model(x)
    partition = metric.partition(model)
    generator = torch.Generator().manual_seed(0)
    ran = counted(lambda: metric.statistics(tape, likelihood, None, partition, generator=generator))
    assert flops_of(costs.statistics) == ran


def test_eigenvalues_are_the_operations_that_run(model_and_inputs):
    """In a basis that is known already, as at every step but those that renew it."""
    model, x = model_and_inputs
    structure = ng.EigenKronecker()
    metric = Fisher(ng.MonteCarlo(), structure)
    meta, passes = passes_of(model, None, None, x)
    costs = costs_of(passes, block_shapes(meta, structure), structure)
    with recording(model) as tape:
        tape.output = model(x)
    partition = metric.partition(model)
    generator = torch.Generator().manual_seed(0)

    def statistics(bases=None):
        return metric.statistics(tape, ng.Categorical(), None, partition, generator=generator, bases=bases)

    from natgrad.metric.eigenbasis import completed

    bases = completed(statistics()).bases
    assert flops_of(costs.statistics) == counted(lambda: statistics(bases))


@pytest.mark.parametrize("structure", [ng.Kronecker(), ng.EigenKronecker(), ng.Kronecker.reduce()], ids=str)
def test_application_is_the_operations_that_run(model_and_inputs, structure):
    model, x = model_and_inputs
    shapes = {s.block.name: s for s in block_shapes(on_meta(model), structure)}
    metric = Fisher(ng.MonteCarlo(), structure)
    with recording(model) as tape:
        tape.output = model(x)
    partition = metric.partition(model)
    found = metric.statistics(tape, ng.Categorical(), None, partition, generator=torch.Generator().manual_seed(0))
    for name, block in metric.operators(partition, found).items():
        inverted = ng.FactoredTikhonov(1e-2).inverse(block)
        vector = torch.randn(block.shape[0])
        assert flops_of(block_application(shapes[name])) == counted(lambda i=inverted, v=vector: i.matvec(v)), name


def test_formulas_of_the_table():
    """N = 16 rows of a layer 24 + 1 → 40."""
    model = nn.Linear(24, 40)
    (layer,) = assumed(geometries(on_meta(model)), 16, 1).layers
    n, m, rows = 25, 40, 16
    assert flops_of(layer_statistics(layer, ng.Kronecker())) == 2 * rows * (n * n + m * m)
    assert flops_of(layer_statistics(layer, ng.Diagonal())) == 2 * rows * n * m
    assert flops_of(layer_statistics(layer, ng.EigenKronecker())) == 4 * rows * (n * n + m * m) + 2 * rows * n * m
    (kron,), (eig,) = (block_shapes(on_meta(model), s) for s in (ng.Kronecker(), ng.EigenKronecker()))
    assert flops_of(block_application(kron)) == 2 * m * n * (m + n)
    assert flops_of(block_application(eig)) == 4 * m * n * (m + n)
    assert flops_of(block_refresh(kron, ng.Kronecker())) == n**3 + m**3


def test_operations():
    assert gemm(3, 5, 7).flops == counted(lambda: torch.randn(3, 5) @ torch.randn(5, 7))
    assert gemm(3, 5, 7).shape == (3, 5) and gemm(7, 3, 5, count=4).count == 4
    assert gram(10, 600).flops == 0.625 * 2 * 10 * 600**2 and gram(10, 500).flops == 2 * 10 * 500**2
    assert inverse(10).flops == 1000 and eigh(10).flops == 9000
    assert memory(10, 3).bytes == 120 and flops_of([memory(10, 3)]) == 0
    assert flops_of([gemm(2, 2, 2, count=3), inverse(3)]) == 3 * 16 + 27


def test_a_fit_is_a_forward_pass_and_two_tangents():
    _, passes = passes_of(wide(24, 40, 10), 16, None)
    assert flops_of(fit_of(passes)) == 5 * flops_of(passes.forward)


def test_a_part_of_the_rows_costs_that_part():
    model = wide(24, 40, 10)
    meta, passes = passes_of(model, 64, None)
    shapes = block_shapes(meta, ng.Kronecker())
    whole, part = (costs_of(passes, shapes, ng.Kronecker(sampling=ng.Sampling(f))) for f in (1.0, 0.25))
    labels = flops_of(passes.sampled)  # the backward pass of sampled labels is whole
    assert flops_of(part.statistics) - labels == pytest.approx((flops_of(whole.statistics) - labels) / 4)
    assert flops_of(part.each) == flops_of(whole.each)
    alone = costs_of(passes, shapes, ng.Kronecker(sampling=ng.SubBatch(0.25)))
    assert flops_of(alone.statistics) == pytest.approx((flops_of(whole.statistics) + flops_of(passes.forward)) / 4)


def test_counting_leaves_the_model_alone():
    found = single("batch_norm_train")
    before = copy.deepcopy(found.model.state_dict())
    state = torch.get_rng_state()
    ng.inspect(found.model, inputs=found.x)
    after = found.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in found.model.parameters())
    assert not found.model._forward_hooks and not any(m._forward_hooks for m in found.model.modules())
