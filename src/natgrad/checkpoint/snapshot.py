"""Saving a run and going on with it: model, optimizer and whatever else is plain."""

from __future__ import annotations

import json
import os
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from natgrad.checkpoint.atomic import previous, replace_file
from natgrad.checkpoint.fitting import (
    OptimizerRecord,
    check_model,
    check_optimizer,
    in_order_of,
    loaded_together,
    parameter_names,
)
from natgrad.checkpoint.sealed import sealed, unsealed
from natgrad.checkpoint.tree import Packer, Unpacker
from natgrad.errors import ArgumentError, SnapshotError


def save(path: str | os.PathLike[str], model: nn.Module | None = None, optimizer: Any = None, **extras: Any) -> None:
    """Write a snapshot: one safetensors file, complete or not there at all, with a checksum of all its bytes.

    What ``path`` held before is kept as ``path + ".previous"``. Returns when the file is on the disk. While it runs,
    main memory holds two more copies of everything.

    Args:
        path: the file, by custom ``….safetensors``; its folder must exist.
        model: its ``state_dict()`` is saved.
        optimizer: any torch optimizer, or anything with ``state_dict()`` and ``load_state_dict()``. With ``model``
            given, its state is saved under the parameters' names.
        extras: what else a resumed run needs: tensors, numbers, texts, None, and lists, tuples and dicts of them, such
            as ``step=7``, ``scheduler=scheduler.state_dict()``, ``random=torch.get_rng_state()``.

    Raises:
        SnapshotError: the file could not be written; the one that was there before still is.
        ArgumentError: a value that a snapshot cannot hold; the message says where. Or model and optimizer exchanged.
        MissingExtraError: without the ``checkpoint`` extra.
    """
    _check_order(model, optimizer)
    target, packer = _resolved(path), Packer()
    content = {
        "model": None if model is None else _packed_model(model, packer),
        "optimizer": None if optimizer is None else _packed_optimizer(optimizer, model, packer),
        "extras": {name: packer.encode(value, f"extras.{name}") for name, value in extras.items()},
    }
    pieces = sealed(packer.tensors, json.dumps(content, separators=(",", ":")))
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        replace_file(target, pieces)
    except OSError as error:
        raise SnapshotError(
            f"{path} could not be written ({error}). What was saved there before is untouched. Make room, or check "
            "that the folder exists and that you may write in it, and save again."
        ) from error


def load(path: str | os.PathLike[str], model: nn.Module | None = None, optimizer: Any = None) -> dict[str, Any]:
    """Load a snapshot into ``model`` and ``optimizer``, all of it or nothing, bit for bit.

    Every byte is checked first, then names, shapes and dtypes; nothing is changed before. Where ``path`` is damaged
    or missing, the generation before it is taken, with a warning. Nothing is unpickled.

    Args:
        path: what :func:`save` wrote.
        model: gets the saved parameters and buffers, on the devices where its own are.
        optimizer: gets the saved state, in the saved dtypes; made with the parameters of ``model``.

    Returns:
        The extras that were given to :func:`save`; their tensors are on the CPU.

    Raises:
        SnapshotError: there is no intact snapshot, or it is of another model or optimizer. Nothing was changed.
        MissingExtraError: without the ``checkpoint`` extra.
    """
    _check_order(model, optimizer)
    tensors, text = _newest(_resolved(path))
    try:
        content = json.loads(text)
        cpu = torch.device("cpu")
        weights = _unpacked_model(content["model"], Unpacker(tensors, cpu))
        record = _unpacked_optimizer(content["optimizer"], Unpacker(tensors, _device(optimizer)))
        unpacker = Unpacker(tensors, cpu)
        extras = {name: unpacker.decode(value) for name, value in content["extras"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, StopIteration, RecursionError) as error:
        raise SnapshotError(
            f"{path} has the right checksum, but holds what natgrad does not write ({type(error).__name__}: {error}): "
            "it was made by another program. Nothing was loaded."
        ) from error
    if model is not None:
        check_model(path, weights, model)
    if optimizer is not None:
        check_optimizer(path, record, optimizer, model)
    with loaded_together(path, model, optimizer) as into:
        if record is not None and optimizer is not None:
            into.optimizer(in_order_of(record, optimizer, model))
        if weights is not None and model is not None:
            into.model(weights)
    return extras


def _check_order(model: Any, optimizer: Any) -> None:
    """Raises ArgumentError where each stands in the other's place, or the model is none."""
    if isinstance(optimizer, nn.Module) or not (model is None or isinstance(model, nn.Module)):
        raise ArgumentError(
            f"model is of type {type(model).__name__} and optimizer of type {type(optimizer).__name__}; the order is "
            "(path, model, optimizer), and model is a torch.nn.Module."
        )


def _resolved(path: str | os.PathLike[str]) -> Path:
    """The file itself, also where ``path`` is a link to it: the link is kept."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"path={path!r} was given; it must be the path of a file.")
    return Path(os.path.realpath(path))


def _newest(path: Path) -> tuple[dict[str, Any], str]:
    """The tensors and the content of the newest intact generation."""
    try:
        return unsealed(path)
    except FileNotFoundError as error:
        damage: SnapshotError = SnapshotError(f"There is no file {path}. Check the path; ng.save writes it.")
        damage.__cause__ = error
    except SnapshotError as error:
        damage = error
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read ({error}). Check the path and its permissions.") from error
    older = previous(path)
    try:
        found = unsealed(older)
    except (SnapshotError, OSError):
        raise damage from damage.__cause__
    warnings.warn(f"{damage} The generation before it is intact and was taken: {older}.", UserWarning, stacklevel=3)
    return found


def _packed_model(model: nn.Module, packer: Packer) -> dict[str, Any]:
    state = model.state_dict()
    return {
        "state": {name: packer.encode(value, f"model.{name}") for name, value in state.items()},
        "versions": packer.encode(dict(getattr(state, "_metadata", {})), "model (versions)"),
    }


def _unpacked_model(saved: dict[str, Any] | None, unpacker: Unpacker) -> OrderedDict[str, Any] | None:
    if saved is None:
        return None
    state = OrderedDict((name, unpacker.decode(value)) for name, value in saved["state"].items())
    state._metadata = unpacker.decode(saved["versions"])  # type: ignore[attr-defined]  # where modules look for it
    return state


def _packed_optimizer(optimizer: Any, model: nn.Module | None, packer: Packer) -> dict[str, Any]:
    state = optimizer.state_dict()
    names = parameter_names(optimizer, model)
    labels = {}
    for group, packed in zip(names, state.get("param_groups", ()), strict=False):
        labels |= {i: name for i, name in zip(packed["params"], group, strict=False) if name is not None}
    rest = {key: value for key, value in state.items() if key != "state"}
    slots = state.get("state", {})
    return {
        "class": type(optimizer).__qualname__,
        "names": names,
        "shapes": [[list(p.shape) for p in group["params"]] for group in getattr(optimizer, "param_groups", ())],
        "rest": packer.encode(rest, "optimizer"),
        "slots": [
            [packer.encode(i, "optimizer.state (a key)"), packer.encode(slot, f"optimizer.state.{labels.get(i, i)}")]
            for i, slot in slots.items()
        ],
    }


def _unpacked_optimizer(saved: dict[str, Any] | None, unpacker: Unpacker) -> OptimizerRecord | None:
    if saved is None:
        return None
    state = {"state": {unpacker.decode(i): unpacker.decode(slot) for i, slot in saved["slots"]}}
    return OptimizerRecord.checked(saved, state | unpacker.decode(saved["rest"]))


def _device(optimizer: Any) -> torch.device:
    """Of the optimizer's first parameter."""
    parameters = (p for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
    return next((p.device for p in parameters), torch.device("cpu"))
