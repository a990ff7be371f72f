"""Batches that are decoded together: the same as one by one, from wherever a loader starts."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pipelines import loader as loaders
from pipelines.backends.base import Made
from pipelines.backends.registry import choose_batches_at_once
from pipelines.backends.together import StepsTogether, start_together
from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.plan.steps import ListedSteps
from tests.pipelines.shard_files import damaged_copy

CPU = torch.device("cpu")


@pytest.fixture
def four_at_once(monkeypatch):
    """Open loaders on a CPU as on a GPU: with four batches at once."""
    monkeypatch.setattr(loaders, "choose_batches_at_once", lambda *_, **__: 4)


def open_small(shards, *, samples=None, place=None, **options):
    data = DataConfig(shards=str(shards), batch_size=16, num_threads=1, backend="dali", **options)
    loader = open_loader(data, ViewsConfig(size=24), seed=3, samples=samples)
    if place is not None:
        loader.load_state_dict(place)
    return loader


def contents(batch):
    return batch.index.tolist(), batch.label.tolist(), [view.tolist() for view in batch.views]


def batches_of(shards, *, epochs=1, **options):
    with open_small(shards, **options) as loader:
        return [contents(batch) for _ in range(epochs) for batch in loader]


@pytest.fixture(scope="module")
def one_by_one(small_shards):
    """Two epochs of six batches."""
    return batches_of(small_shards, epochs=2)


def test_they_are_the_same_as_one_by_one(small_shards, one_by_one, four_at_once):
    assert batches_of(small_shards, epochs=2) == one_by_one
    with open_small(small_shards) as loader:
        assert loader.description.endswith(", 4 batches at once")


@pytest.mark.parametrize("step", [3, 4])
def test_they_are_the_same_from_any_place_on(small_shards, one_by_one, four_at_once, step):
    assert batches_of(small_shards, place={"epoch": 1, "step": step}) == one_by_one[6 + step :]


def test_a_list_ends_with_its_short_batch(small_shards, four_at_once):
    samples = np.arange(99, 0, -1)
    with open_small(small_shards, samples=samples) as loader:
        assert len(loader) == 7
        found = list(loader)
    assert [len(batch.index) for batch in found] == [16] * 6 + [3]
    assert torch.cat([batch.index for batch in found]).tolist() == samples.tolist()


def test_what_was_replaced_is_told_once(small_shards, tmp_path, four_at_once):
    damaged = damaged_copy(small_shards, tmp_path / "damaged", shard=1, sample=3)
    with open_small(damaged, on_bad_sample="skip") as loader:
        seen = [sample for _ in range(2) for batch in loader for sample in batch.index.tolist()]
        assert 28 not in seen
        assert loader.num_replaced == 2


class Numbers:
    """A backend whose views are the numbers of their samples; it notes what it was asked for."""

    def __init__(self, steps):
        self.asked = [samples.tolist() for _, samples in steps]
        self._left = iter(self.asked)
        self.closed = False

    def get(self):
        samples = np.array(next(self._left))
        view = torch.from_numpy(samples).view(-1, 1, 1, 1)
        return Made(samples=samples, labels=samples, views=(view,), replaced=tuple(map(str, samples[:1])))

    def close(self):
        self.closed = True


@dataclass
class StubJob:
    max_batch: int


def test_a_group_ends_with_its_epoch():
    steps = [(epoch, np.array([10 * epoch + step])) for epoch in range(2) for step in range(3)]
    groups = [(epoch, samples.tolist()) for epoch, samples in StepsTogether(steps=steps, at_once=2)]
    assert groups == [(0, [0, 1]), (0, [2]), (1, [10, 11]), (1, [12])]


def test_only_a_gpu_needs_many_images_at_once():
    gpu = torch.device("cuda")
    assert [choose_batches_at_once("dali", size, device=gpu) for size in (1, 32, 100, 256, 300)] == [256, 8, 2, 1, 1]
    assert choose_batches_at_once("dali", 32, device=CPU) == choose_batches_at_once("torch", 32, device=gpu) == 1


@pytest.mark.parametrize("drop", range(3))
def test_groups_do_not_depend_on_where_they_begin(drop):
    steps = ListedSteps(samples=np.arange(11), batch_size=2, epoch=0)
    started = []

    def start(job, groups):
        started.append(Numbers(groups))
        assert job.max_batch == 6
        return started[0]

    stream = start_together(start, StubJob(max_batch=2), steps, at_once=3, drop=drop)
    found = [stream.get() for _ in range(6 - drop)]
    with pytest.raises(StopIteration):
        stream.get()
    assert started[0].asked == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert [made.samples.tolist() for made in found] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]][drop:]
    assert all(made.views[0].flatten().tolist() == made.labels.tolist() == made.samples.tolist() for made in found)
    assert [made.replaced for made in found if made.replaced] == [("0",), ("6",)]
    stream.close()
    assert started[0].closed
