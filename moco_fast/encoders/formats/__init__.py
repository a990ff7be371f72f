"""Formats: where an encoder can come from, one file each."""
