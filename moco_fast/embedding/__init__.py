"""Embedding: images in, one vector per image out; written to files, and searched."""
