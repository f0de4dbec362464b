"""The structures that are planned, each with the preset that uses it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from natgrad.errors import ArgumentError
from natgrad.metric import BlockDiagonal, Dense, Diagonal, EigenKronecker, Gram, Kronecker, MatrixFree, Structure


@dataclass(frozen=True)
class Method:
    """A structure under the name that the command line gives it.

    Args:
        name: short name.
        structure: what is kept of the Fisher matrix.
        preset: name of the optimizer in natgrad.
        fitted: whether the preset measures its step (``QuadraticFit``), at about 1⅔ gradients a step.
        momentum: whether the preset keeps a sum of gradients.
        scheduled: whether statistics and inverses may be renewed less often than at every step.
        iterations: of conjugate gradients, where it takes any.
    """

    name: str
    structure: Structure
    preset: str
    fitted: bool = False
    momentum: bool = False
    scheduled: bool = True
    iterations: int = 0

    @property
    def intervals(self) -> tuple[int, int]:
        """The preset's own intervals of statistics and inverses."""
        return (1, 10) if self.scheduled and self.fitted else (1, 1)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("kfac", Kronecker(), "KFAC", fitted=True),
        Method("ekfac", EigenKronecker(), "EKFAC", fitted=True),
        Method("diagonal", Diagonal(), "DiagonalNGD", momentum=True),
        Method("block", BlockDiagonal(), "BlockNGD", fitted=True),
        Method("gram", Gram(), "GramNGD", fitted=True, scheduled=False),
        Method("dense", Dense(), "NGD", scheduled=False),
        Method("matrix-free", MatrixFree(), "TrustRegionNGD", scheduled=False, iterations=20),
    )
}


def method_of(structure: Structure | str) -> Method:
    """The method of that name or structure.

    Raises:
        ArgumentError: there is none.
    """
    if isinstance(structure, str):
        if structure in METHODS:
            return METHODS[structure]
        close = difflib.get_close_matches(structure.lower(), METHODS, n=1)
        raise ArgumentError(
            f"structure={structure!r} was given{f' (did you mean {close[0]!r}?)' if close else ''}; there are "
            f"{', '.join(METHODS)}."
        )
    for method in METHODS.values():
        if type(method.structure) is type(structure):
            return replace(method, structure=structure)
    raise ArgumentError(
        f"structure={structure!r} was given; it must be a Structure such as natgrad.Kronecker(), or one of "
        f"{', '.join(METHODS)}."
    )
