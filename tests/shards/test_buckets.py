"""Buckets as sources and targets, against an S3 server on this machine."""

import gzip
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.ground.progress import ProgressBars
from shards.packing import pack as pack_module
from shards.packing.cluster import NodeJob, remove_copy
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.packing.plan import ShardTask
from shards.packing.planning import make_plan
from shards.packing.write import WriteShard
from shards.sets import open_set
from shards.storage import stores as storage
from shards.storage.target import BucketTarget
from shards.tools.index import index_folder
from shards.tools.status import read_status
from tests.shards.benchmark_files import cifar_files, tar_of, voc_files, write_coco, write_files, write_imagenet
from tests.shards.pictures import contents, fill, jpeg
from tests.shards.record_files import example, mds, tfrecord

ROOT = Path(__file__).resolve().parents[2]


class Faults(http.server.BaseHTTPRequestHandler):
    """Hands requests on to the S3 server, but the first `remaining` of a kind go wrong as `fault` says."""

    upstream = ""
    fault = ""
    method, name = "GET", ".jpg"
    remaining = 0
    kill_pid, kill_at, is_kill_late = 0, "", False
    """At the first upload to such a name a process is killed, before or after the object is there."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _relay(self):
        cls = type(self)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else None
        request = urllib.request.Request(cls.upstream + self.path, data=body, method=self.command)
        # Without one, urllib says that it is a form, and the server takes it for one.
        request.add_header("Content-Type", "application/octet-stream")
        for name, value in self.headers.items():
            if name.lower() not in ("host", "content-length", "accept-encoding"):
                request.add_header(name, value)
        request.add_header("Host", self.headers["Host"])
        is_kill = self.command == "PUT" and cls.kill_at != "" and cls.kill_at in self.path
        if is_kill:
            cls.kill_at = ""
        if is_kill and not cls.is_kill_late:
            os.kill(cls.kill_pid, signal.SIGKILL)
            self.close_connection = True
            return
        broken = self.command == cls.method and cls.name in self.path and cls.remaining > 0
        cls.remaining -= broken
        if broken and cls.fault == "503":
            self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if broken and cls.fault == "403":
            self._answer(403, {}, b"<Error><Code>ExpiredToken</Code></Error>")
            return
        if broken and cls.fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if broken and cls.fault == "stall":
            cls.release.wait(20)
            return
        try:
            with urllib.request.urlopen(request) as answer:
                status, headers, data = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, headers, data = error.code, error.headers, error.read()
        if is_kill:
            os.kill(cls.kill_pid, signal.SIGKILL)
        self._answer(status, headers, data, is_short=broken)

    def _answer(self, status, headers, data, *, is_short=False):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() in ("etag", "last-modified", "content-type", "content-range", "x-amz-bucket-region"):
                self.send_header(name, value)
        size = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_short else data)
            self.close_connection = is_short

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay  # noqa: N815 - the names that http.server calls


@pytest.fixture(scope="module")
def proxy(server):
    Faults.upstream = server
    Faults.release = threading.Event()
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faults)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    Faults.release.set()
    proxy.shutdown()
    proxy.server_close()
    thread.join()


def upload(url, files):
    folder = storage.Folder(url)
    for name, data in files.items():
        folder.put(name, data)


def objects(url):
    folder = storage.Folder(url)
    return {name: folder.read(name) for name, _ in folder.objects()}


def config(*sources, out, **options):
    return PackConfig(sources=tuple(map(str, sources)), out=str(out), **{"workers": 1, "shard_samples": 4, **options})


def shard_bytes(files):
    """What does not name the source's address."""
    return {name: data for name, data in files.items() if name.endswith((".tar", ".npy", ".idx"))}


def test_a_prefix_is_packed_like_a_folder(bucket, tmp_path):
    source = fill(tmp_path / "in", 10, classes=2)
    (source / "class0" / "notes.txt").write_text("no image")
    upload(bucket + "/some/prefix", contents(source))
    pack(config(source, out=tmp_path / "local", max_rejected=1.0))
    pack(config(bucket + "/some/prefix", out=tmp_path / "remote", max_rejected=1.0))
    assert shard_bytes(contents(tmp_path / "local")) == shard_bytes(contents(tmp_path / "remote"))
    line = json.loads((tmp_path / "remote" / "rejected.jsonl").read_text())
    assert line["source"] == f"{bucket}/some/prefix/class0/notes.txt"


def test_archives_lists_and_inventories_in_a_bucket(bucket, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(5):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(jpeg(i))
            tar.addfile(info, io.BytesIO(jpeg(i)))
    upload(bucket, {"d/x.tar": buffer.getvalue(), "d/more/7.jpg": jpeg(7), "d/list.txt": b"more/7.jpg\n"})
    name = bucket.removeprefix("s3://")
    upload(bucket, {"inventory.csv": f'"{name}","d/more/7.jpg","512"\n"{name}","gone%20one.jpg","1"\n'.encode()})
    for source, count, rejected in (
        ("d/x.tar", 5, 0),
        ("d", 6, 1),
        ("d/list.txt", 1, 0),
        ("inventory.csv", 1, 1),
    ):
        manifest = pack(config(f"{bucket}/{source}", out=tmp_path / source.replace("/", "-"), max_rejected=1.0))[""]
        assert (manifest.num_samples, manifest.num_rejected) == (count, rejected), source
    # Downloaded, it still names what is in the bucket.
    (tmp_path / "inventory.csv.gz").write_bytes(gzip.compress(storage.Folder(bucket).read("inventory.csv")))
    pack(config(tmp_path / "inventory.csv.gz", out=tmp_path / "downloaded", max_rejected=1.0))
    assert shard_bytes(contents(tmp_path / "downloaded")) == shard_bytes(contents(tmp_path / "inventory.csv"))


def test_nothing_of_a_bucket_is_lost_in_silence(bucket, tmp_path):
    first, second = (tar_of({f"{i}.jpg": jpeg(i) for i in some}) for some in (range(2), range(2, 6)))
    # Content says what is an archive and what is an image.
    files = {"x/joined.tar": first + second, "x/y.tgz": first, "x/photo.tar": jpeg(8), "x/._1.jpg": b"\0\5\26\7"}
    upload(bucket, files | {"x/scan.0001.jpg": jpeg(10), "x/scan.0002": jpeg(11)})
    manifest = pack(config(f"{bucket}/x", out=tmp_path / "out"))[""]
    assert (manifest.num_samples, manifest.num_rejected, manifest.left_aside) == (11, 0, {"litter (._*)": 1})
    upload(bucket, {"bad/x.tar": first + b"more", "bad/0.jpg": jpeg(0), "tar/x.tar": first + second, "7z/x.7z": b"7z"})
    with pytest.raises(
        PackError, match=rf"{bucket}/bad/x.tar .* the 4 bytes from byte {len(first)} on are not another one"
    ):
        pack(config(f"{bucket}/bad", out=tmp_path / "bad"))
    with pytest.raises(PackError, match=rf"{bucket}/7z/x.7z is called an archive"):
        pack(config(f"{bucket}/7z", out=tmp_path / "7z"))
    assert index_folder(f"{bucket}/tar", workers=1, work_folder=str(tmp_path)).manifest.num_samples == 6
    upload(bucket, {"masks/0.jpg": jpeg(0), "masks/0.seg.png": jpeg(1)})
    with pytest.raises(ValueError, match=r"has 1 sample of several images"):
        pack(config(f"{bucket}/masks", out=tmp_path / "masks"))


def test_records_in_a_bucket(bucket, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    samples = [{"image": jpeg(i), "label": (i % 2).to_bytes(8, "little")} for i in range(4)]
    mds(source / "shard.00000.mds", {"image": "jpeg", "label": "int"}, samples)
    tfrecord(source / "train-00000-of-00001", [example(image=jpeg(i), label=i % 2) for i in range(4, 8)])
    upload(bucket + "/r", contents(source))
    for name, count in (("", 8), ("/shard.00000.mds", 4), ("/train-00000-of-00001", 4)):
        here, there = (tmp_path / f"{place}{count}{name[:2].strip('/')}" for place in ("here", "there"))
        pack(config(f"{source}{name}", out=here))
        manifest = pack(config(f"{bucket}/r{name}", out=there))[""]
        assert (manifest.num_samples, manifest.num_rejected, manifest.class_names) == (count, 0, ("0", "1"))
        assert shard_bytes(contents(here)) == shard_bytes(contents(there))


def test_the_usual_data_sets_are_read_from_a_bucket(bucket, tmp_path):
    write_imagenet(tmp_path / "in")
    voc = voc_files({"val": ["1", "2"]}, {"1": (1, -1, 0), "2": (1, 1, -1)})
    (tmp_path / "in" / "VOCtrainval_x.tar").write_bytes(tar_of(voc))
    (tmp_path / "in" / "cifar-10-binary.tar.gz").write_bytes(tar_of(cifar_files(10, "binary")[0], "w:gz"))
    write_coco(tmp_path / "in" / "json", {"a/1.jpg": [1], "2.jpg": [2]}, {1: "cat", 2: "dog"})
    upload(bucket + "/in", contents(tmp_path / "in"))
    sources = {
        "ILSVRC2012_img_train.tar": None,
        "ILSVRC2012_img_val.tar": None,
        "VOCtrainval_x.tar": "val",
        "cifar-10-binary.tar.gz": "test",
        "json/train.json": None,
    }
    for source, subset in sources.items():
        places = {"local": tmp_path / "in", "remote": f"{bucket}/in"}
        local, remote = (
            pack(config(f"{places[name]}/{source}", out=tmp_path / name / source, subset=subset))[""] for name in places
        )
        assert shard_bytes(contents(tmp_path / "local" / source)) == shard_bytes(contents(tmp_path / "remote" / source))
        assert local.class_names == remote.class_names != ()


def test_sets_of_labels_and_pixels_beside_the_plan_travel_through_a_bucket(bucket, tmp_path):
    signs = {str(i): (1, -1, i % 2) for i in range(6)}
    write_files(tmp_path, voc_files({"val": list(signs)}, signs))
    write_files(tmp_path / "cifar-10-batches-py", cifar_files(10, "python")[0])
    for source, subset in ((tmp_path / "VOCdevkit", "val"), (tmp_path / "cifar-10-batches-py", "train")):
        out, local = f"{bucket}/{subset}", tmp_path / f"local-{subset}"
        pack(config(source, out=local, subset=subset))
        for i in (1, 0):
            (tmp_path / f"machine{i}").mkdir(exist_ok=True)
            work = str(tmp_path / f"machine{i}")
            pack(config(source, out=out, subset=subset, part=f"{i}/2", work_folder=work))
        finish(out, work_folder=str(tmp_path))
        assert objects(out) == contents(local)
    there, here = open_set(f"{bucket}/val"), open_set(tmp_path / "local-val")
    for shard in range(here.num_shards):
        assert np.array_equal(there.label_sets(shard), here.label_sets(shard))
    upload(f"{bucket}/val", {"shard-000000.labels.npy": b"changed"})
    with pytest.raises(ValueError, match=r"shard-000000\.labels\.npy has changed since it was packed"):
        there.label_sets(0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket_as_target_holds_what_a_folder_would(bucket, tmp_path, workers):
    source = fill(tmp_path / "in", 10, classes=2)
    options = {"work_folder": str(tmp_path), "val_fraction": 0.3}
    local = pack(config(source, out=tmp_path / "local", **options))
    remote = pack(config(source, out=bucket + "/out", workers=workers, **options))
    assert remote == local
    assert objects(bucket + "/out") == contents(tmp_path / "local")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "local"]
    assert pack(config(source, out=bucket + "/out", **options)) == local
    with pytest.raises(ValueError, match="--seed was 0, is 1"):
        pack(config(source, out=bucket + "/out", seed=1, **options))


def test_parts_on_machines_that_share_only_the_bucket(bucket, tmp_path):
    source = fill(tmp_path / "in", 18, classes=2)
    pack(config(source, out=tmp_path / "local"))
    out = bucket + "/out"
    for i in range(3):
        (tmp_path / f"machine{i}").mkdir()
        assert pack(config(source, out=out, part=f"{i}/3", work_folder=str(tmp_path / f"machine{i}"))) is None
        assert "manifest.json" not in objects(out)
        with pytest.raises(ValueError, match=f"is not finished.*`make-shards finish {out}`"):
            index_folder(out, workers=1)
        # What a part needs of the plan it reads in the bucket.
        assert not list((tmp_path / f"machine{i}").iterdir())
    with pytest.raises(ValueError, match="--seed was 0, is 1"):
        pack(config(source, out=out, seed=1, part="0/3", work_folder=str(tmp_path / "machine0")))
    (tmp_path / "machine3").mkdir()
    finish(out, work_folder=str(tmp_path / "machine3"))
    assert objects(out) == contents(tmp_path / "local")


def test_a_part_that_was_overtaken_until_the_set_is_finished_ends_well(bucket, tmp_path, monkeypatch, capsys):
    source, out = fill(tmp_path / "in", 12), bucket + "/out"
    pack(config(source, out=tmp_path / "local"))
    write_missing = pack_module._write_missing

    def overtaken(plan, tasks, options, target, progress):
        monkeypatch.setattr(pack_module, "_write_missing", write_missing)
        for part in ("0/2", "1/2"):
            (tmp_path / "other").mkdir(exist_ok=True)
            pack(config(source, out=out, part=part, work_folder=str(tmp_path / "other")))
        finish(out, work_folder=str(tmp_path / "other"))
        # What it was writing comes late.
        target.put(".pack/done/late.json", b"{}")
        write_missing(plan, tasks, options, target, progress)

    monkeypatch.setattr(pack_module, "_write_missing", overtaken)
    (tmp_path / "slow").mkdir()
    progress = ProgressBars(enabled=False)
    monkeypatch.setattr(progress, "say", print)
    assert pack(config(source, out=out, part="0/2", work_folder=str(tmp_path / "slow")), progress) is None
    assert "was finished meanwhile: others have written the shards of this part" in capsys.readouterr().out
    assert objects(out) == contents(tmp_path / "local")
    assert not list((tmp_path / "slow").iterdir())


def test_a_part_of_the_shards_of_a_split_is_not_taken_for_a_set_of_others(bucket, tmp_path):
    source, out = fill(tmp_path / "in", 30), bucket + "/out"
    pack(config(source, out=out, part="0/2", val_fraction=0.3, work_folder=str(tmp_path)))
    for name in ("train", "val"):
        assert any(each.startswith(f"{name}/shard-") for each in objects(out))
        with pytest.raises(ValueError, match=f"is not finished.*`make-shards finish {out}`"):
            index_folder(f"{out}/{name}", workers=1)


def test_a_node_of_a_cluster_that_shares_only_the_bucket_reads_the_plan_there(bucket, tmp_path):
    source, out = fill(tmp_path / "in", 10), bucket + "/out"
    pack(config(source, out=tmp_path / "local"))
    driver = BucketTarget(out, str(tmp_path / "driver"))
    driver.scratch.mkdir(parents=True)
    plan = make_plan(config(source, out=out), driver, ProgressBars(enabled=False))
    job = NodeJob.of(WriteShard(f".pack/{plan.name}", driver, config(source, out=out)))
    for node in ("one", "two"):
        there = BucketTarget(out, str(tmp_path / node))
        elsewhere = replace(job, job=replace(job.job, target=there))
        for shard in (0, 1) if node == "one" else (2,):
            elsewhere(ShardTask(split=0, shard=shard), print)
        remove_copy(there)
        assert not there.work.exists()
        status = read_status(out, work_folder=str(tmp_path / "elsewhere"))
        assert (status.num_shards_done, status.num_shards) == ((2, 3) if node == "one" else (3, 3))
    assert (status.state, status.num_packed, status.is_held) == ("to be finished", 10, False)
    finish(out, work_folder=str(tmp_path / "driver"))
    assert objects(out) == contents(tmp_path / "local")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_set_in_a_bucket_is_verified_and_inspected(bucket, tmp_path, capsys, workers):
    source, out = fill(tmp_path / "in", 8, classes=2), bucket + "/out"
    pack(config(source, out=out, work_folder=str(tmp_path)))
    verify = ["verify", out, "--decode", "--workers", workers, "--work-folder", str(tmp_path)]
    assert main(verify) == 0
    assert f"{out}: everything is as it was packed" in capsys.readouterr().out
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", out, "--sheet", str(sheet)]) == 0
    assert f"{out}: 8 samples in 2 shards" in capsys.readouterr().out
    pack(config(source, out=tmp_path / "local"))
    assert main(["inspect", str(tmp_path / "local"), "--sheet", str(tmp_path / "local.png")]) == 0
    assert sheet.read_bytes() == (tmp_path / "local.png").read_bytes()
    damaged = bytearray(objects(out)["shard-000001.tar"])
    damaged[1000] ^= 1
    upload(out, {"shard-000001.tar": bytes(damaged)})
    storage.Folder(out).delete(["shard-000000.sources.txt"])
    capsys.readouterr()
    assert main(verify) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "shard-000000.tar: shard-000000.sources.txt cannot be read: No such file or directory"
    assert "shard-000001.tar: shard-000001.tar has changed" in told[1]
    assert "crc32c differs" in told[2]
    assert len(told) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"in", "local", "sheet.png", "local.png"}
    assert main(["verify", bucket + "/nowhere"]) == 2
    assert "has no manifest.json: packing has not finished there" in capsys.readouterr().err


def test_tars_in_a_bucket_are_indexed_as_in_a_folder(bucket, tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    for name in ("a", "b"):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as tar:
            for i in range(3):
                for suffix, data in (("jpg", jpeg(ord(name) + i)), ("cls", b"%d" % i)):
                    info = tarfile.TarInfo(f"{i}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    upload(bucket + "/tars", contents(tmp_path / "tars") | {"below/c.tar": b"of another set"})
    (tmp_path / "work").mkdir()
    assert main(["index", bucket + "/tars", "--work-folder", str(tmp_path / "work"), "--workers", "2"]) == 0
    assert "indexed 6 samples in 2 tars" in capsys.readouterr().out
    assert main(["index", str(tmp_path / "tars")]) == 0
    found = objects(bucket + "/tars")
    del found["below/c.tar"]
    assert found == contents(tmp_path / "tars")
    assert not list((tmp_path / "work").iterdir())
    assert main(["verify", bucket + "/tars", "--work-folder", str(tmp_path / "work")]) == 0
    capsys.readouterr()
    assert main(["index", bucket + "/tars"]) == 2
    assert "has a manifest.json already" in capsys.readouterr().err


def test_an_interrupted_upload_goes_on(bucket, tmp_path, monkeypatch):
    source = fill(tmp_path / "in", 12)
    put = storage.Folder.put

    def failing(self, name, data, **options):
        if name == "shard-000001.idx":
            raise PackError("cannot write: the network is gone")
        return put(self, name, data, **options)

    monkeypatch.setattr(storage.Folder, "put", failing)
    with pytest.raises(PackError, match="network is gone"):
        pack(config(source, out=bucket + "/out", work_folder=str(tmp_path)))
    monkeypatch.setattr(storage.Folder, "put", put)
    done = [name for name in objects(bucket + "/out") if "/done/" in name]
    assert len(done) == 1
    pack(config(source, out=bucket + "/out", work_folder=str(tmp_path)))
    pack(config(source, out=tmp_path / "local"))
    assert objects(bucket + "/out") == contents(tmp_path / "local")


@pytest.fixture
def faults(proxy, bucket, monkeypatch):
    """The proxy between us and the bucket, and clients that do not wait for long."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
    monkeypatch.setattr(storage, "CLIENT_OPTIONS", {"timeout": "1s", "connect_timeout": "1s"})
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    retries = {"max_retries": 3, "retry_timeout": timedelta(seconds=10), "backoff": backoff}
    monkeypatch.setattr(storage, "RETRIES", retries)
    storage.open_folder.cache_clear()
    Faults.method, Faults.name = "GET", ".jpg"
    yield Faults
    Faults.remaining, Faults.kill_at = 0, ""


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["503", "reset", "short", "stall"])
def test_faults_of_the_storage_are_overcome_or_told(bucket, faults, tmp_path, fault):
    source = fill(tmp_path / "in", 6)
    upload(bucket + "/in", contents(source))
    pack(config(source, out=tmp_path / "local", labels="none"))
    faults.fault, faults.remaining = fault, 3
    pack(config(bucket + "/in", out=tmp_path / "remote", labels="none"))
    assert faults.remaining == 0
    assert shard_bytes(contents(tmp_path / "remote")) == shard_bytes(contents(tmp_path / "local"))
    faults.remaining = 10**6
    with pytest.raises(PackError, match=rf"cannot read {bucket}/in/.*\.jpg"):
        pack(config(bucket + "/in", out=tmp_path / "never", labels="none"))
    faults.remaining = 0
    pack(config(bucket + "/in", out=tmp_path / "never", labels="none"))
    assert shard_bytes(contents(tmp_path / "never")) == shard_bytes(contents(tmp_path / "local"))


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["503", "reset", "stall"])
def test_faults_of_the_target_are_overcome_or_told(bucket, faults, tmp_path, fault):
    source = fill(tmp_path / "in", 6)
    pack(config(source, out=tmp_path / "local"))
    faults.method, faults.name, faults.fault, faults.remaining = "PUT", "000001.tar", fault, 2
    pack(config(source, out=bucket + "/out", work_folder=str(tmp_path)))
    assert faults.remaining == 0
    assert objects(bucket + "/out") == contents(tmp_path / "local")
    faults.remaining = 10**6
    with pytest.raises(PackError, match=rf"cannot write {bucket}/never/shard-000001\.tar"):
        pack(config(source, out=bucket + "/never", work_folder=str(tmp_path)))
    faults.remaining = 0
    names = {name for name in objects(bucket + "/never") if not name.startswith(".pack")}
    assert names == {f"shard-000000{suffix}" for suffix in (".tar", ".index.npy", ".sources.txt", ".idx")}
    pack(config(source, out=bucket + "/never", work_folder=str(tmp_path)))
    assert objects(bucket + "/never") == contents(tmp_path / "local")


@pytest.mark.faults
def test_credentials_that_expire_stop_the_packing_instead_of_rejecting_everything(bucket, faults, tmp_path, capsys):
    upload(bucket + "/in", contents(fill(tmp_path / "in", 6)))
    faults.fault, faults.remaining = "403", 10**6
    begin = time.monotonic()
    assert main(["pack", bucket + "/in", "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert time.monotonic() - begin < 10
    error = capsys.readouterr().err
    assert f"cannot read {bucket}/in/" in error
    assert error.count("\n") == 2
    assert error.startswith("labels: none found\n")
    faults.remaining = 0
    assert main(["pack", bucket + "/in", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "is_late"), [("leases/", True), ("listed.json", True), ("shard-000001.idx", False), ("manifest", True)]
)
def test_killed_at_an_upload_the_next_run_ends_with_the_same_bytes(bucket, faults, tmp_path, name, is_late):
    source, out = fill(tmp_path / "in", 8), bucket + "/out"
    pack(config(source, out=tmp_path / "local"))
    expected = contents(tmp_path / "local")
    (tmp_path / "work").mkdir()
    options = ["--shard-samples", "4", "--workers", "1", "--work-folder", str(tmp_path / "work")]
    # It waits for a line on standard input, so that we know whom to kill before it begins.
    code = "import sys; from shards.cli import main; input(); sys.exit(main())"
    packer = subprocess.Popen(
        [sys.executable, "-c", code, "pack", str(source), "--out", out, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
    )
    faults.kill_pid, faults.kill_at, faults.is_kill_late = packer.pid, name, is_late
    packer.communicate(b"\n", timeout=60)
    assert packer.returncode == -signal.SIGKILL
    found = {name: data for name, data in objects(out).items() if not name.startswith(".pack")}
    assert found.items() <= expected.items()
    assert ("manifest.json" in found) == (name == "manifest")
    pack(config(source, out=out, work_folder=str(tmp_path / "work")))
    assert objects(out) == expected
    assert not list((tmp_path / "work").iterdir())


def test_addresses_that_cannot_work_are_told_in_one_line(bucket, tmp_path, capsys):
    source = str(fill(tmp_path / "in", 2))
    for arguments, message in (
        (["pack", source, "--out", "https://host/x"], "cannot be written to"),
        (["pack", source, "--out", "s3://key:secret@b/x"], "through the environment"),
        (["pack", bucket + "/nothing/here", "--out", str(tmp_path / "out")], "no files in"),
        (["pack", "s3://no-such-bucket-anywhere/x", "--out", str(tmp_path / "out")], "cannot list s3://no-such-bucket"),
        (["pack", bucket + "/gone.tar", "--out", str(tmp_path / "out")], "gone.tar"),
    ):
        assert main(arguments) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert "secret" not in error
        assert error.count("\n") == 1
    assert not os.path.lexists(tmp_path / "out")
