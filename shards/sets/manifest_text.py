"""Text of manifest.json: one line per shard, so that a million of them are parsed without being objects at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from shards.sets.shard_table import ShardEntry

__all__ = ["FORMAT", "FORMAT_VERSION", "check_head", "lines_of", "parse", "split_head"]

FORMAT = "moco-fast-shards"
FORMAT_VERSION = 1

# JSON has no line breaks within strings, and what is below the top level is indented by more than one space.
_BEGIN, _END = b',\n "shards": [\n', b"\n ]\n}\n"
_BETWEEN = b",\n"
_CHUNK_BYTES = 1 << 20


def lines_of(shards: Iterable[ShardEntry]) -> bytes:
    """Return the text from the list of shards on; before it comes that of a JSON object that is not closed."""
    lines = ("  " + json.dumps(vars(shard), ensure_ascii=False) for shard in shards)
    return _BEGIN + ",\n".join(lines).encode() + _END


def split_head(text: bytes) -> tuple[dict[str, Any], int] | None:
    """Return what stands before the list of shards, and where that begins; None where the text is not laid out so."""
    begin = text.find(_BEGIN)
    if begin < 0:
        return None
    try:
        return cast("dict[str, Any]", json.loads(text[:begin] + b"}")), begin
    except ValueError:
        return None


def parse(text: bytes) -> tuple[object, Iterator[list[Mapping[str, Any]]]]:
    """Parse a manifest in any layout.

    Returns:
        what stands beside the list of shards, and that list, chunk by chunk.

    Raises:
        ValueError: it is not JSON; or KeyError: it has no shards; both also while the chunks are taken.
    """
    split = split_head(text)
    if split is None or not text.endswith(_END):
        values: Any = json.loads(text)
        return values, (each["shards"] for each in (values,))
    return split[0], _chunks(text, split[1] + len(_BEGIN), len(text) - len(_END))


def check_head(values: object, where: str) -> dict[str, Any]:
    """Return what was parsed, if it is of a manifest that this code reads. Raises ValueError."""
    if not isinstance(values, dict) or cast("dict[str, Any]", values).get("format") != FORMAT:
        raise ValueError(f"{where} was not written by make-shards: point to a folder that make-shards packed")
    values = cast("dict[str, Any]", values)
    if values.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{where} has version {values.get('version')}, this code reads version {FORMAT_VERSION}: "
            "pack again, or use the moco-fast that wrote it"
        )
    return values


def _chunks(text: bytes, begin: int, end: int) -> Iterator[list[Mapping[str, Any]]]:
    while begin < end:
        stop = text.find(_BETWEEN, min(begin + _CHUNK_BYTES, end), end)
        stop = end if stop < 0 else stop
        yield json.loads(b"[" + text[begin:stop] + b"]")
        begin = stop + len(_BETWEEN)
