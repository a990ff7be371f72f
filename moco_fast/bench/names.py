"""Names of times outside the step's parts."""

__all__ = ["REST", "WAITING"]

REST = "rest"
"""Time that belongs to no part."""
WAITING = "waiting for data"
"""Time between the end of a step and the start of the next."""
