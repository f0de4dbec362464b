"""Linear operators, their inverses, and the numerics that keep both correct. Tensors only: no networks, no likelihoods."""

from __future__ import annotations

from natgrad.linalg.basic import DenseMatrix, DiagonalMatrix, FunctionOperator, IdentityMatrix
from natgrad.linalg.compose import (
    BlockDiagonalMatrix,
    ProductOperator,
    ScaledOperator,
    SumOperator,
    TransposedOperator,
)
from natgrad.linalg.factored import CholeskyInverse, EigenMatrix, LUInverse
from natgrad.linalg.iterations import (
    conjugate_gradient,
    lanczos,
    newton_schulz_inverse,
    power_iteration,
    tridiagonal,
)
from natgrad.linalg.kronecker import KroneckerEigen, KroneckerProduct
from natgrad.linalg.low_rank import DiagonalPlusLowRank, LowRankMatrix, WoodburyInverse
from natgrad.linalg.matrices import MATRICES
from natgrad.linalg.operator import Inverse, LinearOperator, SolveReport, check_damping
from natgrad.linalg.psd import damping_floor, safe_cholesky, safe_eigh, symmetrise, working_dtype
from natgrad.linalg.solvers import CG, LU, Cholesky, Eigh, NewtonSchulz, Solver, Woodbury

__all__ = [
    "CG",
    "LU",
    "MATRICES",
    "BlockDiagonalMatrix",
    "Cholesky",
    "CholeskyInverse",
    "DenseMatrix",
    "DiagonalMatrix",
    "DiagonalPlusLowRank",
    "Eigh",
    "EigenMatrix",
    "FunctionOperator",
    "IdentityMatrix",
    "Inverse",
    "KroneckerEigen",
    "KroneckerProduct",
    "LUInverse",
    "LinearOperator",
    "LowRankMatrix",
    "NewtonSchulz",
    "ProductOperator",
    "ScaledOperator",
    "SolveReport",
    "Solver",
    "SumOperator",
    "TransposedOperator",
    "Woodbury",
    "WoodburyInverse",
    "check_damping",
    "conjugate_gradient",
    "damping_floor",
    "lanczos",
    "newton_schulz_inverse",
    "power_iteration",
    "safe_cholesky",
    "safe_eigh",
    "symmetrise",
    "tridiagonal",
    "working_dtype",
]
