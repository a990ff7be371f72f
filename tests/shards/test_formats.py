"""Formats beyond JPEG: HEIC and JPEG XL by an extra, AVIF and WebP by Pillow, and what a decoder says of damage."""

import io
import json
import sys
import tarfile

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401 - it registers itself
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.config import EncodeConfig, PackConfig
from shards.ground.errors import Rejected
from shards.images.encode import encode
from shards.images.formats import early_size
from shards.packing.pack import pack
from shards.tools.index import index_folder
from tests.shards.pictures import encoded, fill, jpeg, picture

pillow_heif.register_heif_opener()

FORMATS = ("HEIF", "JXL", "AVIF", "WEBP")
TURNED = Image.Exif()
TURNED[0x0112] = 6


def decoded(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def write_tar(path, members):
    """Write a tar of these files."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_packed_with_the_right_pixels(kind, mode):
    image = picture(3, 64, 40).convert(mode)
    if mode == "RGBA":
        image.paste((255, 0, 0, 0), (0, 0, 32, 40))
    found = encode(encoded(image, kind, quality=95), EncodeConfig(quality=98))
    assert found.outcomes == (("converted", "flattened") if mode == "RGBA" else ("converted",))
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    assert np.abs(decoded(found.data) - np.asarray(expected.convert("RGB"))).mean() < 6


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "WEBP"])
def test_each_format_is_turned_upright(kind):
    image = picture(3, 64, 40)
    found = encode(encoded(image, kind, quality=95, exif=TURNED.tobytes()), EncodeConfig(quality=98))
    assert (found.width, found.height) == (40, 64)
    assert np.abs(decoded(found.data) - np.rot90(np.asarray(image).astype(float), -1)).mean() < 6


def test_jpeg_xl_of_a_jpeg_is_turned_by_exif_and_any_other_by_itself(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(3, exif=TURNED))
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "a.jxl", lossless_jpeg=True)
    found = encode((tmp_path / "a.jxl").read_bytes(), EncodeConfig(quality=98))
    assert found.outcomes == ("converted", "turned upright")
    assert np.abs(decoded(found.data) - np.rot90(decoded(jpeg(3)), -1)).mean() < 4
    # ISO/IEC 18181-2, 9.7: the codestream's orientation counts, whatever EXIF says.
    found = encode(encoded(picture(3), "JXL", exif=TURNED.tobytes()), EncodeConfig())
    assert (found.outcomes, found.width, found.height) == (("converted",), 48, 40)


def test_jpeg_xl_of_many_bits():
    gray = np.asarray(picture(3).convert("L"))
    for values, outcome in ((gray.astype(np.uint16) * 257, "16 bit to 8"), (gray / np.float32(255), "float to 8 bits")):
        found = encode(encoded(Image.fromarray(values), "JXL", lossless=True), EncodeConfig(quality=98))
        assert found.outcomes == ("converted", outcome)
        assert np.abs(decoded(found.data)[:, :, 0] - gray).mean() < 2


@given(width=st.integers(1, 600), height=st.integers(1, 600), is_in_boxes=st.booleans())
def test_the_size_of_a_jpeg_xl_is_read_from_its_first_bytes(width, height, is_in_boxes):
    data = encoded(Image.new("L", (width, height)), "JXL", use_container=is_in_boxes, effort=1)
    assert early_size(data) == (width, height)


@pytest.mark.parametrize("size", [(1600, 900), (1200, 1000), (1024, 768), (3000, 17), (17, 9000), (320, 160)])
def test_the_size_of_a_large_jpeg_xl_too(size):
    assert early_size(encoded(Image.new("L", size), "JXL", effort=1)) == size


@pytest.mark.parametrize("kind", FORMATS)
def test_limits_hold_before_anything_is_decoded(kind, monkeypatch):
    data = encoded(picture(3, 64, 40), kind)
    monkeypatch.setattr("PIL.Image.Image.load", lambda image: pytest.fail("decoded"))
    with pytest.raises(Rejected) as caught:
        encode(data, EncodeConfig(max_pixels=2000))
    assert caught.value.reason == "too many pixels"
    assert "2000" in caught.value.detail


@pytest.mark.parametrize(
    ("kind", "module", "rejections", "detail"),
    [
        ("HEIF", "pillow_heif", {"unsupported": 1}, "HEIC: install what reads it with `pip install 'moco-fast[heic]'`"),
        # Its size is known without a plugin.
        ("JXL", "pillow_jxl", {}, "JPEG XL: install what reads it with `pip install 'moco-fast[jxl]'`"),
    ],
)
def test_without_the_extra_the_rejection_names_it(tmp_path, monkeypatch, kind, module, rejections, detail):
    data = encoded(picture(3), kind)
    monkeypatch.setitem(sys.modules, module, None)
    # What was registered before is not there either.
    formats = [name for name in Image.ID if name not in FORMATS[:2]]
    monkeypatch.setattr(Image, "ID", formats)
    monkeypatch.setattr("shards.images.isolation.may_die", lambda: True)
    source = fill(tmp_path / "in", 2)
    (source / "a.jpg").write_bytes(data)
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "out"), workers=1))
    [line] = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (line["reason"], line["detail"]) == ("unsupported", detail)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", {"a.jpg": jpeg(), "b.jpg": data})
    found = index_folder(str(tmp_path / "tars"), workers=1)
    assert found.manifest.rejections == rejections
    assert found.manifest.num_samples == 2 - len(rejections)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "HEIF", "JXL", "JPEG2000"])
def test_of_a_damaged_image_the_decoder_s_own_reason_is_given(tmp_path, kind):
    data = encoded(picture(3), kind)
    found = [data[:at] for at in (20, 40, len(data) // 2)] + [data[:12] + bytes(len(data) - 12)]
    for cut in found:
        with pytest.raises(Rejected) as caught:
            encode(cut, EncodeConfig())
        assert caught.value.reason in ("damaged", "too many pixels"), cut
        assert len(caught.value.detail) > 8
        if kind != "WEBP" or cut != found[-1]:
            assert "begins" not in caught.value.detail
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", {"a.jpg": jpeg(), "b.jpg": found[0]})
    assert "not an image" not in index_folder(str(tmp_path / "tars"), workers=1).manifest.rejections


def test_a_png_that_cannot_be_read_says_why():
    with pytest.raises(Rejected) as caught:
        encode(b"\x89PNG\r\n\x1a\n" + bytes(100), EncodeConfig())
    assert caught.value.detail == r"PNG: broken PNG file (chunk b'\x00\x00\x00\x00')"
