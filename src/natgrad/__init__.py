"""natgrad: natural gradient descent for PyTorch."""

__version__ = "0.1.0"
