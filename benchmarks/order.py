"""What the order of a billion samples costs one rank, beside DALI's own reader given as many index entries.

    python benchmarks/order.py [--json FILE]

Ours: a synthetic manifest of 100,000 shards; time and memory to open it, to hand it to the process that reads, and
until that knows the first step's samples; then a seek. Both processes' memory counts.
DALI's: fn.readers.webdataset over index files with fewer entries (--dali-samples), scaled up linearly and marked so.
"""

import argparse
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from shards.sets.manifest import Manifest, ShardEntry, ShardTable
from shards.storage.file_kinds import SHARD_SUFFIXES


def peak_mib() -> float:
    """Most memory that this process has had. The kernel's ru_maxrss would count what started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def write_manifest(folder: Path, num_shards: int, num_samples: int) -> None:
    """Write the manifest of a set that is not there."""
    shards = (
        ShardEntry(
            name=f"shard-{number:06d}.tar",
            num_samples=num_samples // num_shards,
            num_rejected=0,
            num_bytes=1 << 30,
            digests=dict.fromkeys(SHARD_SUFFIXES, f"{number:032x}"),
            max_width=500,
            max_height=500,
            max_bytes=200_000,
            outcomes={"copied": num_samples // num_shards},
            rejections={},
        )
        for number in range(num_shards)
    )
    manifest = Manifest(
        shards=ShardTable.of(shards),
        num_inputs=num_samples,
        num_samples=num_samples,
        num_rejected=0,
        max_width=500,
        max_height=500,
        max_bytes=200_000,
    )
    for name, data in manifest.files():
        (folder / name).write_bytes(data)


def measure_ours(folder: Path, batch_size: int, world_size: int) -> dict[str, float]:
    """Print start-up, first step, seek and steady step of one rank; return seconds and GB until the first samples."""
    from pipelines.plan.order import EpochOrder, OrderPlan
    from shards.sets import open_set

    before = peak_mib()
    begin = time.perf_counter()
    opened = open_set(folder)
    handed_on = pickle.loads(pickle.dumps(opened))
    sizes = handed_on.shard_sizes
    order = EpochOrder(OrderPlan(shard_sizes=sizes, seed=0, batch_size=batch_size, lanes=64, window_shards=4), 0)
    order.rank_step(0, 0, world_size)
    first = time.perf_counter()
    order.rank_step(order.plan.num_steps // 2, 0, world_size)
    sought = time.perf_counter()
    for step in range(order.plan.num_steps // 2 + 1, order.plan.num_steps // 2 + 51):
        order.rank_step(step, 0, world_size)
    steady = (time.perf_counter() - sought) / 50
    memory = peak_mib() - before
    print(
        f"ours   {opened.num_samples:>13,} samples, {world_size:>4} ranks: first step {first - begin:6.2f} s, "
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

    before = peak_mib()
    begin = time.perf_counter()
    pipe = pipeline()
    pipe.build()
    pipe.run()
    seconds = time.perf_counter() - begin
    memory = peak_mib() - before
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
    claims += [
        compare(
            f"{what} until the order of a billion samples is known, 1 rank / what we allow",
            [found["ours-1"][unit]],
            [allowed],
            unit=unit,
            less_is_better=True,
            goal=1.0,
        )
        for what, unit, allowed in (("time", "s", 10.0), ("memory", "GB", 0.5))
    ]
    print(f"\n{header()}\n\n{claims_table(claims)}")
    write_claims(path, claims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--dali-samples", type=int, default=1_000_000)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("ours-1", "ours-64", "dali"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.only is None:
            # A process each: the largest memory of a process never falls.
            found = {}
            write_manifest(Path(folder), options.shards, options.samples)
            for part in ("ours-1", "ours-64", "dali"):
                figures = Path(folder) / f"{part}.json"
                command = [sys.executable, *sys.argv, "--only", part, "--folder", folder, "--json", str(figures)]
                subprocess.run(command, check=True)
                found[part] = json.loads(figures.read_text())
            write_claims_of(found, options.json)
            return
        if options.only == "dali":
            figures = measure_dali(options.dali_samples, Path(options.folder or folder))
        else:
            world_size = int(options.only.removeprefix("ours-"))
            figures = measure_ours(Path(options.folder), options.batch_size, world_size)
        if options.json:
            options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
