"""Elasticity: what becomes of an epoch when the number of ranks changes in its midst, and what a seek costs.

    python benchmarks/elasticity.py [--only ranks seek] [--loaders ours litdata ...] [--json FILE]
    python benchmarks/elasticity.py --python mosaic=PATH    # an interpreter for a peer that needs its own environment

`ranks`: four ranks read a shuffled epoch, and save their places after some steps. Two ranks go on from there and save
theirs, three go on from those. The global batch stays as large. Are all samples there once, and are the later global
batches those that the four would have had?

`seek`: a fresh process opens a loader at a saved place of a longer epoch. Timed is opening it until its first batch
(without imports), near the epoch's beginning and near its end, and there also from what two ranks saved, by turns. Ours
makes two views of each sample in that time, the others hand over bytes. Whether that batch is the one that would have
come is checked.

Each loader is set up as its documents say (elastic_loaders.py), every rank is a process. Peers that are not installed
are left out: benchmarks/requirements.txt has them.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import elastic_loaders
from alternating import Claim, claims_table, compare, header, write_claims

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, PER_FILE, GLOBAL_BATCH = 2880, 60, 48
CHAIN = ((4, 21), (2, 38), (3, None))
"""Ranks, and the step of the epoch after which others go on."""
SEEK_SAMPLES, SEEK_PER_FILE, SEEK_BATCH = 200_000, 600, 64


@dataclass(frozen=True)
class Peer:
    """A loader, what is imported of it, and what its documents promise after a change of ranks."""

    title: str
    module: str
    promise: str
    is_elastic: bool
    """Whether one state is enough for any number of ranks."""


LOADERS = {
    "ours": Peer(
        "ours", "pipelines", "the samples of a global step do not depend on the number of ranks", is_elastic=True
    ),
    "litdata": Peer(
        "LitData", "litdata", "other ranks, workers and batch sizes go on from one state, none twice", is_elastic=True
    ),
    "mosaic": Peer(
        "MosaicML streaming",
        "streaming",
        "samples in the same order on any number of ranks and workers",
        is_elastic=True,
    ),
    "grain": Peer(
        "grain, ElasticIterator", "grain", "the state of any rank restores all after a change of ranks", is_elastic=True
    ),
    "torchdata": Peer(
        "torchdata, map-style",
        "torchdata",
        "each rank's state for the same rank; nothing across ranks",
        is_elastic=False,
    ),
    "webdataset": Peer(
        "webdataset in torchdata", "webdataset", "nothing: skips what was read before, per rank", is_elastic=False
    ),
}


@dataclass(frozen=True)
class Failure:
    """A loader that did not go on."""

    reason: str


class Bench:
    """Runs loaders in processes of their own, on sets in a folder."""

    def __init__(self, folder: Path, pythons: dict[str, str]) -> None:
        self.folder = folder
        self.pythons = pythons

    def _command(self, loader: str, what: str, *words: object) -> list[str]:
        script = str(ROOT / "benchmarks" / "elastic_loaders.py")
        return [self.pythons.get(loader, sys.executable), script, loader, what, *map(str, words)]

    def set_of(self, loader: str, samples: int, per_file: int) -> Path:
        """Write a loader's set, once."""
        folder = self.folder / f"{loader}-{samples}"
        if not (folder / "written").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            words = ("--folder", folder, "--samples", samples, "--per-file", per_file)
            done = subprocess.run(
                self._command(loader, "write", *words),
                env=environment(0, 1, 0),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{loader} could not write its set: {done.stderr[-2000:]}")
            (folder / "written").touch()
        return folder

    def read(self, loader: str, world_size: int, words: list[object], state: Path | None) -> list[Any] | Failure:
        """Read by ranks side by side; what each found, or why one failed."""
        port = free_port()
        with tempfile.TemporaryDirectory() as name:
            outs = [Path(name) / f"{rank}.json" for rank in range(world_size)]
            logs = [Path(name) / f"{rank}.log" for rank in range(world_size)]
            running = []
            for rank, (out, log) in enumerate(zip(outs, logs, strict=True)):
                resumed = [] if state is None else ["--from", saved_state(loader, state, rank)]
                command = self._command(loader, "read", *words, *resumed, "--out", out)
                with log.open("w") as errors:
                    at = environment(rank, world_size, port)
                    running.append(subprocess.Popen(command, env=at, stdout=errors, stderr=errors))
            try:
                codes = [each.wait(timeout=180) for each in running]
            except subprocess.TimeoutExpired:
                return Failure("hangs")
            finally:
                for each in running:
                    each.kill()
            failed = [log for log, code in zip(logs, codes, strict=True) if code]
            if failed:
                return Failure(failed[0].read_text().strip().splitlines()[-1])
            return [json.loads(out.read_text()) for out in outs]


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets, on one machine."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
    return os.environ | {name: str(value) for name, value in (place | where).items()}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def saved_state(loader: str, states: Path, rank: int) -> Path:
    """Which state a rank goes on from: the first rank's, or of a loader whose ranks have their own its own if any."""
    saved = sorted(states.glob("rank-*"), key=lambda path: int(path.name.removeprefix("rank-")))
    return saved[0 if LOADERS[loader].is_elastic else rank % len(saved)]


def global_batches(found: list[Any]) -> list[list[int]]:
    """The samples that all ranks had at each step."""
    steps = max(len(each["batches"]) for each in found)
    return [[i for each in found for i in (each["batches"][step : step + 1] or [[]])[0]] for step in range(steps)]


@dataclass(frozen=True)
class Epoch:
    """What became of an epoch."""

    lost: int
    twice: int
    kept: int
    """Global batches after the change that are those of an epoch without it."""
    later: int


def judge(reference: list[list[int]], parts: list[list[list[int]]], changes: list[int]) -> Epoch:
    """Compare an epoch of which `parts` were read, each up to the next of `changes`, with one that was not changed."""
    ends = [*changes, len(reference)]
    lengths = [end - begin for begin, end in pairwise([0, *ends])]
    seen = [batch for part, length in zip(parts[:-1], lengths, strict=False) for batch in part[:length]] + parts[-1]
    counts = Counter(i for batch in seen for i in batch)
    later = slice(changes[0], None)
    return Epoch(
        lost=sum(i not in counts for batch in reference for i in batch),
        twice=sum(count > 1 for count in counts.values()),
        kept=sum(sorted(a) == sorted(b) for a, b in zip(seen[later], reference[later], strict=False)),
        later=len(reference) - changes[0],
    )


def change_ranks(bench: Bench, loader: str) -> list[Epoch | Failure]:
    """What became of the epoch after each change of ranks."""
    folder = bench.set_of(loader, SAMPLES, PER_FILE)
    parts, changes, results = list[list[list[int]]](), list[int](), list[Epoch | Failure]()
    states: Path | None = None
    for world_size, until in CHAIN:
        words: list[object] = ["--folder", folder, "--global-batch", GLOBAL_BATCH]
        if until is not None:
            saved = folder / f"states-of-{world_size}"
            saved.mkdir(exist_ok=True)
            steps = until - sum(changes[-1:])
            words += ["--save-at", steps, "--states", saved]
        found = bench.read(loader, world_size, words, states)
        if isinstance(found, Failure):
            return [*results, found]
        parts.append(global_batches(found))
        if changes:
            results.append(judge(parts[0], parts, changes))
        if until is not None:
            changes.append(until)
            states = saved / f"step-{steps}"
    return results


def ranks_table(found: dict[str, list[Epoch | Failure]], versions: dict[str, str]) -> str:
    """Markdown: a line per loader."""
    names = [str(world_size) for world_size, _ in CHAIN]
    changes = [" to ".join(names[: number + 2]) for number in range(len(names) - 1)]
    heads = [f"{each} ranks: lost, twice | later batches kept" for each in changes]
    lines = [f"| | its documents promise | {' | '.join(heads)} |", "|---|---|" + "---|---|" * len(changes)]
    for loader, results in found.items():
        cells = [
            f"{each.lost}, {each.twice} | {each.kept} of {each.later}"
            if isinstance(each, Epoch)
            else f"failed: {each.reason} | "
            for each in results
        ]
        cells += [" | "] * (len(changes) - len(cells))
        lines.append(f"| {title(loader, versions)} | {LOADERS[loader].promise} | {' | '.join(cells)} |")
    return "\n".join(lines)


def title(loader: str, versions: dict[str, str]) -> str:
    return LOADERS[loader].title + (f" {versions[loader]}" if loader != "ours" else "")


@dataclass(frozen=True)
class Place:
    """A saved place: by how many ranks, after which step. One rank goes on from there."""

    ranks: int
    step: int

    def describe(self) -> str:
        """The head of a column."""
        return f"step {self.step:,}" + (f", saved by {self.ranks} ranks" if self.ranks > 1 else "")


def places_of(loader: str, steps: list[int]) -> list[Place]:
    """The places that a loader is sent to."""
    changed = [Place(2, max(steps))] if LOADERS[loader].is_elastic else []
    return [*(Place(1, step) for step in steps), *changed]


def prepare_seek(bench: Bench, loader: str, steps: list[int]) -> dict[Place, list[int]]:
    """Save the places; the samples that come next at each."""
    folder = bench.set_of(loader, SEEK_SAMPLES, SEEK_PER_FILE)
    places = places_of(loader, steps)
    following: dict[Place, list[int]] = {}
    for ranks in dict.fromkeys(each.ranks for each in places):
        states = folder / f"states-of-{ranks}"
        kept = states / f"next-{'-'.join(map(str, steps))}.json"
        if not kept.is_file():
            states.mkdir(exist_ok=True)
            words: list[object] = ["--folder", folder, "--global-batch", SEEK_BATCH, "--states", states]
            found = bench.read(loader, ranks, [*words, "--stop", max(steps) + 1, "--save-at", *steps], None)
            if isinstance(found, Failure):
                raise RuntimeError(f"{loader}: {found.reason}")
            batches = global_batches(found)
            kept.write_text(json.dumps([batches[step] for step in steps]))
        batches_then = dict(zip(steps, json.loads(kept.read_text()), strict=True))
        following |= {each: sorted(batches_then[each.step]) for each in places if each.ranks == ranks}
    return following


Seconds = dict[tuple[str, Place], list[float]]


def seek(bench: Bench, loaders: list[str], steps: list[int], rounds: int) -> Seconds:
    """Seconds until the first batch at each place, loaders by turns."""
    following = {(loader, at): it for loader in loaders for at, it in prepare_seek(bench, loader, steps).items()}
    seconds: Seconds = {key: [] for key in following}
    for number in range(rounds):
        for (loader, at), found_s in seconds.items():
            folder = bench.set_of(loader, SEEK_SAMPLES, SEEK_PER_FILE)
            words: list[object] = ["--folder", folder, "--global-batch", SEEK_BATCH, "--stop", 1]
            found = bench.read(loader, 1, words, folder / f"states-of-{at.ranks}" / f"step-{at.step}")
            if isinstance(found, Failure):
                raise RuntimeError(f"{loader}: {found.reason}")
            if sorted(found[0]["batches"][0]) != following[loader, at]:
                raise RuntimeError(f"{loader} went on with other samples after a seek to {at}")
            found_s.append(found[0]["first_s"])
            print(f"  round {number + 1}: {loader} at {at.describe()}: {found_s[-1]:.2f} s", file=sys.stderr)
    return seconds


def seek_table(seconds: Seconds, steps: list[int], versions: dict[str, str]) -> str:
    """Markdown: a line per loader."""
    columns = places_of("ours", steps)
    heads = " | ".join(each.describe() for each in columns)
    lines = [f"| seconds until the first batch at | {heads} |", "|---|" + "---|" * len(columns)]
    for loader in dict.fromkeys(loader for loader, _ in seconds):
        found = [seconds.get((loader, at)) for at in columns]
        cells = [f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})" if each else "" for each in found]
        lines.append(f"| {title(loader, versions)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_of(seconds: Seconds, steps: list[int]) -> list[Claim]:
    """Ours against each other loader, near the end of the epoch."""
    return [
        compare(
            f"first batch at {at.describe()}: ours / {LOADERS[loader].title}",
            seconds["ours", at],
            theirs,
            unit="s",
            less_is_better=True,
        )
        for (loader, at), theirs in seconds.items()
        if loader != "ours" and at.step == max(steps) and ("ours", at) in seconds
    ]


def installed(loaders: list[str], pythons: dict[str, str]) -> dict[str, str]:
    """Versions of those that are there; says what is left out."""
    versions: dict[str, str] = {}
    for loader in loaders:
        package = elastic_loaders.LOADERS[loader].package
        code = f"import {LOADERS[loader].module}; from importlib import metadata; print(metadata.version('{package}'))"
        python = pythons.get(loader, sys.executable)
        done = subprocess.run(
            [python, "-c", code], env=environment(0, 1, 0), capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{loader} is left out; to have it: benchmarks/requirements.txt says what to install")
        else:
            versions[loader] = done.stdout.split()[-1]
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("ranks", "seek"), default=["ranks", "seek"])
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS), default=list(LOADERS))
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 3000], help="of the seek")
    parser.add_argument("--rounds", type=int, default=3, help="of the seek")
    parser.add_argument("--python", nargs="+", default=[], metavar="LOADER=PATH", help="interpreters of peers")
    parser.add_argument("--folder", type=Path, help="where sets are kept for the next time; unset: a temporary folder")
    parser.add_argument("--json", type=Path, help="where to write the claims")
    options = parser.parse_args()
    pythons = dict(each.split("=", 1) for each in options.python)
    versions = installed(options.loaders, pythons)
    claims: list[Claim] = []
    tables: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench((options.folder or Path(temporary)).resolve(), pythons)
        if "ranks" in options.only:
            tables.append(ranks_table({loader: change_ranks(bench, loader) for loader in versions}, versions))
        if "seek" in options.only:
            seconds = seek(bench, list(versions), options.steps, options.rounds)
            claims = claims_of(seconds, options.steps)
            tables += [seek_table(seconds, options.steps, versions), claims_table(claims)]
    print(f"{header()}\n\n" + "\n\n".join(tables))
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
