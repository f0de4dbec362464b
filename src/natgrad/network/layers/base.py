"""What a layer rule is: how a module's parameters enter its output, in one canonical layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from natgrad.network.rows import Rows


@dataclass(frozen=True)
class Layout:
    """How the parameters of a layer make one vector.

    Args:
        groups: with a weight matrix, the number of independent matrices (grouped convolution); 0 for parameters that
            are plainly concatenated. A matrix is ``[out, in]``, with its bias as last column.
        transposed: whether the weight is stored as ``[in, out / groups, *kernel]``.
        table: whether the matrix is a table of which inputs choose rows (``[vocabulary, width]``).
        mixed: whether the matrix serves as a table and as a weight (an output head tied to an embedding).
    """

    groups: int = 0
    transposed: bool = False
    table: bool = False
    mixed: bool = False


class LayerRule(ABC):
    """How one kind of module maps inputs and output gradients to Jacobian rows."""

    plain: ClassVar[bool] = False
    """Whether the inputs of rows follow from what the layer saw and which parameters are trainable alone."""

    @abstractmethod
    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the module's own parameters that the rule understands, weight first."""

    @abstractmethod
    def rows(self, module: nn.Module, x: Tensor, g: Tensor, trainable: tuple[str, ...]) -> Rows:
        """Rows of the Jacobian for the module's ``trainable`` parameters.

        Args:
            module: the layer.
            x: the input of one use of the layer.
            g: gradients with respect to the output of that use, ``[K, *output.shape]``.
            trainable: the subset of :meth:`parameters` that requires a gradient, in that order.
        """

    def layout(self, module: nn.Module) -> Layout:
        """How the parameters make one vector; it must be that of :meth:`rows`."""
        return Layout()

    def parts(self, module: nn.Module) -> tuple[tuple[str, ...], ...]:
        """The parameters by matrix: a matrix and its bias are one part."""
        return (self.parameters(module),)

    def watch(self, module: nn.Module, note: Note) -> Callable[[], None] | None:
        """Watch the module by other means than its output, and return what ends it; None to be watched by its output.

        Args:
            module: the layer.
            note: takes every use, with the name inside ``module`` of the layer that is used ("" for the module).
        """
        return None


@dataclass(frozen=True)
class LayerUse:
    """One use of a layer.

    Args:
        input: what it saw.
        version: of the input, to notice when it is changed in place.
        edge: through which the gradient of its output arrives.
        rule: which gives the rows of this use; None for the layer's own.
        parameters: the layer's own names of those that took part; empty for all.
    """

    input: Tensor
    version: int
    edge: GradientEdge
    rule: LayerRule | None = None
    parameters: tuple[str, ...] = ()

    def concerns(self, names: tuple[str, ...]) -> bool:
        """Whether any of the layer's parameters called ``names`` took part."""
        return not self.parameters or any(n in self.parameters for n in names)


Note = Callable[[str, "LayerUse | None"], Any]
"""Takes a use of a layer with the layer's name inside the module that is watched; None for one without a graph."""
