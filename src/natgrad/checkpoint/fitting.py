"""Whether a snapshot fits a model and an optimizer, and loading it into both or neither."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from natgrad.errors import SnapshotError

Names = list[list[str | None]]
_SHOWN = 8


@dataclass(frozen=True)
class OptimizerRecord:
    """What a snapshot knows of an optimizer.

    Attributes:
        kind: name of its class.
        names: of the parameters of each group, as far as they are known.
        shapes: of the same parameters.
        state: its ``state_dict()``.
    """

    kind: str
    names: Names
    shapes: list[list[list[int]]]
    state: dict[str, Any]

    @staticmethod
    def checked(saved: Mapping[str, Any], state: dict[str, Any]) -> OptimizerRecord:
        """From a file that anybody may have made. Raises ValueError or TypeError if it does not agree with itself."""
        names = [[None if name is None else str(name) for name in group] for group in saved["names"]]
        shapes = [[[int(size) for size in shape] for shape in group] for group in saved["shapes"]]
        sizes = [len(group["params"]) for group in state.get("param_groups", ())]
        if any(sizes != [len(group) for group in groups] for groups in (names, shapes)):
            raise ValueError("the groups differ in size from the list of their parameters")
        return OptimizerRecord(str(saved["class"]), names, shapes, state)


def parameter_names(optimizer: Any, model: nn.Module | None) -> Names:
    """Names of the parameters of each group: the model's, else those the optimizer was given, else None."""
    known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    found: Names = []
    for group in getattr(optimizer, "param_groups", ()):
        own = group.get("param_names", ())
        if len(own) != len(group["params"]):
            own = [None] * len(group["params"])
        found.append([known.get(id(p), name) for p, name in zip(group["params"], own, strict=True)])
    return found


def check_model(path: str | os.PathLike[str], saved: Mapping[str, Any] | None, model: nn.Module) -> None:
    """Raises SnapshotError unless ``saved`` has the very names, shapes and dtypes of the model's state."""
    if saved is None:
        raise SnapshotError(f"{path} holds no model: it was saved without one. Load it without model.")
    own = model.state_dict()
    problems = [f"missing in the file: {name}" for name in own if name not in saved]
    problems += [f"missing in the model: {name}" for name in saved if name not in own]
    for name, value in own.items():
        if isinstance(value, Tensor) and name in saved:
            problems += _difference(name, saved[name], value)
    problems += _torn_ties(saved, own)
    if problems:
        raise SnapshotError(
            f"{path} is of another model than this {type(model).__name__}:\n{_listed(problems)}\n"
            "Nothing was loaded. Build the model as it was when it was saved, with its dtypes; save and load a wrapped "
            "model (DistributedDataParallel, torch.compile) alike."
        )


def _difference(name: str, saved: Any, own: Tensor) -> list[str]:
    if not isinstance(saved, Tensor):
        return [f"{name}: a {type(saved).__name__} in the file, a tensor in the model"]
    if saved.shape != own.shape:
        return [f"{name}: shape {tuple(saved.shape)} in the file, {tuple(own.shape)} in the model"]
    if saved.dtype != own.dtype:
        return [f"{name}: {saved.dtype} in the file, {own.dtype} in the model"]
    return []


def _torn_ties(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names that are one tensor in the model, but were not when it was saved: one value would overwrite the other."""
    first: dict[tuple[Any, ...], str] = {}
    problems = []
    for name, value in own.items():
        if not isinstance(value, Tensor) or not value.numel() or name not in saved:
            continue
        other = first.setdefault((value.device, value.data_ptr(), value.shape, value.stride()), name)
        if other != name and saved[other] is not saved[name] and not _same_bits(saved[other], saved[name]):
            problems.append(f"{other} and {name}: one tensor in the model, two different ones in the file")
    return problems


def _same_bits(a: Any, b: Any) -> bool:
    """Also where both are NaN."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def check_optimizer(
    path: str | os.PathLike[str], record: OptimizerRecord | None, optimizer: Any, model: nn.Module | None
) -> None:
    """Raises SnapshotError unless the record is of such an optimizer, with the same parameters in the same groups."""
    if record is None:
        raise SnapshotError(f"{path} holds no optimizer: it was saved without one. Load it without optimizer.")
    kind, names = type(optimizer).__qualname__, parameter_names(optimizer, model)
    problems = [] if kind == record.kind else [f"{record.kind} in the file, {kind} given"]
    same = [len(group) for group in names] == [len(group) for group in record.names]
    if not same and len(names) == len(record.names) and getattr(optimizer, "matches_by_name", False):
        pass  # it lets parameters join that were unfrozen since it was made, and refuses all else by itself
    elif not same:
        problems.append(f"groups of {_sizes(record.names)} parameters in the file, of {_sizes(names)} given")
    else:
        for g, group in enumerate(optimizer.param_groups if names else ()):
            problems += _group_problems(g, record, names[g], group["params"], known=model is not None)
    if problems:
        raise SnapshotError(
            f"{path} is of another optimizer than this {kind}:\n{_listed(problems)}\n"
            "Nothing was loaded. Make the optimizer as it was when it was saved: the same class, the same parameters "
            "in the same groups."
        )


def _group_problems(
    g: int, record: OptimizerRecord, names: list[str | None], parameters: list[Tensor], *, known: bool
) -> list[str]:
    """``known``: whether a parameter without a name is certainly none of the model's."""
    saved, shapes = record.names[g], record.shapes[g]
    by_name = _distinct(saved) and _distinct(names)
    if by_name:
        lost = [f"group {g}: {n} only in the file" for n in saved if n not in names]
        lost += [f"group {g}: {n} only in the optimizer" for n in names if n not in saved]
        if lost:
            return lost
        shapes = [shapes[saved.index(n)] for n in names]
    problems = []
    for i, (p, shape) in enumerate(zip(parameters, shapes, strict=True)):
        where = names[i] or f"parameter {i}"
        named = saved[i] is not None and (names[i] is not None or known)
        if named and not by_name and saved[i] != names[i]:
            problems.append(f"group {g}, parameter {i}: {saved[i]} in the file, {names[i] or 'one of no name'} given")
        elif list(p.shape) != shape:
            problems.append(f"group {g}, {where}: shape {tuple(shape)} in the file, {tuple(p.shape)} given")
    return problems


def _distinct(names: list[str | None]) -> bool:
    return None not in names and len(set(names)) == len(names)


def _sizes(names: Names) -> str:
    return " + ".join(str(len(group)) for group in names) or "no"


def _listed(problems: list[str]) -> str:
    more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n".join(f"  {line}" for line in problems[:_SHOWN] + more)


def in_order_of(record: OptimizerRecord, optimizer: Any, model: nn.Module | None) -> dict[str, Any]:
    """The saved state, its parameters in the order of the optimizer's.

    Torch matches parameters by their places. A layer that was unfrozen during training stands last in the saved group,
    and in the middle of that of an optimizer made afresh.
    """
    state = dict(record.state)
    groups = []
    names = parameter_names(optimizer, model)
    for saved_names, now, saved in zip(record.names, names, state.get("param_groups", ()), strict=False):
        group = dict(saved)
        if _distinct(saved_names) and _distinct(now) and set(saved_names) == set(now):
            order = [saved_names.index(n) for n in now]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in order]
        groups.append(group)
    return state | {"param_groups": groups} if groups else state


class _Into:
    """Where a snapshot goes."""

    def __init__(self, model: nn.Module | None, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer

    def model(self, state: Mapping[str, Any]) -> None:
        assert self._model is not None
        self._model.load_state_dict(state)

    def optimizer(self, state: dict[str, Any]) -> None:
        optimizer = self._optimizer
        _on_devices(state, optimizer)
        optimizer.load_state_dict(state)
        if isinstance(optimizer, Optimizer) and type(optimizer).load_state_dict is Optimizer.load_state_dict:
            order = [i for group in state["param_groups"] for i in group["params"]]
            held = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in zip(order, held, strict=True):
                if p in optimizer.state:
                    optimizer.state[p] = _exact(optimizer.state[p], state["state"][i])


def _on_devices(state: dict[str, Any], optimizer: Any) -> None:
    """Tensors of groups, such as a learning rate, go where those are that they replace."""
    for saved, group in zip(state.get("param_groups", ()), getattr(optimizer, "param_groups", ()), strict=False):
        for key, value in saved.items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                saved[key] = value.to(group[key].device)


def _exact(loaded: Any, saved: Any) -> Any:
    """``loaded`` with the dtypes and values of ``saved``, which torch casts to those of the parameter."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: _exact(value, saved[key]) if key in saved else value for key, value in loaded.items()}
    if isinstance(loaded, list | tuple) and isinstance(saved, list | tuple) and len(loaded) == len(saved):
        return type(saved)(_exact(a, b) for a, b in zip(loaded, saved, strict=True))
    return saved


@contextmanager
def loaded_together(path: str | os.PathLike[str], model: nn.Module | None, optimizer: Any) -> Iterator[_Into]:
    """Whatever fails in the block, model and optimizer are as they were before it.

    Raises:
        SnapshotError: something failed, such as a ``load_state_dict`` of the user's own.
    """
    # On the CPU: the device may have no room for a second model.
    before = {} if model is None else {n: _kept(value) for n, value in model.state_dict().items()}
    undo = _undo(optimizer)
    try:
        yield _Into(model, optimizer)
    except BaseException as error:
        undo()
        if model is not None:
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    if isinstance(value, Tensor) and isinstance(before.get(name), Tensor):
                        value.copy_(before[name])
        if not isinstance(error, Exception):
            raise
        raise SnapshotError(
            f"{path} is intact, but could not be loaded: {error} Model and optimizer are as they were before."
        ) from error


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _undo(optimizer: Any) -> Callable[[], None]:
    """What puts the optimizer back.

    Loading gives torch's optimizers, also one inside another, a new state and new groups in place of the old, so that
    it is enough to keep these. Of anything else it is not known what loading changes.
    """
    if optimizer is None:
        return lambda: None
    if not isinstance(optimizer, Optimizer):
        saved = copy.deepcopy(optimizer.state_dict())
        return lambda: optimizer.load_state_dict(saved)
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    held = [(o, dict(vars(o))) for o in (optimizer, *inner)]

    def put_back() -> None:
        for o, attributes in held:
            vars(o).clear()
            vars(o).update(attributes)

    return put_back
