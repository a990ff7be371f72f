"""Shards as other programs read them."""

import gc
import json
import os
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest

from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set
from tests.shards.pictures import fill, jpeg


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("back")
    source = fill(folder / "in", 14, classes=3)
    (source / "class0" / "broken").write_bytes(b"?")
    pack(PackConfig(sources=(str(source),), out=str(folder / "out"), shard_samples=6, workers=1, labels="folder"))
    return open_set(folder / "out")


def expected(shards):
    """(key, image bytes, label) of every sample in dense order."""
    found = []
    for i in range(shards.num_shards):
        whole = shards.shard_path(i).read_bytes()
        for record in shards.index(i):
            at, size = int(record["offset"]), int(record["size"])
            found.append((f"{int(record['position']):012d}", whole[at : at + size], int(record["label"])))
    assert {data for _, data, _ in found} == {jpeg(i) for i in range(14)}
    return found


def test_the_webdataset_library(packed):
    import webdataset as wds

    urls = [str(packed.shard_path(i)) for i in range(packed.num_shards)]
    # Its pipeline leaves each file for the garbage collector to close.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
        assert [(s["__key__"], s["jpg"], int(s["cls"])) for s in samples] == expected(packed)
        gc.collect()


def test_pythons_tarfile_and_gnu_tar(packed, tmp_path):
    for i in range(packed.num_shards):
        with tarfile.open(packed.shard_path(i)) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        out = tmp_path / str(i)
        out.mkdir()
        result = subprocess.run(["tar", "xf", packed.shard_path(i), "-C", out], capture_output=True, check=True)
        assert result.stderr == b""
        assert {p.name: p.read_bytes() for p in out.iterdir()} == members
        assert len(members) == 2 * packed.shard_sizes[i]


def test_dalis_own_reader_with_our_idx(packed):
    from nvidia.dali import fn, pipeline_def

    paths = [packed.shard_path(i) for i in range(packed.num_shards)]

    @pipeline_def(batch_size=14, num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            fn.readers.webdataset(
                paths=[str(p) for p in paths],
                index_paths=[str(p.with_suffix(".idx")) for p in paths],
                ext=["jpg", "cls"],
            )
        )

    built = pipeline()
    built.build()
    images, labels = built.run()
    found = [(images.at(i).tobytes(), int(labels.at(i).tobytes())) for i in range(14)]
    assert found == [(data, label) for _, data, label in expected(packed)]


@pytest.mark.slow
def test_hugging_face_datasets_as_the_documentation_says(packed, tmp_path):
    code = """
import json, sys
from datasets import Image, load_dataset
for streaming in (False, True):
    data = load_dataset("webdataset", data_files=sys.argv[1] + "/*.tar", split="train", streaming=streaming)
    for sample in data.cast_column("jpg", Image(decode=False)):
        print(json.dumps([sample["__key__"], sample["jpg"]["bytes"].hex(), sample["cls"]]))
    assert next(iter(data))["jpg"].size == (48, 40)
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(packed.path)],
        env=os.environ | offline,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = [tuple(json.loads(line)) for line in result.stdout.splitlines()]
    samples = [(key, data.hex(), label) for key, data, label in expected(packed)]
    assert found == samples + samples


def test_numpy_reads_the_index(packed):
    for i in range(packed.num_shards):
        records = np.load(packed.path / f"shard-{i:06d}.index.npy", mmap_mode="r")
        assert (records == packed.index(i)).all()
        assert not packed.index(i).flags.writeable
