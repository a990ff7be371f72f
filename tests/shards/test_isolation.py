"""Codecs that end their process, loop or take all memory, in real processes."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import PngImagePlugin

from shards.config import PackConfig
from shards.ground.errors import Rejected
from shards.images.isolation import Limits, close_codecs, run_codecs
from shards.packing.pack import pack
from tests.shards.pictures import contents, encoded, fill, jpeg, picture

ROOT = Path(__file__).resolve().parents[2]
CRASHING = Path(__file__).with_name("crashing")
LIMITS = Limits.of(1_000_000)


@pytest.fixture
def source(tmp_path):
    """Nine JPEGs, of which three crash, and a PNG that does."""
    folder = fill(tmp_path / "in", 9)
    for i, kind in enumerate(("abort", "exit", "memory"), start=3):
        (folder / f"{i:04d}.jpg").write_bytes(jpeg(i, comment=f"crash:{kind};".encode()))
    text = PngImagePlugin.PngInfo()
    text.add_text("mark", "crash:segfault;")
    (folder / "0020.png").write_bytes(encoded(picture(20), "PNG", pnginfo=text))
    return folder


def run_hooked(code, *arguments, **environment):
    """Run Python in which the libraries crash, in children too."""
    path = os.pathsep.join([str(CRASHING), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


PACKS = """
import sys
import shards
source, out, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
def config(name, **others):
    return shards.PackConfig(sources=(source,), out=f"{out}/{name}", shard_samples=4, **options, **others)
for name in sys.argv[4:]:
    if name == "parts":
        for number in (1, 0):
            shards.pack(config(name, part=f"{number}/2", workers=2))
        shards.finish(f"{out}/{name}")
    else:
        shards.pack(config(name, workers=int(name)))
"""

EXPECTED = {
    "0003.jpg": "simplejpeg: its process was killed by SIGABRT, twice",
    "0004.jpg": "simplejpeg: its process ended with exit code 3, twice",
    "0005.jpg": "simplejpeg: needs more than 7.47 GB of memory",
    "0020.png": "Pillow (PNG): its process was killed by SIGSEGV, twice",
}


@pytest.mark.parametrize(
    ("options", "ways"),
    [({"mean_rgb": True}, ("2",)), pytest.param({"resize": 20}, ("1", "parts"), marks=pytest.mark.slow)],
    ids=["mean colors", "resize"],
)
def test_an_image_at_which_a_codec_dies_is_rejected_and_nothing_else_changes(tmp_path, source, options, ways):
    found = run_hooked(PACKS, source, tmp_path, options, *ways)
    assert found.returncode == 0, found.stderr
    raised = run_hooked(PACKS.replace("{out}/", "{out}/raised-"), source, tmp_path, options, "1", RAISES="1")
    assert raised.returncode == 0, raised.stderr
    expected = contents(tmp_path / "raised-1")
    for way in ways:
        files = contents(tmp_path / way)
        lines = [json.loads(line) for line in files.pop("rejected.jsonl").splitlines()]
        assert {Path(line["source"]).name: line["detail"] for line in lines} == EXPECTED
        manifest = json.loads(files.pop("manifest.json"))
        assert (manifest["num_inputs"], manifest["num_samples"]) == (10, 6)
        assert manifest["rejections"] == {"codec failed": 4}
        assert files == {name: data for name, data in expected.items() if name in files}
        assert expected.keys() - files.keys() == {"manifest.json", "rejected.jsonl"}


def test_a_death_that_does_not_come_back_rejects_nothing(tmp_path):
    source = fill(tmp_path / "in", 9)
    for i, kind in enumerate(("once-abort", "once-memory", "once-exit")):
        (source / f"{3 * i:04d}.jpg").write_bytes(jpeg(3 * i, comment=f"crash:{kind};".encode()))
    for way in ("1", "2"):
        (tmp_path / f"crashed-{way}").mkdir()
        found = run_hooked(PACKS, source, tmp_path, {"mean_rgb": True}, way, CRASHED=str(tmp_path / f"crashed-{way}"))
        assert found.returncode == 0, found.stderr
        assert len(list((tmp_path / f"crashed-{way}").iterdir())) == 3
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "reference"), shard_samples=4, workers=1, mean_rgb=True))
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "reference")


def test_processes_that_are_killed_are_no_image_s_fault(tmp_path):
    source = fill(tmp_path / "in", 3)
    (source / "0001.jpg").write_bytes(jpeg(1, comment=b"crash:kill;"))
    found = run_hooked(PACKS, source, tmp_path, {"mean_rgb": True}, "1")
    assert found.returncode == 1
    said = found.stderr.splitlines()[-1]
    assert "PackError" in said
    assert f"{source}/0001.jpg: simplejpeg: the codec process" in said
    assert "was killed by SIGKILL: the machine may have run out of memory, twice" in said
    assert not (tmp_path / "1" / "rejected.jsonl").exists()
    # Where libraries do not crash, the same command goes on.
    again = PackConfig(sources=(str(source),), out=str(tmp_path / "1"), shard_samples=4, workers=1, mean_rgb=True)
    assert pack(again)[""].num_samples == 3


CHECKS = """
import sys
import shards
from shards.tools.index import index_folder
workers = int(sys.argv[3])
for problem in shards.verify(sys.argv[1], decode=True, workers=workers):
    print(problem)
found = index_folder(sys.argv[2], workers=workers)
print(found.manifest.rejections, found.manifest.num_samples)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_and_index_go_on_behind_an_image_at_which_a_codec_dies(tmp_path, workers):
    source = fill(tmp_path / "in", 5)
    (source / "0001.jpg").write_bytes(jpeg(1, comment=b"crash:abort;"))
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "packed"), shuffle=False, shard_samples=3, workers=1))
    (tmp_path / "foreign").mkdir()
    bad = encoded(picture(2), "GIF", comment=b"crash:abort;")
    (source / "0002.gif").write_bytes(bad)
    for number in range(2):
        with tarfile.open(tmp_path / "foreign" / f"{number}.tar", "w") as tar:
            tar.add(source / "0000.jpg", "a.jpg")
            tar.add(source / f"000{2 + number}.{('gif', 'jpg')[number]}", "b.jpg")
    found = run_hooked(CHECKS, tmp_path / "packed", tmp_path / "foreign", workers)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        "shard-000000.tar, sample 000000000001: does not decode: simplejpeg: its process was killed by SIGABRT, twice",
        "{'codec failed': 1} 3",
    ]
    [line] = (tmp_path / "foreign" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": "0.tar/b.jpg",
        "reason": "codec failed",
        "detail": "Pillow: its process was killed by SIGABRT, twice",
    }


def spin(data):
    while True:
        pass


def double(data, *, more):
    return data + more


def allocate(data):
    return np.ones(2 << 30, dtype=np.uint8).size


def fail(data):
    raise Rejected("reason", "detail")


def test_what_a_function_gives_or_raises_apart_is_what_it_gives_or_raises_here():
    assert run_codecs(double, LIMITS, b"ab", more=b"c") == b"abc"
    with pytest.raises(Rejected, match="reason") as caught:
        run_codecs(fail, LIMITS, b"")
    assert (caught.value.reason, caught.value.detail) == ("reason", "detail")


def interrupt(data, pid):
    os.kill(pid, signal.SIGUSR1)
    return b"late"


def test_the_answer_to_an_interrupted_call_is_not_that_of_the_next_one():
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_codecs(interrupt, LIMITS, b"", os.getpid())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert run_codecs(double, LIMITS, b"ab", more=b"c") == b"abc"


def test_a_codec_that_never_returns_or_takes_all_memory_is_stopped():
    with pytest.raises(Rejected) as caught:
        run_codecs(spin, Limits(cpu_s=0.1, memory_bytes=1 << 30), b"")
    assert caught.value.detail == "the codecs: takes more than 0 s"
    with pytest.raises(Rejected) as caught:
        run_codecs(allocate, Limits(cpu_s=60, memory_bytes=1 << 30), b"")
    assert caught.value.detail == "the codecs: needs more than 1.07 GB of memory"
    assert run_codecs(double, LIMITS, b"ab", more=b"c") == b"abc"
    close_codecs()
