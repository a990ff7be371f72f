"""Packing speed against what a user would take instead: the same files, alternating in one run, as ratios.

    python benchmarks/pack.py --photos photos.tar [--files 10000] [--rounds 3] [--folder DIR] [--json FILE]

Copying, by the default options, is compared with GNU tar and fsync, and with webdataset's ShardWriter; shrinking with
OpenCV called as img2dataset calls it (decode, INTER_AREA, encode at the same quality), on one core. The photos are
unpacked as often as it takes for so many files and are in the page cache; every contender writes to the same disk.
Times leave out starting the interpreter; starting worker processes is measured with an all but empty set and taken
away. The last table says how much damage copying finds, by default and with --mean-rgb, which decodes: a spoiled JPEG
counts as found where it is rejected or repaired.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from shards.config import EncodeConfig, PackConfig
from shards.ground.errors import Rejected
from shards.images.encode import encode
from shards.images.jpeg import parse_jpeg
from shards.packing.pack import pack

if TYPE_CHECKING:
    from alternating import Claim

SIDE, QUALITY = 256, 90


def unpack(photos: str, folder: Path, num_files: int) -> list[Path]:
    """At least so many files, in folders that hold each photo once, all in the page cache."""
    files: list[Path] = []
    with tarfile.open(photos) as tar:
        images = [(Path(m.name).name, tar.extractfile(m).read()) for m in tar if m.isfile()]
    for copy in range(-(-num_files // len(images))):
        inner = folder / f"class{copy}"
        inner.mkdir(parents=True)
        for name, data in images:
            (inner / name).write_bytes(data)
            files.append(inner / name)
    return files


def gnu_tar(source: Path, out: Path) -> None:
    out.mkdir()
    subprocess.run(["tar", "cf", out / "x.tar", "-C", source.parent, source.name], check=True)
    with (out / "x.tar").open("rb") as file:
        os.fsync(file.fileno())


def shard_writer(source: Path, out: Path) -> None:
    import webdataset as wds

    out.mkdir()
    with wds.ShardWriter(str(out / "%06d.tar"), maxsize=512 << 20, verbose=0) as writer:
        for i, path in enumerate(sorted(source.rglob("*.*"))):
            writer.write({"__key__": f"{i:012d}", "jpg": path.read_bytes()})


def ours(source: Path, out: Path, **options: object) -> None:
    pack(PackConfig(sources=(str(source),), out=str(out), **options))


def opencv(data: bytes) -> bytes:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    height, width = image.shape[:2]
    side = min(height, width)
    if side > SIDE:
        size = (max(1, round(width * SIDE / side)), max(1, round(height * SIDE / side)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def timed(contenders: dict[str, Callable[[Path], object]], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; they take turns, and get a path where nothing is yet."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    out = folder / "out"
    for number in range(rounds):
        for name, run in contenders.items():
            # Removing a gigabyte takes half a second, which is nobody's merit.
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            begin = time.perf_counter()
            run(out)
            seconds[name].append(time.perf_counter() - begin)
            print(f"  round {number + 1}: {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    return seconds


def similarity(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean SSIM over channels (Wang et al. 2004), Gaussian window of sigma 1.5."""

    def blur(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (11, 11), 1.5)

    a, b = image.astype(np.float64), reference.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(
        (((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()
    )


def look(datas: list[bytes], shrink: Callable[[bytes], bytes]) -> float:
    """SSIM of shrunk photos against Pillow's Lanczos of the originals."""
    found = []
    for data in datas:
        with Image.open(io.BytesIO(data)) as original, Image.open(io.BytesIO(shrink(data))) as small:
            reference = original.convert("RGB").resize(small.size, Image.Resampling.LANCZOS)
            found.append(similarity(np.asarray(small.convert("RGB")), np.asarray(reference)))
    return float(np.mean(found))


def less(seconds: list[float], starts: list[float]) -> list[float]:
    """Times without what starting the worker processes took in the same round."""
    return [each - start for each, start in zip(seconds, starts, strict=True)]


def copying(source: Path, folder: Path, rounds: int, num_files: int) -> list["Claim"]:
    from alternating import compare

    tiny = folder / "tiny"
    tiny.mkdir()
    for path in sorted(source.rglob("*.*"))[:4]:
        shutil.copy(path, tiny)
    seconds = timed(
        {
            "tar": lambda out: gnu_tar(source, out),
            "1 worker": lambda out: ours(source, out, workers=1),
            "2 workers": lambda out: ours(source, out, workers=2),
            "ShardWriter": lambda out: shard_writer(source, out),
            "start": lambda out: ours(tiny, out, workers=2, shard_samples=2),
        },
        folder,
        rounds,
    )
    what = f"copying {num_files:,} photos"
    two = less(seconds["2 workers"], seconds["start"])
    print(f"Starting two workers took {median(seconds['start']):.2f} s; claims are without it.")
    against = {"unit": "s", "less_is_better": True}
    return [
        compare(f"{what}, 1 worker / GNU tar and fsync", seconds["1 worker"], seconds["tar"], goal=1 / 1.3, **against),
        compare(f"{what}, 2 workers / GNU tar and fsync", two, seconds["tar"], goal=0.9, **against),
        compare(f"{what}, 1 worker / webdataset.ShardWriter", seconds["1 worker"], seconds["ShardWriter"], **against),
    ]


def shrinking(source: Path, folder: Path, rounds: int) -> list["Claim"]:
    from alternating import compare

    datas = [path.read_bytes() for path in sorted((source / "class0").iterdir())]
    config = EncodeConfig(resize=SIDE, quality=QUALITY)
    options = {"resize": SIDE, "quality": QUALITY, "shard_samples": 100}
    one, tiny = source / "class0", folder / "tiny"
    cv2.setNumThreads(0)

    def each(shrink: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        return lambda _out: [shrink(data) for data in datas]

    seconds = timed(
        {
            "opencv": each(opencv),
            "encoding": each(lambda data: encode(data, config).data),
            "1 worker": lambda out: ours(one, out, workers=1, **options),
            "2 workers": lambda out: ours(one, out, workers=2, **options),
            "start": lambda out: ours(tiny, out, workers=2, shard_samples=2, resize=SIDE),
        },
        folder,
        rounds,
    )
    two = less(seconds["2 workers"], seconds["start"])

    def rates(found: list[float]) -> list[float]:
        return [len(datas) / value for value in found]

    what, theirs = f"shrinking to {SIDE} at quality {QUALITY}", rates(seconds["opencv"])
    few = datas[:: max(1, len(datas) // 200)]
    looks = [look(few, shrink) for shrink in (lambda data: encode(data, config).data, opencv)]
    return [
        compare(f"{what}, 1 core / OpenCV, 1 core", rates(seconds["encoding"]), theirs, unit="images/s", goal=1.05),
        compare(
            f"{what}, all of packing, 1 worker / OpenCV, 1 core", rates(seconds["1 worker"]), theirs, unit="images/s"
        ),
        compare(f"{what}, all of packing, 2 workers / OpenCV, 1 core", rates(two), theirs, unit="images/s", goal=1.8),
        compare(f"{what}, likeness to Lanczos / OpenCV's", [looks[0]], [looks[1]], unit="SSIM", goal=1.0),
    ]


def meaning(source: Path, folder: Path, rounds: int) -> list["Claim"]:
    """What the mean color of each photo costs where photos are copied."""
    from alternating import compare

    one = source / "class0"
    seconds = timed(
        {
            "plain": lambda out: ours(one, out, workers=1),
            "mean": lambda out: ours(one, out, workers=1, mean_rgb=True),
        },
        folder,
        rounds,
    )
    claim = "copying by default / with --mean-rgb, 1 worker"
    return [compare(claim, seconds["plain"], seconds["mean"], unit="s", less_is_better=True)]


SPOILED: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "cut off": lambda data, at, _: data[:at],
    "zeros to the end": lambda data, at, _: data[:at] + bytes(len(data) - at),
    "4 KiB of zeros": lambda data, at, _: data[:at] + bytes(4096) + data[at + 4096 :],
    "4 KiB of random bytes": lambda data, at, _: data[:at] + np.random.default_rng(at).bytes(4096) + data[at + 4096 :],
    "4 KiB of another photo's scan": lambda data, at, other: data[:at] + other[-8192:-4096] + data[at + 4096 :],
    "4 KiB missing": lambda data, at, _: data[:at] + data[at + 4096 :],
    "one bit flipped": lambda data, at, _: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
}
"""What happens to a JPEG from a place in its scan on, given another one."""


def notices(data: bytes, config: EncodeConfig) -> bool:
    try:
        return encode(data, config).outcomes != ("copied",)
    except Rejected:
        return True


def damage(source: Path) -> str:
    """Share of spoiled photos that copying notices, as a table."""
    datas = [path.read_bytes() for path in sorted((source / "class0").iterdir())[:200]]
    datas = [data for data in datas if parse_jpeg(data).is_baseline and len(data) > 30_000]
    rng = np.random.default_rng(0)
    lines = ["| photo with | default | --mean-rgb |", "|---|---|---|"]
    for what, spoil in SPOILED.items():
        places = [int(rng.integers(parse_jpeg(data).scan_at + 64, len(data) - 8192)) for data in datas]
        spoiled = [spoil(data, at, datas[i - 1]) for i, (data, at) in enumerate(zip(datas, places, strict=True))]
        default, decoded = (
            sum(notices(data, EncodeConfig(mean_rgb=mean)) for data in spoiled) / len(spoiled) for mean in (False, True)
        )
        lines.append(f"| {what} | {default:.0%} | {decoded:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="tar of photos")
    parser.add_argument("--files", type=int, default=10_000, help="at least so many are copied")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    parser.add_argument("--folder", help="where to work; the disk matters")
    options = parser.parse_args()
    # Not above: worker processes import this file, and torch with it.
    from alternating import claims_table, header, write_claims

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        files = unpack(options.photos, folder / "in", options.files)
        claims = [
            *copying(folder / "in", folder, options.rounds, len(files)),
            *shrinking(folder / "in", folder, options.rounds),
            *meaning(folder / "in", folder, options.rounds),
        ]
        noticed = damage(folder / "in")
    print(f"{header()}; {options.rounds} rounds\n\n{claims_table(claims)}\n\n{noticed}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
