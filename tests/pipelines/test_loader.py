import gc
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig, ViewConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.world import World
from tests.pipelines.central import open_central
from tests.pipelines.shard_files import damaged_copy

VIEWS = ViewsConfig(size=24, query=ViewConfig(), key=ViewConfig(solarize_p=0.5, jitter_p=0.0, grayscale_p=0.0))
CPU = torch.device("cpu")


def open_small(shards, *, batch_size=16, views=VIEWS, seed=3, world=World(), **options):
    data = DataConfig(shards=str(shards), batch_size=batch_size, num_threads=2, **options)
    return open_loader(data, views, seed=seed, device=CPU, world=world)


@pytest.fixture
def loader(small_shards):
    with open_small(small_shards) as loader:
        yield loader


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("dali-views", "read-shards"))]


def same(one, two) -> bool:
    of_one, of_two = ((*batch.views, batch.index, batch.label) for batch in (one, two))
    return all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))


def test_a_batch_keeps_the_contract(loader):
    assert len(loader) == 6
    assert (loader.num_samples, loader.batch_size) == (100, 16)
    assert "dali" in loader.description
    for batch in loader:
        for view in batch.views:
            assert view.shape == (16, 3, 24, 24)
            assert view.dtype == torch.uint8
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert batch.index.dtype == batch.label.dtype == torch.int64
        assert torch.equal(batch.index, batch.label)
        assert not torch.equal(*batch.views)


def test_an_iteration_is_an_epoch_and_each_has_an_order_and_views_of_its_own(loader):
    epochs = [list(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [6, 6, 6]
    seen = [torch.cat([batch.index for batch in epoch]).tolist() for epoch in epochs]
    assert all(len(set(samples)) == 96 for samples in seen)
    assert seen[0] != seen[1] != seen[2]
    first = {int(i): view for batch in epochs[0] for i, view in zip(batch.index, batch.views[0], strict=True)}
    second = {int(i): view for batch in epochs[1] for i, view in zip(batch.index, batch.views[0], strict=True)}
    assert not any(torch.equal(first[i], second[i]) for i in first.keys() & second.keys())


def test_the_state_counts_batches_handed_over(loader):
    assert loader.state_dict() == {"epoch": 0, "step": 0}
    iterator = iter(loader)
    for step in range(1, 6):
        next(iterator)
        assert loader.state_dict() == {"epoch": 0, "step": step}
    next(iterator)
    assert loader.state_dict() == {"epoch": 1, "step": 0}
    assert next(iterator, None) is None


def test_a_resume_gives_the_same_batches_to_the_bit(small_shards, loader):
    whole = [batch for _ in range(2) for batch in loader]
    for epoch, step in ((0, 0), (0, 4), (0, 6), (1, 3)):
        with open_small(small_shards) as other:
            other.load_state_dict({"epoch": epoch, "step": step})
            rest = list(other)
        start = epoch * 6 + step
        assert len(rest) == (6 - step if step < 6 else 6)
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=False))


def test_a_seek_in_a_running_loader(loader):
    whole = list(loader)
    next(iter(loader))
    loader.load_state_dict({"epoch": 0, "step": 2})
    assert all(same(a, b) for a, b in zip(loader, whole[2:], strict=True))


def test_leaving_a_loop_goes_on_where_it_left(small_shards, loader):
    with open_small(small_shards) as other:
        whole = list(other)
    parts = []
    for batch in loader:
        parts.append(batch)
        if len(parts) == 2:
            break
    parts.extend(loader)
    assert all(same(a, b) for a, b in zip(parts, whole, strict=True))


def test_pixels_and_samples_of_a_step_do_not_depend_on_the_ranks(small_shards):
    def steps(world_size) -> list[dict[int, torch.Tensor]]:
        found = []
        loaders = [
            open_small(small_shards, world=World(rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        for batches in zip(*loaders, strict=True):
            step = {}
            for batch in batches:
                assert len(batch.index) == 16 // world_size
                for i, *views in zip(batch.index, *batch.views, strict=True):
                    step[int(i)] = torch.stack(views).clone()
            found.append(step)
        for loader in loaders:
            loader.close()
        return found

    one, four = steps(1), steps(4)
    assert len(one) == len(four) == 6
    for a, b in zip(one, four, strict=True):
        assert a.keys() == b.keys()
        assert len(a) == 16
        assert all(torch.equal(a[i], b[i]) for i in a)


def test_views_stay_whole_while_later_ones_are_made(loader):
    kept = []
    for _ in range(3):
        kept.extend((batch, batch.views[0].clone(), batch.views[1].clone()) for batch in loader)
    assert all(torch.equal(batch.views[0], q) and torch.equal(batch.views[1], k) for batch, q, k in kept)


def test_the_next_epoch_is_made_ready_before_it_is_asked_for(loader):
    list(loader)
    ready = loader._stream._out
    with ready._changed:
        assert ready._changed.wait_for(lambda: len(ready._items) == 2, timeout=30)
    assert loader.state_dict() == {"epoch": 1, "step": 0}


@pytest.mark.parametrize("taken", [0, 1, 6])
def test_closing_leaves_no_thread_at_any_time(small_shards, taken):
    loader = open_small(small_shards)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    loader.close()
    loader.close()
    assert our_threads() == []
    with pytest.raises(ValueError, match="this loader is closed"):
        next(iter(loader))


def test_starting_ahead_of_need_changes_no_batch(small_shards, loader):
    with open_small(small_shards) as ahead:
        ahead.start()
        assert our_threads()
        assert ahead.state_dict() == {"epoch": 0, "step": 0}
        ahead.start()
        assert same(next(iter(loader)), next(iter(ahead)))
        # One that goes elsewhere, as a resume does, starts there.
        for each in (loader, ahead):
            each.load_state_dict({"epoch": 1, "step": 2})
        ahead.start()
        assert same(next(iter(loader)), next(iter(ahead)))
    with pytest.raises(ValueError, match="this loader is closed"):
        ahead.start()


def test_a_dropped_loader_closes_itself(small_shards):
    loader = open_small(small_shards)
    next(iter(loader))
    assert our_threads()
    del loader
    gc.collect()
    assert our_threads() == []


def test_a_consumers_exception_leaves_the_loader_usable_and_closable(loader):
    def consume():
        for _ in loader:
            raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    assert loader.state_dict() == {"epoch": 0, "step": 1}
    assert len(list(loader)) == 5


SCRIPT = """
import sys, torch, warnings
# From DALI's conversion of conditionals, as in pyproject.toml.
warnings.filterwarnings("ignore", ".*___pyct_anno", DeprecationWarning)
from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.world import World
loader = open_loader(DataConfig(shards=sys.argv[1], batch_size=16), ViewsConfig(size=16), seed=0,
                     device=torch.device("cpu"))
for step, batch in enumerate(loader):
    if step == 2:
        print("reached", flush=True)
        if sys.argv[2] == "raise":
            raise KeyError("in the loop")
        break
"""


@pytest.mark.parametrize(("how", "code"), [("leave", 0), ("raise", 1)])
def test_a_process_that_never_closes_its_loader_still_ends(small_shards, how, code):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(small_shards), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == "reached\n"
    assert ("KeyError: 'in the loop'" in ended.stderr) if code else (ended.stderr == "")


def test_a_state_that_fits_no_place_is_refused(loader):
    for state in ({"epoch": 0, "step": 7}, {"epoch": -1, "step": 0}, {"epoch": 0, "step": -1}):
        with pytest.raises(ValueError, match="an epoch of this loader has 6 steps"):
            loader.load_state_dict(state)


def test_numbers_that_cannot_work_are_told_before_any_work(small_shards):
    with pytest.raises(ValueError, match="cannot be split evenly over 3 ranks"):
        open_small(small_shards, world=World(world_size=3))
    with pytest.raises(ValueError, match="less than one batch of 101"):
        open_small(small_shards, batch_size=101)
    with pytest.raises(ValueError, match="is not a folder"):
        open_small(small_shards / "absent")
    assert our_threads() == []


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_evaluation_sees_each_sample_once_in_dense_order(small_shards, rank):
    loader = open_central(str(small_shards), size=20, batch_size=45, world=World(rank=rank, world_size=3))
    for _ in range(2):
        batches = list(loader)
        assert len(loader) == len(batches) == 3
        samples = torch.cat([batch.index for batch in batches]).tolist()
        assert samples == list(range(100 * rank // 3, 100 * (rank + 1) // 3))
        assert all(batch.views[0].shape == (len(batch.index), 3, 20, 20) for batch in batches)
        assert all(torch.equal(batch.label, batch.index) for batch in batches)
    assert our_threads() == []


def test_evaluation_of_chosen_samples_and_of_none(small_shards):
    chosen = np.array([99, 3, 50])
    loader = open_central(str(small_shards), size=20, batch_size=2, samples=chosen)
    assert [batch.index.tolist() for batch in loader] == [[99, 3], [50]]
    empty = open_central(str(small_shards), size=20, batch_size=2, samples=chosen[:0])
    assert list(empty) == []
    with pytest.raises(ValueError, match="beyond the 100 samples"):
        open_central(str(small_shards), size=20, batch_size=2, samples=np.array([100]))
    with pytest.raises(ValueError, match="crop is 0"):
        open_central(str(small_shards), size=20, crop=0, batch_size=2)


def test_leaving_an_evaluation_early_ends_its_threads(small_shards):
    loader = open_central(str(small_shards), size=20, batch_size=2)
    for _ in loader:
        break
    gc.collect()
    loader.close()
    assert our_threads() == []


def test_a_damaged_sample_reaches_the_consumer_with_its_name(small_shards, tmp_path):
    loader = open_small(damaged_copy(small_shards, tmp_path / "broken", shard=2, sample=7))
    with pytest.raises(ValueError, match=r"shard-000002\.tar: sample 57 .*crc32c"):
        list(loader)
    loader.close()
    assert our_threads() == []


def test_stages_that_never_happen_are_left_out(small_shards):
    none = ViewConfig(jitter_p=0.0, grayscale_p=0.0, blur_p=0.0, flip_p=0.0, crop_scale=(1.0, 1.0))
    with open_small(small_shards, views=replace(VIEWS, query=none, key=none)) as loader:
        batch = next(iter(loader))
    assert batch.views[0].float().std() > 10


def test_samples_that_are_not_divided_are_all_this_ranks(small_shards):
    world, mine = World(rank=1, world_size=2, local_world_size=2), np.array([7, 3, 50, 4])
    data = DataConfig(shards=str(small_shards), batch_size=6, num_threads=1)
    found = [
        [batch.index.tolist() for batch in open_loader(data, VIEWS, samples=mine, world=world, divided=divided)]
        for divided in (True, False)
    ]
    assert found == [[[50, 4]], [[7, 3, 50], [4]]]
