import io
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from shards.cli import main
from shards.config import EncodeConfig
from shards.ground.errors import Rejected
from shards.images.encode import encode
from shards.images.jpeg import parse_jpeg
from shards.images.libraries import decode_jpeg, reads_sampling
from tests.shards.flat_jpegs import flat_jpeg, halves
from tests.shards.pictures import encoded, fill, jpeg, picture

DEFAULT = EncodeConfig()
WITH_MEAN = EncodeConfig(mean_rgb=True)


def pixels(data: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert(mode)).astype(int)


def test_a_baseline_jpeg_is_copied_byte_for_byte():
    for mode in ("RGB", "L"):
        data = encoded(picture(mode=mode))
        image = encode(data, DEFAULT)
        assert image.data == data
        assert image.outcomes == ("copied",)
        assert (image.width, image.height) == (48, 40)


def test_the_mean_is_that_of_the_pixels():
    for data in (encoded(picture(3, 320, 240)), encoded(picture(3, 321, 245), "PNG"), encoded(picture(4, 90, 70, "L"))):
        expected = pixels(data).mean(axis=(0, 1))
        assert np.abs(np.array(encode(data, WITH_MEAN).mean_rgb) - expected).max() < 1.5
    assert encode(jpeg(), DEFAULT).mean_rgb is None


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_is_applied_as_pillow_does(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(5, 64, 40), kind, exif=exif)
    image = encode(data, EncodeConfig(quality=98))
    with Image.open(io.BytesIO(data)) as original:
        expected = np.asarray(ImageOps.exif_transpose(original)).astype(int)
    assert "turned upright" in image.outcomes
    assert parse_jpeg(image.data).orientation == 1
    assert pixels(image.data).shape == expected.shape
    assert np.abs(pixels(image.data) - expected).mean() < 4


TRANSCODE = EncodeConfig(progressive="transcode", mean_rgb=True)


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    mode=st.sampled_from(["L", "RGB"]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from([0, 1, 2]),
    restart=st.sampled_from([0, 1]),
)
def test_a_transcoded_progressive_jpeg_keeps_every_pixel(width, height, mode, quality, subsampling, restart):
    options = {"quality": quality, "subsampling": subsampling, "restart_marker_rows": restart, "comment": b"kept"}
    data = encoded(picture(width, width, height, mode), progressive=True, **options)
    assert not parse_jpeg(data).is_baseline
    image = encode(data, TRANSCODE)
    assert image.outcomes == ("transcoded",)
    assert parse_jpeg(image.data).is_baseline
    assert b"kept" in image.data
    assert (pixels(image.data, mode) == pixels(data, mode)).all()
    assert image.mean_rgb == encode(data, WITH_MEAN).mean_rgb or width * height > 1 << 16
    assert encode(image.data, TRANSCODE)[:5] == (*image[:4], ("copied",))


def test_what_cannot_be_transcoded_is_written_anew_or_rejected(capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(3, 90, 70), progressive=True)
    for other, outcome in (
        (encoded(picture(), progressive=True, exif=exif), "turned upright"),
        (encoded(picture(mode="CMYK"), progressive=True), "recolored"),
        (data[:-2] + b"stray bytes" + data[-2:], "repaired"),
    ):
        image = encode(other, TRANSCODE)
        assert {outcome, "made baseline"} <= set(image.outcomes)
        assert image.data == encode(other, DEFAULT).data
    assert encode(data, EncodeConfig(progressive="transcode", resize=30)).outcomes == ("made baseline", "resized")
    files = len(list(Path("/proc/self/fd").iterdir()))
    for i in range(20, len(data) - 2, 40):
        with pytest.raises(Rejected):
            encode(data[:i], TRANSCODE)
    # The library behind it prints what it stumbles over, and leaves the file open.
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert capfd.readouterr() == ("", "")


def test_without_the_library_nothing_is_written_anew_in_silence(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(encoded(picture(), progressive=True))
    arguments = ["pack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--progressive", "transcode"]
    monkeypatch.setitem(sys.modules, "jpegio", None)
    assert main(arguments) == 2
    assert "pip install 'moco-fast[transcode]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="needs pyjpegio"):
        encode(encoded(picture(), progressive=True), TRANSCODE)
    monkeypatch.undo()
    assert main(arguments) == 0
    assert "transcoded 1" in capsys.readouterr().out


def with_transparent_left_half() -> Image.Image:
    image = picture(mode="RGBA")
    image.paste((255, 0, 0, 0), (0, 0, 24, 40))
    return image


ODD = {
    "progressive": (encoded(picture(), progressive=True), "made baseline"),
    "cmyk": (encoded(picture(mode="CMYK")), "recolored"),
    "rgb jpeg": (encoded(picture(), keep_rgb=True), "recolored"),
    "png": (encoded(picture(), "PNG"), "converted"),
    "16-bit png": (
        encoded(Image.fromarray((np.arange(48 * 40).reshape(40, 48) * 30).astype(np.uint16)), "PNG"),
        "16 bit to 8",
    ),
    "palette": (encoded(picture().quantize(64, dither=Image.Dither.NONE), "PNG"), "converted"),
    "bilevel": (encoded(picture(mode="1"), "PNG"), "converted"),
    "alpha": (encoded(with_transparent_left_half(), "PNG"), "flattened"),
    "gif": (encoded(picture(), "GIF", save_all=True, append_images=[picture(9)]), "first frame"),
    "webp": (encoded(picture(), "WEBP"), "converted"),
    "tiff": (encoded(picture(), "TIFF"), "converted"),
    "bmp": (encoded(picture(), "BMP"), "converted"),
    "avif": (encoded(picture(), "AVIF"), "converted"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_formats_become_baseline_jpegs_that_look_the_same(kind):
    data, outcome = ODD[kind]
    image = encode(data, EncodeConfig(quality=98))
    header = parse_jpeg(image.data)
    assert header.is_baseline
    assert header.is_ycbcr_or_gray
    assert (header.width, header.height) == (48, 40)
    assert outcome in image.outcomes
    with Image.open(io.BytesIO(data)) as original:
        if kind == "16-bit png":
            expected = np.asarray(original).astype(int)[:, :, None].repeat(3, axis=2) >> 8
        elif kind == "alpha":
            white = Image.new("RGBA", original.size, "white")
            expected = np.asarray(Image.alpha_composite(white, original).convert("RGB")).astype(int)
        else:
            expected = np.asarray(original.convert("RGB")).astype(int)
    assert np.abs(pixels(image.data) - expected).mean() < 8


def test_transparent_parts_become_white():
    image = encode(encoded(with_transparent_left_half(), "PNG"), DEFAULT)
    assert pixels(image.data)[:, :16].min() > 245


@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    goal=st.integers(1, 120),
    mode=st.sampled_from(["shorter", "longer", "exact"]),
    kind=st.sampled_from(["JPEG", "PNG"]),
    orientation=st.sampled_from([1, 3, 6]),
)
def test_resizing_gives_the_promised_size(width, height, goal, mode, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(0, width, height), kind, exif=exif)
    if orientation == 6:
        width, height = height, width
    image = encode(data, EncodeConfig(resize=goal, resize_mode=mode))
    header = parse_jpeg(image.data)
    assert (header.width, header.height) == (image.width, image.height)
    if mode == "exact":
        assert (image.width, image.height) == (goal, goal)
        return
    side = min if mode == "shorter" else max
    assert side(image.width, image.height) == min(goal, side(width, height))
    assert image.width <= width
    assert image.height <= height
    scale = min(1, goal / side(width, height))
    assert abs(image.width - width * scale) <= 1
    assert abs(image.height - height * scale) <= 1


def test_resized_pixels_are_close_to_pillows():
    data = encoded(picture(7, 640, 480), quality=95)
    image = encode(data, EncodeConfig(resize=100, quality=98))
    with Image.open(io.BytesIO(data)) as original:
        expected = np.asarray(original.resize((133, 100), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pixels(image.data) - expected).mean() < 3


@pytest.mark.parametrize(
    ("data", "config", "reason"),
    [
        (b"", DEFAULT, "empty"),
        (b"hello, world", DEFAULT, "not an image"),
        (b"\xff\xd8\xff", DEFAULT, "damaged"),
        (jpeg()[:-30], DEFAULT, "damaged"),
        (jpeg()[:-30], WITH_MEAN, "damaged"),
        (jpeg()[:-30], EncodeConfig(resize=20), "damaged"),
        (encoded(picture(), "PNG")[:200], DEFAULT, "damaged"),
        (jpeg(), EncodeConfig(min_size=41), "too small"),
        (encoded(picture(), "PNG"), EncodeConfig(min_size=41), "too small"),
        (jpeg(), EncodeConfig(max_pixels=1900), "too many pixels"),
        (encoded(picture(), "PNG"), EncodeConfig(max_pixels=1900), "too many pixels"),
        (jpeg(), EncodeConfig(max_aspect=1.1), "too elongated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", DEFAULT, "not an image"),
    ],
)
def test_what_cannot_be_packed_is_rejected_with_a_reason(data, config, reason):
    with pytest.raises(Rejected) as caught:
        encode(data, config)
    assert caught.value.reason == reason


def test_a_missing_end_marker_is_added_without_loss():
    data = jpeg()
    for cut in (data[:-1], data[:-2]):
        image = encode(cut, DEFAULT)
        assert image.data == data
        assert image.outcomes == ("repaired",)


@pytest.mark.parametrize("options", [{}, {"resize": 16}, {"mean_rgb": True}])
@pytest.mark.parametrize("orientation", [1, 6])
def test_whole_without_an_end_marker_whatever_else_is_done(options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), exif=exif)
    config = EncodeConfig(**options)
    for cut in (data[:-1], data[:-2]):
        image = encode(cut, config)
        assert "repaired" in image.outcomes
        assert (pixels(image.data) == pixels(encode(data, config).data)).all()
    with pytest.raises(Rejected, match="damaged"):
        encode(data[:-40], config)


@pytest.mark.parametrize("options", [{}, {"resize": 16}])
def test_scans_that_are_missing_are_damage_also_where_stray_bytes_are_skipped(options):
    data = encoded(picture(), progressive=True)
    scans = [at.start() for at in re.finditer(b"\xff\xda", data)]
    tables = data.rfind(b"\xff\xc4", 0, scans[2])
    stray = data[:tables] + b"\x01" * 300 + data[tables:]
    assert "repaired" in encode(stray, EncodeConfig(**options)).outcomes
    for cut in (stray[: scans[-1] + 300], data[: scans[-1]], data[: data.rfind(b"\xff\xc4", 0, scans[-1])]):
        with pytest.raises(Rejected, match="damaged"):
            encode(cut, EncodeConfig(**options))


def test_stray_bytes_before_the_end_are_repaired():
    data = jpeg()
    stray = data[:-2] + b"\x01" * 300 + data[-2:]
    image = encode(stray, WITH_MEAN)
    assert "repaired" in image.outcomes
    assert np.abs(pixels(image.data) - pixels(data)).mean() < 4
    # What no marker shows is copied: decoders warn of it, and give the same pixels.
    assert encode(stray, DEFAULT).outcomes == ("copied",)
    assert (pixels(stray) == pixels(data)).all()


def test_a_bomb_inside_an_icon_is_refused():
    inner = encoded(Image.new("1", (4000, 4000)), "PNG")
    icon = (
        b"\0\0\1\0\1\0"
        + bytes([16, 16, 0, 0, 1, 0, 32, 0])
        + len(inner).to_bytes(4, "little")
        + (22).to_bytes(4, "little")
    )
    with pytest.raises(Rejected) as caught:
        encode(icon + inner, EncodeConfig(max_pixels=1_000_000))
    assert caught.value.reason == "too many pixels"


@given(data=st.data())
def test_whatever_the_bytes_the_result_is_rejected_or_a_baseline_jpeg(data):
    name = data.draw(st.sampled_from(sorted(ODD)))
    damaged = bytearray(ODD[name][0])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(1, len(damaged)))]
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = encode(
                bytes(damaged), EncodeConfig(max_pixels=100_000, resize=data.draw(st.sampled_from([None, 20])))
            )
        except Rejected:
            return
        finally:
            assert before == Image.MAX_IMAGE_PIXELS
    header = parse_jpeg(image.data)
    assert header.is_baseline
    assert header.is_ycbcr_or_gray
    assert pixels(image.data).shape == (image.height, image.width, 3)


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(640, 480), (641, 487), (9, 300)])
def test_reduced_decoding_gives_the_size_asked_for(reduce, size):
    width, height = size
    pixels = decode_jpeg(encoded(picture(0, width, height)), reduce=reduce)
    assert pixels.shape == (-(-height // reduce), -(-width // reduce), 3)


FACTORS = [
    ((1, 4), (1, 1), (1, 1)),
    ((2, 2), (1, 2), (2, 1)),
    ((4, 2), (1, 1), (1, 1)),
    ((3, 1), (1, 1), (1, 1)),
    ((1, 2), (1, 2), (1, 2)),
    ((2, 2), (2, 1), (2, 1)),
    ((2, 1), (2, 1), (2, 1)),
    ((1, 1), (2, 2), (2, 2)),
    ((2, 2), (1, 1), (1, 1)),
    ((4, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("mean_rgb", [True, False])
@pytest.mark.parametrize("mcus", [2, 18])
@pytest.mark.parametrize("factors", FACTORS)
def test_any_sampling_factors_are_packed_with_the_right_pixels(factors, mcus, mean_rgb):
    image = encode(flat_jpeg(factors, mcus=mcus), EncodeConfig(mean_rgb=mean_rgb, quality=98))
    assert image.outcomes in (("copied",), ("resampled",))
    decoded = decode_jpeg(image.data).astype(float)
    assert np.abs(decoded - halves(image.width, image.height)).mean() < (3 if mcus > 2 else 8)
    # Of what is copied, training's decoder knows the factors.
    assert reads_sampling(image.data)


@pytest.mark.parametrize("mean_rgb", [True, False])
@pytest.mark.parametrize("scan", [b"\0\0\0", b"\1\x3f\0", b"\0\x3f\x11"])
def test_a_scan_header_as_some_phones_write_it_is_repaired(scan, mean_rgb):
    sound = flat_jpeg(((2, 2), (1, 1), (1, 1)))
    image = encode(flat_jpeg(((2, 2), (1, 1), (1, 1)), scan=scan), EncodeConfig(mean_rgb=mean_rgb))
    assert (image.data, image.outcomes) == (sound, ("repaired",))
    with pytest.raises(Rejected, match="damaged"):
        encode(flat_jpeg(((2, 2), (1, 1), (1, 1)), scan=scan)[:-20], DEFAULT)


@pytest.mark.parametrize("mean_rgb", [True, False])
@pytest.mark.parametrize("stray", [b"\0\1\2", b"\x80", bytes(90), b"\xff\0\xff\0"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_stray_bytes_between_the_segments_of_a_header_are_taken_out(mode, stray, mean_rgb):
    sound = encoded(picture(3, mode=mode))
    config = EncodeConfig(mean_rgb=mean_rgb)
    for marker in (b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda"):
        at = sound.index(marker)
        image = encode(sound[:at] + stray + sound[at:], config)
        assert (image.data, image.outcomes) == (sound, ("repaired",))
        with pytest.raises(Rejected, match="damaged"):
            encode(sound[:at] + stray + sound[at:-60], config)
    at = sound.index(b"\xff\xc0")
    filled = sound[:at] + b"\xff\xff" + sound[at:]
    assert encode(filled, config)[4:6] == (("copied",), "gray" if mode == "L" else "4:2:0")
    progressive = encoded(picture(3, mode=mode), progressive=True)
    at = progressive.index(b"\xff\xc2")
    image = encode(progressive[:at] + stray + progressive[at:], config)
    assert image.outcomes == ("repaired", "made baseline")
    assert image.data == encode(progressive, config).data


@pytest.mark.parametrize(
    "error", [KeyError(6), ZeroDivisionError("zero"), SystemError("bad call"), RuntimeError("x\ny")]
)
def test_whatever_a_codec_raises_is_a_rejection_that_names_file_and_codec(tmp_path, monkeypatch, error):
    source = fill(tmp_path / "in", 3)
    # This process alone has the codec that fails.
    monkeypatch.setattr("shards.images.isolation.may_die", lambda: True)
    whole = simplejpeg.decode_jpeg
    hit = jpeg(1)

    def decode(data, *arguments, **options):
        if data.startswith(hit):
            raise error
        return whole(data, *arguments, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    out = tmp_path / "out"
    words = f"pack {source} --out {out} --workers 1 --max-rejected 1 --shard-samples 9 --mean-rgb"
    assert main(words.split()) == 0
    [line] = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert line["source"] == f"{source}/0001.jpg"
    assert (line["reason"], line["detail"].startswith(f"simplejpeg: {type(error).__name__}")) == ("codec failed", True)


def test_twelve_bits_are_named(tmp_path):
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 4
    data[at] = 12
    with pytest.raises(Rejected, match="a JPEG of 12 bits"):
        encode(bytes(data), DEFAULT)


def test_long_texts_in_a_png_are_no_damage():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("one", "x" * (3 << 20), zip=True)
    texts.add_text("two", "y" * (65 << 20), zip=True)
    assert encode(encoded(picture(), "PNG", pnginfo=texts), DEFAULT).outcomes == ("converted",)


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(100), "damaged", "HEIF: "),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not an image", "a pointer of Git LFS"),
        (b"<html>" + bytes(100), "not an image", "begins with 3c 68 74 6d"),
        (b"Rar!\x1a\7\1\0" + bytes(100), "archive", "as RAR does"),
    ],
)
def test_what_is_not_read_is_named(data, reason, detail):
    with pytest.raises(Rejected) as rejected:
        encode(data, DEFAULT)
    assert rejected.value.reason == reason
    assert detail in rejected.value.detail


@pytest.mark.parametrize("text", ['<x tiff:Orientation="6"/>', "<tiff:Orientation>6</tiff:Orientation>"])
@pytest.mark.parametrize("mean_rgb", [True, False])
def test_orientation_by_xmp_alone_is_applied(text, mean_rgb):
    data = encoded(picture(5, 64, 40), quality=95, xmp=text.encode())
    image = encode(data, EncodeConfig(quality=98, mean_rgb=mean_rgb))
    assert (image.outcomes, image.width, image.height) == (("turned upright",), 40, 64)
    assert np.abs(pixels(image.data) - np.rot90(pixels(data), -1)).mean() < 4
    assert encode(image.data, DEFAULT).outcomes == ("copied",)
    exif = Image.Exif()
    exif[0x0112] = 3
    both = encoded(picture(5, 64, 40), quality=95, xmp=text.encode(), exif=exif)
    assert encode(both, DEFAULT).width == 64


def damaged(data: bytes, how: str, at: int) -> bytes:
    """A JPEG's bytes as disks, downloads and editors spoil them, from a place in its scan on."""
    rng = np.random.default_rng(at)
    if how == "cut":
        return data[:at]
    if how == "zeros to the end":
        return data[:at] + bytes(len(data) - at)
    if how == "a block of zeros":
        return data[:at] + bytes(1024) + data[at + 1024 :]
    if how == "a block of something else":
        return data[:at] + rng.bytes(4096) + data[at + 4096 :]
    return data[:at] + b"\xff\xc4" + data[at + 2 :]


def outcome_of(data: bytes, config: EncodeConfig) -> object:
    """What becomes of an image: all but its mean color, or why it is rejected."""
    try:
        return encode(data, config)._replace(mean_rgb=None)
    except Rejected as rejected:
        return rejected.reason, rejected.detail


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "how", ["cut", "zeros to the end", "a block of zeros", "a block of something else", "a marker"]
)
def test_damage_that_bytes_show_is_found_without_the_mean_color(how, mode):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)).convert(mode)
    data = encoded(noise, quality=90)
    scan = parse_jpeg(data).scan_at
    for at in range(scan + 40, len(data) - 5000, 2000):
        spoiled = damaged(data, how, at)
        assert outcome_of(spoiled, DEFAULT) == outcome_of(spoiled, WITH_MEAN)


@pytest.mark.parametrize("behind", [b"", b"\0" * 2000, jpeg(2)])
@pytest.mark.parametrize(
    "options", [{}, {"restart_marker_rows": 1}, {"optimize": True}, {"exif": b"Exif\0\0" + jpeg(1)}]
)
def test_what_is_copied_without_its_mean_color_is_not_decoded(options, behind, monkeypatch):
    whole = encoded(picture(2, 90, 70), quality=95, **options) + behind
    monkeypatch.setattr("shards.images.encode.decode_jpeg", None)
    image = encode(whole, DEFAULT)
    assert (image.data, image.outcomes, image.mean_rgb) == (whole, ("copied",), None)
