"""Training loop and its parts: construction, metrics, folder, runtime."""
