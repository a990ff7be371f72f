"""Shards: images in, WebDataset shards with index and manifest out, and what reads them.

Pack a folder of photos, and open what was packed:

    import shards

    shards.pack(shards.PackConfig(sources=("photos",), out="packed"))
    packed = shards.open("packed")
    print(packed.num_samples, packed.class_names)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.config import PackConfig
    from shards.ground.errors import PackError
    from shards.packing.finish import finish
    from shards.packing.pack import pack
    from shards.sets.base import ShardSet
    from shards.sets.manifest import Manifest
    from shards.sets.registry import open_set as open  # noqa: A004 - shards.open is its public name
    from shards.tools.verify import verify

__all__ = ["Manifest", "PackConfig", "PackError", "ShardSet", "finish", "open", "pack", "verify"]

_PUBLIC = {
    "Manifest": "shards.sets.manifest:Manifest",
    "PackConfig": "shards.config:PackConfig",
    "PackError": "shards.ground.errors:PackError",
    "ShardSet": "shards.sets.base:ShardSet",
    "finish": "shards.packing.finish:finish",
    "open": "shards.sets.registry:open_set",
    "pack": "shards.packing.pack:pack",
    "verify": "shards.tools.verify:verify",
}


def __getattr__(name: str) -> Any:
    # Loaded when used: `make-shards --help` and configuration modules need no numpy.
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
