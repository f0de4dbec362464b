"""Passes run again, and their Jacobian and Hessian products against torch.func."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint as kinds
from torch.utils.checkpoint import checkpoint

from natgrad.errors import StaleTapeError, UnsupportedError
from natgrad.network import HessianProducts, Linearization, Pass, is_replaying, record, trainable_parameters
from natgrad.testing import zoo
from support import assert_close

PLAIN = [n for n in zoo.NAMES if "structured" not in zoo.case(n).tags]


def random_like(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in parameters.items()}


def arguments(x):
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("name", PLAIN)
def test_jacobian_products_of_every_model(name):
    case = zoo.case(name)
    parameters = trainable_parameters(case.model)
    frozen = {n: p.detach() for n, p in parameters.items()}
    oracle = copy.deepcopy(case.model)  # torch.func writes into buffers

    def f(p):
        buffers = {n: b.clone() for n, b in oracle.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(oracle, {**buffers, **p}, arguments(case.x))

    v = random_like(parameters)
    for module_name, module in case.model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # Backward mode holds the padding row fixed, forward mode does not.
            v[f"{module_name}.weight"][module.padding_idx] = 0.0
    pass_ = Pass(case.model, arguments(case.x), {})
    linearization = Linearization(pass_)
    out, pull = vjp(f, frozen)
    u = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    pulled, expected = linearization.vjp(u), pull(u)[0]
    assert_close(linearization.output.detach(), out.detach(), 1e-12)
    for n in parameters:
        torch.testing.assert_close(pulled[n], expected[n], rtol=1e-10, atol=1e-12)
    pushed = linearization.jvp(v)
    if name not in ("lstm",):  # torch has no forward-mode derivative of the LSTM
        assert_close(pushed, jvp(f, (frozen,), (v,))[1], 1e-10)
    # ⟨u, Jv⟩ = ⟨Jᵀu, v⟩
    left, right = (u * pushed).sum(), sum((pulled[n] * v[n]).sum() for n in v)
    assert float(left.detach()) == pytest.approx(float(right.detach()), rel=1e-9)


def test_products_at_a_model_whose_output_ignores_a_parameter():
    case = zoo.case("unused")
    parameters = trainable_parameters(case.model)
    linearization = Linearization(Pass(case.model, (case.x,), {}))
    v = {n: torch.zeros_like(p) for n, p in parameters.items()}
    v["expert.weight"] = torch.ones_like(parameters["expert.weight"])
    assert not linearization.jvp(v).any()
    assert not linearization.vjp(torch.ones_like(linearization.output))["expert.weight"].any()
    products = HessianProducts(Pass(case.model, (case.x,), {}), lambda f: f.square().sum())
    assert not any(h.any() for h in products(v).values())


def test_a_linear_function_of_the_parameters_has_no_hessian():
    model = nn.Linear(3, 2).double()
    products = HessianProducts(Pass(model, (torch.ones(4, 3).double(),), {}), lambda f: f.sum())
    assert not any(h.any() for h in products(random_like(dict(model.named_parameters()))).values())


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def test_a_replay_draws_the_same_masks_and_touches_nothing():
    model, x = noisy(), torch.randn(6, 3).double()
    observed = Pass.begin(model, (x,), {})
    output = model(x)
    buffers, stream = {n: b.clone() for n, b in model.named_buffers()}, torch.get_rng_state()
    again = observed.run()
    assert torch.equal(again, output)
    moved = observed.run({"3.bias": model[3].bias + 1.0})
    assert_close(moved.detach(), output.detach() + 1.0, 1e-12)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert not is_replaying()


def test_a_replay_that_fails_leaves_nothing_behind():
    model = noisy()
    observed = Pass.begin(model, (torch.randn(6, 5).double(),), {})
    stream = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes"):
        observed.run()
    assert torch.equal(torch.get_rng_state(), stream) and not is_replaying()


@pytest.mark.parametrize("mixed", [True, False])
def test_a_replay_runs_in_the_precision_of_the_pass(mixed):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        observed = Pass.begin(model, (x,), {})
        output = model(x)
    again = observed.run()
    assert again.dtype == (torch.bfloat16 if mixed else torch.float32) and torch.equal(again, output)
    with torch.autocast("cpu", torch.bfloat16, enabled=not mixed):
        assert torch.equal(observed.run(), output)


def test_an_input_changed_in_place_cannot_be_replayed():
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3).double()
    observed = Pass.begin(model, (), {"input": x})
    observed.run()
    x.mul_(2.0)
    with pytest.raises(StaleTapeError, match="changed in place"):
        observed.run()


def test_an_output_that_is_no_tensor_is_a_clear_error():
    with pytest.raises(UnsupportedError, match="tuple"):
        record(nn.LSTM(2, 2).double(), torch.randn(3, 4, 2).double())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.body, self.reentrant = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), reentrant

    def forward(self, x):
        return checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant)


def test_jacobian_products_through_activation_checkpointing():
    model, x = Checkpointed(False).double(), torch.randn(4, 3).double()
    plain = nn.Sequential(model.stem, model.body)
    u = torch.ones(4, 3).double()
    for reentrant in (False, True):
        model.reentrant = reentrant
        ours, theirs = (Linearization(Pass(m, (x,), {})) for m in (model, plain))
        pairs = zip(ours.vjp(u).values(), theirs.vjp(u).values(), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)
        assert_close(ours.jvp(model_directions(model)), theirs.jvp(model_directions(plain)), 1e-12)
    assert torch.utils.checkpoint.CheckpointFunction.__name__ == "CheckpointFunction"  # put back


def model_directions(model):
    return {name: torch.cos(p.detach()) for name, p in model.named_parameters()}


def test_replays_that_overlap_in_threads_leave_no_setting_behind():
    """What began second ends last, and would put back what the first had set, were the settings not counted."""
    started, other_began = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        def forward(self, x):
            if threading.current_thread() is first:
                started.set()
                assert other_began.wait(20)
            else:
                other_began.set()
                first.join(20)
                inside.append(torch.backends.cuda.flash_sdp_enabled())
            return super().forward(x)

    def settings():
        kernels = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()]
        return kernels, eval_frame._stance.stance, kinds.CheckpointFunction

    inside: list[bool] = []
    model, before = Waits(2, 2), settings()
    assert before[0] == [True, True]
    x = torch.ones(3, 2)
    first = threading.Thread(target=lambda: Pass(model, (x,), {}).run())
    second = threading.Thread(target=lambda: Pass(model, (x,), {}).run())
    first.start()
    assert started.wait(20)
    second.start()
    first.join(20)
    second.join(20)
    assert inside == [False]  # the second still needs it when the first has left
    assert settings() == before


@pytest.mark.parametrize("where", ["parameters", "autocast"])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e7])
def test_products_in_float16_know_no_bounds(where, size):
    """Vectors far outside float16's range, against the same products of the model in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    if where == "parameters":
        model, x = model.half(), x.half()
    exact = copy.deepcopy(model).double()
    direction = {n: size * torch.randn(p.shape, dtype=torch.float64) for n, p in exact.named_parameters()}
    cotangent = size * torch.randn(5, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.float16, enabled=where == "autocast"):
        half = Linearization(Pass(model, (x,), {}))
    double = Linearization(Pass(exact, (x.double(),), {}))
    pushed, expected = half.jvp({n: v.float() for n, v in direction.items()}), double.jvp(direction)
    assert float((pushed - expected).norm()) <= 3e-3 * float(expected.norm())
    pulled, true = half.vjp(cotangent.float()), double.vjp(cotangent)
    for name, t in true.items():
        assert float((pulled[name] - t).norm()) <= 3e-3 * float(t.norm()), name
