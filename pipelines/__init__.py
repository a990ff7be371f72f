"""Shards in, two augmented views of every sample out."""
