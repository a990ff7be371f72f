"""Optimizers by name, ours and those of libraries, and their state."""
