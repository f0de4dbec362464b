"""The processes that train one model together, and the two collectives that natgrad needs of them: sum and gather."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from natgrad.errors import UnsupportedError


@dataclass(frozen=True)
class Replicas:
    """Processes with equal parameters, among which every batch is divided.

    Every method is a collective: all processes call it, in the same order. With one process each is the identity and
    touches no tensor.

    Args:
        group: the process group; None for a single process.
    """

    group: dist.ProcessGroup | None = None

    @staticmethod
    def of(model: nn.Module) -> tuple[nn.Module, Replicas]:
        """The network inside ``model`` and the processes that hold a copy of it.

        A ``DistributedDataParallel`` model is watched at the module it wraps, so that natgrad's own passes never wake
        its reducer.

        Raises:
            UnsupportedError: the parameters are sharded, or the model is an ``nn.DataParallel``.
        """
        called: Any = model
        while hasattr(called, "_torchdynamo_orig_callable") and isinstance(
            getattr(called, "_orig_mod", None), nn.Module
        ):
            called = called._orig_mod  # inside of what torch.compile returned
        if isinstance(called, DistributedDataParallel):
            return called.module, Replicas(called.process_group)
        kind = type(called).__name__
        sharded = next((n for n, p in model.named_parameters() if hasattr(p, "device_mesh")), None)
        if sharded is not None or kind == "FullyShardedDataParallel":
            raise UnsupportedError(
                f"The parameters of this model are sharded over processes ({sharded or kind}), so that no process sees "
                "a whole layer, which curvature is made of. Wrap the model in DistributedDataParallel instead."
            )
        if isinstance(called, nn.DataParallel):
            raise UnsupportedError(
                "nn.DataParallel runs copies of the model that cannot be observed. Use DistributedDataParallel, with "
                "one process per device."
            )
        return model, Replicas()

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to travel between the processes."""
        nccl = self.group is not None and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is true in any process. Waits for the device."""
        if self.group is None:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in raised.tolist()]

    def sum(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the processes, the same bits everywhere; one collective per dtype."""
        found = list(tensors)
        if self.group is None:
            return found
        out: list[Tensor] = list(found)
        for indices in _by_dtype(found).values():
            flat = torch.cat([found[i].reshape(-1) for i in indices])
            dist.all_reduce(flat, group=self.group)
            for i, part in zip(indices, flat.split([found[i].numel() for i in indices]), strict=True):
                out[i] = part.view(found[i].shape)
        return out

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, in the order of ranks. It may hold tensors anywhere; they travel as tensors.

        Tensors arrive on the device on which this process keeps its own.
        """
        if self.group is None:
            return [value]
        text, tensors = _pickled(value)
        described: list[Any] = [None] * self.size
        dist.all_gather_object(described, (text, [(t.shape, t.dtype) for t in tensors]), group=self.group)
        device = tensors[0].device if tensors else self.device
        values = []
        for rank, (content, kinds) in enumerate(described):
            own = tensors if rank == self.rank else [torch.empty(s, dtype=d, device=device) for s, d in kinds]
            values.append(_unpickled(content, self._broadcast(own, rank)))
        return values

    def _broadcast(self, tensors: list[Tensor], rank: int) -> list[Tensor]:
        assert self.group is not None
        out = list(tensors)
        for indices in _by_dtype(tensors).values():
            flat = torch.cat([tensors[i].reshape(-1) for i in indices])
            dist.broadcast(flat, group=self.group, group_src=rank)
            # The sender, too, goes on with the copy: its own strides would lead to other bits in later products.
            for i, part in zip(indices, flat.split([tensors[i].numel() for i in indices]), strict=True):
                out[i] = part.view(tensors[i].shape)
        return out


def _by_dtype(tensors: list[Tensor]) -> dict[torch.dtype, list[int]]:
    kinds: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault(tensor.dtype, []).append(i)
    return kinds


def _pickled(value: Any) -> tuple[bytes, list[Tensor]]:
    """``value`` as text with its tensors taken out, so that they need not pass through the host's memory as bytes."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, Tensor):
                return None
            tensors.append(obj.detach())
            return len(tensors) - 1

    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue(), tensors


def _unpickled(text: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: int) -> Tensor:
            return tensors[pid]

    return Unpickler(io.BytesIO(text)).load()
