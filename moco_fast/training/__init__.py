"""Training: the loop and what it does at intervals."""
