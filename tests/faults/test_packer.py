"""Everything that reference pages promise about the packer, made to happen."""

import errno
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import pytest

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.ground.pool import run_tasks
from shards.packing.pack import pack
from shards.tools.verify import verify
from tests.shards.pictures import contents, encoded, fill, jpeg, picture

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
KILLS = Path(__file__).with_name("packer_kills.py")


def config(source, out, **options):
    return PackConfig(sources=(str(source),), out=str(out), **{"workers": 1, "shard_samples": 5, **options})


def command(source, out, *options):
    arguments = [sys.executable, "-m", "shards.cli", "pack", str(source), "--out", str(out), *options]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, limit_s=30):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def children(pid):
    """Worker processes of a packer."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"shards.ground.pool" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def in_memory():
    """A folder where syncing costs nothing: this test does little else."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("options", "num_parts"), [({"split": ["val=0.4"], "dedup": True}, 0), ({}, 2)], ids=["whole", "parts"]
)
def test_killed_at_any_file_operation_the_next_run_ends_with_the_same_bytes(in_memory, options, num_parts, every):
    tmp_path = in_memory
    source = fill(tmp_path / "in", 4, classes=2)
    (source / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (source / "again.jpg").write_bytes(jpeg(3))
    options = {"shard_samples": 3, **options}
    pack(config(source, tmp_path / "reference", **options))
    (tmp_path / "kills").mkdir()
    result = subprocess.run(
        [
            sys.executable,
            KILLS,
            source,
            tmp_path / "reference",
            tmp_path / "kills",
            json.dumps(options),
            str(num_parts),
            str(every),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50


def test_a_killed_packer_leaves_no_workers_and_the_next_run_goes_on(tmp_path):
    source = fill(tmp_path / "in", 400)
    out = tmp_path / "out"
    options = ("--shard-samples", "10", "--workers", "2", "--resize", "30")
    packer = command(source, out, *options)
    done = out / ".pack" / "done"
    wait_until(lambda: done.exists() and len(list(done.iterdir())) >= 3)
    workers = children(packer.pid)
    packer.kill()
    packer.communicate()
    assert len(workers) == 2
    wait_until(lambda: not any(alive(pid) for pid in workers), 10)
    assert not (out / "manifest.json").exists()
    finished = contents(done)
    assert 3 <= len(finished) < 40
    again = command(source, out, *options)
    assert again.wait(60) == 0, again.communicate()
    again.communicate()
    pack(config(source, tmp_path / "reference", shard_samples=10, resize=30))
    assert contents(out) == contents(tmp_path / "reference")


def test_a_dead_worker_ends_the_packing_soon_and_it_can_go_on(tmp_path):
    source = fill(tmp_path / "in", 40)
    packer = command(source, tmp_path / "out", "--shard-samples", "5", "--workers", "2")
    wait_until(lambda: children(packer.pid))
    begin = time.monotonic()
    os.kill(children(packer.pid)[0], signal.SIGKILL)
    _, errors = packer.communicate(timeout=10)
    assert packer.returncode == 1
    assert time.monotonic() - begin < 10
    assert re.search(r"a worker process \d+ was killed by SIGKILL", errors)
    assert "Traceback" not in errors
    pack(config(source, tmp_path / "out"))
    pack(config(source, tmp_path / "reference"))
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def _die(task, tick):
    if task == 3:
        os._exit(7)
    return task


def test_a_worker_that_exits_is_told_with_its_exit_code():
    with pytest.raises(PackError, match="ended with exit code 7"):
        list(run_tasks(_die, range(6), workers=2, tick=lambda *done: None))


def test_an_interrupt_is_told_in_one_line(tmp_path):
    packer = command(fill(tmp_path / "in", 60), tmp_path / "out", "--shard-samples", "2", "--workers", "2")
    wait_until(lambda: children(packer.pid))
    packer.send_signal(signal.SIGINT)
    _, errors = packer.communicate(timeout=10)
    assert packer.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: interrupted")


def _limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_target_that_takes_no_more_bytes(tmp_path, workers):
    source, out = fill(tmp_path / "in", 12), tmp_path / "out"
    arguments = [sys.executable, "-m", "shards.cli", "pack", str(source), "--out", str(out), "--workers", workers]
    arguments += ["--shard-samples", "5"]
    begin = time.monotonic()
    result = subprocess.run(
        arguments, cwd=ROOT, preexec_fn=_limit_file_size, capture_output=True, text=True, timeout=30, check=False
    )
    assert time.monotonic() - begin < 10
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert [p.name for p in out.iterdir()] == [".pack"]
    assert list((out / ".pack" / "scratch").iterdir()) == []
    pack(config(source, out))
    assert verify(out) == []


def test_a_full_disk_in_the_middle_of_a_shard(tmp_path, monkeypatch, capsys):
    source, out = fill(tmp_path / "in", 12), tmp_path / "out"
    writev, calls = os.writev, []

    def full(fd, buffers):
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return writev(fd, buffers)

    monkeypatch.setattr(os, "writev", full)
    options = ["--workers", "1", "--shard-samples", "5"]
    assert main(["pack", str(source), "--out", str(out), *options]) == 1
    assert f"error: {out}: No space left on device: finished shards are kept" in capsys.readouterr().err
    assert list((out / ".pack" / "scratch").iterdir()) == []
    assert sorted(p.suffix for p in out.glob("shard-*")) == [".idx", ".npy", ".tar", ".txt"]
    monkeypatch.undo()
    assert main(["pack", str(source), "--out", str(out), *options]) == 0
    pack(config(source, tmp_path / "reference"))
    assert contents(out) == contents(tmp_path / "reference")


def test_a_target_that_cannot_be_written(tmp_path, capsys):
    source = fill(tmp_path / "in", 2)
    (tmp_path / "file").write_text("in the way")
    # What lies under a file is refused before any work.
    for out, status in (("/proc/shards", 1), (tmp_path / "file" / "out", 2)):
        assert main(["pack", str(source), "--out", str(out)]) == status
        assert str(out) in capsys.readouterr().err


def test_a_source_that_vanishes_stops_the_packing_instead_of_rejecting_everything(tmp_path, monkeypatch):
    source, out = fill(tmp_path / "in", 12), tmp_path / "out"
    whole = source.rename(tmp_path / "elsewhere")
    whole.rename(source)
    writev = os.writev

    def unmount(fd, buffers):
        if source.exists():
            source.rename(tmp_path / "elsewhere")
        return writev(fd, buffers)

    monkeypatch.setattr(os, "writev", unmount)
    with pytest.raises(PackError, match=r"is .*in still there"):
        pack(config(source, out))
    monkeypatch.undo()
    whole.rename(source)
    assert pack(config(source, out))[""].num_samples == 12


def test_a_disk_that_fails_stops_the_packing(tmp_path, monkeypatch):
    source = fill(tmp_path / "in", 3)
    read = os.read

    def broken(fd, size):
        if size > 100:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, size)

    monkeypatch.setattr(os, "read", broken)
    with pytest.raises(PackError, match="Input/output error"):
        pack(config(source, tmp_path / "out", shard_samples=2))


def test_a_folder_that_cannot_be_listed_stops_the_packing(tmp_path, monkeypatch):
    source = fill(tmp_path / "in", 4, classes=2)
    scandir = os.scandir

    def closed(path):
        if not isinstance(path, int) and b"class1" in os.fsencode(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PackError, match=r"class1 \(Permission denied\): its images would be lost"):
        pack(config(source, tmp_path / "out"))


def test_a_file_that_cannot_be_read_is_rejected(tmp_path, monkeypatch):
    source = fill(tmp_path / "in", 4)
    opened = os.open

    def closed(path, *arguments, **options):
        if os.fsencode(path).endswith(b"0002.jpg"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", closed)
    manifest = pack(config(source, tmp_path / "out"))[""]
    assert manifest.rejections == {"unreadable": 1}
    assert manifest.num_samples == 3


def test_two_packers_on_one_target(tmp_path):
    source, out = fill(tmp_path / "in", 300), tmp_path / "out"
    first = command(source, out, "--shard-samples", "2", "--workers", "1", "--resize", "30")
    wait_until(lambda: (out / ".pack" / "lock").exists() and (out / ".pack" / "lock").read_text())
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(PackError, match=f"in use by another process .process {first.pid} on"):
            pack(config(source, out, shard_samples=2, resize=30))
        with pytest.raises(PackError, match="in use"):
            pack(config(source, out, shard_samples=2, resize=30, part="0/2"))
    finally:
        first.kill()
        first.communicate()
    # Its owner is dead: the lock is free, with nothing to clean up by hand.
    assert pack(config(source, out, shard_samples=2, resize=30))[""].num_samples == 300


def bomb_png():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def bomb_jpeg():
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 30_000, 30_000)
    return bytes(data)


def test_a_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    source = fill(tmp_path / "in", 1)
    (source / "large.png").write_bytes(bomb_png())
    (source / "bomb.jpg").write_bytes(bomb_jpeg())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    manifest = pack(config(source, tmp_path / "out"))[""]
    assert manifest.rejections == {"too many pixels": 2}
    assert time.monotonic() - begin < 2
    # In KiB; the pixels would take 2.5 GiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_odd_files_end_as_samples_or_rejections_and_nothing_outside_is_read(tmp_path):
    secret = tmp_path / "secret"
    fill(secret, 1)
    source = fill(tmp_path / "in", 2)
    (source / "loop").symlink_to(source)
    (source / "self").symlink_to("self")
    (source / "dangling").symlink_to("nowhere")
    (source / "inside.jpg").symlink_to("0000.jpg")
    (source / "outside.jpg").symlink_to(secret / "0000.jpg")
    (source / "outside").symlink_to(secret)
    os.mkfifo(source / "fifo.jpg")
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(source)
    try:
        listener.bind("socket.jpg")
    finally:
        os.chdir(here)
    odd = [
        ".hidden.jpg",
        "no_extension",
        "a.b.c.jpg",
        "x.tar.jpg",
        "new\nline.jpg",
        "\udcff\udcfe.jpg",
        "ü.JPEG",
        "-rf",
        "a\\b.jpg",
    ]
    for name in odd:
        (source / name).write_bytes(jpeg(5))
    begin = time.monotonic()
    manifest = pack(config(source, tmp_path / "out", shard_samples=100))[""]
    listener.close()
    assert time.monotonic() - begin < 10
    assert manifest.num_samples == 2 + 1 + len(odd)
    assert manifest.rejections == {
        "link leaves the source": 2,
        "link to a folder": 1,
        "not a file": 2,
        "unreadable": 2,
    }
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        names = tar.getnames()
    assert len(set(names)) == manifest.num_samples
    sources = (tmp_path / "out" / "shard-000000.sources.txt").read_text(encoding="utf-8")
    assert len(sources.splitlines()) == manifest.num_samples
    assert "secret" not in sources


KINDS = ("PNG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "TGA", "PPM", "AVIF", "JPEG2000")


@pytest.mark.parametrize(
    "options",
    [{"mean_rgb": True}, {"resize": 20}, {"progressive": "transcode", "mean_rgb": True}, {}],
    ids=["mean", "resize", "transcode", "default"],
)
def test_malformed_images_are_rejected_or_become_sound_jpegs(tmp_path, options):
    source = tmp_path / "in"
    source.mkdir()
    images = {"jpg": jpeg(), "progressive.jpg": jpeg(progressive=True), "cmyk.jpg": encoded(picture(mode="CMYK"))}
    if options == {"mean_rgb": True}:
        images |= {kind.lower(): encoded(picture(), kind) for kind in KINDS}
    for number, (kind, data) in enumerate(images.items()):
        for i in range(0, len(data), max(1, len(data) // 25)):
            (source / f"{number}-cut{i}.{kind}").write_bytes(data[:i])
            (source / f"{number}-flip{i}.{kind}").write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
    manifest = pack(config(source, tmp_path / "out", shard_samples=1000, **options))[""]
    assert manifest.num_samples + manifest.num_rejected == len(list(source.iterdir()))
    assert manifest.num_rejected > 50
    problems = verify(tmp_path / "out", decode=True)
    # By default what is copied is not decoded: some of the flipped bytes of the baseline JPEG pass.
    assert len(problems) < (13 if not options else 1)
    assert all(problem.what.startswith("does not decode") for problem in problems)


def test_bytes_do_not_depend_on_clock_locale_or_directory_order(tmp_path):
    names = [f"{letter}{i}.jpg" for i in range(8) for letter in "aBäZ"]
    outs = []
    for run, (order, environment) in enumerate(
        [
            (names, {"LC_ALL": "C", "TZ": "UTC"}),
            (names[::-1], {"LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "1"}),
        ]
    ):
        folder = tmp_path / str(run)
        (folder / "in").mkdir(parents=True)
        for name in order:
            (folder / "in" / name).write_bytes(jpeg(zlib.crc32(name.encode())))
            os.utime(folder / "in" / name, (run * 1e9, run * 1e9))
        arguments = [sys.executable, "-m", "shards.cli", "pack", "in", "--out", "out", "--workers", str(1 + run)]
        environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [*arguments, "--shard-samples", "9"], cwd=folder, env=environment, check=True, capture_output=True
        )
        outs.append(contents(folder / "out"))
    assert outs[0] == outs[1]
    assert len(outs[0]) == 4 * 4 + 2
