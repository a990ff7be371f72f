"""Benchmark of a run on this machine: its stages measured separately, then together, and a verdict."""
