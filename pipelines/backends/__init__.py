"""Backends: encoded samples in, views out."""
