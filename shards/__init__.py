"""Images in, WebDataset shards with index and manifest out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.sets.index import ShardSet
    from shards.sets.manifest import Manifest

__all__ = ["Manifest", "ShardSet"]

_MODULES = {"Manifest": "shards.sets.manifest", "ShardSet": "shards.sets.index"}


def __getattr__(name: str) -> Any:
    # Loaded when used: `make-shards --help` and configuration modules need no numpy.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
