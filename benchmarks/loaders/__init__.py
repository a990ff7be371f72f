"""Contestants of benchmarks/loader.py: one file each, and a line in `registry.py`."""
