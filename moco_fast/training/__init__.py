"""Training loop and its parts: construction, checkpoints, metrics, optimizers, runtime."""
