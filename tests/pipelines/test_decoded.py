import errno
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.backends import pixels, view_process
from pipelines.backends.layout import num_view_bytes
from pipelines.config import VIEWS, DataConfig, ViewConfig, ViewSpec, central_crop, ten_crop
from pipelines.loader import open_loader
from pipelines.plan.draw import draw_views
from pipelines.reading.decoded import DecodedCache, DecodedFile
from pipelines.reading.reader import DamagedSampleError, Reader
from shards.ground.locks import locked
from shards.sets import ShardSet, open_set
from tests.pipelines.shard_files import damaged_copy

RECIPES = {
    "moco-v2": VIEWS["moco-v2"].specs,
    "moco-v3": VIEWS["moco-v3"].specs,
    "linear": tuple(ViewSpec(size=24, recipe=ViewConfig(), color="linear") for _ in range(3)),
    "cifar10": VIEWS["cifar10"].specs,
    "central": central_crop(32),
    "ten": ten_crop(16),
}
NUM = 25


@pytest.fixture(scope="module")
def shards(small_shards) -> ShardSet:
    return open_set(small_shards)


@pytest.fixture(scope="module")
def images(shards):
    """Records and true pixels of the first samples."""
    reader = Reader(shards, num_threads=1)
    records = reader.records(np.arange(NUM))
    encoded = reader.submit(np.arange(NUM), records).result()
    reader.close()
    return records, [pixels.decode(one) for one in encoded]


def a_cache(shards: ShardSet, folder: Path, *, budget: int = 1 << 30) -> DecodedCache:
    return DecodedCache.of(shards, folder, budget_bytes=budget)


def views_of(shards, cache, samples, *, specs, epoch, seed=0, skip=False):
    """Bytes of a task's slot as a worker fills it, and what it replaced."""
    spec = view_process.WorkerSpec(
        shards=shards,
        shards_in_use=1,
        draw=partial(draw_views, views=specs, seed=seed),
        sizes=tuple(view.size for view in specs),
        skip=skip,
    )
    num = len(samples)
    memory = np.zeros(16 * num + num_view_bytes(spec.sizes, num), dtype=np.uint8)
    slot = view_process.ViewSlot(path="", number=0, capacity=num)
    task = view_process.ViewTask(slot=slot, begin=0, epoch=epoch, samples=np.asarray(samples))
    reader, kept = Reader(shards, num_threads=1), None if cache is None else DecodedFile(cache)
    try:
        begun = view_process._BegunViews(task, reader, kept)
        replaced = view_process._fill(begun, spec, view_process.SlotArrays(memory, spec, num))
    finally:
        reader.close()
        if kept is not None:
            kept.close()
    return memory.tobytes(), replaced


def flip(cache: DecodedCache, place: int) -> None:
    content = bytearray(cache.path.read_bytes())
    content[place % len(content)] ^= 16
    cache.path.write_bytes(content)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_views_are_the_same_to_the_bit_with_and_without(shards, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("kept")
    specs = RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))]
    table = a_cache(shards, folder).table_end
    cache = a_cache(shards, folder, budget=table + data.draw(st.sampled_from([1, 30_000, 100_000, 1 << 30])))
    seed = data.draw(st.integers(0, 2**64 - 1))
    for _ in range(data.draw(st.integers(2, 4))):
        samples = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=8))
        epoch = data.draw(st.integers(0, 3))
        skip = data.draw(st.booleans())
        if data.draw(st.booleans()) and cache.path.stat().st_size:
            flip(cache, data.draw(st.integers(0, 1 << 20)))
        made = [
            views_of(shards, each, samples, specs=specs, epoch=epoch, seed=seed, skip=skip) for each in (cache, None)
        ]
        assert made[0] == made[1]
        assert cache.path.stat().st_size <= cache.budget_bytes


def test_what_is_kept_is_not_decoded_again_nor_read(shards, tmp_path, monkeypatch):
    cache, samples = a_cache(shards, tmp_path), [3, 80, 41]
    specs = RECIPES["cifar10"]
    views_of(shards, cache, samples, specs=specs, epoch=0)
    expected = views_of(shards, None, samples, specs=specs, epoch=1)

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(pixels, "decode", refuse)
    monkeypatch.setattr("pipelines.reading.reader._read_all", lambda wanted, *_: refuse() if wanted else [])
    assert views_of(shards, cache, samples, specs=specs, epoch=1) == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_processes_do_a_file_gives_true_pixels_or_none(shards, images, tmp_path_factory, data):
    """Several write and read with budgets of their own, stop in the middle, and the disk damages what it holds."""
    folder = tmp_path_factory.mktemp("kept")
    records, true = images
    table = a_cache(shards, folder).table_end
    budgets = data.draw(st.lists(st.integers(table + 1, table + 200_000), min_size=1, max_size=3))
    files = [(budget, DecodedFile(a_cache(shards, folder, budget=budget))) for budget in budgets]
    path = a_cache(shards, folder).path
    kept, is_damaged, size = set[int](), False, 0
    for _ in range(data.draw(st.integers(1, 30))):
        budget, file = data.draw(st.sampled_from(files))
        sample = data.draw(st.integers(0, NUM - 1))
        one, record = np.array([sample]), records[sample : sample + 1]
        what = data.draw(st.sampled_from(["keep", "keep", "keep", "killed", "read", "read", "damage"]))
        if what == "damage" and path.stat().st_size:
            is_damaged = True
            place = data.draw(st.integers(0, path.stat().st_size - 1))
            with path.open("r+b") as raw:
                raw.seek(place)
                old = raw.read(1)
                raw.seek(place)
                raw.write(bytes([old[0] ^ 32]))
        elif what == "killed":
            keep_until(file, data.draw(st.integers(0, 3)), sample, record[0], true[sample])
        elif what == "keep":
            file.keep(sample, record[0], true[sample])
        [entry] = file.find(one, record)
        if entry["offset"]:
            found = file.read(entry, record[0])
            assert found is None or np.array_equal(found, true[sample])
            if not is_damaged:
                assert found is not None
                kept.add(sample)
        elif not is_damaged:
            assert sample not in kept
        if path.stat().st_size > size:
            size = path.stat().st_size
            assert size <= budget
    for _, file in files:
        file.close()


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test sees it."""


def keep_until(file, num_writes, sample, record, image, error: BaseException | None = None):
    """Keep a sample in a process that ends at a write to the file."""
    real, left = os.pwrite, num_writes

    def pwrite(*args):
        nonlocal left
        if not left:
            raise error or Killed
        left -= 1
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with suppress(Killed):
            file.keep(sample, record, image)


@pytest.mark.parametrize("num_writes", range(4))
def test_a_sample_whose_writer_was_killed_is_kept_by_the_next_one(shards, images, tmp_path, num_writes):
    records, true = images
    cache = a_cache(shards, tmp_path)
    first, second = DecodedFile(cache), DecodedFile(cache)
    keep_until(first, num_writes, 4, records[4], true[4])
    first.close()
    assert not second.find(np.array([4]), records[4:5])["offset"][0]
    for sample in (5, 4):
        second.keep(sample, records[sample], true[sample])
        [entry] = second.find(np.array([sample]), records[sample : sample + 1])
        assert np.array_equal(second.read(entry, records[sample]), true[sample])
    second.close()
    # Killed between the two writes that reserve, a process loses the place, and nothing else.
    lost = true[4].nbytes if num_writes == 1 else 0
    assert cache.path.stat().st_size == cache.table_end + true[4].nbytes + true[5].nbytes + lost


def test_a_full_disk_ends_filling_and_not_the_run(shards, images, tmp_path):
    records, true = images
    file = DecodedFile(a_cache(shards, tmp_path))
    file.keep(0, records[0], true[0])
    keep_until(file, 1, 1, records[1], true[1], OSError(errno.ENOSPC, "No space left on device"))
    file.keep(2, records[2], true[2])
    entries = file.find(np.arange(3), records[:3])
    assert (entries["offset"] > 0).tolist() == [True, False, False]
    assert np.array_equal(file.read(entries[0], records[0]), true[0])
    file.close()


def test_first_come_first_kept(shards, images, tmp_path):
    records, true = images
    room = sum(image.nbytes for image in true[:5])
    cache = a_cache(shards, tmp_path, budget=a_cache(shards, tmp_path).table_end + room)
    file = DecodedFile(cache)
    for _ in range(2):
        for sample in range(NUM):
            file.keep(sample, records[sample], true[sample])
    assert file.find(np.arange(NUM), records)["offset"].astype(bool).tolist() == [True] * 5 + [False] * (NUM - 5)
    assert cache.path.stat().st_size == cache.budget_bytes
    file.close()


def test_pixels_of_other_bytes_are_not_taken(shards, images, tmp_path):
    records, true = images
    file = DecodedFile(a_cache(shards, tmp_path))
    file.keep(0, records[0], true[0])
    other = records[:1].copy()
    other["crc32c"] += 1
    assert not file.find(np.array([0]), other)["offset"][0]
    file.keep(1, records[1], true[1][:-1])
    assert not file.find(np.array([1]), records[1:2])["offset"][0]
    file.close()


@pytest.mark.parametrize("skip", [False, True])
def test_damaged_samples_are_reported_or_replaced_as_without(small_shards, tmp_path, skip):
    damaged = open_set(damaged_copy(small_shards, tmp_path / "damaged", shard=1, sample=7))
    cache = a_cache(damaged, tmp_path / "kept")
    made = []
    for each in (None, cache, cache):
        take = partial(views_of, damaged, each, [31, 32, 33], specs=RECIPES["cifar10"], epoch=0, skip=skip)
        if skip:
            made.append(take())
        else:
            with pytest.raises(DamagedSampleError, match=r"sample 32 .*do not match"):
                take()
    assert all(each == made[0] for each in made)
    assert [len(replaced) for _, replaced in made] == [1] * len(made)


def test_other_sets_files_go_unless_they_are_in_use(shards, tmp_path):
    idle, used, mine = (tmp_path / f"{name}.pixels" for name in ("idle", "used", "notes"))
    for path in (idle, used):
        path.touch()
    mine.with_suffix(".txt").touch()
    with locked(used, holder="a run", shared=True):
        cache = a_cache(shards, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"used.pixels", "notes.txt", cache.path.name}
        file = DecodedFile(cache)
        assert a_cache(shards, tmp_path).path == cache.path
        file.close()


def test_what_has_no_room_is_refused_before_anything_starts(shards, tmp_path):
    with pytest.raises(ValueError, match=r"its table of 100 samples alone takes .*: raise it"):
        a_cache(shards, tmp_path, budget=4096)
    with pytest.raises(ValueError, match=r"has .* for it: lower it, make room, or name another folder"):
        a_cache(shards, tmp_path, budget=1 << 60)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot keep decoded pixels in .*--data.cache-decoded-in"):
        a_cache(shards, tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match=r"means nothing without --data\.cache-decoded"):
        DataConfig(shards="x", cache_decoded_in="/tmp")
    with pytest.raises(ValueError, match="cache_decoded is 0: it must lie above 0"):
        DataConfig(shards="x", cache_decoded=0)


_KEEPER = """
import pickle, sys
import numpy as np
from pipelines.reading.decoded import DecodedFile
cache, records, images = pickle.load(sys.stdin.buffer)
file = DecodedFile(cache)
print("open", flush=True)
for sample in np.random.default_rng(int(sys.argv[1])).permutation(len(images)).tolist():
    file.keep(sample, records[sample], images[sample])
"""


def test_processes_that_fill_a_file_together_give_every_sample_one_place(shards, images, tmp_path):
    records, true = images
    cache = a_cache(shards, tmp_path)
    content = pickle.dumps((cache, records, true))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    keepers = [subprocess.Popen([sys.executable, "-c", _KEEPER, str(seed)], **pipes) for seed in range(3)]
    for keeper in keepers:
        keeper.stdin.write(content)
        keeper.stdin.close()
    for keeper in keepers:
        with keeper.stdout:
            assert keeper.stdout.read() == b"open\n"
        assert keeper.wait() == 0
    file = DecodedFile(cache)
    for sample, entry in enumerate(file.find(np.arange(NUM), records)):
        assert np.array_equal(file.read(entry, records[sample]), true[sample])
    file.close()
    assert cache.path.stat().st_size == cache.table_end + sum(image.nbytes for image in true)


def test_later_epochs_and_a_resumed_run_have_the_batches_of_a_run_without(small_shards, shards, tmp_path):
    options = {"cache_decoded": 0.01, "cache_decoded_in": str(tmp_path)}
    data = DataConfig(shards=str(small_shards), batch_size=20, num_threads=1, backend="torch", **options)
    specs, batches = RECIPES["cifar10"], []
    with open_loader(data, specs, seed=3) as loader:
        assert f"keeps up to 0.01 GiB of decoded pixels in {tmp_path}" in loader.description
        for epoch in (0, 1):
            batches += [(epoch, batch) for batch in loader]
        loader.load_state_dict({"epoch": 1, "step": 3})
        batches += [(1, batch) for batch in loader]
    assert len(batches) == 12
    for epoch, batch in batches:
        expected, _ = views_of(shards, None, batch.index.numpy(), specs=specs, epoch=epoch, seed=3)
        views = [view.permute(0, 2, 3, 1).numpy().tobytes() for view in batch.views]
        assert b"".join(views) == expected[16 * 20 :]
    [file] = tmp_path.iterdir()
    records = np.concatenate([shards.index(shard) for shard in range(4)])
    num_bytes = 3 * int((records["width"] * records["height"]).sum())
    assert file.stat().st_size == a_cache(shards, tmp_path).table_end + num_bytes
