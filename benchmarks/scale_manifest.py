"""What a set of many shards costs each process that opens it, before and now.

    python benchmarks/scale_manifest.py [--shards 10000 100000 1000000]

For each number of shards, one process after the other, on a manifest without images:

- before: one rank as earlier versions opened a set (JSON into an object per shard, all of it pickled to each child);
- json: a set of earlier versions, opened now: the first process of a machine, once;
- first: a set with a table beside its manifest, in the first process of a machine, which also computes the identity;
- others: any other rank or child on the machine, which is handed that set.

Memory is what a process has of its own, and beside it what all share, which counts once; bytes read are those of files.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from order import write_manifest

from shards.sets import ShardSet, open_set
from shards.sets.manifest import MANIFEST_NAME, ShardEntry
from shards.storage.file_kinds import TABLE_OF_SHARDS_NAME

_SAMPLES_PER_SHARD = 1000
_ROLES = ("before", "json", "first", "others")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", choices=_ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(_measure(options.only, options.folder)))
        return
    print(
        "| shards | process | s | MB of its own | MB shared | MB read | bytes pickled |\n|---|---|---|---|---|---|---|"
    )
    for count in options.shards:
        with tempfile.TemporaryDirectory() as folder:
            write_manifest(Path(folder), count, count * _SAMPLES_PER_SHARD)
            for role in _ROLES:
                figures = _run(role, Path(folder))
                cells = " | ".join(f"{figures[name]:,.4g}" for name in ("s", "own_mb", "shared_mb", "read_mb"))
                print(f"| {count:,} | {role} | {cells} | {figures['pickled_bytes']:,} |", flush=True)


def _run(role: str, folder: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", role, "--folder", str(folder), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(role: str, folder: Path) -> dict[str, Any]:
    handed_over = sys.stdin.buffer.read() if role == "others" and not sys.stdin.isatty() else b""
    if role == "others" and not handed_over:
        # What hands over is a process beside the one that is measured, as among ranks.
        return _hand_over(open_set(folder), folder)
    before, read_before, begin = _memory_mb(), _read_mb(), time.perf_counter()
    opened = _open(role, folder, handed_over)
    seconds, after = time.perf_counter() - begin, _memory_mb()
    return {
        "s": seconds,
        "own_mb": after["own"] - before["own"],
        "shared_mb": after["shared"] - before["shared"],
        "read_mb": _read_mb() - read_before,
        "pickled_bytes": len(pickle.dumps(opened)),
    }


def _open(role: str, folder: Path, handed_over: bytes) -> object:
    """Return what the process then works with: the sizes of all shards are known."""
    if role == "before":
        return _as_before(folder)
    if role == "json":
        (folder / TABLE_OF_SHARDS_NAME).rename(folder / "aside.npz")
    opened: ShardSet = pickle.loads(handed_over) if handed_over else open_set(folder)
    if role == "json":
        (folder / "aside.npz").rename(folder / TABLE_OF_SHARDS_NAME)
    assert opened.manifest.identity
    return opened


def _as_before(folder: Path) -> object:
    values = json.loads((folder / MANIFEST_NAME).read_text())
    shards = tuple(ShardEntry.from_dict(entry) for entry in values["shards"])
    sizes = [shard.num_samples for shard in shards]
    facts = [(shard.num_samples, shard.digests.get(".tar"), None) for shard in shards]
    identity = json.dumps([facts, []])
    return shards, sizes, identity[:0]


def _hand_over(opened: ShardSet, folder: Path) -> dict[str, Any]:
    assert opened.manifest.identity
    command = [sys.executable, __file__, "--only", "others", "--folder", str(folder)]
    done = subprocess.run(command, input=pickle.dumps(opened), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _memory_mb() -> dict[str, float]:
    """Return what is this process's own, and what it has in common with others or with the page cache."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    found, is_shared = {"own": 0.0, "shared": 0.0}, False
    for line in lines:
        words = line.split()
        if "-" in words[0] and len(words) >= 5:
            name = words[5] if len(words) > 5 else ""
            is_shared = name.endswith(TABLE_OF_SHARDS_NAME) or name.startswith("/memfd")
        elif words[0] == "Rss:":
            found["shared" if is_shared else "own"] += int(words[1]) / 1024
    return found


def _read_mb() -> float:
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0]) / 1e6


if __name__ == "__main__":
    main()
