"""The `moco-fast` command."""
