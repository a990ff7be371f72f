"""Tar archives (ustar), written by hand: a packer that copies is as fast as these lines."""

import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from shards.ground.digests import RunningDigest, running_digest

__all__ = ["BLOCK", "EndOfTar", "Member", "TarError", "TarWriter", "make_header", "padding", "parse_header"]

BLOCK = 512
_ZEROS = bytes(BLOCK)
_END = bytes(2 * BLOCK)
_MODE_UID_GID = b"0000644\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"
_TYPE_TO_PREFIX = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
# The checksum counts its own eight bytes as spaces.
_CHECKSUM_BASE = sum(_MODE_UID_GID) + sum(_MTIME) + 8 * 0x20 + sum(_TYPE_TO_PREFIX)
_MAX_SIZE = 8**11
# writev takes at most 1,024 buffers per call (IOV_MAX on Linux).
_MAX_BUFFERS = 1000
# Small enough to be still in the processor's cache when it is written: 8 MiB took twice as long.
_FLUSH_BYTES = 2 << 20
_SYNC_BYTES = 32 << 20


class TarError(ValueError):
    """The bytes are not those of a tar member."""


class EndOfTar(Exception):  # noqa: N818 - an end, not an error
    """A block of zeros where a header would be."""


class Member(NamedTuple):
    """What a header says."""

    name: bytes
    size: int
    type: bytes
    """One byte: `0` or NUL for a file, `L`, `x`, `g` and so on for what describes the next member."""
    link: bytes = b""
    """What a link leads to."""


def make_header(name: bytes, size: int) -> bytes:
    """Return the ustar header of a regular file: mode 0644, owner 0, time 0, so that nothing depends on the machine.

    Args:
        name: at most 100 bytes.
        size: bytes that follow.
    """
    assert len(name) <= 100, name
    assert size < _MAX_SIZE, size
    size_octal = b"%011o\0" % size
    checksum = b"%06o\0 " % (_CHECKSUM_BASE + sum(name) + sum(size_octal))
    return b"".join((name.ljust(100, b"\0"), _MODE_UID_GID, size_octal, _MTIME, checksum, _TYPE_TO_PREFIX))


def padding(size: int) -> bytes:
    """Return the zeros that follow `size` bytes of a member."""
    return _ZEROS[: -size % BLOCK]


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        # GNU's and star's extension: big-endian binary, for members above 8 GiB.
        if field[0] & 0x40:
            raise TarError(f"{field!r} is a negative number")
        return int.from_bytes(field, "big") & ~(1 << (8 * len(field) - 1))
    text = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
    if text.strip(b"01234567"):
        raise TarError(f"{field!r} is not an octal number")
    return int(text, 8) if text else 0


def parse_header(block: bytes) -> Member:
    """Read one header: v7, ustar, GNU or star.

    Raises:
        EndOfTar: the block is all zeros.
        TarError: cut short, or the checksum does not match.
    """
    if len(block) < BLOCK:
        raise TarError(f"cut after {len(block)} of {BLOCK} bytes of a header")
    if block == _ZEROS:
        raise EndOfTar
    fields = block[:148] + block[156:]
    # Half of Adler-32 is one more than the sum modulo 65,521, and ten times as fast as Python's own. Old writers summed
    # signed characters.
    found, modulo = _number(block[148:156]) - 8 * 0x20, (zlib.adler32(fields) & 0xFFFF) - 1
    if (found - modulo) % 65521 and found != sum(fields) - 256 * sum(byte >> 7 for byte in fields):
        raise TarError("a header's checksum does not match")
    name, link = block[:100].partition(b"\0")[0], block[157:257].partition(b"\0")[0]
    # Behind a shorter prefix, star keeps times; GNU has other things there.
    prefix = block[345 : 476 if block[508:] == b"tar\0" else 500] if block[257:263] == b"ustar\0" else b""
    prefix = prefix.partition(b"\0")[0]
    return Member(prefix + b"/" + name if prefix else name, _number(block[124:136]), block[156:157], link)


def _sync_and_forget(fd: int, num_bytes: int) -> None:
    """Write a file's bytes to disk, and free the page cache that they take."""
    os.fdatasync(fd)
    with suppress(OSError):  # only a hint
        os.posix_fadvise(fd, 0, num_bytes, os.POSIX_FADV_DONTNEED)


class TarWriter:
    """Writes a tar through `writev`, and its digest with it.

    Args:
        fd: file descriptor, open for writing at offset 0; the caller closes it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._syncer = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None
        self._unsynced_bytes = 0
        self._buffers: list[bytes] = []
        self._pending_bytes = 0
        self._digest: RunningDigest = running_digest()
        self.num_bytes = 0
        """Size of the tar so far."""

    def add(self, name: bytes, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        offset = self.num_bytes + BLOCK
        self._append((make_header(name, len(data)), data, padding(len(data))))
        return offset

    def finish(self) -> str:
        """Write the end of the archive and wait until it is on the disk; returns the digest of all of it."""
        self._append((_END,))
        self._flush()
        if self._syncing is not None:
            self._syncing.result()
        os.fsync(self._fd)
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread that syncs, before the descriptor is closed."""
        self._syncer.shutdown(wait=True)

    def _sync_meanwhile(self) -> None:
        # The disk works while the next images are read; a sync at the end alone would leave it idle until then.
        if self._unsynced_bytes >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._syncing = self._syncer.submit(_sync_and_forget, self._fd, self.num_bytes)
            self._unsynced_bytes = 0

    def _append(self, parts: tuple[bytes, ...]) -> None:
        for part in parts:
            self._digest.update(part)
            self._pending_bytes += len(part)
            self.num_bytes += len(part)
        self._buffers.extend(parts)
        if self._pending_bytes >= _FLUSH_BYTES or len(self._buffers) >= _MAX_BUFFERS:
            self._flush()

    def _flush(self) -> None:
        buffers: list[bytes | memoryview] = list(self._buffers)
        while buffers:
            written = os.writev(self._fd, buffers)
            while buffers and written >= len(buffers[0]):
                written -= len(buffers.pop(0))
            if written:
                buffers[0] = memoryview(buffers[0])[written:]
        self._unsynced_bytes += self._pending_bytes
        self._buffers.clear()
        self._pending_bytes = 0
        self._sync_meanwhile()
