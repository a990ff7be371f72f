"""Tar archives of flavors that Python's tarfile does not write, header by header, and packings of sources in tests."""

import struct
from pathlib import Path

from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set
from shards.sets.manifest import Manifest
from shards.tools.verify import verify

END = bytes(1024)


def header(
    name: bytes,
    size: int | bytes = 0,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    rest: bytes = b"",
    signed: bool = False,
) -> bytes:
    """One block: name, size (a number, or the field's bytes), type, link, magic, and what follows at byte 345."""
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[100:124] = b"0000644\x000000000\x000000000\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:156] = b"00000000000\0" + b" " * 8
    block[156:157] = kind
    block[157:257] = link.ljust(100, b"\0")
    block[257 : 257 + len(magic)] = magic
    block[345 : 345 + len(rest)] = rest
    total = sum(struct.unpack("512b" if signed else "512B", block))
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    """A member's data with the zeros behind them."""
    return data + bytes(-len(data) % 512)


def member(name: bytes, data: bytes, kind: bytes = b"0", **options: object) -> bytes:
    """A header and its data."""
    return header(name, len(data), kind, **options) + padded(data)


def pax(fields: list[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    """An extended header."""
    lines = b""
    for key, value in fields:
        rest = b" %b=%b\n" % (key, value)
        length = len(rest) + 1
        while len(b"%d" % length) + len(rest) != length:
            length += 1
        lines += b"%d%b" % (length, rest)
    return member(b"./PaxHeaders/x", lines, kind)


def pack_all(tmp_path: Path, *sources: object, out: str = "out", **options: object) -> Manifest:
    """Pack into `tmp_path / out`, and check what is always true of a set."""
    config = PackConfig(
        sources=tuple(map(str, sources)), out=str(tmp_path / out), **{"workers": 1, "shard_samples": 100, **options}
    )
    manifest = pack(config)[""]
    assert verify(tmp_path / out) == []
    assert manifest.num_samples + manifest.num_rejected == manifest.num_inputs
    return manifest


def labels_of(folder: Path) -> dict[str, str | None]:
    """{end of a sample's source: name of its class} of a packed set."""
    shards = open_set(folder)
    found: dict[str, str | None] = {}
    for shard in range(shards.num_shards):
        lines = (Path(folder) / f"shard-{shard:06d}.sources.txt").read_text().splitlines()
        for record, source in zip(shards.index(shard), lines, strict=True):
            label = int(record["label"])
            found[source.rpartition("/")[2]] = shards.class_names[label] if label >= 0 else None
    return found
