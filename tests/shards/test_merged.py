from dataclasses import replace

import numpy as np
import pytest

from shards import Manifest
from shards.sets import open_set
from shards.sets.merged import MergedShardSet
from tests.pipelines.shard_files import write_shards

ONE = [bytes([number]) * 50 for number in range(20)]
TWO = [bytes([number]) * 60 for number in range(100, 133)]


def write(folder, images, per_shard, class_names):
    write_shards(folder, images, per_shard=per_shard, labels=[i % 2 for i in range(len(images))])
    manifest = replace(Manifest.read(folder), class_names=class_names)
    (folder / "manifest.json").write_text(manifest.to_json())
    return str(folder)


@pytest.fixture
def two(tmp_path):
    return [write(tmp_path / "one", ONE, 6, ("cat", "dog")), write(tmp_path / "two", TWO, 10, ("cat", "dog"))]


def test_several_folders_are_one_set(two):
    merged = open_set(",".join(two))
    assert isinstance(merged, MergedShardSet)
    assert (merged.num_samples, merged.num_shards) == (53, 8)
    assert merged.shard_sizes.tolist() == [6, 6, 6, 2, 10, 10, 10, 3]
    assert merged.class_names == ("cat", "dog")
    assert merged.max_bytes == 60
    parts = [open_set(path) for path in two]
    for shard in range(8):
        part, inner = parts[shard >= 4], shard if shard < 4 else shard - 4
        assert np.array_equal(merged.index(shard), part.index(inner))
        assert merged.shard_name(shard) == part.shard_name(inner)
        record = merged.index(shard)[0]
        content = np.empty(int(record["size"]), dtype=np.uint8)
        assert merged.open_shard(shard).read_into(content, int(record["offset"])) == len(content)
        assert bytes(content) == (ONE + TWO)[int(merged.shard_sizes[:shard].sum())]


def test_labels_that_mean_different_things_are_dropped(two, tmp_path):
    third = write(tmp_path / "three", ONE, 6, ("dog", "cat"))
    merged = open_set(f"{two[0]},{third}")
    assert merged.class_names == ()
    assert merged.has_dropped_labels
    assert all((merged.index(shard)["label"] == -1).all() for shard in range(merged.num_shards))


def test_a_folder_with_a_comma_in_its_name_is_one(tmp_path):
    path = write(tmp_path / "cats,dogs", ONE, 6, ())
    assert open_set(path).num_samples == 20


def test_an_absent_one_is_named(two):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        open_set(f"{two[0]},nowhere")
