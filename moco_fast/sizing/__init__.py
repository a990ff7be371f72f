"""What a run at scale needs: storage, rates, time, checkpoints and cost."""
