"""Nested plain values as JSON, with every tensor in them kept apart under a name.

JSON's own values stand for themselves, and a list for a list. Everything else is an object whose first key says what
it is: ``{"tensor": name}``, ``{"tuple": […]}``, ``{"dict": [[key, value], …]}``, ``{"counter": …}``,
``{"bytes": hex}``, ``{"complex": [re, im]}``, ``{"dtype": …}``, ``{"device": …}``. Reading one builds such values and
nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natgrad.errors import ArgumentError

_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_NATIVE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}
"""What every version of safetensors stores as it is; all else goes in as bytes."""

_DEEPEST = 64
_TEXTS: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (complex, "complex", lambda value: [value.real, value.imag]),
    (bytes, "bytes", bytes.hex),
    (torch.dtype, "dtype", lambda value: str(value).removeprefix("torch.")),
    (torch.device, "device", str),
)


class Packer:
    """Turns values into JSON and collects their tensors; a tensor met twice is stored once.

    Attributes:
        tensors: by name; contiguous, on the CPU, none sharing memory with another.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[Any, ...], tuple[dict[str, Any], Tensor]] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, path: str, depth: int = 0) -> Any:
        """``value`` as JSON. ``path`` says where it stands: it names the tensors, and the value in an error.

        Raises:
            ArgumentError: something that is neither plain nor a dense tensor, or is nested more than 64 deep.
        """
        if depth > _DEEPEST:
            raise ArgumentError(f"{path[:60]}… is more than {_DEEPEST} lists or dicts deep. Does one contain itself?")
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool):
            return value
        for kind in (int, float, str):
            if isinstance(value, kind):
                return kind(value)  # also of subclasses, such as enumerations
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, list | tuple):
            items = [self.encode(item, f"{path}.{i}", depth + 1) for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, dict):
            tag, inner = "counter" if isinstance(value, Counter) else "dict", depth + 1
            keys = [self.encode(k, f"{path} (a key)", inner) for k in value]
            values = [self.encode(v, f"{path}.{k}", inner) for k, v in value.items()]
            return {tag: [list(pair) for pair in zip(keys, values, strict=True)]}
        for kind, tag, text in _TEXTS:
            if isinstance(value, kind):
                return {tag: text(value)}
        raise ArgumentError(
            f"{path} is a {type(value).__qualname__}, which a snapshot cannot hold: it takes tensors, numbers, texts, "
            "None and lists, tuples and dicts of them. Give an object's state_dict(), and an array as "
            "torch.from_numpy(array)."
        )

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        plain = tensor.detach()
        _check_dense(plain, path)
        layout: dict[str, Any] = {} if plain.device.type == "cpu" else {"device": plain.device.type}
        if not plain.is_contiguous() and is_dense(plain.shape, plain.stride()):
            layout["stride"] = list(plain.stride())
        memory = plain.untyped_storage().data_ptr()
        key = (plain.device, memory, plain.storage_offset(), plain.shape, plain.stride(), plain.dtype, plain.is_conj())
        if memory and key in self._known:
            return self._known[key][0]
        name = path
        while name in self.tensors:
            name += "'"
        stored = plain.cpu().resolve_conj().resolve_neg().contiguous()
        if plain.dtype not in _NATIVE:
            layout |= {"dtype": str(plain.dtype).removeprefix("torch."), "shape": list(plain.shape)}
            stored = stored.reshape(-1).view(torch.uint8)
        storage = stored.untyped_storage()
        if storage.data_ptr() in self._storages or storage.nbytes() != stored.numel() * stored.element_size():
            stored = stored.clone()
        self._storages.add(stored.untyped_storage().data_ptr())
        self.tensors[name] = stored
        record = {"tensor": name, **layout}
        self._known[key] = (record, plain)
        return record


def _check_dense(tensor: Tensor, path: str) -> None:
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ArgumentError(
            f"{path} is no ordinary dense tensor ({type(tensor).__qualname__}, {tensor.layout}, {tensor.device}). "
            "Snapshots hold whole tensors of one process: give .to_dense() or .full_tensor(), or save sharded states "
            "with torch.distributed.checkpoint."
        )


class Unpacker:
    """Builds values from what :class:`Packer` made. Every value owns its memory; a tensor met twice is one object.

    Args:
        tensors: by name.
        device: of numbers (0-d tensors) that were not on the CPU; all other tensors stay on it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._made: dict[str, Tensor] = {}

    def decode(self, value: Any) -> Any:
        """The value.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: it is not what a Packer makes.
        """
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag, content = next(iter(value.items()))
        match tag:
            case "tensor":
                return self._tensor(value)
            case "tuple":
                return tuple(self.decode(item) for item in content)
            case "dict":
                return {self.decode(k): self.decode(v) for k, v in content}
            case "counter":
                return Counter({self.decode(k): self.decode(v) for k, v in content})
            case "complex":
                return complex(*content)
            case "bytes":
                return bytes.fromhex(content)
            case "dtype":
                return _DTYPES[content]
            case "device":
                return torch.device(content)
        raise ValueError(f"unknown kind of value {tag!r}")

    def _tensor(self, record: dict[str, Any]) -> Tensor:
        name = record["tensor"]
        if name not in self._made:
            stored = self._tensors[name]
            if "dtype" in record:
                stored = stored.clone().view(_DTYPES[record["dtype"]]).reshape(record["shape"])
            stride = record.get("stride")
            if stride is None:
                made = stored.clone()
            elif is_dense(stored.shape, stride):
                made = torch.empty_strided(stored.shape, stride, dtype=stored.dtype).copy_(stored)
            else:
                raise ValueError(f"strides {stride} do not fit shape {tuple(stored.shape)}")
            self._made[name] = made.to(self._device) if "device" in record and not made.dim() else made
        return self._made[name]


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether such a tensor fills its memory without gap or overlap, in whatever order of its axes."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True
