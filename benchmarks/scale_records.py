"""What the records of an evaluation's samples cost, of a set in a bucket: whole indexes, as before, and ranges of them.

    python benchmarks/scale_records.py [--samples 1000] [--latency-ms 20]

A web server of this machine answers every request after a delay, and counts. As many shards as samples, of 10,000
samples each, as a bank of 100,000 is spread over a billion in 100,000 shards; figures for that are linear in samples.
Seconds on a real store depend on its delay and on the network, requests and bytes do not.
"""

import argparse
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from shards.sets.manifest import Manifest, ShardEntry, ShardTable
from shards.sets.record import RECORD, npy_header
from shards.sets.remote import RemoteShardSet

_PER_SHARD = 10_000
_BANK = 100_000


class DelayedIndexes(BaseHTTPRequestHandler):
    """Answers any request with an index, or a range of it."""

    protocol_version = "HTTP/1.1"
    index = npy_header(_PER_SHARD) + np.zeros(_PER_SHARD, dtype=RECORD).tobytes()
    latency_s = 0.0
    turns = threading.Lock()
    num_requests = 0
    num_bytes = 0

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer."""
        time.sleep(self.latency_s)
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        data = self.index[int(first) : int(last) + 1] if last else self.index
        with self.turns:
            DelayedIndexes.num_requests += 1
            DelayedIndexes.num_bytes += len(data)
        self.send_response(206 if last else 200)
        if last:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.index)}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"index"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    options = parser.parse_args()
    DelayedIndexes.latency_s = options.latency_ms / 1000
    server = ThreadingHTTPServer(("127.0.0.1", 0), DelayedIndexes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    opened = RemoteShardSet(f"http://127.0.0.1:{server.server_port}/set", _manifest(options.samples), "")
    samples = np.arange(options.samples, dtype=np.int64) * _PER_SHARD + 17

    def by_indexes() -> None:
        for shard in range(opened.num_shards):
            opened.index(shard)

    print(f"    python benchmarks/scale_records.py --samples {options.samples} --latency-ms {options.latency_ms:g}\n")
    print(f"| records of {options.samples:,} samples | s | requests | MB | of {_BANK:,}: s | requests | GB |")
    print("|---|---|---|---|---|---|---|")
    _measure("whole indexes, one after the other, every evaluation (before)", options.samples, by_indexes)
    _measure("ranges, 64 at a time, first evaluation", options.samples, lambda: opened.records_of(samples))
    _measure("later evaluations of a run", options.samples, lambda: opened.records_of(samples))
    server.shutdown()


def _manifest(num_shards: int) -> Manifest:
    entries = (
        ShardEntry(
            name=f"shard-{number:06d}.tar",
            num_samples=_PER_SHARD,
            num_rejected=0,
            num_bytes=1 << 30,
            digests={},
            max_width=500,
            max_height=500,
            max_bytes=200_000,
            outcomes={},
            rejections={},
        )
        for number in range(num_shards)
    )
    num_samples = num_shards * _PER_SHARD
    return Manifest(
        shards=ShardTable.of(entries),
        num_inputs=num_samples,
        num_samples=num_samples,
        num_rejected=0,
        max_width=500,
        max_height=500,
        max_bytes=200_000,
    )


def _measure(what: str, num_samples: int, read: Callable[[], object]) -> None:
    DelayedIndexes.num_requests = DelayedIndexes.num_bytes = 0
    begin = time.perf_counter()
    read()
    seconds, requests, num_bytes = time.perf_counter() - begin, DelayedIndexes.num_requests, DelayedIndexes.num_bytes
    scale = _BANK / num_samples
    print(
        f"| {what} | {seconds:.2f} | {requests:,} | {num_bytes / 1e6:.4g} | {scale * seconds:,.0f} | "
        f"{scale * requests:,.0f} | {scale * num_bytes / 1e9:.4g} |"
    )


if __name__ == "__main__":
    main()
