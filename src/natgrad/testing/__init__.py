"""What tests of natgrad, and of code built on it, compare with: oracles, output families and a zoo of models."""
