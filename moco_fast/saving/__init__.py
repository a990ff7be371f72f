"""Saving of a run: when, from which memory, by which thread, and where else."""
