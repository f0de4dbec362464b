"""Outputs with the classes on axis 1, as torch.nn.CrossEntropyLoss takes them: observed with their axes moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.errors import ShapeError, StaleTapeError
from natgrad.optim.axes import moved_axes

PRESETS = (ng.KFAC, ng.NGD, ng.GramNGD, ng.TrustRegionNGD, ng.GaussNewton)


class ClassesLast(nn.Sequential):
    """What the user would have to write without: the oracle."""

    def forward(self, x):
        return super().forward(x).movedim(1, -1)


def batches(count: int = 4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=generator)
        yield x, torch.randint(4, (2, 5, 5), generator=generator)


def network(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(1)
    return kind(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 1)).double()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(preset, how: str, kind: type[nn.Sequential] = nn.Sequential) -> tuple[torch.Tensor, dict[str, float]]:
    model = network(kind)
    optimizer = preset(model, ng.Categorical())
    for i, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        if how == "closure":
            optimizer.step(lambda x=x, y=y: (F.cross_entropy(f := model(x), y), f.movedim(1, -1), y))
            continue
        f = model(x)
        if how == "classes last":
            optimizer.observe(f, y)
            f = f.movedim(-1, 1)
        elif how == "observed" or i == 0:
            optimizer.observe(f.movedim(1, -1), y)
        else:
            optimizer.observe(f.permute(0, 2, 3, 1), y)  # the same in other words
        F.cross_entropy(f, y).backward()
        optimizer.step()
    return flat(model), optimizer.metrics()


@pytest.mark.parametrize("how", ["observed", "other words", "closure"])
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_an_output_observed_with_its_axes_moved_steps_as_a_network_with_the_classes_last(preset, how):
    parameters, metrics = trained(preset, how)
    expected, expected_metrics = trained(preset, "closure" if how == "closure" else "classes last", _kind(how))
    assert torch.equal(parameters, expected)
    assert metrics == expected_metrics


def _kind(how: str) -> type[nn.Sequential]:
    if how != "closure":
        return ClassesLast

    class Twice(ClassesLast):  # the closure above moves the axes of what it gets
        def forward(self, x):
            return super().forward(x).movedim(-1, 1).clone()

    return Twice


def test_the_order_of_the_axes_said_once_holds_until_something_else_is_said():
    outcomes = []
    for kind in (ClassesLast, nn.Sequential):
        model = network(kind)
        optimizer = ng.KFAC(model, ng.Categorical())
        for i, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            f = model(x)
            if i == 0 and kind is nn.Sequential:
                optimizer.observe(f.movedim(1, -1))
            F.cross_entropy(f.movedim(-1, 1) if kind is ClassesLast else f, y).backward()
            optimizer.step()
        outcomes.append(flat(model))
    assert torch.equal(*outcomes)
    f = model(x)
    with pytest.raises(ShapeError, match=r"output\.movedim\(1, -1\)"):
        optimizer.observe(f, y)


@pytest.mark.parametrize("likelihood", [ng.Categorical(), ng.Weighted(ng.Categorical(), ignore_index=0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loss_whose_classes_are_on_another_axis_than_the_likelihoods_is_told_from_its_gradient(dtype, likelihood):
    x, y = next(batches())
    model = network().to(dtype)
    optimizer = ng.KFAC(model, likelihood)
    for _ in range(2):  # it is said again
        f = model(x.to(dtype))
        with pytest.raises(ShapeError, match=r"axis 1.*observe\(output\.movedim\(1, -1\)\)"):
            F.cross_entropy(f, y, ignore_index=0).backward()
    optimizer.zero_grad()
    f = model(x.to(dtype))
    optimizer.observe(f.movedim(1, -1), y)
    F.cross_entropy(f, y, ignore_index=0).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: F.cross_entropy(f.movedim(-1, 1), y),
        lambda f, y: F.cross_entropy((f - f.mean(1, keepdim=True)).movedim(-1, 1), y),
        lambda f, y: f.square().mean(),
        lambda f, y: f.sum() * 0,
    ],
    ids=["classes last", "centred over both axes", "no softmax", "zero"],
)
def test_a_loss_that_shows_nothing_of_the_kind_is_left_alone(loss):
    x, y = next(batches())
    model = network(ClassesLast)
    optimizer = ng.KFAC(model, ng.Categorical())
    loss(model(x), y).backward()
    model = network()
    optimizer = ng.KFAC(model, ng.Gaussian())  # another likelihood has no classes
    F.cross_entropy(model(x), y).backward()
    del optimizer


def test_only_views_with_the_axes_moved_are_the_output():
    x, y = next(batches())
    model = network()
    optimizer = ng.KFAC(model, ng.Categorical())
    f = model(x)
    for other in (f[:, :3].movedim(1, -1), f.movedim(1, -1).contiguous(), f.flatten(2).mT, f.detach().movedim(1, -1)):
        with pytest.raises(StaleTapeError):
            optimizer.observe(other)
    optimizer.observe(f.movedim(1, -1), y)
    with pytest.raises(ShapeError):
        optimizer.observe(f.movedim(1, -1).movedim(-1, 1), y)  # as it was


@pytest.mark.parametrize("axes", [(0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (4, 4, 4, 4)])
@pytest.mark.parametrize("of_view", [False, True])
def test_the_order_is_found_from_shape_and_strides(axes, shape, of_view):
    f = torch.randn(shape, requires_grad=True) * 1.0
    f = f.mT if of_view else f
    found = moved_axes(f, f.permute(axes))
    assert found is not None and torch.equal(f.permute(found), f.permute(axes))
    assert moved_axes(f, f.clone().permute(axes)) is None
