import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reading.reader import DamagedSampleError, Reader
from shards.sets import ShardSet, open_set
from tests.pipelines.shard_files import write_shards

pytestmark = pytest.mark.faults

PAYLOADS = [bytes(range(100 + number)) for number in range(8)]


@pytest.fixture
def shards(tmp_path):
    return open_set(write_shards(tmp_path / "set", PAYLOADS, per_shard=4))


def read(shards: ShardSet, samples) -> list[bytes]:
    reader = Reader(shards, num_threads=2)
    try:
        wanted = np.array(samples)
        return [image.tobytes() for image in reader.submit(wanted, reader.records(wanted)).result()]
    finally:
        reader.close()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_flipped_bit_anywhere_in_a_sample_is_found_and_named(tmp_path_factory, data):
    shards = open_set(write_shards(tmp_path_factory.mktemp("flip"), PAYLOADS, per_shard=4))
    sample = data.draw(st.integers(0, 7))
    record = shards.index(sample // 4)[sample % 4]
    place = int(record["offset"]) + data.draw(st.integers(0, int(record["size"]) - 1))
    path = shards.shard_path(sample // 4)
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(DamagedSampleError, match=rf"{path.name}: sample {sample} \(key {sample}, .*crc32c"):
        read(shards, [0, sample, 7])
    others = [number for number in range(8) if number != sample]
    assert read(shards, others) == [PAYLOADS[number] for number in others]


def test_a_shard_that_was_cut_is_found_and_named(shards):
    record = shards.index(1)[2]
    path = shards.shard_path(1)
    path.write_bytes(path.read_bytes()[: int(record["offset"]) + 40])
    with pytest.raises(DamagedSampleError, match=rf"{path.name}: sample 6 .*ends 66 bytes too early"):
        read(shards, [6])
    assert read(shards, [5]) == [PAYLOADS[5]]


def test_an_absent_shard_is_named(shards):
    shards.shard_path(0).unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000000\.tar is listed in manifest\.json but absent"):
        read(shards, [1])


def test_an_absent_index_is_named(shards):
    (shards.path / "shard-000001.index.npy").unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.index\.npy"):
        read(shards, [7])
