"""Where images come from: each kind of source lists its inputs once, and later reads any one of them."""

from shards.sources.base import Columns, Input, Source, open_source, reopen_source

__all__ = ["Columns", "Input", "Source", "open_source", "reopen_source"]
