"""What limits a machine: the stages of a run measured apart, then together, and a verdict."""
