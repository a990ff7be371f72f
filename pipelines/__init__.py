"""Data pipeline: shards in, views of every sample out."""
