"""How packing goes wrong: for one input, or for the whole command."""

__all__ = ["PackError", "Rejected"]


class Rejected(Exception):  # noqa: N818 - an outcome of packing, not an error
    """An input that cannot be packed.

    Args:
        reason: one of a few words, for tallies.
        detail: what exactly.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class PackError(ValueError):
    """Packing cannot go on; what is finished stays, and the same command continues from there."""
