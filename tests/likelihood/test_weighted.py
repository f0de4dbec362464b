"""Weighted against torch's own weighted losses: value, gradient and generalised Gauss–Newton matrix over f."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions

from natgrad.errors import ArgumentError, ShapeError, UnsupportedError
from natgrad.likelihood import Bernoulli, Categorical, FromDistribution, Gaussian, Likelihood, Poisson, Weighted

C = 4
CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.5, 0.0], dtype=torch.float64)


def outputs(*batch: int, size: int = C) -> Tensor:
    return 2 * torch.randn(*batch, size, dtype=torch.float64)


def labels(*batch: int, ignore: int | None = None) -> Tensor:
    y = torch.randint(0, C, batch)
    if ignore is not None:
        y[torch.rand(batch) < 0.4] = ignore
        y.view(-1)[0], y.view(-1)[1] = 2, ignore
    return y


def loss_of(likelihood: Likelihood, f: Tensor, y: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Σ nll / Σ weights: the reduction that natgrad documents."""
    weights = likelihood.weights(f, y)
    total = math.prod(f.shape[:-1]) if weights is None else weights.sum()
    return likelihood.nll(f, y).sum() / total


def curvature_of(likelihood: Likelihood, f: Tensor, y: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Σ curvature weight · Λ / Σ weights, block diagonal over predictions, as a dense matrix over all of f."""
    columns = likelihood.fisher_factor(f)
    scale = likelihood.curvature_weights(f, y)
    if scale is not None:
        columns = columns * scale.sqrt().unsqueeze(-1)
    fisher = torch.einsum("k...i,k...j->...ij", columns, columns).reshape(-1, f.shape[-1], f.shape[-1])
    weights = likelihood.weights(f, y)
    return torch.block_diag(*fisher) / (len(fisher) if weights is None else weights.sum())


OPTIONS = list(itertools.product([None, -100, 1], [None, CLASS_WEIGHTS], [0.0, 0.2]))


@pytest.mark.parametrize("batch", [(6,), (3, 4)], ids=str)
@pytest.mark.parametrize(("ignore", "class_weights", "smoothing"), OPTIONS)
def test_is_torchs_cross_entropy(
    batch: tuple[int, ...], ignore: int | None, class_weights: Tensor | None, smoothing: float
) -> None:
    """The loss is convex in f with Hessian = GGN, so that torch's Hessian is an oracle for the curvature."""
    f, y = outputs(*batch), labels(*batch, ignore=ignore)
    likelihood = Weighted(Categorical(), ignore_index=ignore, class_weights=class_weights, label_smoothing=smoothing)
    likelihood.check_output(f)
    likelihood.check_target(f, y)

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(
            flat.reshape(-1, C),
            y.reshape(-1),
            weight=class_weights,
            label_smoothing=smoothing,
            ignore_index=-100 if ignore is None else ignore,
        )

    flat = f.reshape(-1)
    weights = likelihood.weights(f, y)
    total = y.numel() if weights is None else weights.sum()
    assert torch.allclose(loss_of(likelihood, f, y), loss(flat), atol=1e-14)
    assert torch.allclose(likelihood.score(f, y).reshape(-1) / total, torch.func.grad(loss)(flat), atol=1e-14)
    assert torch.allclose(curvature_of(likelihood, f, y), torch.func.hessian(loss)(flat), atol=1e-14)
    if weights is not None and (smoothing == 0 or class_weights is None):
        assert torch.equal(weights, likelihood.curvature_weights(f, y))


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS], ids=["plain", "class weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_torchs_cross_entropy_of_soft_targets(class_weights: Tensor | None, smoothing: float) -> None:
    f, y = outputs(6), torch.softmax(outputs(6), -1)
    likelihood = Weighted(Categorical(), class_weights=class_weights, label_smoothing=smoothing)
    likelihood.check_target(f, y)

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(flat.reshape(-1, C), y, weight=class_weights, label_smoothing=smoothing)

    flat = f.reshape(-1)
    assert likelihood.weights(f, y) is None
    assert torch.allclose(loss_of(likelihood, f, y), loss(flat), atol=1e-14)
    assert torch.allclose(likelihood.score(f, y).reshape(-1) / 6, torch.func.grad(loss)(flat), atol=1e-14)
    assert torch.allclose(curvature_of(likelihood, f, y), torch.func.hessian(loss)(flat), atol=1e-14)


def test_padding_changes_nothing() -> None:
    f, y = outputs(3, 5), labels(3, 5)
    padded_f = torch.cat([f, outputs(3, 2)], 1)
    padded_y = torch.cat([y, torch.full((3, 2), -100)], 1)
    likelihood = Weighted(Categorical(), ignore_index=-100)
    assert torch.allclose(loss_of(likelihood, padded_f, padded_y), loss_of(Categorical(), f, y), atol=1e-14)
    curvature = curvature_of(likelihood, padded_f, padded_y).reshape(3, 7 * C, 3, 7 * C)
    plain = curvature_of(Categorical(), f, y).reshape(3, 5 * C, 3, 5 * C)
    assert torch.allclose(curvature[:, : 5 * C, :, : 5 * C], plain, atol=1e-15)
    assert (curvature[:, 5 * C :] == 0).all()


def test_ignored_labels_are_never_looked_up() -> None:
    looked_up: list[Tensor] = []

    def weights(y: Tensor) -> Tensor:
        looked_up.append(y)
        return torch.arange(1.0, 5.0, dtype=torch.float64)[y]

    f, y = outputs(4), torch.tensor([10**6, 2, 10**6, 0])
    likelihood = Weighted(Categorical(), ignore_index=10**6, class_weights=CLASS_WEIGHTS, weights=weights)
    likelihood.check_target(f, y)
    expected = torch.tensor([0.0, 3 * 2.5, 0.0, 1 * 0.3], dtype=torch.float64)
    assert torch.allclose(likelihood.weights(f, y), expected)
    assert torch.allclose(likelihood.nll(f, y), expected * Categorical().nll(f, y.clamp(max=3)))
    assert all(part.min() >= 0 and part.max() < C for part in looked_up)


def test_sampled_labels_may_be_the_ignored_class_and_count_then() -> None:
    """ignore_index = 0 (a padding token): labels drawn from the model are 0 with probability p_0 and are scored."""
    f = outputs(2)
    likelihood = Weighted(Categorical(), ignore_index=0, label_smoothing=0.3)
    drawn = likelihood.sample(f, 50_000, generator=torch.Generator().manual_seed(0))
    frequency = (drawn == 0).double().mean(0)
    assert torch.allclose(frequency, torch.softmax(f, -1)[:, 0], atol=0.01)
    scores = likelihood.unweighted.score(f.expand(50_000, 2, C), drawn)
    fisher = torch.einsum("k...i,k...j->...ij", likelihood.fisher_factor(f), likelihood.fisher_factor(f))
    assert torch.allclose(torch.einsum("sni,snj->nij", scores, scores) / 50_000, fisher, atol=0.01)


def test_sample_weights_come_with_the_target() -> None:
    f, y, w = outputs(3, 5), labels(3, 5, ignore=-1), torch.rand(3, 5, dtype=torch.float64)
    likelihood = Weighted(Categorical(), ignore_index=-1, class_weights=CLASS_WEIGHTS)
    likelihood.check_target(f, (y, w))
    keep = (y != -1).double()
    expected = w * keep * CLASS_WEIGHTS[y.clamp(min=0)]
    assert torch.allclose(likelihood.weights(f, (y, w)), expected)
    assert torch.allclose(likelihood.curvature_weights(f, (y, w)), expected)
    assert torch.allclose(likelihood.nll(f, (y, w)), expected * Categorical().nll(f, y.clamp(min=0)))
    score = Categorical().score(f, y.clamp(min=0))
    assert torch.allclose(likelihood.score(f, (y, w)), expected.unsqueeze(-1) * score)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type(mask_dtype: torch.dtype) -> None:
    f, y = outputs(4), labels(4)
    mask = torch.tensor([1, 0, 1, 0]).to(mask_dtype)
    likelihood = Weighted(Categorical())
    likelihood.check_target(f, (y, mask))
    assert likelihood.weights(f, (y, mask)).tolist() == [1, 0, 1, 0]
    assert likelihood.weights(f, (y, mask)).dtype == f.dtype
    kept = loss_of(Categorical(), f[[0, 2]], y[[0, 2]])
    assert torch.allclose(loss_of(likelihood, f, (y, mask)), kept)
    assert likelihood.weights(f, y) is None and torch.equal(likelihood.nll(f, y), Categorical().nll(f, y))


CASES = [
    (Gaussian(0.5), math.nan),
    (Gaussian.learned(), math.nan),
    (Bernoulli(), math.nan),
    (Poisson(), math.inf),
    (FromDistribution(lambda f: distributions.Normal(f, 1.0)), math.nan),
    (FromDistribution(lambda f: distributions.Gamma(f[..., 0].exp(), f[..., 1].exp())), math.nan),
    (FromDistribution(lambda f: distributions.LogNormal(f[..., 0], f[..., 1].exp())), -1.0),
    (FromDistribution(lambda f: distributions.Categorical(logits=f)), 999),
    (Categorical(), 999),
]


@pytest.mark.parametrize(("inner", "missing"), CASES, ids=lambda case: str(case)[:20])
def test_labels_of_weight_zero_may_be_anything(inner: Likelihood, missing: float) -> None:
    f = outputs(5)
    y = inner.sample(f)[0]
    w = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    broken = y.clone()
    broken[w == 0] = missing
    likelihood = Weighted(inner)
    likelihood.check_target(f, (broken, w))
    g = f.clone().requires_grad_()
    value = likelihood.nll(g, (broken, w))
    assert torch.allclose(value, w * inner.nll(f, y), atol=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), g)
    expected = w.unsqueeze(-1) * inner.score(f, y)
    assert torch.allclose(gradient, expected, atol=1e-14)
    assert torch.allclose(likelihood.score(f, (broken, w)), expected, atol=1e-14)


def test_weights_at_dropped_labels_do_not_matter() -> None:
    f, y = outputs(3, size=1), torch.tensor([[2.0], [0.0], [4.0]], dtype=torch.float64)
    likelihood = Weighted(Poisson(), weights=lambda y: 1 / y[..., 0])
    mask = torch.tensor([1, 0, 1])
    likelihood.check_target(f, (y, mask))
    assert likelihood.weights(f, (y, mask)).tolist() == [0.5, 0.0, 0.25]
    assert likelihood.nll(f, (y, mask)).isfinite().all()


def test_integer_weight_is_a_repeated_example() -> None:
    f, y = outputs(4, size=3), outputs(4, size=3)
    counts = torch.tensor([1, 3, 0, 2])
    likelihood = Weighted(Gaussian(0.7))
    repeated_f, repeated_y = f.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0)
    assert torch.allclose(loss_of(likelihood, f, (y, counts)), loss_of(Gaussian(0.7), repeated_f, repeated_y))
    blocks = curvature_of(likelihood, f, (y, counts)).reshape(4, 3, 4, 3).sum((0, 2))
    expected = curvature_of(Gaussian(0.7), repeated_f, repeated_y).reshape(6, 3, 6, 3).sum((0, 2))
    assert torch.allclose(blocks, expected)


def test_scaling_all_weights_changes_neither_loss_nor_curvature() -> None:
    f, y, w = outputs(6), labels(6), torch.rand(6, dtype=torch.float64)
    likelihood = Weighted(Categorical(), class_weights=CLASS_WEIGHTS, label_smoothing=0.1)
    scaled = Weighted(Categorical(), class_weights=7 * CLASS_WEIGHTS, label_smoothing=0.1)
    assert torch.allclose(loss_of(likelihood, f, (y, w)), loss_of(scaled, f, (y, 3 * w)))
    assert torch.allclose(curvature_of(likelihood, f, (y, w)), curvature_of(scaled, f, (y, 3 * w)))


def test_needs_target() -> None:
    assert not Weighted(Categorical(), label_smoothing=0.1).needs_target
    for likelihood in (
        Weighted(Categorical()),
        Weighted(Categorical(), ignore_index=0, label_smoothing=0.1),
        Weighted(Categorical(), class_weights=[1.0, 2.0]),
        Weighted(Gaussian(), weights=lambda y: y[..., 0]),
    ):
        assert likelihood.needs_target


def test_half_precision() -> None:
    f, y = outputs(6).to(torch.bfloat16), labels(6, ignore=-1)
    likelihood = Weighted(Categorical(), ignore_index=-1, class_weights=CLASS_WEIGHTS, label_smoothing=0.1)
    for method in (likelihood.nll, likelihood.score, likelihood.weights, likelihood.curvature_weights):
        value = method(f, y)
        assert value is not None and value.dtype == torch.float32
        assert torch.equal(value, method(f.float(), y))  # type: ignore[arg-type]


def test_extreme_logits() -> None:
    f = torch.tensor([[1e4, -1e4, 0.0, 0.0], [0.0, 1e4, 0.0, -1e4]])
    likelihood = Weighted(Categorical(), ignore_index=-100, label_smoothing=0.1)
    y = torch.tensor([1, -100])
    assert likelihood.nll(f, y).tolist() == pytest.approx([0.9 * 2e4 + 0.1 * (2e4 + 2e4) / 4, 0.0])
    assert likelihood.score(f, y).isfinite().all()


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Weighted(Categorical()).ignore_index = 3  # type: ignore[misc]
    assert "ignore_index=-100" in str(Weighted(Categorical(), ignore_index=-100))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"likelihood": "categorical"}, "unweighted natgrad likelihood, but got 'categorical'"),
        ({"likelihood": Weighted(Categorical())}, "Give all weights to one Weighted"),
        ({"weights": torch.ones(3)}, "must be a function from labels.*got Tensor"),
        ({"label_smoothing": 1.0}, "below 1, but got 1.0"),
        ({"label_smoothing": math.nan}, "but got nan"),
        ({"class_weights": [1.0, -2.0]}, r"class_weights must be finite and not negative.*between -2 and 1"),
        ({"class_weights": [1.0, math.nan]}, "class_weights must be finite"),
        ({"class_weights": [1.0, math.inf]}, "class_weights must be finite"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Weighted(**{"likelihood": Categorical()} | arguments)


@pytest.mark.parametrize("option", [{"class_weights": [1.0, 2.0]}, {"label_smoothing": 0.1}])
def test_class_options_need_classes(option: dict) -> None:
    with pytest.raises(UnsupportedError, match=r"defined for Categorical, but the likelihood is Gaussian\(scale=1.0\)"):
        Weighted(Gaussian(), **option)


def test_bad_targets() -> None:
    f, y = outputs(3, 5), labels(3, 5)
    likelihood = Weighted(Categorical(), ignore_index=-100)
    with pytest.raises(ShapeError, match=r"predictions of shape \[3, 5\], but the sample weights have shape \[3\]"):
        likelihood.nll(f, (y, torch.ones(3)))
    with pytest.raises(ArgumentError, match=r"sample weight w .* between -1 and 1"):
        likelihood.check_target(f, (y, torch.linspace(-1, 1, 15).reshape(3, 5)))
    with pytest.raises(ArgumentError, match="sample weight w"):
        likelihood.check_target(f, (y, torch.full((3, 5), math.nan)))
    with pytest.raises(ArgumentError, match=r"pair of tensors \(y, w\).*\['Tensor', 'float'\]"):
        likelihood.nll(f, (y, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"pair of tensors.*dict"):
        likelihood.check_target(f, {"y": y})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Labels lie between 0 and 7"):
        likelihood.check_target(f, torch.full((3, 5), 7).index_fill(0, torch.tensor([0]), -100))
    with pytest.raises(ArgumentError, match="ignore_index=-100 needs integer labels"):
        likelihood.check_target(f, torch.softmax(f, -1))
    with pytest.raises(ArgumentError, match=r"ignore_index=0 .*\[3\], but got torch.float64 of shape \[3, 4\]"):
        Weighted(Gaussian(), ignore_index=0).nll(f[:, 0], f[:, 0])
    with pytest.raises(ShapeError, match=r"class_weights has shape \[2\].*has 4 classes"):
        Weighted(Categorical(), class_weights=[1.0, 2.0]).check_output(f)
    with pytest.raises(ShapeError, match=r"weights\(y\) must return one weight per prediction, shape \[3\].*\[3, 4\]"):
        Weighted(Gaussian(), weights=lambda y: y).nll(f[:, 0], f[:, 0])
    with pytest.raises(ShapeError, match=r"weights\(y\) must return .*returned float"):
        Weighted(Gaussian(), weights=lambda y: 1.0).nll(f[:, 0], f[:, 0])  # type: ignore[arg-type,return-value]
    with pytest.raises(ArgumentError, match="The weight of a prediction must be finite and not negative"):
        Weighted(Gaussian(), weights=lambda y: -torch.ones(3)).check_target(f[:, 0], f[:, 0])
