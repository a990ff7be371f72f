"""Parts of data sets that come in several, of which one is packed at a time."""

from collections.abc import Iterable

__all__ = ["chosen_part"]


def chosen_part(path: str, parts: Iterable[str], subset: str | None) -> str:
    """Return the part that was asked for, or the only one.

    Args:
        path: of the data set.
        parts: that it comes in.
        subset: as it was asked for.

    Raises:
        ValueError: there is no such part, or there are several and none was asked for.
    """
    names = sorted(parts)
    if subset in names:
        return subset
    if subset is not None:
        raise ValueError(f"--subset {subset}: {path} holds {', '.join(names)}")
    if len(names) > 1:
        raise ValueError(f"{path} holds {', '.join(names)}: choose one with --subset {names[0]}")
    return names[0]
