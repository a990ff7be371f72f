"""Files that start a run on a cluster: what they share, and one file per scheduler."""
