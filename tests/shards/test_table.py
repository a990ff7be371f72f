import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from shards.cli import main
from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set
from shards.tools.index import index_folder
from shards.tools.table import write_table
from tests.shards.archives import member
from tests.shards.pictures import contents, encoded, fill, picture


def test_a_row_for_each_sample_says_what_index_sources_and_headers_say(tmp_path, capsys):
    source, out = fill(tmp_path / "in", 9, classes=2), tmp_path / "out"
    (source / "class1" / "gray.jpg").write_bytes(encoded(picture(70, 30, 50, "L")))
    (source / "alone.jpg").write_bytes(encoded(picture(71, 64, 32), subsampling=0))
    (source / "broken.jpg").write_bytes(b"hello")
    pack(PackConfig(sources=(str(source),), out=str(out), workers=1, shard_samples=4))
    assert main(["table", str(out), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{out / 'samples.parquet'}: 11 rows\n"
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    shards = open_set(out)
    records = np.concatenate([shards.index(shard) for shard in range(shards.num_shards)])
    sources = [line for path in sorted(out.glob("*.sources.txt")) for line in path.read_text().splitlines()]
    stems = np.repeat([entry.name for entry in shards.manifest.shards], shards.shard_sizes).tolist()
    assert [row["sample"] for row in rows] == list(range(11))
    assert [row["key"] for row in rows] == [f"{position:012d}" for position in records["position"].tolist()]
    for row, record, name, stem in zip(rows, records, sources, stems, strict=True):
        assert (row["source"], row["shard"]) == (name, stem)
        assert (row["width"], row["height"], row["crc32c"]) == (record["width"], record["height"], record["crc32c"])
        data = (out / stem).read_bytes()[row["offset"] : row["offset"] + row["bytes"]]
        assert data == Path(name).read_bytes()
        folder = name.split("/")[-2]
        assert (row["class"], row["label"]) == ((folder, int(folder[-1])) if "class" in folder else (None, None))
        kind = "gray" if "gray" in name else "4:4:4" if "alone" in name else "4:2:0"
        assert row["format"] == kind


def test_the_table_is_the_same_again_and_is_no_input_of_another_packing(tmp_path):
    out = tmp_path / "out"
    pack(PackConfig(sources=(str(fill(tmp_path / "in", 5, classes=2)),), out=str(out), workers=1, shard_samples=2))
    path, _ = write_table(str(out), workers=1)
    first = path.read_bytes()
    write_table(str(out), workers=1)
    assert path.read_bytes() == first
    manifest = pack(PackConfig(sources=(str(out),), out=str(tmp_path / "again"), workers=1))[""]
    assert (manifest.num_samples, manifest.num_rejected) == (5, 0)
    # As the documentation shows.
    table = pd.read_parquet(out / "samples.parquet")
    assert table.groupby("class", observed=True).bytes.count().to_dict() == {"class0": 3, "class1": 2}


def test_keys_of_tars_that_others_wrote_are_their_names(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    images = {"a/x.0001.jpg": encoded(picture(1)), "a/x.0002.jpg": encoded(picture(2), progressive=True)}
    members = [member(name.encode(), data) for name, data in (images | {"a/x.0002.cls": b"cat"}).items()]
    (folder / "t.tar").write_bytes(b"".join(members) + bytes(1024))
    index_folder(str(folder), workers=1)
    path, num = write_table(str(folder), str(tmp_path / "t.parquet"), workers=1)
    rows = pq.read_table(path).to_pylist()
    assert num == 2
    assert [(row["key"], row["format"], row["class"]) for row in rows] == [
        ("a/x.0001", "4:2:0", None),
        ("a/x.0002", "progressive", "cat"),
    ]
    both, num = write_table(f"{folder},{folder}", str(tmp_path / "both.parquet"), workers=1)
    assert [row["sample"] for row in pq.read_table(both).to_pylist()] == [0, 1, 2, 3]


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    pack(PackConfig(sources=(str(fill(tmp_path / "in", 3)),), out=str(out), workers=1))
    before = contents(out)
    assert main(["table", f"{out},{out}"]) == 2
    assert "--file" in capsys.readouterr().err
    (out / "shard-000000.sources.txt").write_text("one\n")
    with pytest.raises(ValueError, match="1 lines for 3 samples"):
        write_table(str(out), workers=1)
    assert contents(out).keys() == before.keys()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["table", str(out)]) == 2
    assert "moco-fast[parquet]" in capsys.readouterr().err
