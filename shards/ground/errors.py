"""How packing goes wrong: for one input, or for the whole command."""

__all__ = ["PackError", "RefusedError", "Rejected"]


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


class RefusedError(PackError):
    """A web server will not give one file, now or later.

    Args:
        message: what to tell where the file was needed.
        status: the server's answer, such as `403 Forbidden`.
    """

    # It crosses processes: what unpickles it calls this with the message alone, and puts the status back itself.
    def __init__(self, message: str, status: str = "") -> None:
        super().__init__(message)
        self.status = status
