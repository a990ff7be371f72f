import numpy as np
import pytest
from PIL import Image

from shards.cli import main
from shards.config import EncodeConfig
from shards.packing.stored_size import describe_stored_size
from tests.shards.pictures import encoded

_PHOTOS = {"bytes_per_image": 110_000.0, "resized_share": 0.0, "has_annotations": False}


@pytest.mark.parametrize(
    ("encoding", "facts", "expected"),
    [
        ({}, {}, "110 kB per image; stored at 256 pixels (--resize 256)"),
        ({}, {"bytes_per_image": 3_000.0}, None),
        ({}, {"has_annotations": True}, None),
        ({"resize": 256}, {"resized_share": 0.9}, "stored at 256 pixels: more crops"),
        ({"resize": 256}, {"resized_share": 0.1}, None),  # most were smaller already
        ({"resize": 512}, {"resized_share": 0.9}, None),  # about as large as they were
        ({"resize": 256, "resize_mode": "longer"}, {"resized_share": 0.9}, None),
    ],
)
def test_packing_says_what_a_stored_size_gives_and_costs(encoding, facts, expected):
    line = describe_stored_size(EncodeConfig(**encoding), **(_PHOTOS | facts))
    assert line is None if expected is None else line is not None and line.startswith(expected)


def test_the_command_says_so(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    (tmp_path / "in" / "0.jpg").write_bytes(encoded(Image.fromarray(pixels)))
    command = ["pack", str(tmp_path / "in"), "--workers", "1", "--out"]
    large, small = str(tmp_path / "large"), str(tmp_path / "small")
    assert main([*command, large]) == 0
    assert "kB per image; stored at 256 pixels" in capsys.readouterr().out
    assert main([*command, small, "--resize", "256"]) == 0
    assert "are enlarged" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "none"), "--resize", "256", "--dry-run"]) == 0
    assert "are enlarged" in capsys.readouterr().out
