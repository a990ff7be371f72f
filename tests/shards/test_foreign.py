import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from shards.cli import main
from shards.config import EncodeConfig
from shards.ground.errors import PackError, Rejected
from shards.images.encode import encode
from shards.sets import open_set
from shards.sets.record import Flag
from shards.tools.index import advice, index_folder
from shards.tools.verify import verify
from tests.shards.pictures import encoded, jpeg, picture


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(
        tmp_path / "b.tar",
        {
            "x/0.cls": b"1",
            "x/0.jpg": jpeg(0),
            "x/0.json": b"{}",
            "x/1.jpeg": jpeg(1, exif=exif),
            "x/1.cls": b"0",
            "x/2.png": encoded(picture(2), "PNG"),
            "x/2.cls": b"1",
            "notes.txt": b"no image",
        },
    )
    write(
        tmp_path / "a.tar",
        {
            "3.jpg": encoded(picture(3), progressive=True),
            "4.jpg": encoded(picture(4, mode="CMYK")),
            "5.jpg": jpeg(5)[:-50],
            "6.jpg": b"\xff\xd8\xff\xe0",
        },
    )
    return tmp_path


def test_tars_are_described_and_left_as_they_are(tars):
    before = {p.name: p.read_bytes() for p in tars.glob("*.tar")}
    indexed = index_folder(str(tars), workers=2)
    assert {p.name: p.read_bytes() for p in tars.glob("*.tar")} == before
    shards = open_set(tars)
    assert [s.name for s in shards.manifest.shards] == ["a.tar", "b.tar"]
    assert shards.shard_sizes.tolist() == [4, 3]
    flags = [Flag(f) for i in range(2) for f in shards.index(i)["flags"].tolist()]
    assert flags == [
        Flag.NOT_BASELINE,
        Flag.NOT_RGB,
        Flag.DAMAGED,
        Flag.DAMAGED,
        Flag(0),
        Flag.NEEDS_ORIENTATION,
        Flag.NOT_JPEG,
    ]
    assert shards.index(1)["label"].tolist() == [1, 0, 1]
    assert shards.index(0)["label"].tolist() == [-1] * 4
    assert np.concatenate([shards.index(i)["position"] for i in range(2)]).tolist() == list(range(7))
    record = shards.index(1)[2]
    whole = before["b.tar"]
    assert whole[record["offset"] : record["offset"] + record["size"]] == encoded(picture(2), "PNG")
    assert (record["width"], record["height"]) == (48, 40)
    assert (tars / "b.sources.txt").read_text().splitlines() == ["x/0.jpg", "x/1.jpeg", "x/2.png"]
    assert indexed.flagged["damaged"] == 2
    assert indexed.examples["needs orientation"] == ["b.tar/x/1.jpeg"]
    assert "make-shards pack" in list(advice(indexed, str(tars)))[-1]


def test_archives_that_index_does_not_read_are_named(tars, capsys):
    assert main(["index", str(tars)]) == 0
    assert "not indexed" not in capsys.readouterr().out
    (tars / "manifest.json").unlink()
    (tars / "below").mkdir()
    write(tars / "below" / "c.tar", {"0.jpg": jpeg(0)})
    (tars / "d.tar.gz").write_bytes(b"?")
    (tars / "a.parquet").write_bytes(b"statistics")
    assert main(["index", str(tars)]) == 0
    assert "  not indexed: 2 other archives, such as below/c.tar: index reads .tar right" in capsys.readouterr().out


def test_a_cut_image_is_damaged_though_its_thumbnail_is_whole(tmp_path):
    whole = encoded(picture(1, 200, 160), exif=b"Exif\0\0" + jpeg(2))
    assert whole.count(b"\xff\xd9") == 2
    write(tmp_path / "x.tar", {"0.jpg": whole, "1.jpg": whole[:-300], "2.jpg": whole[:-300] + b"\xff\xd9"})
    assert index_folder(str(tmp_path), workers=1).flagged == {"damaged": 1}
    # What has an end marker behind a scan with holes is found by decoding alone.
    assert verify(tmp_path) == []
    assert {problem.sample for problem in verify(tmp_path, decode=True)} == {"1", "2"}
    assert encode(whole, EncodeConfig()).data == whole
    with pytest.raises(Rejected, match="damaged"):
        encode(whole[:-300], EncodeConfig())


def test_verify_knows_foreign_shards(tars):
    index_folder(str(tars), workers=1)
    assert verify(tars) == []
    assert {p.sample for p in verify(tars, decode=True)} == {"2"}
    path = tars / "b.tar"
    record = open_set(tars).index(1)[1]
    damaged = bytearray(path.read_bytes())
    damaged[int(record["offset"]) + 100] ^= 1
    path.write_bytes(damaged)
    assert any(p.shard == "b.tar" and p.sample == "5" and "crc32c" in p.what for p in verify(tars))


def test_long_runs_of_one_label_are_told(tmp_path, capsys):
    members = {}
    for i in range(2400):
        members[f"{i:05d}.jpg"] = b"\xff\xd8\xff"
        members[f"{i:05d}.cls"] = b"0" if i < 1300 else b"%d" % (1 + i % 2)
    write(tmp_path / "x.tar", members)
    assert index_folder(str(tmp_path), workers=1).longest_run == 1300
    for path in tmp_path.glob("x.*"):
        if path.suffix != ".tar":
            path.unlink()
    (tmp_path / "manifest.json").unlink()
    assert main(["index", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1,300 samples in a row share one label" in out
    assert f"make-shards pack {tmp_path} --out {tmp_path}-packed" in out
    assert main(["index", str(tmp_path)]) == 2


def test_folders_without_whole_tars_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.tar"):
        index_folder(str(tmp_path), workers=1)
    write(tmp_path / "x.tar", {"0.jpg": jpeg(0)})
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:700])
    with pytest.raises(PackError, match="cannot be read to its end"):
        index_folder(str(tmp_path), workers=1)
    assert not (tmp_path / "manifest.json").exists()
