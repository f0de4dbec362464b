"""The tests of torch's own optimizers (``TestOptimRenewed`` of pytorch/test/test_optim.py) on every preset of natgrad.

The bodies are our own: as torch passes parameters, so do these, and ``attach`` the module they belong to. Every one of
torch's 44 tests is either here under its name or in ``NOT_APPLIED`` with the reason.
"""

from __future__ import annotations

import functools
import tempfile
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_optim_infos import INFOS, Net, common, evaluate, likelihood

import natgrad as ng

NO_FOREACH = "natgrad's arithmetic is on vectors of whole blocks: there is no foreach implementation to compare with"
NO_FUSED = "there is no fused implementation to compare with"
NOT_APPLIED = {
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs; blocks of one optimizer are on one device",
    "test_rosenbrock_sparse": "sparse gradients are refused: see test_sparse_gradients_are_refused",
    "test_complex": "complex parameters are refused: see test_complex_parameters_are_refused",
    "test_complex_2d": "complex parameters are refused: see test_complex_parameters_are_refused",
    "test_foreach_matches_forloop": NO_FOREACH,
    "test_mixed_device_dtype": "needs two GPUs and compares foreach or fused with the loop",
    "test_set_default_dtype_works_with_foreach": NO_FOREACH,
    "test_foreach_large_tensor": NO_FOREACH,
    "test_peak_memory_foreach": NO_FOREACH,
    "test_fused_matches_forloop": NO_FUSED,
    "test_fused_error_on_params_on_meta": NO_FUSED,
    "test_fused_large_tensor": NO_FUSED,
    "test_fused_does_not_step_if_foundinf": NO_FUSED,
    "test_cpu_load_state_dict": "is of the flags fused and capturable, on a GPU",
    "test_state_dict_with_cuda_params": "needs a GPU",
    "test_second_order_optims_return_consistent_types": "is of LBFGS's tolerance_grad, which ends a step early",
    "test_fused_cpu_matches_cuda": NO_FUSED,
    "test_defaults_changed_to_foreach": NO_FOREACH,
}
TORCH_TESTS = [
    "test_optim_infos_do_not_specify_global_cliquey_kwargs",
    "test_errors",
    "test_forloop_goes_right_direction",
    "test_forloop_goes_right_direction_multigpu",
    "test_param_group_with_lrscheduler_goes_right_direction",
    "test_tensor_lr",
    "test_rosenbrock_sparse",
    "test_complex",
    "test_complex_2d",
    "test_foreach_matches_forloop",
    "test_mixed_device_dtype",
    "test_set_default_dtype_works_with_foreach",
    "test_foreach_large_tensor",
    "test_peak_memory_foreach",
    "test_fused_matches_forloop",
    "test_fused_error_on_params_on_meta",
    "test_fused_large_tensor",
    "test_fused_does_not_step_if_foundinf",
    "test_cpu_load_state_dict",
    "test_param_groups_weight_decay",
    "test_param_groups_lr",
    "test_step_is_noop_when_params_have_no_grad",
    "test_step_is_noop_for_zero_grads",
    "test_optimizer_can_be_printed",
    "test_state_dict_deterministic",
    "test_can_load_older_state_dict",
    "test_can_load_from_to_named_state_dict",
    "test_save_load_equality_with_weights_only",
    "test_load_nontensor_step",
    "test_state_dict_with_cuda_params",
    "test_state_dict_pre_hook",
    "test_state_dict_post_hook",
    "test_state_dict_pre_post_hook",
    "test_load_state_dict_pre_hook_and_prepend",
    "test_load_state_dict_post_hook",
    "test_load_state_dict_pre_post_hook",
    "test_step_post_hook",
    "test_step_pre_hook",
    "test_step_all_hooks",
    "test_deepcopy_copies_all_public_attrs",
    "test_second_order_optims_return_consistent_types",
    "test_fused_cpu_matches_cuda",
    "test_defaults_changed_to_foreach",
    "test_non_empty_state",
]

STEPS = 8  # torch takes 20, of methods that go less far
WHOLE = ("likelihood", "estimate", "search")  # of the optimizer, not of a group
each_preset = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def every_input(info: Any) -> list[Any]:
    return info.optim_inputs_func(device="cpu")


def made(info: Any, kwargs: dict[str, Any], contiguous: bool = True) -> tuple[Net, Any]:
    """A module, and the optimizer of its parameters as a framework would make it."""
    model = Net(contiguous)
    return model, info.optim_cls(model.parameters(), **kwargs).attach(model)


def follow(schedulers: list[Any], loss: torch.Tensor) -> None:
    for scheduler in schedulers:
        scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


def assert_direction(maximize: bool, before: float, after: float) -> None:
    assert (after > before) if maximize else (after < before)


def test_every_test_of_torch_is_applied_or_listed_with_its_reason():
    applied = {name for name in globals() if name in TORCH_TESTS}
    assert len(TORCH_TESTS) == len(set(TORCH_TESTS)) == 44
    assert applied.isdisjoint(NOT_APPLIED)
    assert applied | NOT_APPLIED.keys() == set(TORCH_TESTS)
    assert all(len(reason) > 10 for reason in NOT_APPLIED.values())


@each_preset
def test_optim_infos_do_not_specify_global_cliquey_kwargs(info):
    for given in every_input(info):
        assert not {"foreach", "fused", "differentiable"} & given.kwargs.keys()


@each_preset
def test_errors(info):
    errors = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(errors) >= 9
    for error in errors:
        given = error.optimizer_error_input
        assert error.error_on == common.OptimizerErrorEnum.CONSTRUCTION_ERROR
        check = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with check(error.error_type, match=error.error_regex):
            info.optim_cls(given.params, **given.kwargs)


@each_preset
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_forloop_goes_right_direction(info, contiguous):
    x = torch.randn(3, 5)
    for schedulers_of in (None, *(info.scheduler_inputs if contiguous else ())):
        for given in every_input(info)[:: 1 if schedulers_of is None else 4]:
            model, optimizer = made(info, given.kwargs, contiguous)
            schedulers = [make(optimizer) for make in schedulers_of or ()]
            first = evaluate(optimizer, model, x).item()
            for _ in range(STEPS):
                loss = evaluate(optimizer, model, x)
                optimizer.step()
                follow(schedulers, loss)
            assert_direction(given.kwargs.get("maximize", False), first, evaluate(optimizer, model, x).item())


@each_preset
def test_param_group_with_lrscheduler_goes_right_direction(info):
    x = torch.randn(3, 5)
    for schedulers_of in info.scheduler_inputs:
        model = Net()
        kwargs = every_input(info)[1].kwargs
        groups = [{"params": [model.linear.weight]}, {"params": [model.linear.bias, model.shift], "lr": 0.01}]
        optimizer = info.optim_cls(groups, **kwargs).attach(model)
        schedulers = [make(optimizer) for make in schedulers_of]
        first = evaluate(optimizer, model, x).item()
        for _ in range(STEPS):
            loss = optimizer.step(functools.partial(evaluate, optimizer, model, x))
            follow(schedulers, loss)
        assert evaluate(optimizer, model, x).item() < first


@each_preset
def test_tensor_lr(info):
    x = torch.randn(3, 5)
    for given in every_input(info):
        runs = []
        for lr in (0.25, torch.tensor(0.25)):
            torch.manual_seed(1)
            model, optimizer = made(info, {**given.kwargs, "lr": lr})
            for _ in range(5):
                evaluate(optimizer, model, x)
                optimizer.step()
            runs.append(model.state_dict())
            assert optimizer.param_groups[0]["lr"] is lr
        torch.testing.assert_close(runs[0], runs[1])


@each_preset
def test_param_groups_weight_decay(info):
    x = torch.randn(3, 5)
    for given in every_input(info):
        model = Net()
        options = {name: value for name, value in given.kwargs.items() if name not in WHOLE}
        rest = {name: value for name, value in given.kwargs.items() if name in WHOLE}
        groups = [
            {"params": [model.linear.weight], **options},
            {"params": [model.linear.bias, model.shift], **options, "weight_decay": 0.0},
        ]
        optimizer = info.optim_cls(groups, **rest).attach(model)
        first = evaluate(optimizer, model, x).item()
        for _ in range(STEPS):
            evaluate(optimizer, model, x)
            optimizer.step()
        assert_direction(given.kwargs.get("maximize", False), first, evaluate(optimizer, model, x).item())


@each_preset
def test_param_groups_lr(info):
    """As torch's, but for the idle parameter, which is part of the loss: curvature is measured on the output."""
    x = torch.randn(3, 5)
    for given in every_input(info):
        options = {"lr": 0.1, **{name: value for name, value in given.kwargs.items() if name not in WHOLE}}
        rest = {name: value for name, value in given.kwargs.items() if name in (*WHOLE, "maximize")}
        model = Net()
        before = model.shift.detach().clone()
        groups = [{"params": [model.linear.weight, model.linear.bias], **options}, {"params": [model.shift]}]
        optimizer = info.optim_cls(groups, lr=1e-28, **rest).attach(model)
        first = evaluate(optimizer, model, x).item()
        for _ in range(STEPS):
            evaluate(optimizer, model, x)
            optimizer.step()
        assert_direction(given.kwargs.get("maximize", False), first, evaluate(optimizer, model, x).item())
        assert torch.equal(model.shift, before)


@each_preset
@pytest.mark.parametrize("attached", [True, False])
def test_step_is_noop_when_params_have_no_grad(info, attached):
    for given in every_input(info):
        model = Net().requires_grad_(False)
        before = deepcopy(model.state_dict())
        optimizer = info.optim_cls(list(model.parameters()), **given.kwargs)
        if attached:
            optimizer.attach(model)
        assert optimizer.step(lambda: torch.tensor([1.0])).item() == 1
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@each_preset
@pytest.mark.parametrize("attached", [True, False])
def test_step_is_noop_for_zero_grads(info, attached):
    for given in every_input(info):
        if given.kwargs.get("weight_decay", 0) != 0:
            continue
        model = Net()
        before = deepcopy(model.state_dict())
        optimizer = info.optim_cls(model.parameters(), **given.kwargs)
        if attached:
            optimizer.attach(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(lambda: torch.tensor([1.0]))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@each_preset
def test_optimizer_can_be_printed(info):
    for given in every_input(info):
        text = repr(info.optim_cls([Parameter(torch.randn(2, 3))], **given.kwargs))
        assert info.name in text and "lr:" in text


def as_given(model: nn.Module, named: bool) -> Any:
    return model.named_parameters() if named else model.parameters()


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    state = deepcopy(state)
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


@each_preset
@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)])
def test_state_dict_deterministic(info, named):
    x = torch.randn(3, 5)
    for given in every_input(info)[:: 1 if named == (False, False) else 6]:
        model = Net()
        optimizer = info.optim_cls(as_given(model, named[0]), **given.kwargs).attach(model)
        for _ in range(4):
            evaluate(optimizer, model, x)
            optimizer.step()
        again = Net()
        again.load_state_dict(model.state_dict())
        resumed = info.optim_cls(as_given(again, named[1]), **given.kwargs).attach(again)
        resumed.load_state_dict(deepcopy(optimizer.state_dict()))
        for _ in range(4):
            for opt, net in ((optimizer, model), (resumed, again)):
                evaluate(opt, net, x)
                opt.step()
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
        states = without_names(optimizer.state_dict()), without_names(resumed.state_dict())
        torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
        assert states[0]["param_groups"] == states[1]["param_groups"]
        resumed.param_groups.extend(resumed.param_groups)  # one parameter twice is written the same twice
        assert (
            without_names(resumed.state_dict())["param_groups"][-1]
            == without_names(optimizer.state_dict())["param_groups"][-1]
        )


def convolution() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2), nn.Flatten())


@each_preset
def test_can_load_older_state_dict(info):
    x = torch.rand(2, 4, 8, 8)
    for given in every_input(info):
        model = convolution()
        optimizer = info.optim_cls(model.parameters(), **given.kwargs).attach(model)
        for _ in range(2):
            evaluate(optimizer, model, x)
            optimizer.step()
        old = deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for flag in info.not_og_supported_flags:
                group.pop(flag, None)
        optimizer.load_state_dict(old)
        before = deepcopy(model.state_dict())
        evaluate(optimizer, model, x)
        optimizer.step()
        assert not torch.equal(before["1.bias"], model.state_dict()["1.bias"])


@each_preset
@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)])
def test_can_load_from_to_named_state_dict(info, named):
    x = torch.rand(2, 4, 8, 8)
    given = every_input(info)[0]
    model = convolution()
    optimizer = info.optim_cls(as_given(model, named[0]), **given.kwargs).attach(model)
    for _ in range(2):
        evaluate(optimizer, model, x)
        optimizer.step()
    other = info.optim_cls(as_given(model, named[1]), **given.kwargs)
    optimizer.detach()
    other.attach(model)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    evaluate(other, model, x)
    other.step()
    if any(named):
        names = other.state_dict()["param_groups"][0]["param_names"]
        assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


@each_preset
@pytest.mark.parametrize("named", [False, True])
def test_save_load_equality_with_weights_only(info, named):
    x = torch.randn(3, 5)
    for given in every_input(info):
        model = Net()
        optimizer = info.optim_cls(as_given(model, named), **given.kwargs).attach(model)
        for _ in range(2):
            optimizer.step(functools.partial(evaluate, optimizer, model, x))
        state = optimizer.state_dict()
        with tempfile.TemporaryFile() as file:
            torch.save(state, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
        torch.testing.assert_close(loaded["state"], state["state"], rtol=0, atol=0)
        assert loaded["param_groups"] == state["param_groups"]


@each_preset
def test_load_nontensor_step(info):
    x = torch.randn(3, 5)
    for given in every_input(info):
        model, optimizer = made(info, given.kwargs)
        for _ in range(2):
            evaluate(optimizer, model, x)
            optimizer.step()
        state = deepcopy(optimizer.state_dict())
        changed = 0
        for own in state["state"].values():
            if torch.is_tensor(own.get("step")):
                own["step"] = own["step"].item()
                changed += 1
        optimizer.load_state_dict(state)
        evaluate(optimizer, model, x)
        optimizer.step()
        assert all(float(own["step"]) == 3 for own in optimizer.state.values() if "step" in own)


def note_before(optimizer: Any) -> None:
    optimizer.state["test"] = 1


def note_after(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    state["seen"] = state["state"].pop("test", None) == 1
    return state


def set_rate(optimizer: Any, state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = 0.002


def set_rate_in_a_copy(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    state = deepcopy(state)
    state["param_groups"][0]["lr"] = 0.003
    return state


def note_loaded(optimizer: Any) -> None:
    optimizer.state["loaded"] = True
    optimizer.state["rate"] = optimizer.param_groups[0]["lr"] == 0.003


def stepped(info: Any, kwargs: dict[str, Any]) -> Any:
    """An optimizer with state; torch's tests of hooks have none."""
    model, optimizer = made(info, kwargs)
    optimizer.owner = model
    evaluate(optimizer, model, torch.randn(3, 5))
    optimizer.step()
    return optimizer


@each_preset
def test_state_dict_pre_hook(info):
    for given in every_input(info):
        optimizer = stepped(info, given.kwargs)
        optimizer.register_state_dict_pre_hook(note_before)
        assert optimizer.state_dict()["state"]["test"] == 1


@each_preset
def test_state_dict_post_hook(info):
    for given in every_input(info):
        optimizer = stepped(info, given.kwargs)
        optimizer.register_state_dict_post_hook(note_after)
        assert optimizer.state_dict()["seen"] is False


@each_preset
def test_state_dict_pre_post_hook(info):
    for given in every_input(info):
        optimizer = stepped(info, given.kwargs)
        optimizer.register_state_dict_pre_hook(note_before)
        optimizer.register_state_dict_post_hook(note_after)
        state = optimizer.state_dict()
        assert state["seen"] is True and "test" not in state["state"]


@each_preset
def test_load_state_dict_pre_hook_and_prepend(info):
    for given in every_input(info):
        optimizer = stepped(info, given.kwargs)
        state = optimizer.state_dict()
        optimizer.register_load_state_dict_pre_hook(set_rate)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.002
        optimizer.register_load_state_dict_pre_hook(set_rate_in_a_copy, prepend=True)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.002  # the later hook has the last word


@each_preset
def test_load_state_dict_post_hook(info):
    for given in every_input(info):
        optimizer = stepped(info, given.kwargs)
        optimizer.register_load_state_dict_post_hook(note_loaded)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["loaded"] and not optimizer.state["rate"]


@each_preset
def test_load_state_dict_pre_post_hook(info):
    for given in every_input(info):
        optimizer = stepped(info, given.kwargs)
        optimizer.register_load_state_dict_pre_hook(set_rate_in_a_copy)
        optimizer.register_load_state_dict_post_hook(note_loaded)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["loaded"] and optimizer.state["rate"]


def check_step_hook(info: Any, when: str) -> None:
    for given in every_input(info):
        optimizer = info.optim_cls([torch.ones(2)], **given.kwargs)
        calls: list[Any] = []
        handle = getattr(optimizer, f"register_step_{when}_hook")(lambda opt, args, kwargs, c=calls: c.append(opt))
        optimizer.step()
        optimizer.step()
        assert calls == [optimizer, optimizer]
        handle.remove()
        optimizer.step()
        assert len(calls) == 2


@pytest.mark.parametrize("returns", [True, False])
def test_a_hook_may_change_the_tensors_that_are_loaded(returns):
    """As torch's documentation says it may, in place or by returning another state."""
    info = next(info for info in INFOS if info.name == "NGD")
    optimizer = stepped(info, {"likelihood": likelihood(), "momentum": 0.9, "lr": 0.1})

    def forget(optimizer: Any, state: dict[str, Any]) -> Any:
        mine = deepcopy(state) if returns else state
        for own in mine["state"].values():
            own["momentum"] = torch.zeros_like(own["momentum"])
        return mine if returns else None

    saved = deepcopy(optimizer.state_dict())
    assert all(bool(own["momentum"].any()) for own in optimizer.state.values())
    optimizer.register_load_state_dict_pre_hook(forget)
    optimizer.load_state_dict(saved)
    assert not any(bool(own["momentum"].any()) for own in optimizer.state.values())


@each_preset
def test_step_pre_hook(info):
    check_step_hook(info, "pre")


@each_preset
def test_step_post_hook(info):
    check_step_hook(info, "post")


@each_preset
def test_step_all_hooks(info):
    """Global before, own before, own after, global after; through a step that moves parameters."""
    x = torch.randn(3, 5)
    for given in every_input(info):
        model, optimizer = made(info, given.kwargs)
        sgd = torch.optim.SGD([torch.ones(2)], lr=0.1)
        order: list[int] = []

        def say(number: int, order: list[int] = order) -> Any:
            return lambda *_: order.append(number)

        handles = [register_optimizer_step_pre_hook(say(0)), register_optimizer_step_post_hook(say(5))]
        for opt in (optimizer, sgd):
            handles += [opt.register_step_pre_hook(say(1)), opt.register_step_post_hook(say(2))]
        try:
            evaluate(optimizer, model, x)
            optimizer.step()
            assert order == [0, 1, 2, 5]
            sgd.step()
            assert order == [0, 1, 2, 5] * 2
        finally:
            for handle in handles:
                handle.remove()
        evaluate(optimizer, model, x)
        optimizer.step()
        assert order == [0, 1, 2, 5] * 2


@each_preset
def test_deepcopy_copies_all_public_attrs(info):
    x = torch.randn(3, 5)

    def public(optimizer: Any) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    for given in every_input(info):
        model, optimizer = made(info, given.kwargs)
        for _ in range(2):
            evaluate(optimizer, model, x)
            optimizer.step()
        assert public(optimizer) == public(deepcopy(optimizer)) >= {"defaults", "state", "param_groups"}


@each_preset
def test_non_empty_state(info):
    x = torch.randn(3, 5)
    for given in every_input(info):
        model, optimizer = made(info, given.kwargs)
        evaluate(optimizer, model, x)
        optimizer.step()
        assert all(len(state) > 0 for state in optimizer.state.values())
        state = optimizer.state_dict()
        assert state["param_groups"][0]["params"] == [0, 1, 2]


# What is refused instead


@each_preset
def test_complex_parameters_are_refused(info):
    for given in every_input(info):
        with pytest.raises(ng.errors.UnsupportedError, match="complex"):
            info.optim_cls([Parameter(torch.randn(3, dtype=torch.complex64))], **given.kwargs)


@each_preset
def test_sparse_gradients_are_refused(info):
    x = torch.randn(3, 5)
    for given in every_input(info):
        model, optimizer = made(info, given.kwargs)
        evaluate(optimizer, model, x)
        model.shift.grad = model.shift.grad.to_sparse()
        before = model.shift.detach().clone()
        with pytest.raises(ng.errors.UnsupportedError, match=r"shift.*sparse"):
            optimizer.step()
        assert torch.equal(model.shift, before)


@each_preset
@pytest.mark.parametrize("flag", ["foreach", "fused", "differentiable", "capturable"])
def test_flags_of_torchs_implementations_are_refused(info, flag):
    with pytest.raises(TypeError, match=flag):
        info.optim_cls([Parameter(torch.randn(3))], likelihood=likelihood(), **{flag: True})


def test_a_step_without_attach_says_what_to_do():
    p = Parameter(torch.randn(3))
    optimizer = ng.KFAC([p], ng.Gaussian())
    p.grad = torch.ones(3)
    with pytest.raises(ng.errors.NotObservedError, match="attach"):
        optimizer.step()
