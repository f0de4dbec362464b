"""Values of the closed-form likelihoods against scipy and torch, at moderate and at extreme outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from torch import Tensor

from natgrad.errors import ArgumentError
from natgrad.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, MultiCategorical, Poisson

ALL: list[Likelihood] = [
    Categorical(),
    Bernoulli(),
    Gaussian(0.5),
    Gaussian.learned(),
    Poisson(),
    MultiCategorical([2, 4]),
]


def outputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def dense(likelihood: Likelihood, f: Tensor) -> Tensor:
    columns = likelihood.fisher_factor(f)
    return torch.einsum("k...i,k...j->...ij", columns, columns)


# --- values ----------------------------------------------------------------------------------------------------------


def test_categorical_by_enumeration() -> None:
    f, g = 2 * outputs(2, 3, 4), 2 * outputs(2, 3, 4)
    y = torch.randint(0, 4, (2, 3))
    p, q = softmax(f.numpy(), axis=-1), softmax(g.numpy(), axis=-1)
    likelihood = Categorical()
    wanted_kl = (p * (np.log(p) - np.log(q))).sum(-1)
    fisher = np.zeros((2, 3, 4, 4))
    for c in range(4):
        score = p - np.eye(4)[c]
        fisher += p[..., c, None, None] * score[..., :, None] * score[..., None, :]
    nll = -np.log(np.take_along_axis(p, y.numpy()[..., None], -1))[..., 0]
    assert np.allclose(likelihood.nll(f, y), nll, atol=1e-14)
    assert np.allclose(likelihood.kl(f, g), wanted_kl, atol=1e-14)
    assert np.allclose(dense(likelihood, f), fisher, atol=1e-15)
    assert np.allclose(likelihood.score(f, y), p - np.eye(4)[y.numpy()], atol=1e-15)


def test_multi_categorical_by_enumeration() -> None:
    """The joint outcomes of all decisions are those of one categorical variable."""
    f, g, classes = 2 * outputs(2, 3, 6), 2 * outputs(2, 3, 6), (1, 3, 2)
    cuts = np.cumsum(classes)[:-1]

    def probabilities(h: Tensor) -> np.ndarray:
        parts = [softmax(part, axis=-1) for part in np.split(h.numpy(), cuts, axis=-1)]
        return np.einsum("...a,...b,...c->...abc", *parts)

    p, q, likelihood = probabilities(f), probabilities(g), MultiCategorical(classes)
    kl = (p * np.log(p / q)).sum((-3, -2, -1))
    fisher, entropy = np.zeros((2, 3, 6, 6)), np.zeros((2, 3))
    for index in np.ndindex(classes):
        y = torch.tensor(index).expand(2, 3, 3)
        joint = p[(..., *index)]
        assert np.allclose(likelihood.nll(f, y), -np.log(joint), atol=1e-13)
        assert np.allclose(likelihood.distribution(f).log_prob(y), np.log(joint), atol=1e-13)
        onehot = np.concatenate([np.eye(n)[i] for n, i in zip(classes, index, strict=True)])
        marginals = np.concatenate([softmax(part, axis=-1) for part in np.split(f.numpy(), cuts, axis=-1)], axis=-1)
        score = marginals - onehot
        assert np.allclose(likelihood.score(f, y), score, atol=1e-14)
        fisher += joint[..., None, None] * score[..., :, None] * score[..., None, :]
        entropy -= joint * np.log(joint)
    assert np.allclose(likelihood.kl(f, g), kl, atol=1e-13)
    assert np.allclose(dense(likelihood, f), fisher, atol=1e-14)
    assert np.allclose(likelihood.distribution(f).entropy(), entropy, atol=1e-13)
    drawn = likelihood.sample(f, 20_000, generator=torch.Generator().manual_seed(0)).numpy()
    for index in np.ndindex(classes):
        frequency, joint = (drawn == index).all(-1).mean(0), p[(..., *index)]
        assert (abs(frequency - joint) <= 6 * np.sqrt(joint * (1 - joint) / 20_000) + 1e-3).all()


def test_bernoulli_against_scipy() -> None:
    f, g = 2 * outputs(5, 3), 2 * outputs(5, 3)
    y = torch.randint(0, 2, (5, 3))
    p, q = expit(f.numpy()), expit(g.numpy())
    likelihood = Bernoulli()
    assert np.allclose(likelihood.nll(f, y), -scipy.stats.bernoulli.logpmf(y.numpy(), p).sum(-1))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert np.allclose(likelihood.kl(f, g), kl.sum(-1), atol=1e-14)
    assert np.allclose(dense(likelihood, f), (p * (1 - p))[..., None] * np.eye(3))


def test_bernoulli_is_bce_with_logits() -> None:
    f, y = 3 * outputs(4, 2, 3), torch.rand(4, 2, 3, dtype=torch.float64)
    wanted = F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(-1)
    assert torch.allclose(Bernoulli().nll(f, y), wanted, atol=1e-14)
    assert torch.allclose(Bernoulli().nll(f, y > 0.5), Bernoulli().nll(f, (y > 0.5).double()))


def test_poisson_against_scipy() -> None:
    f, g = outputs(5, 3), outputs(5, 3)
    y = torch.poisson(f.exp())
    a, b = np.exp(f.numpy()), np.exp(g.numpy())
    likelihood = Poisson()
    assert np.allclose(likelihood.nll(f, y), -scipy.stats.poisson.logpmf(y.numpy(), a).sum(-1))
    assert np.allclose(likelihood.kl(f, g), (a * np.log(a / b) - a + b).sum(-1), atol=1e-14)
    assert np.allclose(dense(likelihood, f), a[..., None] * np.eye(3))


@pytest.mark.parametrize("scale", [0.3, (0.3, 2.0, 1.0)])
def test_gaussian_against_scipy(scale: float | tuple[float, ...]) -> None:
    f, g, y = outputs(5, 3), outputs(5, 3), outputs(5, 3)
    s = np.broadcast_to(np.array(scale), (3,))
    likelihood = Gaussian(scale)
    assert np.allclose(likelihood.nll(f, y), -scipy.stats.norm.logpdf(y.numpy(), f.numpy(), s).sum(-1))
    assert np.allclose(likelihood.kl(f, g), (((f - g).numpy() / s) ** 2 / 2).sum(-1), atol=1e-14)
    assert np.allclose(dense(likelihood, f), np.broadcast_to(np.diag(1 / s**2), (5, 3, 3)))


def test_learned_gaussian_is_torchs_normal() -> None:
    f, g, y = outputs(5, 2, 6), outputs(5, 2, 6), outputs(5, 2, 3)
    normal = torch.distributions.Normal(f[..., :3], f[..., 3:].exp())
    other = torch.distributions.Normal(g[..., :3], g[..., 3:].exp())
    likelihood = Gaussian.learned()
    assert likelihood == Gaussian(scale=None)
    assert torch.allclose(likelihood.nll(f, y), -normal.log_prob(y).sum(-1), atol=1e-13)
    wanted = torch.distributions.kl_divergence(normal, other).sum(-1)
    assert torch.allclose(likelihood.kl(f, g), wanted, rtol=1e-12)
    fisher = torch.diag_embed(torch.cat([(-2 * f[..., 3:]).exp(), torch.full_like(f[..., 3:], 2.0)], -1))
    assert torch.allclose(dense(likelihood, f), fisher, rtol=1e-12)
    drawn = likelihood.sample(f, 40_000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (40_000, 5, 2, 3)
    assert torch.allclose(drawn.mean(0), normal.mean, atol=0.15)
    assert torch.allclose(drawn.std(0) / normal.stddev, torch.ones(5, 2, 3, dtype=torch.float64), rtol=0.03)


def test_gaussian_of_mse_loss() -> None:
    f, y = outputs(4, 3).requires_grad_(), outputs(4, 3)
    (gradient,) = torch.autograd.grad(Gaussian.of_mse_loss().nll(f, y).sum(), f)
    (wanted,) = torch.autograd.grad(F.mse_loss(f, y, reduction="sum"), f)
    assert torch.allclose(gradient, wanted, atol=1e-14)
    hessian = torch.func.hessian(lambda row: F.mse_loss(row, y[0], reduction="sum"))(f[0].detach())
    assert torch.allclose(dense(Gaussian.of_mse_loss(), f.detach())[0], hessian, atol=1e-14)


# --- soft targets ----------------------------------------------------------------------------------------------------


def test_soft_targets_are_torchs() -> None:
    f, t = outputs(6, 4), torch.softmax(outputs(6, 4), -1)
    assert torch.allclose(Categorical().nll(f, t), F.cross_entropy(f, t, reduction="none"), atol=1e-14)
    hard = torch.randint(0, 4, (6,))
    onehot = F.one_hot(hard, 4).double()
    assert torch.allclose(Categorical().nll(f, onehot), Categorical().nll(f, hard), atol=1e-15)
    assert torch.allclose(Categorical().score(f, onehot), Categorical().score(f, hard), atol=1e-15)
    unnormalised = 3 * t
    g = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Categorical().nll(g, unnormalised).sum(), g)
    assert torch.allclose(Categorical().score(f, unnormalised), gradient, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_labels(dtype: torch.dtype) -> None:
    f, y = outputs(6, 4), torch.randint(0, 4, (6,))
    assert torch.equal(Categorical().nll(f, y.to(dtype)), Categorical().nll(f, y))
    assert torch.equal(Categorical().score(f, y.to(dtype)), Categorical().score(f, y))


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_categorical_at_extreme_logits(dtype: torch.dtype) -> None:
    f = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -1e4], [1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    g = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 1e4], [1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    likelihood = Categorical()
    assert likelihood.nll(f, torch.tensor([1, 2, 0])).tolist() == pytest.approx([2e4, 1e4 + math.log(2), math.log(3)])
    kl = likelihood.kl(f, g)
    assert kl[:2].tolist() == pytest.approx([2e4, 1e4 - math.log(2)])
    assert kl[2].item() == pytest.approx(math.log(2 / 3) + 2e4 / 3)
    assert likelihood.kl(f, f).abs().max() == 0
    for gradient in torch.autograd.grad(kl.sum(), (f, g)):
        assert gradient.isfinite().all()
    assert torch.autograd.grad(likelihood.kl(f, g).sum(), g)[0][0].tolist() == pytest.approx([-1, 1, 0])
    columns = likelihood.fisher_factor(f.detach())
    assert columns.isfinite().all()
    expected = torch.tensor([[0.0] * 3] * 3), torch.tensor([[0.25, -0.25, 0], [-0.25, 0.25, 0], [0, 0, 0]])
    fisher = dense(likelihood, f.detach()).double()
    assert torch.allclose(fisher[0], expected[0].double(), atol=1e-7)
    assert torch.allclose(fisher[1], expected[1].double(), atol=1e-7)
    assert torch.equal(likelihood.sample(f[:1], 50)[:, 0], torch.zeros(50, dtype=torch.int64))


def test_masked_classes() -> None:
    """Logits of −∞ (actions that are not allowed) act as if the class did not exist."""
    f, g = outputs(5, 3), outputs(5, 3)
    y = torch.randint(0, 3, (5,))
    masked = [torch.cat([h, torch.full((5, 1), -math.inf, dtype=h.dtype)], -1).requires_grad_() for h in (f, g)]
    likelihood = Categorical()
    kl, nll = likelihood.kl(*masked), likelihood.nll(masked[0], y)
    assert torch.allclose(kl, likelihood.kl(f, g), atol=1e-15)
    assert torch.allclose(nll, likelihood.nll(f, y), atol=1e-15)
    soft = torch.cat([torch.softmax(g, -1), torch.zeros(5, 1, dtype=torch.float64)], -1)
    assert torch.allclose(likelihood.nll(masked[0], soft), likelihood.nll(f, soft[:, :3]), atol=1e-15)
    for gradient in torch.autograd.grad(kl.sum() + nll.sum(), masked):
        assert gradient.isfinite().all() and (gradient[:, 3] == 0).all()
    fisher = dense(likelihood, masked[0].detach())
    assert torch.allclose(fisher[:, :3, :3], dense(likelihood, f), atol=1e-15)
    assert (fisher[:, 3] == 0).all()
    assert (likelihood.fisher_matvec(masked[0].detach(), torch.ones(5, 4).double())[:, 3] == 0).all()
    assert likelihood.sample(masked[0], 200).max() < 3
    assert likelihood.kl(f, torch.tensor([0.0, 0.0, -math.inf]).double().expand(5, 3)).min() == math.inf


def test_masked_classes_of_several_decisions() -> None:
    """A class of logit −∞ is as if that decision had one class less."""
    f, g = outputs(5, 5), outputs(5, 5)
    holes = [torch.cat([h[:, :2], torch.full((5, 1), -math.inf, dtype=h.dtype), h[:, 2:]], -1) for h in (f, g)]
    masked, other = (h.requires_grad_() for h in holes)
    full, fewer, kept = MultiCategorical([3, 3]), MultiCategorical([2, 3]), [0, 1, 3, 4, 5]
    y = fewer.sample(f)[0]
    kl, nll = full.kl(masked, other), full.nll(masked, y)
    assert torch.allclose(kl, fewer.kl(f, g), atol=1e-14)
    assert torch.allclose(nll, fewer.nll(f, y), atol=1e-14)
    for gradient in torch.autograd.grad(kl.sum() + nll.sum(), (masked, other)):
        assert gradient.isfinite().all() and (gradient[:, 2] == 0).all()
    fisher = dense(full, masked.detach())
    assert torch.allclose(fisher[:, kept][:, :, kept], dense(fewer, f), atol=1e-15)
    assert (fisher[:, 2] == 0).all()
    assert full.sample(masked, 200)[..., 0].max() < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_at_extreme_logits(dtype: torch.dtype) -> None:
    f = torch.tensor([[1e4], [-1e4], [1e4], [30.0]], dtype=dtype, requires_grad=True)
    g = torch.tensor([[-1e4], [1e4], [1e4], [31.0]], dtype=dtype, requires_grad=True)
    likelihood = Bernoulli()
    y = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=dtype)
    assert likelihood.nll(f, y).tolist() == pytest.approx([1e4, 0.0, 0.0, math.exp(-30)], rel=1e-6)
    kl = likelihood.kl(f, g)
    # KL of two tiny probabilities a, b of failure is that of Poisson rates: b − a − a log(b/a)
    assert kl[:3].tolist() == pytest.approx([1e4, 1e4, 0.0])
    assert kl[3].item() == pytest.approx(math.exp(-30) * math.exp(-1), rel=1e-4)
    for gradient in torch.autograd.grad(kl.sum(), (f, g)):
        assert gradient.isfinite().all()
    fisher = dense(likelihood, f.detach())[:, 0, 0]
    assert fisher[:3].tolist() == [0.0, 0.0, 0.0]
    assert fisher[3].item() == pytest.approx(math.exp(-30), rel=1e-4)
    assert likelihood.sample(f, 20)[:, :3, 0].unique(dim=0).tolist() == [[1.0, 0.0, 1.0]]


def test_poisson_and_gaussian_at_extreme_outputs() -> None:
    f, g = torch.tensor([[-1e4], [-1e4], [0.0]]), torch.tensor([[0.0], [-1e4], [-1e4]])
    assert Poisson().kl(f, g).tolist() == pytest.approx([1.0, 0.0, 1e4 - 1])
    assert Poisson().fisher_factor(f).isfinite().all()
    assert Poisson().nll(f, torch.zeros(3, 1)).tolist() == [0.0, 0.0, 1.0]
    f, g = torch.tensor([[0.0, -20.0]]), torch.tensor([[0.0, 20.0]])
    assert Gaussian.learned().kl(f, g).item() == pytest.approx(40 - 0.5)
    far = torch.tensor([[1e15]])
    assert Gaussian().kl(far, -far).item() == pytest.approx(2e30)


def test_gradient_of_kl_between_distant_rates() -> None:
    """q/p overflows float32 although p and q do not."""
    f, g = torch.tensor([[-50.0]], requires_grad=True), torch.tensor([[50.0]], requires_grad=True)
    of_f, of_g = torch.autograd.grad(Poisson().kl(f, g).sum(), (f, g))
    assert of_f.item() == pytest.approx(-100 * math.exp(-50), rel=1e-5)
    assert of_g.item() == pytest.approx(math.exp(50), rel=1e-5)


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_small_kl_keeps_its_digits_in_float32(likelihood: Likelihood) -> None:
    """KL of a step of 1e-4 is about 1e-8, below float32's rounding of log-probabilities."""
    f = torch.randn(50, 6)
    g = f + 1e-4 * torch.randn(50, 6)
    exact = likelihood.kl(f.double(), g.double())
    error = (likelihood.kl(f, g).double() / exact - 1).abs()
    assert error.max() < 0.05 and error.median() < 5e-3
    assert likelihood.kl(f, g).min() > 0


@pytest.mark.parametrize("likelihood", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(likelihood: Likelihood, dtype: torch.dtype) -> None:
    f, g, u = (outputs(4, 3, 6, dtype=dtype) for _ in range(3))
    full, other = f.float(), g.float()
    y = likelihood.sample(full)[0]
    seed = torch.Generator()
    pairs = [
        (likelihood.nll(f, y), likelihood.nll(full, y)),
        (likelihood.kl(f, g), likelihood.kl(full, other)),
        (likelihood.score(f, y), likelihood.score(full, y)),
        (likelihood.fisher_matvec(f, u), likelihood.fisher_matvec(full, u.float())),
        (likelihood.fisher_factor(f), likelihood.fisher_factor(full)),
        (
            likelihood.sample(f, 2, generator=seed.manual_seed(0)),
            likelihood.sample(full, 2, generator=seed.manual_seed(0)),
        ),
        (likelihood.distribution(f).log_prob(y), likelihood.distribution(full).log_prob(y)),
    ]
    for low, high in pairs:
        assert low.dtype == high.dtype and low.dtype in (torch.float32, torch.int64)
        assert torch.equal(low, high)


# --- shapes, sampling, values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ALL, ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_shapes(likelihood: Likelihood, batch: tuple[int, ...]) -> None:
    f = outputs(*batch, 6)
    drawn = likelihood.sample(f, 2)
    assert drawn.shape[: 1 + len(batch)] == (2, *batch)
    y = drawn[0]
    assert y.shape == likelihood.distribution(f).sample().shape
    assert likelihood.nll(f, y).shape == likelihood.kl(f, f).shape == batch
    assert likelihood.score(f, y).shape == likelihood.fisher_matvec(f, f).shape == f.shape
    assert likelihood.fisher_factor(f).shape == (6, *batch, 6)
    assert likelihood.weights(f, y) is None and likelihood.curvature_weights(f, y) is None
    assert likelihood.unweighted is likelihood and not likelihood.needs_target
    if batch:
        likelihood.check_output(f)
        likelihood.check_target(f, y)


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_sampling_uses_the_generator_alone(likelihood: Likelihood) -> None:
    f = outputs(5, 2, 6).requires_grad_()
    before = torch.get_rng_state()
    one, two = (likelihood.sample(f, 4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two) and not one.requires_grad
    shared = torch.Generator().manual_seed(7)
    assert torch.equal(one, likelihood.sample(f, 4, generator=shared))
    assert not torch.equal(one, likelihood.sample(f, 4, generator=shared))
    torch.manual_seed(3)
    first = likelihood.sample(f)
    torch.manual_seed(3)
    assert torch.equal(first, likelihood.sample(f))


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_nll_and_kl_are_differentiable_twice(likelihood: Likelihood) -> None:
    f, g = outputs(2, 6).requires_grad_(), outputs(2, 6).requires_grad_()
    y = likelihood.sample(f)[0]
    assert torch.autograd.gradcheck(lambda h: likelihood.nll(h, y), f)
    assert torch.autograd.gradcheck(likelihood.kl, (f, g))
    assert torch.autograd.gradgradcheck(likelihood.kl, (f, g))
    assert torch.autograd.gradgradcheck(lambda h: likelihood.nll(h, y), f)


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_works_under_torch_func(likelihood: Likelihood) -> None:
    f = outputs(3, 6)
    y = likelihood.sample(f)[0]
    gradients = torch.func.vmap(torch.func.grad(likelihood.nll))(f, y)
    assert torch.allclose(gradients, likelihood.score(f, y), atol=1e-14)
    hessians = torch.func.vmap(torch.func.hessian(lambda g, h: likelihood.kl(h, g)))(f, f)
    assert torch.allclose(hessians, dense(likelihood, f), atol=1e-14)


def test_likelihoods_are_values() -> None:
    assert Gaussian(0.5) == Gaussian(0.5) != Gaussian(0.4)
    assert Gaussian([1.0, 2.0]) == Gaussian(torch.tensor([1.0, 2.0]))
    assert MultiCategorical([2, 3]) == MultiCategorical((2, 3)) != MultiCategorical([3, 2])
    values = [Categorical(), Categorical(), Bernoulli(), Poisson(), Gaussian([1.0]), MultiCategorical([2])]
    assert len(set(values)) == 5
    with pytest.raises(AttributeError):
        Gaussian().scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, (), (1.0, 0.0)])
def test_bad_scales(scale: object) -> None:
    with pytest.raises(ArgumentError, match="standard deviation"):
        Gaussian(scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [(), (0, 2), (-1,)])
def test_bad_classes(classes: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"number of classes per decision.*MultiCategorical\(\[3, 2\]\)"):
        MultiCategorical(classes)
