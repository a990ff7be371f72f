"""Errors of packing and of the ground floor, and how an error crosses from one process to another."""

import pickle
import traceback

__all__ = [
    "AmbiguousLabelsError",
    "ExpiredError",
    "InUseError",
    "PackError",
    "RefusedError",
    "Rejected",
    "UnrenewedError",
    "portable",
]


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
    """Packing cannot continue; finished shards are kept, and the same command continues from there."""


class AmbiguousLabelsError(ValueError):
    """Which labels are wanted has to be chosen; the message names the choices."""


class InUseError(PackError):
    """Another process has locked a file or folder."""


class ExpiredError(PackError):
    """Credentials have expired that cannot be renewed while this process runs."""


class RefusedError(PackError):
    """A web server refuses one file for good.

    Args:
        message: what to report where the file was needed.
        status: the server's answer, such as `403 Forbidden`.
    """

    # It crosses processes: what unpickles it calls this with the message alone, and puts the status back itself.
    def __init__(self, message: str, status: str = "") -> None:
        super().__init__(message)
        self.status = status


class UnrenewedError(PackError):
    """Credentials have ended or could not be renewed, which a login or a service that is back may change."""


def portable(error: Exception, where: str) -> Exception:
    """Return an error that can be sent to another process, with its traceback as a note.

    Args:
        error: the error; one that cannot be pickled becomes a RuntimeError that names it.
        where: where it was raised, such as `in a worker process`.
    """
    # The end says most, and messages are small.
    note = f"{where}:\n" + "".join(traceback.format_exception(error))[-8000:]
    error.__cause__ = error.__context__ = error.__traceback__ = None
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - what this line has just made
    # Whatever a class of someone else's does when it is copied.
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error
