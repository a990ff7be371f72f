"""Sets of shards: manifest, records, and the kinds of sets that readers open."""

from shards.sets.base import ShardSet
from shards.sets.registry import open_set

__all__ = ["ShardSet", "open_set"]
