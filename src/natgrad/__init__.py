"""natgrad: natural gradient descent for PyTorch."""

from natgrad import linalg
from natgrad.likelihood import Bernoulli, Categorical, FromDistribution, Gaussian, Likelihood, Poisson, Weighted
from natgrad.metric import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Empirical,
    Euclidean,
    Exact,
    Fisher,
    Gram,
    Hessian,
    Kronecker,
    MatrixFree,
    MonteCarlo,
    Signed,
    fisher,
    hessian,
)

__version__ = "0.1.0"
