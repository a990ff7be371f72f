"""Images in, WebDataset shards with index and manifest out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.sets.base import ShardSet
    from shards.sets.manifest import Manifest
    from shards.sets.registry import open_set as open  # noqa: A004 - shards.open is its public name

__all__ = ["Manifest", "ShardSet", "open"]

_PUBLIC = {
    "Manifest": "shards.sets.manifest:Manifest",
    "ShardSet": "shards.sets.base:ShardSet",
    "open": "shards.sets.registry:open_set",
}


def __getattr__(name: str) -> Any:
    # Loaded when used: `make-shards --help` and configuration modules need no numpy.
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
