"""TFRecord files, and the `tf.train.Example` messages in them, read by ranges and without TensorFlow.

    length   8 bytes, little-endian, of the data
    crc      4 bytes: masked CRC-32C of the length
    data     a message
    crc      4 bytes: masked CRC-32C of the data

Files may be joined: a record follows the other, and nothing else is there.
Sources: "TFRecord and tf.train.Example" of TensorFlow's guide; tensorflow/core/example/feature.proto; "Encoding" of
protobuf's guide.
"""

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shards.ground.digests import masked_crc32c
from shards.storage.stores import SeekableFile

__all__ = ["Feature", "RecordError", "check_record", "features", "records"]

Read = Callable[[int, int], bytes]
"""(start, count) to bytes."""

_HEAD_BYTES, _CRC_BYTES = 12, 4
_MAX_VALUE_BYTES = 1 << 12
_KINDS = {1: "bytes", 2: "float", 3: "int"}
_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5


class RecordError(ValueError):
    """The bytes are not whole records, or not the message that was expected."""


def records(reader: SeekableFile) -> Iterator[tuple[int, int]]:
    """Return (offset, size) of the data of each record.

    Raises:
        RecordError: cut short, or a length that does not match its checksum; says at which byte.
    """
    at, end = 0, reader.file.size
    while at < end:
        head = reader.read_at(at, _HEAD_BYTES)
        if len(head) < _HEAD_BYTES:
            raise RecordError(f"a record at byte {at} is cut short")
        if int.from_bytes(head[8:], "little") != masked_crc32c(head[:8]):
            raise RecordError(f"the length of a record at byte {at} does not match its checksum")
        size = int.from_bytes(head[:8], "little")
        if at + _HEAD_BYTES + size + _CRC_BYTES > end:
            raise RecordError(f"a record of {size} bytes at byte {at} is cut short")
        yield at + _HEAD_BYTES, size
        at += _HEAD_BYTES + size + _CRC_BYTES


def check_record(data: bytes, crc: bytes) -> None:
    """Compare a record's data with what follows them. Raises RecordError."""
    if int.from_bytes(crc, "little") != masked_crc32c(data):
        raise RecordError("does not match its checksum in the TFRecord file")


class Feature(NamedTuple):
    """One feature of an Example, whose values are not read yet."""

    kind: str
    """bytes, float or int."""
    start: int
    """Where its list of values is."""
    stop: int

    def places(self, read: Read) -> list[tuple[int, int]]:
        """Return (start, stop) of each value of a feature of bytes. Raises RecordError."""
        return [(field.start, field.stop) for field in _fields(read, self.start, self.stop) if field.number == 1]

    def values(self, read: Read) -> list[bytes] | list[int] | list[float]:
        """Return the values, which must be short. Raises RecordError."""
        if self.stop - self.start > _MAX_VALUE_BYTES:
            raise RecordError(f"has {self.stop - self.start} bytes")
        if self.kind == "bytes":
            return [read(start, stop - start) for start, stop in self.places(read)]
        return [value for field in _fields(read, self.start, self.stop) for value in _numbers(read, self.kind, field)]


class _Field(NamedTuple):
    """A field of a message."""

    number: int
    wire: int
    start: int
    """First byte of its content."""
    stop: int
    value: int
    """Of a varint."""


def features(read: Read, start: int, stop: int) -> dict[str, Feature]:
    """Return the features of a `tf.train.Example` by name.

    Args:
        read: gives bytes of the file.
        start: where the message begins in it.
        stop: where it ends.

    Raises:
        RecordError: not such a message.
    """
    found: dict[str, Feature] = {}
    entries = (
        entry
        for message in _messages(read, start, stop, {1})
        for entry in _messages(read, message.start, message.stop, {1})
    )
    for entry in entries:
        name, feature = "", None
        for part in _messages(read, entry.start, entry.stop, {1, 2}):
            if part.number == 1:
                name = read(part.start, min(part.stop - part.start, _MAX_VALUE_BYTES)).decode("utf-8", "replace")
            else:
                lists = list(_messages(read, part.start, part.stop, _KINDS))
                feature = Feature(_KINDS[lists[-1].number], lists[-1].start, lists[-1].stop) if lists else None
        if feature is not None:
            found[name] = feature
    if not found:
        raise RecordError("is not a tf.train.Example, or one without features")
    return found


def _messages(read: Read, start: int, stop: int, numbers: "set[int] | dict[int, str]") -> Iterator[_Field]:
    """Return the fields of a message, all of which must be messages or texts of these numbers. Raises RecordError."""
    for field in _fields(read, start, stop):
        if field.wire != _LENGTH or field.number not in numbers:
            raise RecordError("is not a tf.train.Example")
        yield field


def _fields(read: Read, start: int, stop: int) -> Iterator[_Field]:
    """Return the fields between two bytes. Raises RecordError."""
    at = start
    while at < stop:
        tag, at = _varint(read, at, stop)
        number, wire = tag >> 3, tag & 7
        value = 0
        begin = at
        if wire == _VARINT:
            value, at = _varint(read, at, stop)
        elif wire == _LENGTH:
            size, begin = _varint(read, at, stop)
            at = begin + size
        elif wire in (_FIXED_32, _FIXED_64):
            at += 4 if wire == _FIXED_32 else 8
        else:
            raise RecordError("is not a message of protobuf")
        if at > stop:
            raise RecordError("is not a message of protobuf, or cut")
        yield _Field(number, wire, begin, at, value)


def _varint(read: Read, at: int, stop: int) -> tuple[int, int]:
    """Return a number, and where it ends. Raises RecordError."""
    value = 0
    for shift, byte in enumerate(read(at, min(10, stop - at))):
        value |= (byte & 0x7F) << 7 * shift
        if not byte & 0x80:
            return value, at + shift + 1
    raise RecordError("is not a message of protobuf, or cut")


def _numbers(read: Read, kind: str, field: _Field) -> Iterator[int | float]:
    """Return the numbers of a field, which may be packed."""
    if kind == "float":
        data = read(field.start, field.stop - field.start)
        yield from (value for (value,) in struct.iter_unpack("<f", data[: len(data) // 4 * 4]))
    elif field.wire == _VARINT:
        yield _signed(field.value)
    else:
        at = field.start
        while at < field.stop:
            value, at = _varint(read, at, field.stop)
            yield _signed(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
