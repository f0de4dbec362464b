"""Every matrix class in one place, and the table by which an optimizer saves and restores them."""

from __future__ import annotations

from typing import Any

from natgrad.linalg.basic import DenseMatrix, DiagonalMatrix, FunctionOperator, IdentityMatrix
from natgrad.linalg.factored import CholeskyInverse, EigenMatrix, LUInverse
from natgrad.linalg.kronecker import KroneckerEigen, KroneckerProduct
from natgrad.linalg.low_rank import DiagonalPlusLowRank, LowRankMatrix, WoodburyInverse

# kind -> class with ``tensors() -> dict[str, Tensor]`` and ``from_tensors(dict)``.
MATRICES: dict[str, Any] = {
    cls.kind: cls
    for cls in (
        IdentityMatrix,
        DiagonalMatrix,
        DenseMatrix,
        LowRankMatrix,
        DiagonalPlusLowRank,
        KroneckerProduct,
        KroneckerEigen,
        EigenMatrix,
        CholeskyInverse,
    )
}

__all__ = [
    "MATRICES",
    "CholeskyInverse",
    "DenseMatrix",
    "DiagonalMatrix",
    "DiagonalPlusLowRank",
    "EigenMatrix",
    "FunctionOperator",
    "IdentityMatrix",
    "KroneckerEigen",
    "KroneckerProduct",
    "LUInverse",
    "LowRankMatrix",
    "WoodburyInverse",
]
