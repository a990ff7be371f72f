"""Versions that a result was made with."""

import platform
from importlib import metadata

from moco_fast import __version__

__all__ = ["versions_of"]


def versions_of(*names: str) -> dict[str, str]:
    """Return the versions of Python, of this project and of other distributions, by name.

    This project's is its own: run from a checkout that is only on the path, it has no metadata. Another distribution
    without any is "unknown".
    """
    return {"python": platform.python_version(), "moco-fast": __version__} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
