"""Images with more than 8 bits per channel: the right pixels, by one range for the whole set."""

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.config import EncodeConfig, PackConfig
from shards.ground.progress import ProgressBars
from shards.images.depth import DepthRange, Values, range_of, to_pixels
from shards.images.encode import encode
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.packing.plan import open_plan
from shards.sets import open_set
from shards.storage.target import LocalTarget
from tests.shards.pictures import contents, encoded, jpeg, picture


def values(seed, channels, white):
    """A smooth picture, (40, 48, channels), whose largest value is `white`."""
    image = np.asarray(picture(seed)).astype(np.float64)[:, :, :channels] / 255
    return image / image.max() * white


def deep(values, kind, dtype=np.uint16):
    """The bytes of a file that holds RGB or gray values as they are."""
    data = values.astype(dtype)
    return cv2.imencode(kind, data[:, :, ::-1] if data.shape[2] == 3 else data)[1].tobytes()


def decoded(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def packed(out):
    """The pixels of each packed image, by the name of its source."""
    shards, found = open_set(out), {}
    for i in range(shards.num_shards):
        whole = shards.shard_path(i).read_bytes()
        names = (Path(out) / f"shard-{i:06d}.sources.txt").read_text().splitlines()
        for record, name in zip(shards.index(i), names, strict=True):
            offset = int(record["offset"])
            found[Path(name).stem] = decoded(whole[offset : offset + int(record["size"])])
    return found


class Said(ProgressBars):
    """What packing says."""

    def __init__(self):
        super().__init__(enabled=False)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def pack_files(tmp_path, files, name="out", **options):
    """Pack files; returns what was said and the manifest."""
    source = tmp_path / "in"
    source.mkdir(exist_ok=True)
    for file, data in files.items():
        (source / file).write_bytes(data)
    said = Said()
    options = {"sources": (str(source),), "out": str(tmp_path / name), "workers": 1, "quality": 98, **options}
    return said.lines, pack(PackConfig(**options), said)[""]


@pytest.mark.parametrize("kind", [".png", ".tiff"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_values_of_a_set_become_all_of_black_to_white(tmp_path, kind, bits):
    white = (1 << bits) - 1
    made = {
        "gray": values(1, 1, white),
        "color": values(2, 3, white),
        # Dark beside the others, and stays so.
        "dark": values(3, 3, white / 3),
    }
    files = {f"{name}{kind}": deep(each, kind) for name, each in made.items()} | {"eight.jpg": jpeg(4)}
    lines, manifest = pack_files(tmp_path, files)
    assert f"images of 16 bits: 3 of 4 tried inputs, with values from 0 to {white}: read as {bits} bits" in lines[-1]
    assert manifest.outcomes["16 bit to 8" if bits == 16 else f"{bits} of 16 bits to 8"] == 3
    found = packed(tmp_path / "out")
    for name, each in made.items():
        assert np.abs(found[name] - each / white * 255).mean() < 4, name
    assert found["dark"].max() < 100


def test_the_range_can_be_given(tmp_path):
    image = values(2, 3, 4095)
    _, manifest = pack_files(tmp_path, {"a.png": deep(image, ".png")}, depth_range="full")
    assert manifest.outcomes == {"16 bit to 8": 1, "converted": 1}
    assert packed(tmp_path / "out")["a"].max() < 20
    pack_files(tmp_path, {}, "given", depth_range="10")
    assert np.abs(packed(tmp_path / "given")["a"] - (image / 4).clip(0, 255)).mean() < 4
    for wrong in ("7", "17", "1:0", "nan:1", "x:1", "12,", "12,0:0", ""):
        with pytest.raises(ValueError, match="--depth-range"):
            PackConfig(sources=("in",), out="out", depth_range=wrong)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("low", "high", "used"), [(0, 0.9, "0 to 1"), (0, 200, "0 to 255"), (0, 4000, "0 to 4095"), (-3, 7, "-3 to 7")]
)
def test_floating_point_images_get_the_usual_range_that_holds_them(tmp_path, channels, low, high, used):
    image = values(2, channels, 1)
    image -= image.min()
    image = low + image / image.max() * (high - low)
    lines, manifest = pack_files(tmp_path, {"a.tiff": deep(image, ".tiff", np.float32)})
    assert lines[-1].endswith(f"read from {used} (--depth-range)")
    assert manifest.outcomes == {"converted": 1, "float to 8 bits": 1}
    black, white = map(float, used.split(" to "))
    expected = (image - black) / (white - black) * 255
    assert np.abs(packed(tmp_path / "out")["a"] - expected).mean() < 4
    pack_files(tmp_path, {}, "given", depth_range=f"{low - 1}:{high + 1}")
    expected = (image - low + 1) / (high - low + 2) * 255
    assert np.abs(packed(tmp_path / "given")["a"] - expected).mean() < 4


def test_parts_and_a_resume_read_the_range_from_the_plan(tmp_path):
    files = {f"{i}.png": deep(values(i, 3, 4095), ".png") for i in range(6)}
    pack_files(tmp_path, files, shard_samples=2)
    source, out = tmp_path / "in", tmp_path / "parts"
    config = {"sources": (str(source),), "out": str(out), "workers": 1, "quality": 98, "shard_samples": 2}
    assert pack(PackConfig(part="1/3", **config)) is None
    assert open_plan(LocalTarget(str(out))).depth_range == "12,0:1"
    # Nothing is measured again.
    said = Said()
    for part in ("0/3", "2/3"):
        pack(PackConfig(part=part, **config), said)
    assert said.lines == []
    finish(str(out))
    assert contents(out) == contents(tmp_path / "out")


def test_transparency_orientation_and_pages_are_minded(tmp_path):
    image = values(2, 3, 4095)
    opacity = np.full((40, 48, 1), 4095.0)
    opacity[:, :24] = 0
    rgba = np.concatenate([image[:, :, ::-1], opacity], axis=2).astype(np.uint16)
    data = cv2.imencode(".png", rgba)[1].tobytes()
    found = encode(data, EncodeConfig(depth_range="12", quality=98))
    assert found.outcomes == ("converted", "12 of 16 bits to 8", "flattened")
    assert decoded(found.data)[:, :16].min() > 245
    assert np.abs(decoded(found.data) - image / 16)[:, 32:].mean() < 4
    turned = Image.Exif()
    turned[274] = 6
    gray = Image.fromarray(values(1, 1, 4095)[:, :, 0].astype(np.uint16))
    color = values(2, 3, 4095)
    for data, expected, outcomes in (
        (encoded(gray, "TIFF", save_all=True, append_images=[gray], tiffinfo={274: 6}), gray, ["first frame"]),
        (encoded(gray, "PNG", exif=turned), gray, []),
        (with_orientation(deep(color, ".tiff"), 6), color, []),
    ):
        found = encode(data, EncodeConfig(depth_range="12", quality=98))
        assert found.outcomes == ("converted", *outcomes, "12 of 16 bits to 8", "turned upright")
        expected = np.rot90(np.asarray(expected), -1) / 16
        assert np.abs(decoded(found.data).T - expected.T).mean() < 4
    float_color = encode(with_orientation(deep(color / 4095, ".tiff", np.float32), 6), EncodeConfig(quality=98))
    assert float_color.outcomes == ("converted", "float to 8 bits", "turned upright")
    assert np.abs(decoded(float_color.data) - np.rot90(color, -1) / 16).mean() < 4


def with_orientation(tiff, orientation):
    """The same little-endian TIFF with another entry."""
    at = int.from_bytes(tiff[4:8], "little")
    count = int.from_bytes(tiff[at : at + 2], "little")
    entries = [tiff[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    entries.append(struct.pack("<HHIHH", 274, 3, 1, orientation, 0))
    entries.sort(key=lambda entry: int.from_bytes(entry[:2], "little"))
    ifd = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    tiff += bytes(len(tiff) % 2)
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + ifd


def test_a_tiff_that_says_twelve_bits_needs_no_range():
    image = values(1, 1, 4095)[:, :, 0].astype(np.uint16)
    pairs = image.reshape(-1, 2).astype(np.uint32)
    numbers = pairs[:, 0] << 12 | pairs[:, 1]
    strip = np.stack([numbers >> 16, numbers >> 8 & 255, numbers & 255], axis=1).astype(np.uint8).tobytes()
    tags = {256: 48, 257: 40, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 40, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + ifd
    found = encode(data, EncodeConfig(quality=98))
    assert found.outcomes == ("converted", "12 of 16 bits to 8")
    assert np.abs(decoded(found.data)[:, :, 0] - image / 16).mean() < 4


def test_a_cut_image_of_many_bits_is_rejected(tmp_path):
    files = {
        name: data[: len(data) * 3 // 4]
        for name, data in (
            ("color.png", deep(values(2, 3, 4095), ".png")),
            ("gray.tiff", deep(values(2, 1, 4095), ".tiff")),
            ("float.tiff", deep(values(2, 3, 1), ".tiff", np.float32)),
        )
    }
    _, manifest = pack_files(tmp_path, files | {"whole.png": deep(values(1, 3, 4095), ".png")})
    assert (manifest.num_samples, manifest.num_rejected) == (1, 3)


@given(
    bits=st.integers(8, 16),
    low=st.floats(-1e6, 1e6),
    width=st.floats(1e-3, 1e6),
    many=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=20),
)
def test_pixels_rise_with_values_from_black_to_white(bits, low, width, many):
    wanted = DepthRange(bits=bits, low=low, high=low + width)
    ints = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256, 1)
    pixels = to_pixels(ints, wanted).ravel().astype(int)
    assert (np.diff(pixels) >= 0).all()
    assert (pixels[0], pixels[(1 << bits) - 1], pixels[-1]) == (0, 255, 255)
    floats = np.sort(np.array(many, dtype=np.float32))
    pixels = to_pixels(floats[np.isfinite(floats)].reshape(1, -1, 1), wanted).ravel().astype(int)
    assert (np.diff(pixels) >= 0).all()
    assert to_pixels(np.full((1, 1, 1), np.nan, dtype=np.float32), wanted)[0, 0, 0] == 0


@given(
    found=st.lists(st.tuples(st.booleans(), st.floats(0, 65535), st.floats(0, 65535)), max_size=6),
    shift=st.sampled_from([0.0, -100.0]),
)
def test_the_range_holds_every_value_found(found, shift):
    seen = [Values(is_float, min(a, b) + shift * is_float, max(a, b) + shift * is_float) for is_float, a, b in found]
    wanted = range_of(seen)
    assert DepthRange.parse(str(wanted)).bits == wanted.bits
    for each in seen:
        assert (wanted.low <= each.low <= each.high <= wanted.high) if each.is_float else each.high < 1 << wanted.bits
