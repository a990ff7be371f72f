import re
from dataclasses import replace

import numpy as np
from PIL import Image

from shards.cli import main
from shards.config import PackConfig
from shards.packing.estimate import estimate
from shards.packing.pack import pack
from shards.sets import open_set
from shards.tools.inspect_set import contact_sheet, describe
from tests.shards.pictures import encoded, fill, picture


def test_inspect_tells_counts_sizes_shapes_and_classes(tmp_path, capsys):
    source = fill(tmp_path / "in", 12, classes=3)
    (source / "class0" / "wide.png").write_bytes(encoded(picture(50, 600, 100), "PNG"))
    (source / "class0" / "broken").write_bytes(b"?")
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "out"), shard_samples=5, workers=1))
    text = "\n".join(describe(open_set(tmp_path / "out")))
    assert "13 samples in 3 shards" in text
    assert "packed: converted 1, copied 12" in text
    assert "rejected: not an image 1" in text
    assert re.search(r"32 to 64 +12 #{40}\n +64 to 128 +1 #", text)
    assert re.search(r"1.34333 to 2|1.05 to 1.34", text)
    assert re.search(r"4 and more +1 #", text)
    assert "classes: 3, of 4 to 5 samples; 0 samples have none" in text
    assert main(["inspect", str(tmp_path / "out"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 128, 2 * 128)
        assert np.asarray(sheet).std() > 20
    assert "sheet.png" in capsys.readouterr().out


def test_several_sets_are_inspected_as_one(tmp_path, capsys):
    for name in ("a", "b"):
        pack(PackConfig(sources=(str(fill(tmp_path / name, 3)),), out=str(tmp_path / f"{name}-out"), workers=1))
    both = f"{tmp_path}/a-out,{tmp_path}/b-out"
    assert main(["inspect", both, "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert f"{both}: 6 samples in 2 shards" in capsys.readouterr().out


def test_the_sheet_shows_the_samples(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    colors = ["red", "lime", "blue"]
    for i, color in enumerate(colors):
        Image.new("RGB", (300, 300), color).save(source / f"{i}.png")
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "out"), shuffle=False, shard_samples=2, workers=1))
    sheet = contact_sheet(open_set(tmp_path / "out"), columns=2, rows=2)
    found = [sheet.getpixel(at) for at in ((64, 64), (192, 64), (64, 192), (192, 192))]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert np.abs(np.array(found) - np.array(expected)).max() < 6


def test_a_dry_run_writes_nothing_and_predicts_what_packing_gives(tmp_path, capsys):
    source = fill(tmp_path / "in", 60, classes=2)
    for i in range(20):
        (source / f"broken{i}").write_bytes(b"?")
    work = tmp_path / "work"
    work.mkdir()
    config = PackConfig(
        sources=(str(source),),
        out=str(tmp_path / "out"),
        shard_samples=8,
        workers=1,
        dry_run=True,
        work_folder=str(work),
    )
    found = estimate(config)
    assert (found.num_inputs, found.num_classes, found.shards) == (80, 2, {"": 10})
    assert found.rejections == {"not an image": 20}
    assert found.outcomes == {"copied": 60}
    assert found.median_shorter_side == 40
    assert not (tmp_path / "out").exists()
    assert list(work.iterdir()) == []
    packed = pack(PackConfig(sources=(str(source),), out=str(tmp_path / "out"), shard_samples=8, workers=1))[""]
    total = sum(shard.num_bytes for shard in packed.shards)
    assert 0.7 < found.bytes_per_sample * packed.num_samples / total < 1.3
    assert main(["pack", str(source), "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "80 inputs, 2 classes" in told
    assert re.search(r"60 samples, [\d.]+ kB, in 1 shard\n  packed: copied 60\n  rejected: not an image 20\n", told)
    assert re.search(r"about \d s with \d+ workers", told)
    assert not (tmp_path / "new").exists()


def test_a_dry_run_advises_to_transcode_where_many_are_progressive(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i), progressive=i < 2))
    base = PackConfig(sources=(str(tmp_path),), out="out", workers=1, work_folder=str(tmp_path.parent))
    for progressive, is_advised in (("encode", True), ("transcode", False)):
        config = replace(base, progressive=progressive)
        told = "\n".join(estimate(config).lines(config))
        assert ("50% are progressive" in told) == is_advised, told


def test_a_dry_run_advises_to_resize_large_photos(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(encoded(picture(i, 1400, 1024)))
    config = PackConfig(
        sources=(str(source),), out=str(tmp_path / "out"), workers=1, dry_run=True, work_folder=str(tmp_path)
    )
    advice = list(estimate(config).lines(config))[-1]
    assert "--resize 512 would make them about 4 times as fast to decode" in advice
    assert "costs" in advice
