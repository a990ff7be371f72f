import logging
from itertools import chain

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.reading.reader import DamagedSampleError
from pipelines.world import World
from shards.sets import open_set
from tests.pipelines.shard_files import jpeg, smooth_image, write_shards

pytestmark = pytest.mark.faults

CPU = torch.device("cpu")


def joined(lists) -> list:
    return list(chain.from_iterable(lists))


@pytest.fixture
def images():
    rng = np.random.default_rng(2)
    return [jpeg(smooth_image(rng, 40, 40)) for _ in range(30)]


@pytest.fixture
def flipped(images, tmp_path):
    """Samples 9, 10 and 29 do not match their crc."""
    folder = write_shards(tmp_path / "flipped", images)
    shards = open_set(folder)
    for sample in (9, 10, 29):
        path = shards.shard_path(sample // 10)
        content = bytearray(path.read_bytes())
        content[int(shards.index(sample // 10)[sample % 10]["offset"]) + 50] ^= 4
        path.write_bytes(content)
    return folder


def samples_of_an_epoch(shards, *, world=World(), **options):
    data = DataConfig(shards=str(shards), batch_size=10, num_threads=1, on_bad_sample="skip", **options)
    with open_loader(data, ViewsConfig(size=16), seed=1, device=CPU, world=world) as loader:
        steps = [batch.index.tolist() for batch in loader]
        return steps, loader.num_replaced


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_damaged_samples_are_replaced_by_the_next_good_one_and_counted(flipped, backend, caplog):
    with caplog.at_level(logging.WARNING):
        steps, num_replaced = samples_of_an_epoch(flipped, backend=backend)
    expected = sorted([*(set(range(30)) - {9, 10, 29}), 11, 11, 0])
    assert sorted(joined(steps)) == expected
    assert num_replaced == 3
    told = [record.message for record in caplog.records]
    for sample in (9, 10, 29):
        assert sum(f"sample {sample} " in message and "replaced by the next good sample" in message for message in told)


def test_ranks_agree_on_the_replacements(flipped):
    [whole, _] = samples_of_an_epoch(flipped, backend="dali")
    shares = [
        samples_of_an_epoch(flipped, backend="dali", world=World(rank=rank, world_size=2))[0] for rank in range(2)
    ]
    for step, parts in enumerate(zip(*shares, strict=True)):
        assert [len(part) for part in parts] == [5, 5]
        assert sorted(joined(parts)) == sorted(whole[step])


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_replacement_is_seen_as_itself(flipped, backend):
    data = DataConfig(shards=str(flipped), batch_size=10, num_threads=1, on_bad_sample="skip", backend=backend)
    views = {}
    with open_loader(data, ViewsConfig(size=16), seed=1, device=CPU) as loader:
        for batch in loader:
            for sample, view in zip(batch.index.tolist(), batch.views[0], strict=True):
                # Sample 11 comes three times, with the same parameters and so the same pixels.
                assert torch.equal(views.setdefault(sample, view.clone()), view)
    assert len(views) == 27


@pytest.fixture
def undecodable(images, tmp_path):
    """Samples 4, 5, 17 and 29 are as they were packed, and no decoder takes them."""
    images[4] = images[4][:200]
    images[5] = b"no image at all" * 20
    images[17] = images[17][: len(images[17]) * 3 // 4]
    images[29] = images[29][:300]
    return write_shards(tmp_path / "undecodable", images)


@pytest.mark.parametrize(("backend", "batch_size"), [("dali", 3), ("dali", 30), ("torch", 10)])
def test_images_that_cannot_be_decoded_are_replaced(undecodable, backend, batch_size):
    data = DataConfig(
        shards=str(undecodable), batch_size=batch_size, num_threads=1, backend=backend, on_bad_sample="skip"
    )
    views, epochs = {}, []
    with open_loader(data, ViewsConfig(size=16), seed=1, device=CPU) as loader:
        for _ in range(2):
            epochs.append([])
            for batch in loader:
                epochs[-1] += batch.index.tolist()
                for sample, view in zip(batch.index.tolist(), batch.views[0], strict=True):
                    # A replacement has the parameters, and so the pixels, of its own place in the epoch.
                    assert torch.equal(views.setdefault((len(epochs), sample), view.clone()), view)
        num_replaced = loader.num_replaced
    expected = sorted([*(set(range(30)) - {4, 5, 17, 29}), 6, 6, 18, 0])
    assert [sorted(epoch) for epoch in epochs] == [expected, expected]
    assert num_replaced == 8


def test_dali_replaces_what_torch_replaces_in_the_same_order(undecodable):
    by_dali, by_torch = (samples_of_an_epoch(undecodable, backend=backend)[0] for backend in ("dali", "torch"))
    assert by_dali == by_torch


def test_ranks_agree_on_what_cannot_be_decoded(undecodable):
    [whole, _] = samples_of_an_epoch(undecodable, backend="dali")
    shares = [
        samples_of_an_epoch(undecodable, backend="dali", world=World(rank=rank, world_size=2))[0] for rank in range(2)
    ]
    for step, parts in enumerate(zip(*shares, strict=True)):
        assert sorted(joined(parts)) == sorted(whole[step])


def test_without_skip_an_image_that_cannot_be_decoded_is_named(undecodable):
    data = DataConfig(shards=str(undecodable), batch_size=30, num_threads=1, backend="dali")
    with (
        open_loader(data, ViewsConfig(size=16), seed=1, device=CPU) as loader,
        pytest.raises(DamagedSampleError, match=r"shard-000000\.tar: sample (4|5) .*cannot be decoded by DALI"),
    ):
        next(iter(loader))


def test_a_machine_on_which_dali_decodes_nothing_does_not_make_samples_damaged(images, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("pipelines.backends.dali._decode", fail)
    images[4] = images[4][:200]
    with pytest.raises(RuntimeError, match="out of memory"):
        samples_of_an_epoch(write_shards(tmp_path / "one", images), backend="dali")


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_set_without_a_good_sample_ends_with_an_error(tmp_path, backend):
    images = [b"nothing" * 10] * 12
    folder = write_shards(tmp_path / "hopeless", images)
    with pytest.raises(DamagedSampleError, match="cannot be decoded"):
        samples_of_an_epoch(folder, backend=backend)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_loader_of_given_samples_says_batch_by_batch_what_was_replaced(flipped, backend):
    data = DataConfig(shards=str(flipped), batch_size=10, num_threads=1, on_bad_sample="skip", backend=backend)
    with open_loader(data, ViewsConfig(size=16), samples=np.arange(30), device=CPU) as loader:
        said = [(batch.index.tolist(), loader.replaced) for batch in loader]
    assert joined(index for index, _ in said) == [*range(9), 11, 11, *range(11, 29), 0]
    for sample, (_, replaced) in zip((9, 10, 29), said, strict=True):
        [reason] = replaced
        assert f": sample {sample} (key" in reason
