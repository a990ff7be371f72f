import os
from pathlib import Path

import pytest

from shards.ground.files import appearing, aside_of, remove, write_whole

BEFORE, AFTER = b"before", b"after" * 1000


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_appears_whole_and_replaces_the_one_before(tmp_path):
    final = tmp_path / "file"
    for data in (BEFORE, AFTER):
        write_whole(final, data, durable=False)
        assert final.read_bytes() == data
    write_whole(final, "größer", durable=True)
    assert final.read_bytes() == "größer".encode()
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_appears_with_all_that_is_in_it(tmp_path, durable):
    final = tmp_path / "folder"
    # What a kill left from an earlier attempt.
    (aside_of(final) / "old").mkdir(parents=True)
    with appearing(final, durable=durable) as aside:
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "file").write_bytes(AFTER)
        assert not final.exists()
    assert [str(path.relative_to(final)) for path in sorted(final.rglob("*"))] == ["inner", "inner/file"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_left_of_what_fails(tmp_path, kind):
    def fail_midway():
        with appearing(tmp_path / "final", durable=True) as aside:
            if kind == "folder":
                aside.mkdir()
                (aside / "file").write_bytes(BEFORE)
            else:
                aside.write_bytes(BEFORE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert names(tmp_path) == []


def recorded(monkeypatch):
    """What is synced and renamed from now on, in order."""
    events, fsync, replace = [], os.fsync, Path.replace

    def recording_fsync(descriptor):
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def recording_replace(path, target):
        events.append(("rename", path))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    return events


def test_what_is_durable_is_synced_before_its_name_and_its_name_after(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    aside = aside_of(tmp_path / "set")
    with appearing(tmp_path / "set", durable=True) as path:
        path.mkdir()
        (path / "one").write_bytes(BEFORE)
    assert events == [("sync", aside / "one"), ("sync", aside), ("rename", aside), ("sync", tmp_path)]


def test_what_is_not_durable_is_only_renamed(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    write_whole(tmp_path / "file", AFTER, durable=False)
    assert events == [("rename", aside_of(tmp_path / "file"))]


@pytest.mark.parametrize("failing", ["sync", "rename", "sync the name"])
def test_a_disk_that_fails_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, failing):
    final = tmp_path / "file"
    write_whole(final, BEFORE, durable=True)
    fsync, calls = os.fsync, []

    def failing_fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == {"sync": 1, "sync the name": 2}.get(failing):
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    def failing_replace(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    if failing == "rename":
        monkeypatch.setattr(Path, "replace", failing_replace)
    with pytest.raises(OSError, match=r"Input/output error|No space left"):
        write_whole(final, AFTER, durable=True)
    assert final.read_bytes() == (AFTER if failing == "sync the name" else BEFORE)
    assert names(tmp_path) == ["file"]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert names(tmp_path) == ["folder"]
