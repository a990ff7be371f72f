"""Beton files: FFCV's file format, written so that the file is a whole set by itself.

    header                       24 bytes
    3 field descriptors          image (JPEG), label, index; the first one's arguments hold our own JSON
    metadata                     32 bytes per sample: size and place of its image, its label, its dense number
    images                       byte for byte as in the shards, none across the border of a page
    index records                those of the shards, with offsets into this file
    manifest                     that of the shards
    allocation table             24 bytes per sample, up to the end of the file

FFCV reads the first four and the last; everything else here reads the index and the manifest, so a `.beton` stands
where a folder of shards does, and order and parameters of augmentation are the same. Layout: ffcv 1.0.2, ffcv/types.py.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np

from shards.ground.arrays import Indices, Records
from shards.sets.base import BaseSet, SetKind
from shards.sets.manifest import Manifest
from shards.sets.record import RECORD
from shards.sets.shard_file import LocalShardFile, ShardFile

__all__ = [
    "ALLOCATION",
    "FIELDS",
    "METADATA",
    "METADATA_AT",
    "PAGE_BYTES",
    "BetonSet",
    "Layout",
    "build_head",
]

_FORMAT = "moco-fast-beton"
_FORMAT_VERSION = 1
_FFCV_VERSION = 2
_IMAGE_TYPE, _INTEGER_TYPE = 2, 1

FIELDS = ("image", "label", "index")
"""Names of the fields, as FFCV knows them."""

PAGE_BYTES = 8 << 20
"""FFCV's own default; larger where an image is."""

_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("f0", _IMAGE), ("f1", "<i8"), ("f2", "<i8")], align=True)
"""What FFCV reads per sample: image (mode 0: JPEG), label, index."""
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
"""One run of bytes in the file, and whose it is."""

METADATA_AT = _HEADER.itemsize + len(FIELDS) * _FIELD.itemsize
"""Byte at which the metadata begins."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Offsets of those parts of the file that FFCV does not know."""

    num_samples: int
    records_at: int
    """Byte at which the index records begin."""
    manifest_at: int
    """Byte at which the manifest begins."""
    allocations_at: int
    """Byte at which the manifest ends and FFCV's allocation table begins."""
    digest: str
    """xxh3_128, in hex, of metadata, index records, manifest and allocation table."""

    @property
    def is_sound(self) -> bool:
        """Whether the numbers fit each other."""
        return (
            self.records_at >= METADATA_AT + self.num_samples * METADATA.itemsize
            and self.manifest_at == self.records_at + self.num_samples * RECORD.itemsize
            and self.allocations_at > self.manifest_at
        )

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.allocations_at + self.num_samples * ALLOCATION.itemsize


def build_head(layout: Layout, *, page_bytes: int) -> bytes:
    """Return the header and field descriptors."""
    header = np.zeros(1, dtype=_HEADER)
    header["version"], header["num_fields"] = _FFCV_VERSION, len(FIELDS)
    header["page_size"], header["num_samples"] = page_bytes, layout.num_samples
    header["alloc_table_ptr"] = layout.allocations_at
    fields = np.zeros(len(FIELDS), dtype=_FIELD)
    fields["type_id"] = (_IMAGE_TYPE, _INTEGER_TYPE, _INTEGER_TYPE)
    for field, name in zip(fields, FIELDS, strict=True):
        field["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
    ours = json.dumps({"format": _FORMAT, "version": _FORMAT_VERSION, **asdict(layout)}).encode()
    fields[0]["arguments"][: len(ours)] = np.frombuffer(ours, dtype=np.uint8)
    return header.tobytes() + fields.tobytes()


class BetonSet(BaseSet):
    """A `.beton` as a set of shards: the same samples under the same numbers, all in one file.

    Args:
        path: the file.
        manifest: that of the shards it was made of.
        layout: of the file.
    """

    kind: ClassVar[SetKind] = "beton"

    def __init__(self, path: Path, manifest: Manifest, layout: Layout) -> None:
        super().__init__(str(path), manifest)
        self.path = path
        self.layout = layout
        self.records: Records = np.memmap(
            path, dtype=RECORD, mode="r", offset=layout.records_at, shape=(layout.num_samples,)
        )
        """(num_samples,) of RECORD, by dense sample number; offsets are those in this file."""
        self._ends: Indices = np.cumsum(self.shard_sizes)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file that `make-shards beton` wrote.

        Raises:
            ValueError: no such file, one that FFCV's own writer made, a damaged one, or another format version.
        """
        path = Path(path)
        try:
            layout = _read_layout(path)
            with path.open("rb") as file:
                file.seek(layout.manifest_at)
                text = file.read(layout.allocations_at - layout.manifest_at)
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: `make-shards beton SHARDS --out {path}` writes it") from None
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        return cls(path, Manifest.from_json(text, where=str(path)), layout)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (BetonSet, (self.path, self.manifest, self.layout))

    def shard_name(self, shard: int) -> str:
        """Return the path of the file: it holds all shards."""
        del shard
        return self.where

    def open_shard(self, shard: int) -> ShardFile:
        """Open the file. Raises FileNotFoundError."""
        del shard
        return LocalShardFile(self.path)

    def index(self, shard: int) -> Records:
        """Return the records of what was a shard, (shard_sizes[shard],) of RECORD, memory-mapped read-only."""
        end = int(self._ends[shard])
        return self.records[end - int(self.shard_sizes[shard]) : end]


def _read_layout(path: Path) -> Layout:
    with path.open("rb") as file:
        head = file.read(METADATA_AT)
        num_bytes = file.seek(0, 2)
    if len(head) < METADATA_AT or np.frombuffer(head, dtype=_HEADER, count=1)[0]["version"] != _FFCV_VERSION:
        raise ValueError(f"{path} is not a .beton: `make-shards beton SHARDS --out FILE.beton` writes one")
    field = np.frombuffer(head, dtype=_FIELD, count=1, offset=_HEADER.itemsize)[0]
    try:
        found: Any = json.loads(field["arguments"].tobytes().rstrip(b"\0") or b"{}")
    except ValueError:
        found = None
    values = cast("dict[str, Any]", found if isinstance(found, dict) else {})
    if values.pop("format", None) != _FORMAT:
        raise ValueError(
            f"{path} lacks the index that order and augmentation need: FFCV's own writer made it, or it is damaged; "
            "make it with `make-shards beton`"
        )
    if values.pop("version", None) != _FORMAT_VERSION:
        raise ValueError(f"{path} has another version than this code reads: write it again with `make-shards beton`")
    layout = _parse_layout(values, head)
    if layout is None:
        raise ValueError(f"{path} is damaged: its first {METADATA_AT} bytes contradict each other; write it again")
    if layout.num_bytes != num_bytes:
        raise ValueError(f"{path} has {num_bytes} bytes, not {layout.num_bytes}: it was cut; write or copy it again")
    return layout


def _parse_layout(values: dict[str, Any], head: bytes) -> Layout | None:
    """Build it from parsed JSON; None where that is not what `build_head` writes."""
    page_bytes = int(np.frombuffer(head, dtype=_HEADER, count=1)[0]["page_size"])
    try:
        layout = Layout(**values)
        return layout if build_head(layout, page_bytes=page_bytes) == head and layout.is_sound else None
    except (TypeError, ValueError, OverflowError):
        return None
