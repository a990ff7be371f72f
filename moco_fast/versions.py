"""Versions that a result was made with."""

import platform
import sys
from importlib import metadata

__all__ = ["versions_of"]


def versions_of(*names: str) -> dict[str, str]:
    """Return the versions of Python, of this project and of other distributions, by name.

    This project's is its own: run from a checkout that is only on the path, it has no metadata. Another distribution
    without any is "unknown".
    """
    # From the package as it is loaded: importing it by name would count as a dependence on all that it exports.
    own: str = sys.modules["moco_fast"].__version__
    return {"python": platform.python_version(), "moco-fast": own} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
