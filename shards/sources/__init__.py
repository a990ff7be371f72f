"""Sources of images: each kind lists its inputs once, and later reads any one of them."""

from shards.sources.base import Aside, Found, Input, LabelSet, Source
from shards.sources.registry import open_source, reopen_source

__all__ = ["Aside", "Found", "Input", "LabelSet", "Source", "open_source", "reopen_source"]
