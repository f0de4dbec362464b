"""Step time, statistics and memory of natgrad beside torch's own optimizers. Run it with ``make bench``."""
