import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.ground.locks import locked
from shards.packing.executors import EXECUTORS
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.tools.status import _covered_s, describe_status, read_status
from tests.shards.pictures import contents, fill


def config(source, out, **options):
    return PackConfig(sources=(str(source),), out=str(out), workers=1, shard_samples=2, **options)


def set_spans(out, *spans):
    """Let the shards have been written in these times, one after the other; none: by an earlier version."""
    done = out / ".pack" / "done"
    for group in done.glob("group-*"):
        group.unlink()
    for path, span in zip(sorted(done.iterdir()), spans, strict=True):
        record = json.loads(path.read_bytes())
        del record["span_s"]
        path.write_text(json.dumps(record | ({} if span is None else {"span_s": span})))


def test_parts_of_an_array_job_are_added_up(tmp_path, capsys):
    source, out = fill(tmp_path / "in", 12), tmp_path / "out"
    (source / "0003.jpg").write_bytes(b"hello")
    for part in ("0/4", "2/4"):
        pack(config(source, out, part=part, max_rejected=1))
    # Shards 0 and 4 are of the first part, 2 of the third; a night lies between.
    set_spans(out, [100.0, 102.0], [101.0, 104.0], [90_000.0, 90_002.0])
    before = contents(out)
    status = read_status(str(out))
    assert (status.state, status.is_held) == ("packing", False)
    assert (status.num_shards_done, status.num_shards, status.num_done, status.num_inputs) == (3, 6, 6, 12)
    assert status.num_packed + status.num_rejected == 6
    assert [(part.part, part.num_shards_done, part.num_shards) for part in status.parts] == [
        ("0/4", 2, 2),
        ("1/4", 0, 2),
        ("2/4", 1, 1),
        ("3/4", 0, 1),
    ]
    # Six inputs in the six seconds in which something was written.
    assert (status.inputs_per_s, status.time_left_s, status.last_done_s) == (1.0, 6.0, 90_002.0)
    assert status.num_bytes == sum(path.stat().st_size for path in out.glob("*.tar"))
    assert contents(out) == before
    lines = list(describe_status(status, "OUT", now_s=90_062.0))
    assert lines[0] == "OUT: packing; no packer of this machine is at work"
    assert lines[1].startswith("  6 of 12 inputs done (50%): ")
    assert "  part 1/4: 0 of 2 shards done" in lines
    assert lines[-1].endswith("about 6 s left at this rate; the newest shard is from 1 min 0 s ago")
    assert main(["status", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"][0] == {"part": "0/4", "num_shards": 2, "num_shards_done": 2}
    for part in ("1/4", "3/4"):
        pack(config(source, out, part=part, max_rejected=1))
    status = read_status(str(out))
    assert (status.state, status.num_done, status.rejections) == ("to be finished", 12, {"not an image": 1})
    manifest = finish(str(out))[""]
    status = read_status(str(out))
    assert (status.state, status.num_packed, status.num_rejected) == ("finished", manifest.num_samples, 1)
    assert main(["status", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: finished"
    assert said[1].endswith("1 rejected (not an image 1)")
    assert len(said) == 3


class Stopped(Exception):  # noqa: N818 - it is no error
    """The packer was interrupted."""


def test_a_packing_that_stopped_is_seen_as_it_is_on_disk(tmp_path, monkeypatch):
    source, out = fill(tmp_path / "in", 9), tmp_path / "out"
    (source / "copy.jpg").write_bytes((source / "0001.jpg").read_bytes())

    def stopping(_config):
        def run(job, tasks, *, tick):
            for task in tasks[:3]:
                yield task, job(task, tick)
                assert read_status(str(out)).is_held
            raise Stopped

        return run

    monkeypatch.setitem(EXECUTORS, "local", stopping)
    with pytest.raises(Stopped):
        pack(config(source, out, split=("val=0.3",), dedup=True))
    status = read_status(str(out))
    assert (status.num_shards_done, status.num_done, status.num_inputs, status.num_duplicates) == (3, 6, 9, 1)
    assert status.parts == ()
    # What an earlier version wrote has no times: no rate is made up.
    set_spans(out, None, None, None)
    assert read_status(str(out)).time_left_s is None
    assert not any("at this rate" in line for line in describe_status(read_status(str(out)), "OUT"))
    scratch = out / ".pack" / "scratch"
    scratch.mkdir(exist_ok=True)
    (scratch / "0-shard-000004.tar.123").write_bytes(bytes(1000))
    status = read_status(str(out))
    assert (status.num_writing, status.writing_bytes) == (1, 1000)
    assert "1 being written, 1 kB so far" in "\n".join(describe_status(status, "OUT"))
    # A shard whose file has gone will be written again.
    next(iter((out / "train").glob("*.tar"))).unlink()
    assert read_status(str(out)).num_shards_done == 2
    with locked(out / ".pack" / "lock-1-of-3", holder="a part"):
        assert read_status(str(out)).is_held
    monkeypatch.undo()
    pack(config(source, out, split=("val=0.3",), dedup=True))
    status = read_status(str(out))
    assert (status.state, status.num_done, status.num_duplicates) == ("finished", 9, 1)


def test_before_there_is_a_plan_and_where_there_is_nothing(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "nothing is packed at" in capsys.readouterr().err
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    assert main(["status", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: listing; no packer of this machine is at work\n"
    work = tmp_path / "out" / ".pack"
    (work / "plan-1").mkdir()
    (work / "plan-1" / "plan.json").write_text("{}")
    (work / "plan.json").write_text(".pack/plan-1")
    with pytest.raises(PackError, match=r"plan\.json is damaged"):
        read_status(str(tmp_path / "out"))


def test_a_packing_that_an_earlier_version_began_is_refused(tmp_path, capsys):
    source, out = fill(tmp_path / "in", 2), tmp_path / "out"
    (out / ".pack" / "plan").mkdir(parents=True)
    (out / ".pack" / "plan" / "plan.json").write_text('{"version": 1}')
    before = contents(out)
    for words in (
        ["pack", str(source), "--out", str(out)],
        ["pack", str(source), "--out", str(out), "--part", "0/2"],
        ["finish", str(out)],
        ["status", str(out)],
    ):
        assert main(words) == 1
        assert "by an earlier version of make-shards: finish the packing with that version" in capsys.readouterr().err
    assert contents(out) == before
    # In a bucket, and from now on, the version is in the plan.
    (out / ".pack" / "plan").rename(out / ".pack" / "plan-1")
    (out / ".pack" / "plan.json").write_text(".pack/plan-1")
    with pytest.raises(PackError, match=r"plan-1/plan\.json was written by another version"):
        pack(config(source, out))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=8))
def test_time_counts_once_however_many_write(spans):
    naive = {second for begin, length in spans for second in range(begin, begin + length)}
    assert _covered_s([(float(begin), float(begin + length)) for begin, length in spans]) == len(naive)
