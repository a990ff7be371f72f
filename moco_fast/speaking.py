"""Which of several ranks says an error: the first one of each machine, where all ranks know it. Imports no torch."""

import os

__all__ = ["FailedAloneError", "is_known", "note_known", "note_met", "says"]

_KNOWN = "all ranks leave with this"


class FailedAloneError(RuntimeError):
    """What ends all ranks where one fails while the others wait for it in collectives: its text is that rank's reason.

    Args:
        reason: why that rank cannot go on.
        is_own: whether this rank is the one, and the first if there are several.
    """

    def __init__(self, reason: str, *, is_own: bool) -> None:
        super().__init__(reason)
        self.is_own = is_own


class _Met:
    have_met = False


def note_met(have_met: bool = True) -> None:
    """Note that this process has met the other ranks, from when on it may fail alone; or not, as a command begins."""
    _Met.have_met = have_met


def note_known(error: BaseException) -> None:
    """Note that all ranks know an error of this one's."""
    if not is_known(error):
        error.add_note(_KNOWN)


def is_known(error: BaseException) -> bool:
    """Return whether all ranks know an error."""
    return _KNOWN in getattr(error, "__notes__", ())


def says(error: BaseException) -> bool:
    """Return whether this process is the one to print an error.

    Before ranks meet, they check what all of them were told, and find the same.
    """
    if isinstance(error, FailedAloneError):
        return error.is_own
    is_first = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0
    return is_first or (_Met.have_met and not is_known(error))
