"""Shards written by a Ray cluster, one of whose workers is killed."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.ground.progress import ProgressBars
from shards.packing.cluster import NodeJob
from shards.packing.pack import pack
from shards.packing.plan import ShardTask
from shards.packing.planning import make_plan
from shards.packing.write import WriteShard
from shards.storage.target import LocalTarget
from tests.shards.benchmark_files import cifar_files, voc_files, write_files
from tests.shards.pictures import contents, encoded, picture

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
CRASHING = ROOT / "tests" / "shards" / "crashing"


def wait_until(condition, limit_s=60):
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def cluster():
    """(address, environment, session) of a Ray cluster of two workers on this machine; it dies with its session."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Sockets lie below it, and their paths may be 107 bytes long at most.
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    # Ray listens on all addresses, whatever it is told.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Libraries crash there, too, at images that say so.
    path = os.pathsep.join([str(CRASHING), str(ROOT)])
    environment = os.environ | token | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    options = f"--head --block --num-cpus 2 --port {port} --include-dashboard false --temp-dir {folder}"
    arguments = ["-c", "from ray.scripts.scripts import main; main()", "start", *options.split()]
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(
            [sys.executable, *arguments, "--object-store-memory", "80000000"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(lambda: b"runtime started" in (folder / "log").read_bytes() or head.poll() is not None)
        assert head.poll() is None, (folder / "log").read_text()
        address = (folder / "log").read_text().partition("--address='")[2].partition("'")[0]
        yield address, environment, head.pid
    finally:
        head.terminate()
        head.wait(20)
        wait_until(lambda: not members(head.pid), 20)
        shutil.rmtree(folder)


def members(session):
    """{pid: title} of the processes of a session."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state != "Z":
                found[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def stop_a_busy_worker(session):
    """Stop a worker of Ray in the middle of a shard; its number, None where none is at work."""
    for pid, title in members(session).items():
        if title.startswith("ray::_write"):
            os.kill(pid, signal.SIGSTOP)
            # Stopped, it cannot finish what it is at.
            if members(session).get(pid, "").startswith("ray::_write"):
                return pid
            os.kill(pid, signal.SIGCONT)
    return None


def kill_a_busy_worker(session):
    """Kill a worker of Ray in the middle of a shard; False where none is at work."""
    if (pid := stop_a_busy_worker(session)) is None:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder that holds in/, 48 images that take a while, and one/, what one process makes of them."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "in").mkdir()
    for i in range(48):
        (folder / "in" / f"{i}.png").write_bytes(encoded(picture(i, 400, 400), "PNG"))
    pack(PackConfig(sources=(str(folder / "in"),), out=str(folder / "one"), shard_samples=3, workers=1))
    return folder


def start_packing(cluster, source, out, python=("-m", "shards.cli")):
    address, environment, _ = cluster
    arguments = ["pack", str(source / "in"), "--out", str(out), "--shard-samples", "3"]
    return subprocess.Popen(
        [sys.executable, *python, *arguments, "--executor", "ray", "--ray-address", address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_cluster_one_of_whose_workers_is_killed_gives_the_bytes_of_one_process(cluster, source, tmp_path):
    packer = start_packing(cluster, source, tmp_path / "ray")
    wait_until(lambda: kill_a_busy_worker(cluster[2]) or packer.poll() is not None)
    assert packer.poll() is None, packer.communicate()
    output, errors = packer.communicate(timeout=60)
    assert packer.returncode == 0, errors
    assert "48 images in 16 shards" in output
    assert contents(tmp_path / "ray") == contents(source / "one")


@pytest.mark.slow
def test_a_shard_that_takes_long_is_written_elsewhere_too(cluster, source, tmp_path):
    at_once = "import sys; from shards.packing import cluster; cluster._LATE_S = 0.5; from shards.cli import main; "
    packer = start_packing(cluster, source, tmp_path / "ray", ("-c", f"{at_once}sys.exit(main())"))
    stopped = wait_until(lambda: stop_a_busy_worker(cluster[2]) or packer.poll() is not None)
    output, errors = packer.communicate(timeout=60)
    assert packer.returncode == 0, errors
    assert "48 images in 16 shards" in output
    assert contents(tmp_path / "ray") == contents(source / "one")
    # Ray ends what a packer leaves behind.
    wait_until(lambda: stopped not in members(cluster[2]))


@pytest.mark.slow
def test_interrupted_on_a_cluster_it_can_go_on_anywhere(cluster, source, tmp_path):
    packer, done = start_packing(cluster, source, tmp_path / "out"), tmp_path / "out" / ".pack" / "done"
    wait_until(lambda: packer.poll() is not None or (done.exists() and len(list(done.iterdir())) >= 2))
    packer.send_signal(signal.SIGINT)
    _, errors = packer.communicate(timeout=30)
    assert packer.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("error: interrupted: finished shards are kept")
    assert not (tmp_path / "out" / "manifest.json").exists()
    wait_until(lambda: not any(title.startswith("ray::_write") for title in members(cluster[2]).values()))
    pack(PackConfig(sources=(str(source / "in"),), out=str(tmp_path / "out"), shard_samples=3, workers=1))
    assert contents(tmp_path / "out") == contents(source / "one")


@pytest.mark.slow
def test_a_cluster_packs_the_usual_data_sets_as_one_process_does(cluster, tmp_path):
    # What is beside their plan: pixels of one, sets of labels of the other.
    signs = {str(i): (1, -1, i % 2) for i in range(6)}
    write_files(tmp_path, voc_files({"train": list(signs)}, signs))
    write_files(tmp_path / "cifar-10-batches-py", cifar_files(10, "python")[0])
    for name in ("VOCdevkit", "cifar-10-batches-py"):
        options = {"sources": (str(tmp_path / name),), "subset": "train", "shard_samples": 3}
        pack(PackConfig(out=str(tmp_path / "one" / name), workers=1, **options))
        arguments = ["pack", str(tmp_path / name), "--subset", "train", "--shard-samples", "3"]
        arguments += ["--out", str(tmp_path / "ray" / name), "--executor", "ray", "--ray-address", cluster[0]]
        subprocess.run(
            [sys.executable, "-m", "shards.cli", *arguments], env=cluster[1], check=True, capture_output=True
        )
        assert contents(tmp_path / "ray" / name) == contents(tmp_path / "one" / name)


@pytest.mark.slow
def test_an_image_at_which_a_codec_dies_on_a_node_is_rejected_and_nothing_else_changes(cluster, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        comment = b"crash:abort;" if i == 2 else b""
        (tmp_path / "in" / f"{i}.jpg").write_bytes(encoded(picture(i), comment=comment))
    words = ["pack", str(tmp_path / "in"), "--shard-samples", "3", "--mean-rgb", "--max-rejected", "1"]
    for name, more in (("ray", ["--executor", "ray", "--ray-address", cluster[0]]), ("one", ["--workers", "1"])):
        arguments = [sys.executable, "-m", "shards.cli", *words, "--out", str(tmp_path / name), *more]
        subprocess.run(arguments, env=cluster[1], check=True, capture_output=True)
    files = contents(tmp_path / "ray")
    assert b"2.jpg" in files["rejected.jsonl"]
    assert b"killed by SIGABRT, twice" in files["rejected.jsonl"]
    assert files == contents(tmp_path / "one")


@pytest.fixture
def job(tmp_path):
    """The job of a node, and its plan of one shard."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(encoded(picture(), "PNG"))
    config = PackConfig(sources=(str(tmp_path / "in"),), out=str(tmp_path / "out"), shard_samples=1, workers=1)
    target = LocalTarget(config.out)
    target.scratch.mkdir(parents=True)
    target.begin([])
    plan = make_plan(config, target, ProgressBars(enabled=False))
    target.leave()
    return NodeJob.of(WriteShard(f".pack/{plan.name}", target, config))


def test_a_node_without_the_shared_folder_says_what_it_lacks(job, tmp_path):
    task = ShardTask(split=0, shard=0)
    away = replace(job, job=replace(job.job, target=LocalTarget(str(tmp_path / "nowhere"))))
    with pytest.raises(PackError, match=rf"node {socket.gethostname()}: cannot read .*nowhere.*every node has"):
        away(task, print)
    with pytest.raises(PackError, match=r"has simplejpeg [\d.]+, not simplejpeg 0.0: .*install the same versions"):
        replace(job, versions=("simplejpeg 0.0", *job.versions[1:]))(task, print)
    scratch = job.job.target.scratch
    scratch.write_text("in the way")
    with pytest.raises(PackError, match=rf"node {socket.gethostname()}: .*scratch.*: (File exists|Not a directory)"):
        job(task, print)
    scratch.unlink()
    (tmp_path / "in").rename(tmp_path / "unmounted")
    with pytest.raises(PackError, match=rf"node {socket.gethostname()}: .*is .*in still there"):
        job(task, print)
    assert not list((tmp_path / "out").glob("shard-*"))


def test_without_ray_or_a_cluster_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(encoded(picture(), "PNG"))
    arguments = ["pack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--executor", "ray"]
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        assert main([*arguments, "--ray-address", address]) == 2
    assert f"--ray-address {address}: no Ray cluster answers" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--part and --executor ray exclude each other"):
        PackConfig(sources=("in",), out="out", executor="ray", part="0/2")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments) == 2
    assert "pip install 'moco-fast[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
