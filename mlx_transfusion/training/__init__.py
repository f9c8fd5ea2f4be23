"""Training: rows, pixels, batches, optimisation, checkpoints."""
