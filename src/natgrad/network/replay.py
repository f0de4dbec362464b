"""Run an observed forward pass again, at the same or other parameters, leaving no trace.

BatchNorm's running statistics are changed in copies, random streams are put back, and observers look away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from natgrad.errors import StaleTapeError, UnsupportedError
from natgrad.network.checkpointing import never_reentrant
from natgrad.network.partition import trainable_parameters
from natgrad.network.process_wide import ProcessWide
from natgrad.network.tape import Tape, as_arguments, clearer, output_tensor, recording


def _eager() -> AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


# Compiled modules run as they were written: a compiled backward pass can be differentiated once only.
_EAGER = ProcessWide(_eager)
# Of the kernels of attention, this alone can be differentiated twice.
_MATH_ATTENTION = ProcessWide(lambda: sdpa_kernel(SDPBackend.MATH))
_NEVER_REENTRANT = ProcessWide(never_reentrant)
_replaying: ContextVar[bool] = ContextVar("natgrad_replaying", default=False)


def is_replaying() -> bool:
    """True inside a forward pass that natgrad itself runs."""
    return _replaying.get()


@dataclass(frozen=True)
class RandomState:
    """State of the global random streams before a forward pass, so that a replay draws the same dropout masks."""

    cpu: Tensor
    device: torch.device | None
    accelerator: Tensor | None

    @staticmethod
    def capture(device: torch.device) -> RandomState:
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), device if device.type == "cuda" else None, accelerator)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)  # type: ignore[arg-type]


@contextmanager
def random_state(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Draw from ``state`` inside; afterwards the user's streams stand where they stood."""
    before = RandomState.capture(device)
    if state is not None:
        state.restore()
    try:
        yield
    finally:
        before.restore()


@dataclass(frozen=True)
class Pass:
    """An observed forward pass that can be run again.

    Args:
        model: the network.
        args: positional arguments.
        kwargs: keyword arguments.
        random: state of the random streams before the pass (None where none was kept).
        select: how the observed output tensor is found in what the model returns.
        autocast: dtype of the automatic mixed precision that the pass ran under; None for whatever is in force.
        versions: of the input tensors before the pass, to notice when one is changed in place.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: RandomState | None = None
    select: Callable[[Any], Tensor | None] = output_tensor
    autocast: torch.dtype | None = None
    versions: tuple[int, ...] | None = None

    @staticmethod
    def begin(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        """The pass that is about to run, with the conditions it runs under."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        random = RandomState.capture(device)
        kind = device.type
        # float32 stands for: no mixed precision, even if the replay happens inside an autocast region.
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        return Pass(model, args, kwargs, random, autocast=autocast, versions=_versions(args, kwargs))

    @contextmanager
    def _conditions(self, device: torch.device) -> Iterator[None]:
        mixed = self.autocast is not None and self.autocast != torch.float32
        casting = nullcontext()
        if self.autocast is not None and (mixed or torch.is_autocast_enabled(device.type)):
            dtype = self.autocast if mixed else None
            casting = torch.autocast(device.type, dtype=dtype, enabled=mixed, cache_enabled=False)
        with random_state(self.random, device), casting:
            yield

    def run(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output at ``parameters`` (qualified name → tensor; those not given stay as they are)."""
        with _MATH_ATTENTION:
            return self._again(parameters)

    def tape(self) -> Tape:
        """What the layers see when the pass is run again, as they were written, with the attention it ran with."""
        with torch.enable_grad(), recording(self.model) as tape:
            tape.output = self._again()
        return tape

    @contextmanager
    def again(self) -> Iterator[Tape]:
        """The tape of a second run."""
        yield self.tape()

    def tensors(self) -> list[Any]:
        """The tensors among the arguments, in order, and None for what is none."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [t if isinstance(t, Tensor) and t.layout == torch.strided else None for t in leaves]

    def of_examples(self, index: Tensor, places: Collection[int]) -> Pass:
        """The pass of the examples ``index`` alone, which are along the first axis of the tensors at ``places``."""
        self._check_unchanged()
        leaves, form = pytree.tree_flatten((self.args, dict(self.kwargs)))
        for i in places:
            taken = leaves[i].detach().index_select(0, index.to(leaves[i].device))
            leaves[i] = taken.requires_grad_(leaves[i].requires_grad)
        args, kwargs = pytree.tree_unflatten(leaves, form)
        return replace(self, args=args, kwargs=kwargs, versions=None)

    def _check_unchanged(self) -> None:
        if self.versions is not None and self.versions != _versions(self.args, self.kwargs):
            raise StaleTapeError(
                "An input of the observed forward pass has been changed in place since, so that the pass cannot be run "
                "again to measure it. Give the model a copy of a tensor that is reused, and no in-place operation on "
                "its input."
            )

    def _again(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        self._check_unchanged()
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        device = next(self.model.parameters()).device
        token = _replaying.set(True)
        try:
            with self._conditions(device), _EAGER, _NEVER_REENTRANT:
                output = functional_call(self.model, {**buffers, **(parameters or {})}, self.args, dict(self.kwargs))
        finally:
            _replaying.reset(token)
        selected = self.select(output)
        if selected is None:
            raise UnsupportedError(f"The model returned {type(output).__name__}; natgrad needs a tensor output.")
        return selected


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` or a module in it runs as a compiled graph, inside which no hook of a layer fires."""
    return "torch._dynamo" in sys.modules and any(_runs_compiled(module) for module in model.modules())


def _runs_compiled(module: nn.Module) -> bool:
    forward = getattr(module, "forward", None)  # compiled by itself, or that of what torch.compile(module) returns
    compiled = hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
    return compiled or module._compiled_call_impl is not None


def full_precision(device: torch.device) -> torch.autocast:
    """Outside of automatic mixed precision: products of statistics are not the user's to round."""
    # Without torch's cache of low-precision weights: it would outlive the parameters it was made of.
    return torch.autocast(device.type, enabled=False, cache_enabled=False)


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Low-precision copies of the parameters are made anew inside, and none of them is left behind.

    torch keeps them until the outermost autocast region ends, whatever happens to the parameters meanwhile.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def record(model: nn.Module, x: Any) -> Tape:
    """Run ``model`` on ``x`` without side effects and return the tape.

    Args:
        model: the network, in whatever mode it is.
        x: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        UnsupportedError: the output is neither a tensor nor has one called ``logits``.
    """
    args, kwargs = as_arguments(x)
    observed = Pass(model, args, kwargs)
    with torch.enable_grad(), recording(model) as tape:
        tape.output = observed.run()
    return tape


class Linearization:
    """The Jacobian of an observed pass as a pair of products, ``J v`` and ``Jᵀ u``, from one graph.

    ``Jᵀ u`` is a backward pass; ``J v`` differentiates ``Jᵀ u``, which is linear in ``u``, once more. Where either runs
    in float16, the vector is brought to a largest entry of 1/2 to 1 first, by a power of two, and the product back:
    vectors of a solve know no bounds, float16 ends at 65504.
    """

    def __init__(self, observed: Pass) -> None:
        self.parameters = trainable_parameters(observed.model)
        with torch.enable_grad():
            self.output = observed.run()
            self._cotangent = torch.zeros_like(self.output, requires_grad=True)
            self._pulled = _differentiable_gradients(self.output, self.parameters.values(), self._cotangent)
        self._half = torch.float16 in {t.dtype for t in (self.output, *self.parameters.values())}

    def jvp(self, v: Mapping[str, Tensor]) -> Tensor:
        """``J v`` of the output's shape, for a tensor per parameter name; a missing one counts as zero."""
        pairs = [(g, v[n]) for g, n in zip(self._pulled, self.parameters, strict=True) if g is not None and n in v]
        pairs = [(g, t) for g, t in pairs if g.requires_grad]
        if not pairs:
            return torch.zeros_like(self.output)
        outputs, tangents = zip(*pairs, strict=True)
        exponent = _largest_exponent(tangents) if self._half else None
        grads = [_shifted(t, exponent, -1).to(g.dtype) for g, t in pairs]
        (out,) = torch.autograd.grad(outputs, self._cotangent, grads, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.output) if out is None else _shifted(out, exponent, 1)

    def vjp(self, u: Tensor) -> dict[str, Tensor]:
        """``Jᵀ u``: a tensor per parameter name, zero where the output does not depend on it."""
        exponent = _largest_exponent([u]) if self._half else None
        cotangent = _shifted(u, exponent, -1).to(self.output.dtype)
        grads = _gradients(self.output, self.parameters.values(), cotangent)
        return {name: _shifted(g, exponent, 1) for name, g in zip(self.parameters, grads, strict=True)}


def _largest_exponent(tensors: Iterable[Tensor]) -> Tensor:
    """e (0-d) such that the largest magnitude of all entries is in [2^(e−1), 2^e); 0 where none is finite."""
    largest = torch.stack([t.abs().amax().float() for t in tensors if t.numel()]).amax()
    exponent = torch.frexp(largest).exponent
    return torch.where(torch.isfinite(largest), exponent, torch.zeros_like(exponent))


def _shifted(t: Tensor, exponent: Tensor | None, sign: int) -> Tensor:
    """``t · 2^(sign · exponent)``, in float32 at least; ``t`` itself without an exponent."""
    if exponent is None:
        return t
    return torch.ldexp(t.to(torch.promote_types(t.dtype, torch.float32)), sign * exponent)


class HessianProducts:
    """Products with the Hessian of a scalar function of an observed pass's output."""

    def __init__(self, observed: Pass, loss: Callable[[Tensor], Tensor]) -> None:
        self.parameters = trainable_parameters(observed.model)
        with torch.enable_grad():
            value = loss(observed.run())
            self._gradient = _differentiable_gradients(value, self.parameters.values())

    def __call__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``H v``: a tensor per parameter name; a missing one in ``v`` counts as zero."""
        pairs = [(g, v[n]) for g, n in zip(self._gradient, self.parameters, strict=True) if g is not None and n in v]
        pairs = [(g, t.to(g.dtype)) for g, t in pairs if g.requires_grad]
        if not pairs:
            return {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        outputs, grads = zip(*pairs, strict=True)
        found = _gradients(outputs, self.parameters.values(), grads)
        return dict(zip(self.parameters, found, strict=True))


def _versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    return tuple(t._version for t in leaves if isinstance(t, Tensor) and not t.is_inference())


def _differentiable_gradients(
    output: Tensor, inputs: Any, cotangent: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(output, list(inputs), cotangent, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise clearer(error) from error


def _gradients(outputs: Any, inputs: Any, grad_outputs: Any) -> list[Tensor]:
    targets: Sequence[Tensor] = list(inputs)
    found = torch.autograd.grad(outputs, targets, grad_outputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, targets, strict=True)]
