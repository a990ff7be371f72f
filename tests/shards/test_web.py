"""Web servers as sources, and Google's and Azure's buckets as sources and targets, on loopback."""

import io
import json
import pickle
import tarfile
import zipfile
from datetime import timedelta

import pytest

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError, RefusedError
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.sets import open_set
from shards.storage import stores as storage
from shards.tools.verify import verify
from tests.shards.pictures import contents, fill, jpeg
from tests.shards.web import FAULTS, Cloud, Web, serving


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Connections of this test alone, which do not wait for long."""
    monkeypatch.setattr(storage, "CLIENT_OPTIONS", {"timeout": "1s", "connect_timeout": "1s"})
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    retries = {"max_retries": 3, "retry_timeout": timedelta(seconds=10), "backoff": backoff}
    monkeypatch.setattr(storage, "RETRIES", retries)
    for cached in (storage.open_folder, storage._open_remote):
        cached.cache_clear()
    yield
    for cached in (storage.open_folder, storage._open_remote):
        cached.cache_clear()


def config(*sources, out, **options):
    return PackConfig(sources=tuple(map(str, sources)), out=str(out), **{"workers": 1, "shard_samples": 4, **options})


def shard_bytes(folder):
    """What does not name the source's address."""
    return {name: data for name, data in contents(folder).items() if name.endswith((".tar", ".npy", ".idx"))}


def images(folder):
    """The images of a set, sorted."""
    shards = open_set(folder)
    found = []
    for i in range(shards.num_shards):
        whole = shards.shard_path(i).read_bytes()
        spans = [(int(record["offset"]), int(record["size"])) for record in shards.index(i)]
        found += [whole[at : at + size] for at, size in spans]
    return sorted(found)


def tar_of(numbers):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in numbers:
            info = tarfile.TarInfo(f"class{i % 2}/{i}.jpg")
            info.size = len(jpeg(i))
            tar.addfile(info, io.BytesIO(jpeg(i)))
    return buffer.getvalue()


def test_archives_tables_and_lists_on_a_web_server(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    zipped, table = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3, 6):
            archive.writestr(f"class{i % 2}/{i}.jpg", jpeg(i))
    pq.write_table(pa.table({"image": [jpeg(6), jpeg(7)], "label": ["class0", "class1"]}), table)
    files = {
        "d/x.tar": tar_of(range(3)),
        "d/x.zip": zipped.getvalue(),
        "d/x.parquet": table.getvalue(),
        "d/list.csv": b"path,label\nsub/8%209.jpg,class0\nhttp://HOST/elsewhere.jpg,class1\ngone.jpg,class1\n",
        "d/sub/8 9.jpg": jpeg(8),
        "elsewhere.jpg": jpeg(9),
    }
    with serving(Web, files) as (address, _):
        files["d/list.csv"] = files["d/list.csv"].replace(b"http://HOST", address.encode()).replace(b"%20", b" ")
        sources = [f"{address}/d/{name}" for name in ("x.tar", "x.zip", "x.parquet", "list.csv")]
        manifest = pack(config(*sources, out=tmp_path / "web", max_rejected=1.0, shuffle=False))[""]
    assert manifest.rejections == {"unreadable": 1}
    assert manifest.class_names == ("class0", "class1")
    pack(config(fill(tmp_path / "in", 10, classes=2), out=tmp_path / "local"))
    assert images(tmp_path / "web") == images(tmp_path / "local")
    assert verify(tmp_path / "web", decode=True) == []


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_web_server_are_overcome_or_told(tmp_path, fault):
    files = {f"d/{i}.jpg": jpeg(i) for i in range(5)} | {"d/list.txt": b"".join(b"%d.jpg\n" % i for i in range(5))}
    for name, data in {**files, "x.tar": tar_of(range(5))}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    files["x.tar"] = tar_of(range(5))
    pack(config(tmp_path / "d/list.txt", tmp_path / "x.tar", out=tmp_path / "local", labels="none"))
    with serving(Web, files) as (address, server):
        sources = (f"{address}/d/list.txt", f"{address}/x.tar")
        server.fault = fault
        for broken in (".jpg", "x.tar"):
            for cached in (storage.open_folder, storage._open_remote):
                cached.cache_clear()
            server.broken, server.remaining = broken, 2
            out = tmp_path / f"after-{broken}"
            pack(config(*sources, out=out, labels="none"))
            assert server.remaining < 0
            assert shard_bytes(out) == shard_bytes(tmp_path / "local")
        server.broken, server.remaining = ".jpg", 10**6
        with pytest.raises(PackError, match=rf"cannot read {address}/d/\d.jpg"):
            pack(config(*sources, out=tmp_path / "never", labels="none"))
        server.remaining = 0
        pack(config(*sources, out=tmp_path / "never", labels="none"))
        assert shard_bytes(tmp_path / "never") == shard_bytes(tmp_path / "local")


@pytest.mark.faults
@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "410 Gone"])
def test_an_image_that_a_web_server_refuses_is_rejected_with_its_answer(tmp_path, status):
    files = {f"d/{i}.jpg": jpeg(i) for i in range(5)} | {"d/list.txt": b"".join(b"%d.jpg\n" % i for i in range(5))}
    with serving(Web, files) as (address, server):
        server.fault, server.broken, server.remaining = status[:3], "3.jpg", 10**6
        out = tmp_path / "out"
        manifest = pack(config(f"{address}/d/list.txt", out=out, labels="none", max_rejected=1.0))[""]
    assert (manifest.num_samples, manifest.rejections) == (4, {"unreadable": 1})
    (rejected,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert rejected["detail"] == status
    assert images(out) == sorted(jpeg(i) for i in (0, 1, 2, 4))


def test_an_archive_that_a_web_server_refuses_ends_the_packing_with_its_answer(tmp_path, capsys):
    with serving(Web, {"x.tar": tar_of(range(5))}) as (address, server):
        server.fault, server.broken, server.remaining = "403", "x.tar", 10**6
        assert main(["pack", f"{address}/x.tar", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "403 Forbidden" in error
    assert error.count("\n") == 1


def test_a_refusal_comes_whole_out_of_a_worker_process():
    refused = pickle.loads(pickle.dumps(RefusedError("what", "403 Forbidden")))
    assert (str(refused), refused.status) == ("what", "403 Forbidden")


def test_a_set_on_a_web_server_is_verified_and_inspected(tmp_path, capsys):
    pack(config(fill(tmp_path / "in", 6, classes=2), out=tmp_path / "out"))
    files = {f"set/{name}": data for name, data in contents(tmp_path / "out").items()}
    with serving(Web, files) as (address, _):
        assert main(["verify", f"{address}/set", "--workers", "1"]) == 0
        assert main(["inspect", f"{address}/set", "--sheet", str(tmp_path / "sheet.png")]) == 0
        assert f"{address}/set: 6 samples in 2 shards" in capsys.readouterr().out
        files["set/shard-000001.tar"] = files["set/shard-000001.tar"][:-1024]
        assert main(["verify", f"{address}/set", "--workers", "1"]) == 1
        assert "shard-000001.tar has changed since it was packed" in capsys.readouterr().out


def test_a_web_server_cannot_be_listed(tmp_path, capsys):
    with serving(Web, {}) as (address, _):
        for source, message in ((f"{address}/folder", "is not a source"), (f"{address}/gone.tar", "no such object")):
            assert main(["pack", source, "--out", str(tmp_path / "out")]) in (1, 2)
            assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=["gs", "az"])
def cloud(request, monkeypatch):
    """(address of a bucket, what is in it): a server that speaks as much of Google's or Azure's protocol as we do."""
    files: dict[str, bytes] = {}
    with serving(Cloud, files) as (address, _):
        fields = {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": ""}
        for name, value in {
            "GOOGLE_BASE_URL": address,
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**fields, "private_key_id": ""}),
            "AZURE_STORAGE_ENDPOINT": address,
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_SKIP_SIGNATURE": "true",
        }.items():
            monkeypatch.setenv(name, value)
        yield f"{request.param}://bucket", files


def test_googles_and_azures_buckets_hold_what_a_folder_would(cloud, tmp_path):
    bucket, files = cloud
    source = fill(tmp_path / "in", 10, classes=2)
    pack(config(source, out=tmp_path / "local"))
    files |= {f"bucket/photos/{name}": data for name, data in contents(source).items()}
    for i in range(2):
        pack(config(bucket + "/photos", out=bucket + "/set", part=f"{i}/2", work_folder=str(tmp_path / f"{i}")))
    finish(bucket + "/set", work_folder=str(tmp_path / "2"))
    packed = {n.removeprefix("bucket/set/"): data for n, data in files.items() if n.startswith("bucket/set/")}
    assert packed.keys() == contents(tmp_path / "local").keys()
    assert packed.items() >= shard_bytes(tmp_path / "local").items()
    assert verify(bucket + "/set", decode=True, work_folder=str(tmp_path)) == []
    damaged = bytearray(files["bucket/set/shard-000000.tar"])
    damaged[700] ^= 1
    files["bucket/set/shard-000000.tar"] = bytes(damaged)
    assert {p.shard for p in verify(bucket + "/set", work_folder=str(tmp_path))} == {"shard-000000.tar"}
