import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.sources.beside import describe_sets, may_describe
from shards.storage import sorted_names
from shards.storage.sorted_names import SortedNames


@settings(max_examples=25)
@given(
    names=st.lists(st.binary(max_size=6), unique=True, max_size=60),
    sort_first=st.booleans(),
    run=st.integers(1, 20),
    block=st.integers(1, 8),
)
def test_names_come_as_a_sort_in_memory_gives_them(tmp_path_factory, names, sort_first, run, block):
    pairs = [(name, number) for number, name in enumerate(sorted(names) if sort_first else names)]
    folder = tmp_path_factory.mktemp("names") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_names, "_RUN_NAMES", run)
        patch.setattr(sorted_names, "_BLOCK_NAMES", block)
        found = SortedNames(iter(pairs), folder)
        assert list(found) == list(found) == sorted(pairs)
    found.remove()
    assert not folder.exists()


_BASES = st.sampled_from(
    [
        *("index.json", "dataset_info.json", "features.json", "state.json", "dataset_dict.json", "label.labels.txt"),
        *("00000.tar", "00000_stats.json", "00000.parquet", "manifest.json", "rejected.jsonl", "summary.html"),
        *(
            "shard-000000.tar",
            "shard-000000.idx",
            "shard-000000.index.npy",
            "shard-000000.labels.npy",
            "a.jpg",
            "b.txt",
        ),
        *(
            "train.tfrecord",
            "train-00000-of-00002",
            "x.mds",
            "x.mds.jpg",
            "x.arrow",
            "samples.parquet",
            "x-tfrecord.jpg",
        ),
    ]
)


@settings(max_examples=300)
@given(st.sets(st.tuples(st.sampled_from(["", "a/", "a/b/"]), _BASES)))
def test_what_describes_sets_is_found_among_few_names(parts):
    names = [f"{folder}{base}".encode() for folder, base in parts]
    assert describe_sets(filter(may_describe, names)) == describe_sets(names)
    assert not any(map(may_describe, (b"a/1.jpg", b"1.JPEG", b"a/0001.json", b"1.png")))
