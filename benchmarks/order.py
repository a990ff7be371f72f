"""What the order of a billion samples costs one rank, beside DALI's own reader given as many index entries.

    python benchmarks/order.py [--json FILE]

Ours: a synthetic set of 100,000 shards; time and memory until the first step's samples are known, and a seek.
DALI's: fn.readers.webdataset over index files with fewer entries (--dali-samples), scaled up linearly and marked so.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np


def measure_ours(num_shards: int, num_samples: int, batch_size: int, world_size: int) -> dict[str, float]:
    """Print start-up, first step, seek and steady step of one rank; return seconds and GB until the first samples."""
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
    return {"s": first - begin, "GB": memory / 1024}


def measure_dali(num_samples: int, folder: Path) -> dict[str, float]:
    """Print what DALI's reader needs for an index of that many entries before it gives its first sample.

    Returns:
        seconds and GB, scaled to a billion.
    """
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
    return {"s": scale * seconds, "GB": scale * memory / 1024}


def write_claims_of(found: dict[str, dict[str, float]], path: Path | None) -> None:
    """Print and write one rank's start against DALI's."""
    # Late: the processes that measure memory must not hold torch.
    from alternating import claims_table, compare, header, write_claims

    claims = [
        compare(
            f"{what} until the order of a billion samples is known, 1 of 64 ranks / DALI's reader (extrapolated)",
            [found["ours-64"][unit]],
            [found["dali"][unit]],
            unit=unit,
            less_is_better=True,
            goal=100.0,
        )
        for what, unit in (("time", "s"), ("memory", "GB"))
    ]
    print(f"\n{header()}\n\n{claims_table(claims)}")
    write_claims(path, claims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--dali-samples", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("ours-1", "ours-64", "dali"))
    parser.add_argument("--json", type=Path, help="where to write the claims")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.only is None:
            # A process each: the largest memory of a process never falls.
            found = {}
            for part in ("ours-1", "ours-64", "dali"):
                figures = Path(folder) / f"{part}.json"
                command = [sys.executable, *sys.argv, "--only", part, "--json", str(figures)]
                subprocess.run(command, check=True)
                found[part] = json.loads(figures.read_text())
            write_claims_of(found, options.json)
            return
        if options.only == "dali":
            figures = measure_dali(options.dali_samples, Path(folder))
        else:
            world_size = int(options.only.removeprefix("ours-"))
            figures = measure_ours(options.shards, options.samples, options.batch_size, world_size)
        if options.json:
            options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
