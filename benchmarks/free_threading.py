"""Free-threaded Python probed: threads that read and make views, alone and beside a busy interpreter.

    python3.14 benchmarks/free_threading.py --photos PHOTOS.tar
    python3.14t benchmarks/free_threading.py --photos PHOTOS.tar

Run it with both builds and compare the rows. It needs numpy, Pillow and torch alone: OpenCV, simplejpeg and
google-crc32c, with which the project itself reads and makes views, have no wheels for the free-threaded build. The
stand-ins (Pillow's decoder, zlib's crc, torch's resize) release the interpreter lock as those do.
"""

import argparse
import io
import os
import platform
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

VIEW = 224


def samples_of(photos: Path) -> list[tuple[int, int]]:
    """(offset, size) of each JPEG in a tar."""
    with tarfile.open(photos) as tar:
        return [(member.offset_data, member.size) for member in tar if member.isfile()]


def read_one(file: int, place: tuple[int, int]) -> bytes:
    """Read one sample's bytes and check them."""
    offset, size = place
    data = os.pread(file, size, offset)
    zlib.crc32(data)
    return data


def two_views(file: int, place: tuple[int, int]) -> None:
    """Read, decode, and resize two crops of one sample."""
    with Image.open(io.BytesIO(read_one(file, place))) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    for _ in range(2):
        torch.ops.aten._upsample_bilinear2d_aa(pixels, (VIEW, VIEW), False)


def rate(work: Callable[[int, tuple[int, int]], object], photos: Path, *, threads: int, busy: bool, seconds: float):
    """Samples per second of `threads` threads; `busy`: while this thread runs Python without a pause."""
    places = samples_of(photos)
    done = [0] * threads
    ended = threading.Event()

    def run(number: int) -> None:
        file = os.open(photos, os.O_RDONLY)
        while not ended.is_set():
            work(file, places[(number + done[number] * threads) % len(places)])
            done[number] += 1
        os.close(file)

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    begin, end = time.perf_counter(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        if not busy:
            time.sleep(0.05)
    ended.set()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - begin)


def main() -> None:
    """Print a row for each kind of work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="tar of JPEGs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lock = "no lock" if not getattr(sys, "_is_gil_enabled", lambda: True)() else "lock"
    for name, work in (("read and check", read_one), ("two views", two_views)):
        rate(work, options.photos, threads=1, busy=False, seconds=0.5)
        alone, beside = (
            rate(work, options.photos, threads=options.threads, busy=busy, seconds=options.seconds)
            for busy in (False, True)
        )
        print(f"| {platform.python_version()}, {lock} | {name} | {alone:,.0f} | {beside:,.0f} | {beside / alone:.2f} |")


if __name__ == "__main__":
    main()
