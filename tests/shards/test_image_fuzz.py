"""Damaged images of every kind: each is packed or rejected, none is lost, and what was packed can be trained on."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import PngImagePlugin

from pipelines.backends.pixels import decode
from shards.config import EncodeConfig, PackConfig
from shards.ground.errors import Rejected
from shards.images.encode import encode
from shards.images.jpeg import parse_jpeg
from shards.packing.pack import pack
from shards.sets import open_set
from shards.tools.index import index_folder
from shards.tools.verify import verify
from tests.shards.flat_jpegs import flat_jpeg
from tests.shards.pictures import encoded, picture


def _with_thumbnail() -> bytes:
    """A JPEG with another one in its EXIF segment."""
    thumbnail = encoded(picture(1, 16, 12))
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    data = encoded(picture(2))
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]


def _originals() -> dict[str, bytes]:
    """One of each kind that the decoders treat differently, 48 x 40 or so."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("title", "words", zip=True)
    deep = (np.asarray(picture(4)).astype(np.uint16) * 16)[:, :, ::-1]
    frames = [picture(5), picture(6)]
    made = {
        "JPEG": encoded(picture(0)),
        "JPEG, gray": encoded(picture(0, mode="L")),
        "JPEG, progressive": encoded(picture(0), progressive=True),
        "JPEG, restarts": encoded(picture(0), restart_marker_rows=1),
        "JPEG, CMYK": encoded(picture(0, mode="CMYK")),
        "JPEG, thumbnail": _with_thumbnail(),
        "JPEG, 4:4:1": flat_jpeg(((1, 4), (1, 1), (1, 1)), mcus=2),
        "PNG": encoded(picture(0), "PNG", pnginfo=texts),
        "PNG, palette": encoded(picture(0).quantize(16), "PNG", transparency=3),
        "PNG, 16 bits": cv2.imencode(".png", deep)[1].tobytes(),
        "WebP": encoded(picture(0), "WEBP"),
        "WebP, lossless": encoded(picture(0, mode="RGBA"), "WEBP", lossless=True),
        "WebP, animated": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "TIFF": encoded(picture(0), "TIFF"),
        "TIFF, LZW": encoded(picture(0), "TIFF", compression="tiff_lzw"),
        "TIFF, 16 bits": cv2.imencode(".tiff", deep)[1].tobytes(),
        "TIFF, float": cv2.imencode(".tiff", deep.astype(np.float32) / 4096)[1].tobytes(),
        "GIF": encoded(picture(0).quantize(16), "GIF"),
        "GIF, animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    assert all(len(data) < 40_000 for data in made.values())
    return made


ORIGINALS = _originals()
CONFIGS = (
    EncodeConfig(max_pixels=100_000),
    EncodeConfig(mean_rgb=True, max_pixels=100_000),
    EncodeConfig(resize=20, max_pixels=100_000),
    EncodeConfig(progressive="transcode", depth_range="12,0:1", max_pixels=100_000),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An image of some kind after a few mutations."""
    data = ORIGINALS[draw(st.sampled_from(sorted(ORIGINALS)))]
    for _ in range(draw(st.integers(1, 4))):
        data = draw(_mutated(data))
    return data


@st.composite
def _mutated(draw: st.DrawFn, data: bytes) -> bytes:
    # The first bytes say what it is; without them little is tried. Headers, where most of the meaning is, are hit as
    # often as all the rest.
    first = draw(st.sampled_from([0, 3, 12, 12, 12]))
    last = draw(st.sampled_from([100, len(data)]))
    at = min(len(data), draw(st.integers(first, max(first, last))))
    end = min(len(data), at + draw(st.sampled_from([1, 2, 4, 16, 200, 5000])))
    match draw(st.sampled_from(["flip", "set", "cut", "drop", "repeat", "zero", "insert", "splice", "segment"])):
        case "flip" if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        case "set" if at < len(data):
            return data[:at] + draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\1"])) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "drop":
            return data[:at] + data[end:]
        case "repeat":
            return data[:end] + data[at:]
        case "zero":
            return data[:at] + bytes(end - at) + data[end:]
        case "insert":
            return data[:at] + draw(st.binary(max_size=8)) + data[at:]
        case "splice":
            other = ORIGINALS[draw(st.sampled_from(sorted(ORIGINALS)))]
            return data[:at] + other[draw(st.integers(0, len(other))) :]
        case "segment":
            parts = _segments(data)
            first, second = draw(st.integers(0, len(parts) - 1)), draw(st.integers(0, len(parts) - 1))
            parts.insert(second, parts[first] if draw(st.booleans()) else parts.pop(first))
            return b"".join(parts)
    return data


def _segments(data: bytes) -> list[bytes]:
    """Cut a JPEG before its markers, any other file before what looks like the name of a chunk."""
    if data[:2] == b"\xff\xd8":
        starts = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] not in (0, 0xFF)]
    else:
        names = (
            b"IHDR",
            b"PLTE",
            b"tRNS",
            b"zTXt",
            b"IDAT",
            b"IEND",
            b"VP8",
            b"ALPH",
            b"ANIM",
            b"ANMF",
            b"\x21\xf9",
            b"\x2c",
        )
        starts = sorted(max(0, data.find(name) - 4 * name.isalnum()) for name in names if name in data)
    bounds = [0, *starts, len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


def check(data: bytes, config: EncodeConfig) -> bool:
    """Hold one image to what packing promises; returns whether it was packed."""
    try:
        image = encode(data, config)
    except Rejected:
        return False
    header = parse_jpeg(image.data)
    assert (header.width, header.height) == (image.width, image.height)
    assert header.is_baseline
    assert header.is_ycbcr_or_gray
    assert header.orientation == 1
    assert image.width * image.height <= config.max_pixels
    try:
        pixels = decode(np.frombuffer(image.data, np.uint8))
    except ValueError:
        # What is copied without being decoded may be damaged; training replaces it.
        assert image.outcomes in (("copied",), ("repaired",))
        assert not config.mean_rgb
    else:
        assert pixels.shape == (image.height, image.width, 3)
    return True


OPTIONS = {"suppress_health_check": [HealthCheck.too_slow], "deadline": None}


@settings(max_examples=800, derandomize=True, **OPTIONS)
@given(data=damaged(), config=st.sampled_from(CONFIGS))
def test_a_damaged_image_is_packed_or_rejected(data: bytes, config: EncodeConfig) -> None:
    check(data, config)


@pytest.mark.long
@settings(max_examples=20_000, **OPTIONS)
@given(data=damaged(), config=st.sampled_from(CONFIGS))
def test_thousands_of_damaged_images_are_packed_or_rejected(data: bytes, config: EncodeConfig) -> None:
    check(data, config)


def test_the_whole_originals_are_packed() -> None:
    """Mutations begin with images that are packed, or they would find nothing."""
    for name, data in ORIGINALS.items():
        assert all(check(data, config) for config in CONFIGS), name


def _write_all(folder: Path, images: list[bytes]) -> None:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, data in enumerate(images):
            entry = tarfile.TarInfo(f"{number:04d}.jpg")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@settings(max_examples=2, derandomize=True, **OPTIONS)
@given(images=st.lists(damaged(), min_size=40, max_size=60))
def test_a_packing_of_damaged_images_ends_and_counts_them_all(tmp_path_factory, images: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    _write_all(folder / "in", images)
    source = str(folder / "in" / "a.tar")
    config = PackConfig(sources=(source,), out=str(folder / "out"), workers=1, mean_rgb=True)
    manifest = (pack(config) or {})[""]
    assert manifest.num_inputs == len(images) == manifest.num_samples + manifest.num_rejected
    lines = [json.loads(line) for line in (folder / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(lines) == manifest.num_rejected
    assert verify(folder / "out", decode=True) == []
    shards = open_set(folder / "out")
    for number in range(shards.num_shards):
        assert len(shards.index(number)) == shards.shard_sizes[number]
    # The same tar, as someone else's shard.
    indexed = index_folder(str(folder / "in"), workers=1).manifest
    assert indexed.num_samples + indexed.num_rejected == len(images)
    for number in range(len(indexed.shards)):
        assert len(open_set(folder / "in").index(number)) == indexed.num_samples
