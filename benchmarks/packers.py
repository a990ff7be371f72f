"""Packers side by side: photographs into shards, copied and shrunk, by two workers of each, in alternating rounds.

    python benchmarks/packers.py --photos FILE.tar [--rounds 2] [--json FILE]
    python benchmarks/packers.py --photos FILE.tar --python mosaic=PATH img2dataset=PATH

What a user would take instead of `make-shards pack`: LitData's `optimize`, MosaicML's MDSWriter (a writer in each of
two processes, as its documents say), webdataset's ShardWriter (one process: it has no workers), and img2dataset, which
reads URLs: these are served by a process of this machine, to ours as well. Shrinking is to 256 pixels on the shorter
side, at quality 90; LitData, MDS and ShardWriter leave it to the user's code, which is OpenCV's `INTER_AREA` here, as
img2dataset calls it.

Each pass is a fresh process with the files in page cache. Times are without imports and, like processor time, without
what a set of four photographs takes in the same round: that is the start of the workers. Processor time is that of the
process and its workers. Whether all photographs arrived is checked. Ours also looks into every JPEG, writes digests and
an index, and waits until its files are on the disk; the others do not wait. Peers that are not installed are left out,
or have an interpreter of their own: benchmarks/requirements.txt.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alternating import Claim

ROOT = Path(__file__).resolve().parent.parent
SIDE, QUALITY, WORKERS, PER_SHARD = 256, 90, 2, 250


def shrunk(data: bytes) -> bytes:
    """A JPEG of SIDE pixels on the shorter side, by OpenCV; smaller ones as they are."""
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    height, width = image.shape[:2]
    side = min(height, width)
    if side <= SIDE:
        return data
    size = (max(1, round(width * SIDE / side)), max(1, round(height * SIDE / side)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def photo_of(path: str, *, shrink: bool) -> dict[str, bytes]:
    """A sample of LitData and MDS."""
    data = Path(path).read_bytes()
    return {"image": shrunk(data) if shrink else data}


def by_ours(inputs: list[str], out: Path, *, shrink: bool) -> None:
    import shards

    names = out.with_name("inputs.txt")
    names.write_text("\n".join(inputs) + "\n")
    resize = SIDE if shrink else None
    shards.pack(
        shards.PackConfig(
            sources=(str(names),),
            out=str(out),
            resize=resize,
            quality=QUALITY,
            workers=WORKERS,
            shard_samples=min(PER_SHARD, -(-len(inputs) // WORKERS)),
        )
    )


def by_litdata(inputs: list[str], out: Path, *, shrink: bool) -> None:
    import litdata

    litdata.optimize(
        partial(photo_of, shrink=shrink), inputs, output_dir=str(out), chunk_bytes="64MB", num_workers=WORKERS
    )


def write_mds(inputs: list[str], out: Path, *, shrink: bool) -> None:
    """Write one worker's part."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"image": "bytes"}) as writer:
        for path in inputs:
            writer.write(photo_of(path, shrink=shrink))


def by_mosaic(inputs: list[str], out: Path, *, shrink: bool) -> None:
    from multiprocessing import get_context

    from streaming.base.util import merge_index

    with get_context("fork").Pool(WORKERS) as pool:
        parts = [(inputs[number::WORKERS], out / str(number)) for number in range(WORKERS)]
        pool.starmap(partial(write_mds, shrink=shrink), parts)
    merge_index(str(out), keep_local=True)


def by_shard_writer(inputs: list[str], out: Path, *, shrink: bool) -> None:
    import webdataset as wds

    out.mkdir()
    with wds.ShardWriter(str(out / "%06d.tar"), maxcount=PER_SHARD, verbose=0) as writer:
        for number, path in enumerate(inputs):
            writer.write({"__key__": f"{number:09d}", "jpg": photo_of(path, shrink=shrink)["image"]})


def by_img2dataset(inputs: list[str], out: Path, *, shrink: bool) -> None:
    from img2dataset import download

    names = out.with_name("inputs.txt")
    names.write_text("\n".join(inputs) + "\n")
    how = (
        {"image_size": SIDE, "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "encode_quality": QUALITY}
        if shrink
        else {"disable_all_reencoding": True}
    )
    download(
        url_list=str(names),
        output_folder=str(out),
        output_format="webdataset",
        processes_count=WORKERS,
        thread_count=32,
        number_sample_per_shard=min(PER_SHARD, -(-len(inputs) // WORKERS)),
        **how,
    )


def in_tars(out: Path) -> int:
    """Photographs in the tars of a folder."""
    import tarfile

    num = 0
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            num += sum(name.endswith("jpg") for name in tar.getnames())
    return num


PACKERS: dict[str, tuple[str, str, Callable[..., None], Callable[[Path], int]]] = {
    "ours": ("ours", "shards", by_ours, lambda out: json.loads((out / "manifest.json").read_text())["num_samples"]),
    "litdata": (
        "LitData's optimize",
        "litdata",
        by_litdata,
        lambda out: sum(each["chunk_size"] for each in json.loads((out / "index.json").read_text())["chunks"]),
    ),
    "mosaic": (
        "MDSWriter in two processes",
        "streaming",
        by_mosaic,
        lambda out: sum(each["samples"] for each in json.loads((out / "index.json").read_text())["shards"]),
    ),
    "webdataset": ("webdataset.ShardWriter, one process", "webdataset", by_shard_writer, in_tars),
    "img2dataset": ("img2dataset", "img2dataset", by_img2dataset, in_tars),
}
"""By name: title, module, how it packs, how many photographs it says are there."""

JOBS = {
    "copying files": (("ours", "litdata", "mosaic", "webdataset"), False, False),
    f"files shrunk to {SIDE}": (("ours", "litdata", "mosaic", "webdataset"), True, False),
    "copying from URLs": (("ours", "img2dataset"), False, True),
    f"URLs shrunk to {SIDE}": (("ours", "img2dataset"), True, True),
}
"""By what is done: by whom, whether photographs are shrunk, whether they are read from a server."""


def child(words: list[str]) -> None:
    """Pack once, and print seconds and what was written."""
    name, inputs_file, out, shrink = words
    _, module, pack, count = PACKERS[name]
    __import__(module)
    inputs, folder = Path(inputs_file).read_text().split("\n"), Path(out)
    begin = time.perf_counter()
    pack(inputs, folder, shrink=shrink == "True")
    seconds = time.perf_counter() - begin
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print("\n" + json.dumps({"s": seconds, "num": count(folder), "mb": num_bytes / 1e6}))


def run(python: str, name: str, inputs: list[str], folder: Path, *, shrink: bool) -> dict[str, float]:
    """Seconds, processor seconds and MB of one pass in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    (folder / "list").write_text("\n".join(inputs))
    words = [python, __file__, "--child", name, str(folder / "list"), str(folder / "out"), str(shrink)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as errors, (folder / "said").open("w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=errors, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name}: {(folder / 'log').read_text()[-2000:]}")
    found = json.loads((folder / "said").read_text().splitlines()[-1])
    if found["num"] != len(inputs):
        raise RuntimeError(f"{name} packed {found['num']} of {len(inputs)} photographs")
    return {"s": found["s"], "cpu": used.ru_utime + used.ru_stime, "mb": found["mb"]}


Figures = dict[str, dict[str, list[float]]]


def measure(job: str, inputs: list[str], folder: Path, pythons: dict[str, str], rounds: int) -> Figures:
    """Figures of each packer, by turns, without those of its start."""
    names, shrink, _ = JOBS[job]
    found: Figures = {name: {"s": [], "cpu": [], "mb": [], "start": []} for name in names if name in pythons}
    for number in range(rounds):
        for name, figures in found.items():
            start = run(pythons[name], name, inputs[:4], folder / "out", shrink=shrink)
            whole = run(pythons[name], name, inputs, folder / "out", shrink=shrink)
            figures["s"].append(whole["s"] - start["s"])
            figures["cpu"].append(whole["cpu"] - start["cpu"])
            figures["mb"].append(whole["mb"])
            figures["start"].append(start["s"])
            print(f"  round {number + 1}, {job}: {name}: {figures['s'][-1]:.2f} s", file=sys.stderr)
    return found


def report(job: str, found: Figures, num: int, versions: dict[str, str]) -> tuple[str, list["Claim"]]:
    """Markdown of one job, and its claims."""
    from alternating import compare

    lines = [f"| {job} | photographs/s | CPU, ms per photograph | MB written | start, s |", "|---|---|---|---|---|"]
    for name, figures in found.items():
        rate, cpu = num / median(figures["s"]), 1e3 * median(figures["cpu"]) / num
        what = PACKERS[name][0] + versions[name]
        lines.append(
            f"| {what} | {rate:,.0f} | {cpu:.2f} | {median(figures['mb']):.0f} | {median(figures['start']):.2f} |"
        )
    claims: list[Claim] = []
    for name, figures in found.items():
        if name != "ours":
            what = f"{job}, {num:,} photographs: ours / {PACKERS[name][0]}"
            rates = [[num / value for value in each["s"]] for each in (found["ours"], figures)]
            costs = [[1e3 * value / num for value in each["cpu"]] for each in (found["ours"], figures)]
            claims.append(compare(what, *rates, unit="photographs/s"))
            claims.append(compare(f"{what}, processor time", *costs, unit="ms each", less_is_better=True))
    return "\n".join(lines), claims


def installed(pythons: dict[str, str]) -> dict[str, str]:
    """Versions of the packers that are there; says what is left out."""
    packages = {"litdata": "litdata", "mosaic": "mosaicml-streaming", "webdataset": "webdataset"}
    packages |= {"img2dataset": "img2dataset"}
    versions = {"ours": ""}
    for name, package in packages.items():
        code = f"import {PACKERS[name][1]}; from importlib import metadata; print(metadata.version('{package}'))"
        done = subprocess.run(
            [pythons.get(name, sys.executable), "-c", code], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{name} is left out; to have it: benchmarks/requirements.txt says what to install")
        else:
            versions[name] = f" {done.stdout.split()[-1]}"
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="tar of photographs")
    parser.add_argument("--files", type=int, default=2000, help="at least so many are packed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--python", nargs="+", default=[], metavar="PACKER=PATH", help="interpreters of peers")
    parser.add_argument("--folder", help="where to work; the disk matters")
    parser.add_argument("--json", type=Path, help="where to write the claims")
    options = parser.parse_args()
    from alternating import claims_table, header, write_claims
    from pack import unpack

    own = dict(each.split("=", 1) for each in options.python)
    versions = installed(own)
    pythons: dict[str, Any] = {name: own.get(name, sys.executable) for name in versions}
    claims: list[Claim] = []
    tables: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        files = [str(path) for path in unpack(options.photos, folder / "in", options.files)]
        script = str(ROOT / "benchmarks" / "fetching.py")
        with subprocess.Popen([sys.executable, script, "--serve", name], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = f"http://127.0.0.1:{server.stdout.readline().strip()}/photos"
            urls = [f"{address}/{Path(path).relative_to(folder)}" for path in files]
            for job in options.jobs:
                inputs = urls if JOBS[job][2] else files
                found = measure(job, inputs, folder, pythons, options.rounds)
                table, of_job = report(job, found, len(files), versions)
                tables.append(table)
                claims += of_job
            server.kill()
    print(f"{header()}; {len(files):,} photographs, {WORKERS} workers, {options.rounds} round(s)\n")
    print("\n\n".join([*tables, claims_table(claims)]))
    write_claims(options.json, claims)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
