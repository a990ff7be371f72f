"""Names of times that are no part of the step."""

__all__ = ["REST", "WAITING"]

REST = "rest"
"""Time that belongs to no part."""
WAITING = "waiting for data"
"""Between the end of a step and the start of the next."""
