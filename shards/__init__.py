"""Images in, WebDataset shards with index and manifest out."""

from shards.index import ShardSet
from shards.manifest import Manifest

__all__ = ["Manifest", "ShardSet"]
