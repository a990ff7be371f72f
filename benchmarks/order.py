"""What the order of a billion samples costs one rank, beside DALI's own reader given as many index entries.

    python benchmarks/order.py

Ours: a synthetic set of 100,000 shards; time and memory until the first step's samples are known, and a seek.
DALI's: fn.readers.webdataset over index files with fewer entries (--dali-samples), scaled up linearly and marked so.
"""

import argparse
import io
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np


def measure_ours(num_shards: int, num_samples: int, batch_size: int, world_size: int) -> None:
    """Print start-up, first step, seek and steady step of one rank."""
    from pipelines.order import EpochOrder, OrderPlan

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    sizes = np.full(num_shards, num_samples // num_shards, dtype=np.int64)
    order = EpochOrder(OrderPlan(shard_sizes=sizes, seed=0, batch_size=batch_size), 0)
    order.rank_step(0, 0, world_size)
    first = time.perf_counter()
    order.rank_step(order.plan.num_steps // 2, 0, world_size)
    sought = time.perf_counter()
    for step in range(order.plan.num_steps // 2 + 1, order.plan.num_steps // 2 + 51):
        order.rank_step(step, 0, world_size)
    steady = (time.perf_counter() - sought) / 50
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"ours   {num_samples:>13,} samples, {world_size:>4} ranks: first step {first - begin:6.2f} s, "
        f"seek {sought - first:5.2f} s, then {1e3 * steady:.2f} ms a step, {memory:.0f} MB"
    )


def measure_dali(num_samples: int, folder: Path) -> None:
    """Print what DALI's reader needs for an index of that many entries before it gives its first sample."""
    from nvidia.dali import fn, pipeline_def

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = 512
        tar.addfile(member, io.BytesIO(bytes(512)))
    (folder / "a.tar").write_bytes(content.getvalue())
    # Every entry points to the one member there is: only the index counts here.
    (folder / "a.idx").write_text(f"v1.2 {num_samples}\n" + "jpg 512 512 0.jpg\n" * num_samples)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> object:
        return fn.readers.webdataset(
            paths=[str(folder / "a.tar")], index_paths=[str(folder / "a.idx")], ext=["jpg"], dont_use_mmap=True
        )

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    pipe = pipeline()
    pipe.build()
    pipe.run()
    seconds = time.perf_counter() - begin
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    scale = 1e9 / num_samples
    print(
        f"DALI   {num_samples:>13,} samples,    1 rank : first sample {seconds:6.2f} s, {memory:.0f} MB; "
        f"scaled to a billion (extrapolated): {scale * seconds:.0f} s, {scale * memory / 1024:.0f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--dali-samples", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("ours-1", "ours-64", "dali"))
    options = parser.parse_args()
    if options.only is None:
        # A process each: the largest memory of a process never falls.
        for part in ("ours-1", "ours-64", "dali"):
            subprocess.run([sys.executable, *sys.argv, "--only", part], check=True)
    elif options.only == "dali":
        with tempfile.TemporaryDirectory() as folder:
            measure_dali(options.dali_samples, Path(folder))
    else:
        world_size = int(options.only.removeprefix("ours-"))
        measure_ours(options.shards, options.samples, options.batch_size, world_size)


if __name__ == "__main__":
    main()
