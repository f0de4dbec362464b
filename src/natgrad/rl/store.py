"""Policies on disk: weights as safetensors, what they are as JSON; nothing is pickled."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from natgrad.checkpoint import load as load_snapshot
from natgrad.checkpoint import save as save_snapshot
from natgrad.checkpoint.atomic import replace_file
from natgrad.errors import ArgumentError, NatgradError, NonFiniteError, SnapshotError
from natgrad.rl import heads
from natgrad.rl.networks import Recurrent
from natgrad.rl.normalise import RunningMoments
from natgrad.rl.policy import Policy, build

_HEADS = {
    kind.__name__: kind
    for kind in (
        heads.CategoricalHead,
        heads.MultiCategoricalHead,
        heads.BernoulliHead,
        heads.GaussianHead,
        heads.SquashedHead,
    )
}


def save(policy: Policy, folder: str | os.PathLike[str], **about: Any) -> Path:
    """Write ``policy.safetensors`` and ``policy.json`` into ``folder``; returns the folder.

    Args:
        policy: one that :func:`natgrad.rl.policy.build` made.
        folder: made where it is missing.
        about: plain values to keep with it, such as ``environment="CartPole-v1"``.

    Raises:
        ArgumentError: a policy with a body of its own, whose shape is not known here; or ``about`` is not plain.
        NonFiniteError: the policy has NaN or infinity in it.
    """
    for name, value in policy.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{name} of the policy is not finite; nothing was saved. Save an earlier policy.")
    head = {f.name: _plain(getattr(policy.head, f.name)) for f in dataclasses.fields(policy.head) if f.init}  # pyright: ignore
    content = {"head": {"kind": type(policy.head).__name__, **head}, "network": _network(policy), "about": about}
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"What is kept with a policy must be plain finite values ({error}).") from error
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_snapshot(target / "policy.safetensors", policy)
    replace_file(target / "policy.json", [(text + "\n").encode()])
    return target


def load(folder: str | os.PathLike[str]) -> Policy:
    """The policy that :func:`save` wrote, bit for bit.

    Raises:
        SnapshotError: a file is missing or damaged.
    """
    path = Path(folder) / "policy.json"
    content = _content(path)
    try:
        given = dict(content["head"])
        kind = _HEADS[given.pop("kind")]
        head = kind(**{name: _exact(value) for name, value in given.items()})
        network = dict(content["network"])
        dtype, limit = getattr(torch, network.pop("dtype")), float(network.pop("limit"))
        size, hidden = network.pop("observations"), tuple(network.pop("hidden"))
        policy = _built(size, head, hidden, network, dtype)
    except (AttributeError, ValueError, KeyError, TypeError, RuntimeError, IndexError, NatgradError) as error:
        raise SnapshotError(f"{path} does not describe a policy ({type(error).__name__}: {error}).") from error
    if isinstance(policy.normaliser, RunningMoments):
        policy.normaliser.limit = limit
    load_snapshot(Path(folder) / "policy.safetensors", policy)
    return policy


def about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What was kept with the policy.

    Raises:
        SnapshotError: the description is missing or damaged.
    """
    path = Path(folder) / "policy.json"
    found = _content(path).get("about")
    if not isinstance(found, dict):
        raise SnapshotError(f"{path} does not describe a policy.")
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SnapshotError(f"{path} cannot be read as JSON ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict):
        raise SnapshotError(f"{path} does not describe a policy.")
    return content


def _plain(value: Any) -> Any:
    """JSON has no infinity, which bounds of actions may have."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return repr(value) if isinstance(value, float) and math.isinf(value) else value


def _exact(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_exact(v) for v in value)
    return float(value) if value in ("inf", "-inf") else value


def _built(size: int, head: heads.Head, hidden: tuple[int, ...], shape: dict[str, bool], dtype: torch.dtype) -> Policy:
    """A policy of that shape; the global random stream, which its weights would be drawn from, stays as it is."""
    with torch.random.fork_rng(devices=[]):
        policy = build(size, head, hidden=hidden, **shape)[0]
    for p in policy.parameters():
        p.data = p.data.to(dtype)
    return policy


def _network(policy: Policy) -> dict[str, Any]:
    body = policy.body
    if isinstance(body, Recurrent):
        size, hidden = body.encoder.in_features, [body.hidden]
    else:
        linear = [m for m in body.modules() if isinstance(m, nn.Linear)]
        size, hidden = (linear[0].in_features, [m.out_features for m in linear[:-1]]) if linear else (0, [])
    shape = {
        "recurrent": policy.recurrent,
        "normalise": isinstance(policy.normaliser, RunningMoments),
        "state_dependent_scale": isinstance(policy.head, heads.GaussianHead) and policy.log_scale is None,
    }
    dtype = next(policy.parameters()).dtype
    if _layout(_built(size, policy.head, tuple(hidden), shape, dtype)) != _layout(policy):
        raise ArgumentError(
            "Only policies of natgrad.rl.build can be saved as JSON; one with a body of its own is saved by "
            "natgrad.save(path, policy) and loaded into a policy that your code makes."
        )
    limit = policy.normaliser.limit if isinstance(policy.normaliser, RunningMoments) else 0.0
    return {
        "observations": size,
        "hidden": hidden,
        **shape,
        "limit": limit,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _layout(policy: Policy) -> list[Any]:
    """Kinds of all modules; names, shapes and dtypes of all tensors."""
    kinds: list[Any] = [type(module) for module in policy.modules()]
    return kinds + [(name, value.shape, value.dtype) for name, value in policy.state_dict().items()]
