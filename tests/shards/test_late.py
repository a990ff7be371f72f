"""Shards that a part has left, written by another one."""

from hypothesis import given
from hypothesis import strategies as st

from shards.config import PackConfig
from shards.packing import late
from shards.packing import pack as packing
from shards.packing.finish import finish
from shards.packing.late import late_tasks
from shards.packing.pack import pack
from shards.packing.plan import ShardTask
from shards.packing.records import Finished
from shards.storage.stores import Folder
from tests.shards.pictures import contents, fill

TASKS = [ShardTask(split=0, shard=number) for number in range(24)]


def finished(end_s, *, took_s=10.0):
    return Finished(entry=None, span=(end_s - took_s, end_s), part="")


@given(st.dictionaries(st.sampled_from(TASKS), st.floats(0, 1000), max_size=24), st.integers(1, 5))
def test_late_are_missing_shards_of_parts_that_began_and_fell_silent(ends, num_parts):
    records = {task: finished(end_s) for task, end_s in ends.items()}
    found = late_tasks(TASKS, records, num_parts, now_s=1000.0)
    assert len(set(found)) == len(found)
    for number in range(num_parts):
        share = TASKS[number::num_parts]
        newest_s = max((ends[task] for task in share if task in ends), default=None)
        is_silent = newest_s is not None and 1000.0 - newest_s > 60
        missing = [task for task in share if task not in records]
        assert [task for task in found if task in share] == (missing[::-1] if is_silent else [])


def test_a_part_is_given_longer_where_shards_take_longer():
    records = {TASKS[0]: finished(1000.0, took_s=100), TASKS[1]: finished(700.0, took_s=100)}
    assert late_tasks(TASKS, records, 2, now_s=1000.0) == []
    assert len(late_tasks(TASKS, records, 2, now_s=1101.0)) == 11


def config(tmp_path, out, **options):
    return PackConfig(sources=(str(tmp_path / "in"),), out=str(out), shard_samples=2, workers=1, **options)


def begin_and_stop(tmp_path, out, monkeypatch, **options):
    """Let part 1 of 2 write a few of its six shards."""

    class Stopped(Exception):  # noqa: N818 - as in test_status.py
        pass

    def stopping(job, tasks, *, tick):
        for task in tasks[:2]:
            yield task, job(task, tick)
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(packing, "executor", lambda config: stopping)
        try:
            pack(config(tmp_path, out, part="1/2", **options))
        except Stopped:
            return
    raise AssertionError("was not stopped")


def test_a_part_that_fell_silent_is_finished_by_another(tmp_path, monkeypatch):
    fill(tmp_path / "in", 24)
    pack(config(tmp_path, tmp_path / "one"))
    begin_and_stop(tmp_path, tmp_path / "out", monkeypatch)
    monkeypatch.setattr(late, "_LATE_S", -1.0)
    monkeypatch.setattr(late, "_LATE", 0)
    pack(config(tmp_path, tmp_path / "out", part="0/2"))
    finish(str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_part_that_is_at_work_is_left_alone(tmp_path, monkeypatch):
    fill(tmp_path / "in", 24)
    begin_and_stop(tmp_path, tmp_path / "out", monkeypatch)
    pack(config(tmp_path, tmp_path / "out", part="0/2"))
    assert len(list((tmp_path / "out").glob("*.tar"))) == 8


def test_a_bucket_s_part_that_fell_silent_is_finished_by_another(bucket, tmp_path, monkeypatch):
    fill(tmp_path / "in", 24)
    pack(config(tmp_path, tmp_path / "one"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    begin_and_stop(tmp_path, f"{bucket}/out", monkeypatch, work_folder=str(tmp_path / "a"))
    monkeypatch.setattr(late, "_LATE_S", -1.0)
    monkeypatch.setattr(late, "_LATE", 0)
    pack(config(tmp_path, f"{bucket}/out", part="0/2", work_folder=str(tmp_path / "b")))
    finish(f"{bucket}/out", work_folder=str(tmp_path / "b"))
    folder = Folder(f"{bucket}/out")
    assert {name: folder.read(name) for name, _ in folder.objects()} == contents(tmp_path / "one")
