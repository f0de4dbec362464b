"""Measures what a step would do: KL and loss at other parameters, and exact curvature between directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.distributed import Replicas
from natgrad.likelihood import Likelihood
from natgrad.likelihood.base import Target
from natgrad.network import BlockVector, Linearization, Partition, Pass, RandomState, trainable_parameters
from natgrad.network.replay import random_state
from natgrad.optim.observer import Observation
from natgrad.step import Trial

# The levels of torch's forward mode belong to the process: two threads in it at once get wrong tangents, silently.
_FORWARD_MODE = Lock()


@dataclass(frozen=True)
class ModelProbe:
    """Evaluates the observed passes near the current parameters and leaves no trace.

    Args:
        model: the network.
        partition: maps block vectors to parameters.
        likelihood: what the output means.
        observations: the passes of this step.
        closure: where given, evaluates the loss; returns ``(loss, output)``.
        random: state of the random streams before the closure first ran.
        decay: weight decay w of parameters; the loss then includes ½ w ‖θ‖².
        sign: −1 where the loss is maximised: it is then the negative loss that is measured.
        replicas: the processes whose parts of the batch are measured together.
        part: the examples of a pass on which curvature is taken, as a pass of their own, and their indices ``[m]``;
            None for all of them.
    """

    model: nn.Module
    partition: Partition
    likelihood: Likelihood
    observations: Sequence[Observation]
    closure: Callable[[], tuple[Tensor, Tensor]] | None = None
    random: RandomState | None = None
    decay: Mapping[str, float] = field(default_factory=dict)
    sign: float = 1.0
    replicas: Replicas = Replicas()
    part: Callable[[Observation], tuple[Pass, Tensor] | None] = lambda observation: None

    @torch.no_grad()
    def __call__(self, delta: BlockVector) -> Trial:
        moved = self._moved(delta)
        if self.closure is not None:
            return self._through_closure(moved)
        kl, loss, total = 0.0, 0.0, 0.0
        known = all(o.target is not None for o in self.observations)
        for observation in self.observations:
            assert observation.output is not None
            new, old = observation.observed.run(moved), observation.output.detach()
            weights = self._weights(observation)
            kl = kl + self._sum(self.likelihood.kl(old, new), weights)
            total = total + (old[..., 0].numel() if weights is None else weights.sum())
            if known:
                loss = loss + self.likelihood.nll(new, observation.target).sum()  # type: ignore[arg-type]
        kl, loss, total = self._summed(kl, loss, total)
        return Trial(kl / total, self.sign * loss / total + self.penalty(moved) if known else None)

    def loss(self) -> Tensor | None:
        """Mean negative log-likelihood of the observed passes at the current parameters; None without targets."""
        if any(o.target is None for o in self.observations) or not self.observations:
            return None
        loss, total = 0.0, 0.0
        for observation in self.observations:
            assert observation.output is not None and observation.target is not None
            weights = self._weights(observation)
            loss = loss + self.likelihood.nll(observation.output.detach(), observation.target).sum()
            total = total + (observation.output[..., 0].numel() if weights is None else weights.sum())
        loss, total = self._summed(loss, total)
        return self.sign * loss / total + self.penalty()

    def averaged(self, loss: Tensor) -> Tensor:
        """The mean over processes of a closure's loss: what their averaged gradients are the gradient of."""
        return self.sign * self.replicas.sum([loss])[0] / self.replicas.size

    def penalty(self, moved: Mapping[str, Tensor] | None = None) -> float | Tensor:
        """½ Σ w ‖θ‖² with the parameters in ``moved`` in place of the present ones."""
        if not any(self.decay.values()):
            return 0.0
        parameters = {**trainable_parameters(self.model), **(moved or {})}
        return 0.5 * torch.stack([w * parameters[n].detach().square().sum() for n, w in self.decay.items() if w]).sum()

    def curvature(self, deltas: Sequence[BlockVector]) -> Tensor:
        gram: Tensor | float = 0.0
        total: Tensor | float = 0.0
        named = [self.partition.unpack(delta) for delta in deltas]
        for observation in self.observations:
            part = self.part(observation)
            observed, index = (observation.observed, None) if part is None else part
            with _FORWARD_MODE:
                f, pushed = _push(observed, named)
            target = _picked(observation.target, index)
            weights = None if target is None else self.likelihood.weights(f, target)
            # Examples of a part stand for those of the whole, so that unequal parts weigh as their batches do.
            copies = 1.0 if index is None else len(observation.output) / len(index)  # type: ignore[arg-type]
            total = total + copies * (f[..., 0].numel() if weights is None else weights.sum())
            factors = None
            if target is not None:
                factors = self.likelihood.curvature_weights(f, target)
            products = [self.likelihood.unweighted.fisher_matvec(f, u) for u in pushed]
            entries = [self._sum((u * p).sum(-1), factors) for u in pushed for p in products]
            gram = gram + copies * torch.stack(entries).reshape(len(pushed), len(pushed))
        gram, total = self._summed(gram, total)
        return gram / total

    def _summed(self, *values: float | Tensor) -> list[Tensor]:
        """Sums over this process's part of the batch, added up over all processes."""
        like = next(v for v in values if isinstance(v, Tensor))
        tensors = [
            torch.as_tensor(v, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device) for v in values
        ]
        return self.replicas.sum(tensors)

    def _moved(self, delta: BlockVector) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {n: parameters[n] + d.to(parameters[n].dtype) for n, d in self.partition.unpack(delta).items()}

    def _weights(self, observation: Observation) -> Tensor | None:
        if observation.target is None:
            return None
        assert observation.output is not None
        return self.likelihood.weights(observation.output, observation.target)

    @staticmethod
    def _sum(values: Tensor, weights: Tensor | None) -> Tensor:
        # A zero weight must silence its prediction even where the prediction is not finite.
        return values.sum() if weights is None else torch.where(weights == 0, 0.0, values * weights).sum()

    def _through_closure(self, moved: dict[str, Tensor]) -> Trial:
        assert self.closure is not None
        parameters = dict(self.model.named_parameters())
        kept = {n: parameters[n].clone() for n in moved}
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        device = next(iter(parameters.values())).device
        try:
            for name, value in moved.items():
                parameters[name].copy_(value)
            with random_state(self.random, device):
                loss, output = self.closure()
        finally:
            for name, value in kept.items():
                parameters[name].copy_(value)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        (observation,) = self.observations
        assert observation.output is not None
        weights = self._weights(observation)
        old = observation.output.detach()
        total: Any = old[..., 0].numel() if weights is None else weights.sum()
        kl, total = self._summed(self._sum(self.likelihood.kl(old, output), weights), total)
        return Trial(kl / total, self.averaged(loss.detach()) + self.penalty(moved))


def _picked(target: Target | None, index: Tensor | None) -> Target | None:
    """The labels (and weights) of the examples ``index``; of all where it is None."""
    if target is None or index is None:
        return target
    if isinstance(target, Tensor):
        return target.index_select(0, index.to(target.device))
    return tuple(t.index_select(0, index.to(t.device)) for t in target)  # type: ignore[return-value]


def _push(observed: Pass, vectors: Sequence[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """The output and ``J v`` for each vector."""
    parameters = {n: p.detach() for n, p in trainable_parameters(observed.model).items()}
    tangents = {
        n: torch.stack([v[n].to(p.dtype) if n in v else torch.zeros_like(p) for v in vectors])
        for n, p in parameters.items()
    }

    def push(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(observed.run, (parameters,), (tangent,))  # pyright: ignore

    try:
        if len(vectors) > 1:
            try:
                # All vectors share one forward pass; the random streams are replayed, so that masks are shared too.
                output, pushed = torch.vmap(push, out_dims=(None, 0), randomness="same")(tangents)  # pyright: ignore
                return output.detach(), list(pushed.detach())
            except (NotImplementedError, RuntimeError, ValueError):
                pass  # an operation that vmap does not know, or that looks at the values of tangents
        found = [push({n: t[i] for n, t in tangents.items()}) for i in range(len(vectors))]
        return found[0][0].detach(), [jv.detach() for _, jv in found]
    except (NotImplementedError, RuntimeError):
        # Some operations have no forward-mode derivative; two backward passes give the same product.
        linearization = Linearization(observed)
        zeros = {n: torch.zeros_like(p) for n, p in parameters.items()}
        return linearization.output.detach(), [linearization.jvp({**zeros, **v}).detach() for v in vectors]
