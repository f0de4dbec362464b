"""Likelihood and network joined: estimates, structures, and the metrics made of them."""

from natgrad.metric.bases import CholeskyQR, EighBases
from natgrad.metric.estimate import Empirical, Estimate, Exact, Factor, MonteCarlo, Signed
from natgrad.metric.fisher import Fisher, Metric
from natgrad.metric.hessian import Euclidean, Hessian
from natgrad.metric.kronecker import EigenKronecker, Kronecker
from natgrad.metric.operator import ParameterOperator, check_finite_output, fisher, hessian
from natgrad.metric.sampling import Sampling, SubBatch
from natgrad.metric.statistics import Bases, Basis, Moment, Moments, ProductStatistics, RowStatistics, Statistics
from natgrad.metric.storage import Packed, Unpacked
from natgrad.metric.structure import BlockDiagonal, Dense, Diagonal, Gram, MatrixFree, Structure, row_chunks
from natgrad.metric.widths import WidthLimits

__all__ = [
    "Bases",
    "Basis",
    "BlockDiagonal",
    "CholeskyQR",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "EighBases",
    "Empirical",
    "Estimate",
    "Euclidean",
    "Exact",
    "Factor",
    "Fisher",
    "Gram",
    "Hessian",
    "Kronecker",
    "MatrixFree",
    "Metric",
    "Moment",
    "Moments",
    "MonteCarlo",
    "Packed",
    "ParameterOperator",
    "ProductStatistics",
    "RowStatistics",
    "Sampling",
    "Signed",
    "Statistics",
    "Structure",
    "SubBatch",
    "Unpacked",
    "WidthLimits",
    "check_finite_output",
    "fisher",
    "hessian",
    "row_chunks",
]
