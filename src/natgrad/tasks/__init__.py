"""Tasks on real data, and the engine that compares optimizers on them."""
