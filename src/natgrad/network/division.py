"""Whether examples of a batch may be run by themselves: found by doing it, not told from the model's type.

A part of the batch stands for itself where every layer sees in it what it saw of the same examples in the whole. Where
a pass draws numbers (dropout) they differ between two passes of the whole as well; the comparison is then made with
dropout modules switched off, and if numbers are still drawn with all modules in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from natgrad.network.replay import Pass
from natgrad.network.tape import Tape

_DROPOUT = nn.modules.dropout._DropoutNd
_MODES: tuple[Callable[[nn.Module], bool], ...] = (
    lambda module: False,
    lambda module: isinstance(module, _DROPOUT),
    lambda module: True,
)


@dataclass(frozen=True)
class Division:
    """How the batches of a model are divided.

    Args:
        places: which tensors among the arguments of a pass have the examples along their first axis.
        whole: why only whole batches may be run; empty where parts may.
    """

    places: tuple[int, ...] = ()
    whole: str = ""

    def part(self, observed: Pass, n: int, index: Tensor) -> Pass | None:
        """The pass of the examples ``index`` of n; None where this batch cannot be divided."""
        tensors = observed.tensors()
        fits = all(i < len(tensors) and tensors[i] is not None and tensors[i].shape[:1] == (n,) for i in self.places)
        return observed.of_examples(index, self.places) if fits and self.places and not self.whole else None


def division_of(observed: Pass, tape: Tape) -> Division | None:
    """How to divide batches like the observed one, of which ``tape`` is left; None where that cannot be told yet."""
    assert tape.output is not None
    n = tape.output.shape[0]
    if n < 2:
        return None
    places = tuple(i for i, t in enumerate(observed.tensors()) if t is not None and t.dim() and t.shape[0] == n)
    return Division(places, _why_whole(observed, tape, places, n))


def _why_whole(observed: Pass, tape: Tape, places: tuple[int, ...], n: int) -> str:
    coupled = [name for name, m in observed.model.named_modules() if _couples(m)]
    if coupled:
        return f"{coupled[0]} normalises by the batch's own statistics"
    if not places:
        return f"no argument of the model has the {n} examples along its first axis"
    index = torch.arange(1, n, 2)
    part = observed.of_examples(index, places)
    for switched in _MODES:
        with _evaluating(observed.model, switched):
            whole = tape if switched is _MODES[0] else observed.tape()
            try:
                alone = part.tape()
            except Exception as error:  # whatever a model does where it is given half of its batch
                return f"the model does not run on a part of it ({type(error).__name__})"
            if _agree(whole, alone, index, n):
                return ""
            other = replace(observed, random=None).tape()  # with numbers drawn from another place
            if _agree(whole, other, torch.arange(n), n):
                return "the model couples its examples: run by themselves, they are not what they are in the batch"
    return "the model draws numbers in evaluation mode too, so that it cannot be seen whether it couples its examples"


def _couples(module: nn.Module) -> bool:
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or module.running_mean is None)


@contextmanager
def _evaluating(model: nn.Module, which: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Some modules of ``model`` in evaluation mode inside."""
    switched = [m for m in model.modules() if m.training and which(m)]
    try:
        for module in switched:
            module.training = False
        yield
    finally:
        for module in switched:
            module.training = True


def _agree(whole: Tape, part: Tape, index: Tensor, n: int) -> bool:
    """Whether the layers' inputs and the output in ``part`` are those of the examples ``index`` in ``whole``."""
    assert whole.output is not None and part.output is not None
    pairs = [(whole.output.detach(), part.output.detach())]
    for layer, uses in whole.uses.items():
        found = part.uses.get(layer, [])
        if len(found) == len(uses):
            pairs += [(a.input, b.input) for a, b in zip(uses, found, strict=True)]
    return all(_same(a, b, index.to(a.device), n) for a, b in pairs)


def _same(whole: Tensor, part: Tensor, index: Tensor, n: int) -> bool:
    if whole.dim() != part.dim():
        return False
    axes = [i for i in range(whole.dim()) if whole.shape[i] != part.shape[i]]
    if axes:
        (axis, *others), k = axes, whole.shape[axes[0]] // n
        if others or whole.shape[axis] != n * k or part.shape[axis] != len(index) * k:
            return True  # tokens that were picked inside the model: nothing to compare them with
        whole = whole.unflatten(axis, (n, k)).index_select(axis, index).flatten(axis, axis + 1)
    if not whole.is_floating_point():
        return torch.equal(whole, part)
    tolerance = 5e-2 if whole.dtype in (torch.float16, torch.bfloat16) else 1e-3
    whole, part = whole.float(), part.float()
    return bool(torch.linalg.vector_norm(whole - part) <= tolerance * torch.linalg.vector_norm(whole))
