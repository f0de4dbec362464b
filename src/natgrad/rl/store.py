"""Policies on disk: weights as safetensors, what they are as JSON; nothing is pickled."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from natgrad.checkpoint import load as load_snapshot
from natgrad.checkpoint import save as save_snapshot
from natgrad.errors import ArgumentError, SnapshotError
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
        ArgumentError: a policy with a body of its own, whose shape is not known here.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    head = {f.name: getattr(policy.head, f.name) for f in dataclasses.fields(policy.head) if f.init}  # pyright: ignore
    content = {"head": {"kind": type(policy.head).__name__, **head}, "network": _network(policy), "about": about}
    text = json.dumps(content, indent=1)
    save_snapshot(target / "policy.safetensors", policy)
    (target / "policy.json").write_text(text + "\n")
    return target


def load(folder: str | os.PathLike[str]) -> Policy:
    """The policy that :func:`save` wrote, bit for bit.

    Raises:
        SnapshotError: a file is missing or damaged.
    """
    path = Path(folder) / "policy.json"
    try:
        content = json.loads(path.read_text())
        given = dict(content["head"])
        kind = _HEADS[given.pop("kind")]
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        head = kind(**fields)
        network = content["network"]
        policy, _ = build(
            network["observations"],
            head,
            hidden=tuple(network["hidden"]),
            recurrent=network["recurrent"],
            normalise=network["normalise"],
            state_dependent_scale=network["state_dependent_scale"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{path} does not describe a policy ({type(error).__name__}: {error}).") from error
    load_snapshot(Path(folder) / "policy.safetensors", policy)
    return policy


def about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What was kept with the policy."""
    return json.loads((Path(folder) / "policy.json").read_text())["about"]


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
    rebuilt, _ = build(size, policy.head, hidden=tuple(hidden), **shape)
    ours, theirs = policy.state_dict(), rebuilt.state_dict()
    if {n: v.shape for n, v in ours.items()} != {n: v.shape for n, v in theirs.items()}:
        raise ArgumentError(
            "Only policies of natgrad.rl.build can be saved as JSON; one with a body of its own is saved by "
            "natgrad.save(path, policy) and loaded into a policy that your code makes."
        )
    return {"observations": size, "hidden": hidden, **shape}
