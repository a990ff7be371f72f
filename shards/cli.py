"""The `make-shards` command."""
