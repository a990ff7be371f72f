"""Images that are nearly one color: packed, counted and named."""

import json

import numpy as np
import pytest
from PIL import Image

from shards.cli import main
from shards.config import EncodeConfig
from shards.images.encode import encode
from tests.shards.pictures import contents, encoded, fill, picture


def noisy(level, std, size=(120, 90)):
    noise = np.random.default_rng(0).normal(level, std, (size[1], size[0], 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def scan():
    """A white page with one line of text."""
    page = np.full((300, 200, 3), 250, np.uint8)
    page[100:112, 20:180:3] = 20
    return Image.fromarray(page)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (40, 30)), True),
        (Image.new("L", (40, 30), 200), True),
        (Image.new("RGB", (1, 1)), True),
        (Image.new("RGB", (700, 500), (250, 3, 90)), True),
        (noisy(30, 1), True),
        (noisy(30, 6), False),
        (picture(), False),
        (picture(mode="L"), False),
        (scan(), False),
    ],
)
def test_what_is_nearly_one_color(image, expected, kind):
    assert encode(encoded(image, kind), EncodeConfig(mean_rgb=True)).is_uniform == expected


@pytest.mark.parametrize("options", [["--workers", "1"], ["--workers", "2"], ["--val-fraction", "0.5"]])
def test_they_are_counted_named_and_listed(tmp_path, capsys, options):
    source = fill(tmp_path / "in", 4)
    for i in range(5):
        (source / f"black{i}.png").write_bytes(encoded(Image.new("RGB", (20, 20 + i)), "PNG"))
    # It is copied, so nobody looks at its pixels.
    (source / "copied.jpg").write_bytes(encoded(Image.new("RGB", (20, 20)), "JPEG"))
    out = tmp_path / "out"
    assert main(["pack", str(source), "--out", str(out), "--shard-samples", "3", *options]) == 0
    said = capsys.readouterr().out
    lists = [json.loads(line) for path in out.rglob("near-uniform.jsonl") for line in path.read_text().splitlines()]
    assert sorted(line["source"] for line in lists) == [f"{source}/black{i}.png" for i in range(5)]
    assert all(set(line) == {"key", "source"} for line in lists)
    assert "5 images nearly one color, such as " in said
    assert ": see near-uniform.jsonl" in said
    assert said.count(f"{source}/black") == 3
    manifests = [json.loads(path.read_text()) for path in out.rglob("manifest.json")]
    assert sum(manifest["outcomes"].get("near-uniform", 0) for manifest in manifests) == 5
    # The list is no input of a later packing.
    again = tmp_path / "again"
    assert main(["pack", str(out), "--out", str(again), "--workers", "1", "--labels", "none"]) == 0
    assert sum(json.loads(path.read_text())["num_rejected"] for path in again.rglob("manifest.json")) == 0


def test_where_there_are_none_there_is_no_list(tmp_path, capsys):
    source = fill(tmp_path / "in", 3)
    assert main(["pack", str(source), "--out", str(tmp_path / "out"), "--mean-rgb", "--workers", "1"]) == 0
    assert "one color" not in capsys.readouterr().out
    assert "near-uniform.jsonl" not in contents(tmp_path / "out")
