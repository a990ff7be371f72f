"""Sets of shards: manifest, index, and the kinds of sets that readers open."""
