"""Linear operators, their inverses, and the numerics that keep both correct. Tensors only, no networks."""

from __future__ import annotations

from natgrad.linalg.basic import DenseMatrix, DiagonalMatrix, FunctionOperator, IdentityMatrix
from natgrad.linalg.block_stacks import BlockStacks, found_in, named_tensors
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
from natgrad.linalg.saddle_free import SaddleFree
from natgrad.linalg.solvers import CG, LU, Cholesky, Eigh, NewtonSchulz, Solver, Woodbury
from natgrad.linalg.stochastic import (
    SpectralDensity,
    hutch_plus_plus_trace,
    hutchinson_diagonal,
    hutchinson_trace,
    rademacher,
    slq_logdet,
    slq_trace,
    spectral_density,
)

__all__ = [
    "CG",
    "LU",
    "MATRICES",
    "BlockDiagonalMatrix",
    "BlockStacks",
    "Cholesky",
    "CholeskyInverse",
    "DenseMatrix",
    "DiagonalMatrix",
    "DiagonalPlusLowRank",
    "EigenMatrix",
    "Eigh",
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
    "SaddleFree",
    "ScaledOperator",
    "SolveReport",
    "Solver",
    "SpectralDensity",
    "SumOperator",
    "TransposedOperator",
    "Woodbury",
    "WoodburyInverse",
    "check_damping",
    "conjugate_gradient",
    "damping_floor",
    "found_in",
    "hutch_plus_plus_trace",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "lanczos",
    "named_tensors",
    "newton_schulz_inverse",
    "power_iteration",
    "rademacher",
    "safe_cholesky",
    "safe_eigh",
    "slq_logdet",
    "slq_trace",
    "spectral_density",
    "symmetrise",
    "tridiagonal",
    "working_dtype",
]
