"""Transcoding of progressive JPEGs to baseline ones, coefficient by coefficient."""

import os
from importlib import import_module
from typing import Any

from shards.images.libraries import codec

__all__ = ["transcode_jpeg", "transcoder"]


def transcode_jpeg(data: bytes) -> bytes:
    """Turn a JPEG into a sequential one with the same coefficients, markers and pixels, and optimal Huffman tables.

    Args:
        data: a JPEG that decodes without a warning: for others the library prints, and does not close the file.

    Raises:
        ValueError: the coefficients do not fit.
    """
    # The library reads and writes paths; these files are never on a disk.
    source, target = os.memfd_create("source", os.MFD_CLOEXEC), os.memfd_create("target", os.MFD_CLOEXEC)
    try:
        os.write(source, data)
        library = transcoder()
        with codec("pyjpegio"):
            image = library.read(f"/proc/self/fd/{source}")
            image.progressive_mode = False
            # The tables of a progressive JPEG lack codes that a sequential one needs.
            image.optimize_coding = True
            image.write(f"/proc/self/fd/{target}")
        return os.pread(target, os.fstat(target).st_size, 0)
    finally:
        os.close(source)
        os.close(target)


def transcoder() -> Any:
    """Return the library that transcodes. Raises ValueError where it is not installed."""
    try:
        return import_module("jpegio")
    except ImportError:
        raise ValueError(
            "--progressive transcode needs pyjpegio: install it with `pip install 'moco-fast[transcode]'`, on every "
            "machine that packs, or use --progressive encode"
        ) from None
