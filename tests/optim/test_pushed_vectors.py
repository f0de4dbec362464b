"""Products J v for several vectors at once, and for models that vmap or forward mode cannot serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad as ng
from natgrad.network import Pass, trainable_parameters
from natgrad.optim.probe import ModelProbe, _push


class Sine(torch.autograd.Function):
    """Knows nothing but its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x.cos()


class OnlyBackward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return Sine.apply(super().forward(input))  # type: ignore[return-value]


class Peeks(nn.Linear):
    """Looks at the values of what depends on the parameters, which vmap over tangents allows and over values not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        return output * (2.0 if float(output.detach().sum()) > 0 else 3.0)


MODELS = {
    "dropout": lambda: (nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 2)), (7, 4)),
    "batch norm": lambda: (nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()), (5, 2, 3, 3)),
    "only backward": lambda: (nn.Sequential(OnlyBackward(4, 3), nn.Linear(3, 2)), (5, 4)),
    "peeks": lambda: (nn.Sequential(Peeks(4, 3), nn.Tanh()), (5, 4)),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_pushed_vectors_are_finite_differences_of_the_output(name, count):
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model.double()
    x = torch.randn(*shape, dtype=torch.float64)
    observed = Pass.begin(model, (x,), {})
    output = model(x).detach()
    parameters = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    vectors = [{n: torch.randn_like(p) for n, p in parameters.items()} for _ in range(count)]
    vectors[-1].pop(next(iter(parameters)))  # a missing tensor counts as zero
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        found, pushed = _push(observed, vectors)
        torch.testing.assert_close(found, output)
        assert len(pushed) == count
        for vector, jv in zip(vectors, pushed, strict=True):
            there, back = (
                observed.run({n: p + h * vector.get(n, torch.zeros_like(p)) for n, p in parameters.items()})
                for h in (1e-5, -1e-5)
            )
            torch.testing.assert_close(jv, (there - back) / 2e-5, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_exact_curvature_between_vectors_is_that_of_the_weighted_loss():
    """Against torch's own Hessian: the model is linear, so that the loss's Hessian is its Gauss-Newton matrix."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, -100, 0])
    w = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    options: dict[str, Any] = {"class_weights": w, "label_smoothing": 0.2, "ignore_index": -100}
    likelihood = ng.Weighted(ng.Categorical(), **options)
    optimizer = ng.NaturalGradient(model, likelihood)
    output = model(x)
    optimizer.observe(output, y)
    partition = ng.Fisher(ng.Exact(), ng.Dense()).partition(model)
    probe = ModelProbe(model, partition, likelihood, optimizer._observer.take())
    deltas = [torch.randn(15, dtype=torch.float64) for _ in range(2)]
    got = probe.curvature([partition.split(d) for d in deltas])

    def loss(flat: torch.Tensor) -> torch.Tensor:
        logits = x @ flat[:12].reshape(3, 4).T + flat[12:]
        return F.cross_entropy(logits, y, weight=w, label_smoothing=0.2, ignore_index=-100)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.func.hessian(loss)(flat)
    stacked = torch.stack(deltas)
    torch.testing.assert_close(got, stacked @ hessian @ stacked.T, rtol=1e-9, atol=1e-12)
