"""Fetching shards from a bucket: CPU per GB beside boto3's download, and rates where each connection is slow.

    python benchmarks/fetching.py [--rounds 3] [--json build/fetching.json]

The bucket is a server in another process of this machine. The first comparison is of one large file, from socket to
disk, with the digest that a shard's is compared with; the second of the shards of a run's coming steps, from a server
that gives each connection 5 MB/s.
"""

import argparse
import http.server
import os
import resource
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from alternating import claims_table, compare, header, write_claims
from PIL import Image

import shards
from pipelines.plan.steps import ListedSteps
from pipelines.reading.cache import CachedShardSet, CacheFolder
from pipelines.reading.fetch import FetchedSteps, cached
from shards.storage.stores import open_folder

LARGE_BYTES = 512 << 20
NUM_SHARDS, PER_SHARD, JPEG_BYTES = 64, 36, 110_000
SLOW_BYTES_S = 5_000_000


class Bucket(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder, whole and by ranges; below `slow/`, each connection at a rate."""

    protocol_version = "HTTP/1.1"
    folder = Path()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer with the size."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with bytes of a file."""
        _, bucket, name = self.path.split("/", 2)
        path = self.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, end = int(asked[0] or 0), min(size, int(asked[2] or size) + 1)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        if self.command == "HEAD":
            return
        begun_s, first = time.monotonic(), start
        with path.open("rb") as file:
            while start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, min(end - start, 1 << 18))
                if bucket == "slow":
                    time.sleep(max(0.0, (start - first) / SLOW_BYTES_S - (time.monotonic() - begun_s)))


def serve(folder: str) -> None:
    """Serve a folder until this process is ended."""
    Bucket.folder = Path(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    print(server.server_port, flush=True)
    server.serve_forever()


def cpu_per_gb(fetch: Callable[[], None]) -> float:
    """CPU seconds of this process per GB."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    fetch()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / (LARGE_BYTES / 1e9)


def by_ours(out: Path) -> None:
    """Copy the large file as a shard is copied into a cache."""
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT)
    entry = SimpleNamespace(name="large", num_bytes=LARGE_BYTES, digests={})
    copy = cast("Any", CachedShardSet._copy_pieces)
    assert copy(SimpleNamespace(url="s3://fast"), entry, descriptor, threading.Event()) == ""
    os.close(descriptor)


def by_boto3(out: Path) -> None:
    """Copy it as users of S3 do."""
    import boto3

    boto3.client("s3").download_file("fast", "large", str(out))


def write_set(folder: Path) -> None:
    """Pack a set of one noisy JPEG, many times."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    data = (buffer.getvalue() + bytes(JPEG_BYTES))[:JPEG_BYTES]
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number in range(NUM_SHARDS * PER_SHARD):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    source = (str(folder / "images.tar"),)
    shards.pack(shards.PackConfig(sources=source, out=str(folder / "set"), shard_samples=PER_SHARD))


def fetch_all(cache: Path, fetchers: tuple[int, int]) -> float:
    """MB/s at which the shards of the coming steps arrive."""
    opened = cached(
        shards.open("s3://slow/set"),
        CacheFolder(path=cache, budget_bytes=1 << 40, share_bytes=1 << 40, fetchers=fetchers),
    )
    num_bytes = int(opened.copied_bytes.sum())
    begin_s = time.perf_counter()
    steps = FetchedSteps(opened, ListedSteps(samples=np.arange(NUM_SHARDS * PER_SHARD), batch_size=PER_SHARD, epoch=0))
    while len(list(cache.glob("*/*.tar"))) < opened.num_shards:
        time.sleep(0.01)
        steps.advance()
    seconds = time.perf_counter() - begin_s
    steps.close()
    return num_bytes / 1e6 / seconds


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "served").mkdir()
        (folder / "served/large").write_bytes(np.random.default_rng(0).bytes(LARGE_BYTES))
        write_set(folder / "served")
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder / "served")], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        os.environ["AWS_REGION"] = "us-east-1"
        try:
            cpu: dict[str, list[float]] = {"ours": [], "boto3": []}
            rates: dict[str, list[float]] = {"ours": [], "4 fetchers": []}
            for number in range(options.rounds + 1):
                for name, copy in (("ours", by_ours), ("boto3", by_boto3)):
                    seconds = cpu_per_gb(partial(copy, folder / "copy"))
                    (folder / "copy").unlink()
                    cpu[name] += [seconds] * (number > 0)
            for number in range(options.rounds):
                for name, fetchers in (("ours", (4, 32)), ("4 fetchers", (4, 4))):
                    rates[name].append(fetch_all(folder / f"cache-{name}-{number}", fetchers))
        finally:
            server.kill()
            server.wait()
    open_folder.cache_clear()
    claims = [
        compare(
            "CPU of fetching from a bucket to disk, with a digest, against boto3 without",
            cpu["ours"],
            cpu["boto3"],
            unit="s/GB",
            less_is_better=True,
        ),
        compare(
            "shards of coming steps, 5 MB/s per connection, against 4 fetchers",
            rates["ours"],
            rates["4 fetchers"],
            unit="MB/s",
            goal=1.5,
        ),
    ]
    print(f"{header()}\n\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()
