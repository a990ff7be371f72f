"""Planning by several processes, and what is left of it when one is killed."""

import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.config import PackConfig
from shards.packing import content, planning
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.sources.folder import FolderSource
from shards.storage.stores import Folder
from tests.shards.pictures import contents, fill, jpeg


def config(source, out, **options):
    options = {"shard_samples": 4, "depth_range": "full", "dedup": True, "val_fraction": 0.3, **options}
    return PackConfig(sources=(str(source),), out=str(out), workers=1, **options)


def objects(url):
    folder = Folder(url)
    return {name: folder.read(name) for name, _ in folder.objects()}


@pytest.fixture
def quick(monkeypatch):
    """Small files of digests, and no long waits."""
    monkeypatch.setattr(content, "FILE_ROWS", 4)
    monkeypatch.setattr(content, "_POLL_S", 0.01)
    monkeypatch.setattr(planning, "_POLL_S", 0.01)


def test_three_parts_list_and_read_a_bucket_once(bucket, tmp_path, monkeypatch, quick):
    source = fill(tmp_path / "in", 18, classes=2)
    (source / "again.jpg").write_bytes(jpeg(3))
    for name, data in contents(source).items():
        Folder(f"{bucket}/in").put(name, data)
    pack(config(f"{bucket}/in", tmp_path / "local"))
    counts, read, listing = Counter(), Folder.read, Folder.objects

    def counting(self, name):
        counts[name if name.endswith(".jpg") else ""] += 1
        return read(self, name)

    def listing_counted(self):
        counts[self.url] += 1
        return listing(self)

    failed = []

    def pack_part(number):
        work = tmp_path / f"machine{number}"
        work.mkdir()
        try:
            pack(config(f"{bucket}/in", f"{bucket}/out", part=f"{number}/3", work_folder=str(work)))
        except BaseException as error:
            failed.append(error)

    parts = [threading.Thread(target=pack_part, args=(number,)) for number in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", counting)
        patch.setattr(Folder, "objects", listing_counted)
        for part in parts:
            part.start()
        for part in parts:
            part.join()
    assert not failed
    images = {name: count for name, count in counts.items() if name.endswith(".jpg")}
    assert counts[f"{bucket}/in"] == 1
    # Once for its digest and once to be packed, which a duplicate is not.
    assert Counter(images.values()) == {2: 18, 1: 1}
    finish(f"{bucket}/out", work_folder=str(tmp_path))
    assert objects(f"{bucket}/out") == contents(tmp_path / "local")


class Killed(BaseException):
    """Stands for a kill: nothing is caught of it, and locks are let go as by the kernel."""


@settings(max_examples=6, deadline=None)
@given(kill_at=st.integers(1, 12), parts=st.integers(0, 2))
def test_killed_while_it_reads_the_next_one_reads_a_file_of_digests_again_at_most(tmp_path_factory, kill_at, parts):
    folder = tmp_path_factory.mktemp("killed")
    source = fill(folder / "in", 12)
    pack(config(source, folder / "whole"))
    num_reads, read = 0, FolderSource.read

    def killed(self, *arguments):
        nonlocal num_reads
        num_reads += 1
        if num_reads == kill_at:
            raise Killed
        return read(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "FILE_ROWS", 4)
        patch.setattr(FolderSource, "read", killed)
        with pytest.raises(Killed):
            pack(config(source, folder / "out", part=f"0/{parts}" if parts else None))
        for number in range(parts):
            pack(config(source, folder / "out", part=f"{number}/{parts}"))
        if parts:
            finish(str(folder / "out"))
        else:
            pack(config(source, folder / "out"))
    # Digests, and packing; what was read of the file that was killed was lost.
    assert num_reads == 12 + 12 + (kill_at - 1) % 4 + 1
    assert contents(folder / "out") == contents(folder / "whole")


@pytest.mark.parametrize("step", ["list_inputs", "digest_contents", "arrange"])
def test_a_step_that_was_killed_is_done_by_another_part_and_no_other_is_again(tmp_path, monkeypatch, quick, step):
    source, steps = fill(tmp_path / "in", 9), ("list_inputs", "digest_contents", "arrange")
    pack(config(source, tmp_path / "whole"))
    done, is_killed = Counter(), False

    def noted(name, function):
        def run(*arguments, **options):
            nonlocal is_killed
            result = function(*arguments, **options)
            if name == step and not is_killed:
                # Late: all that it wrote is lost, where it was to appear as a whole.
                is_killed = True
                raise Killed
            done[name] += 1
            return result

        return run

    for name in steps:
        monkeypatch.setattr(planning, name, noted(name, getattr(planning, name)))
    reads, read = [], FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, *arguments: (reads.append(1), read(self, *arguments))[1])
    with pytest.raises(Killed):
        pack(config(source, tmp_path / "out", part="0/2"))
    for part in ("1/2", "0/2"):
        pack(config(source, tmp_path / "out", part=part))
    finish(str(tmp_path / "out"))
    assert (done["list_inputs"], done["arrange"]) == (1, 1)
    assert len(reads) == 9 + 9
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
