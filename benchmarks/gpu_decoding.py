"""Parts of the GPU check about decoding alone: the rate of a GPU, and what its decoders make of each kind of JPEG.

DALI by itself, without this project's loader: figures that others can repeat and compare with their own.
"""

import hashlib
import io
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import cycle, islice
from multiprocessing import get_context
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from gpu_job import Job, Outcome, Row, cpu_seconds, processors

Encoded = npt.NDArray[np.uint8]


def decode_pipeline(source: Callable[[], list[Encoded]], *, batch: int, on_gpu: bool, load: float, threads: int) -> Any:
    """Whole images to RGB: on the GPU, its engines taking `load` of them, or on the CPU."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    options: Any = {"hw_decoder_load": load} if on_gpu else {}

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    def decoded() -> Any:
        encoded: Any = fn.external_source(source, batch=True, dtype=types.UINT8, ndim=1, no_copy=True)
        where = "mixed" if on_gpu else "cpu"
        return fn.decoders.image(encoded, device=where, output_type=types.RGB, adjust_orientation=False, **options)

    pipe = decoded()
    pipe.build()
    return pipe


def decode_rate(job: Job, *, batch: int, load: float, seconds: float) -> Outcome:
    """Images/s of whole photographs, JPEG in host memory to RGB on the device, in a process that does nothing else."""
    from shards.sets import open_set

    shards = open_set(job.shards())
    images = [_encoded(shards, number) for number in range(min(1024, shards.num_samples))]
    endless = cycle(images)
    on_gpu, threads = job.device == "cuda", min(16, processors())
    pipe = decode_pipeline(lambda: list(islice(endless, batch)), batch=batch, on_gpu=on_gpu, load=load, threads=threads)
    for _ in range(4):
        pipe.run()
    rates: list[float] = []
    cpu_begin, num = cpu_seconds(), 0
    for _ in range(3):
        begin, of_round = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds / 3:
            # `run` gives a batch whose decoding is done: it waits on the host.
            pipe.run()
            of_round += batch
        rates.append(of_round / (time.perf_counter() - begin))
        num += of_round
    cost_s = 1e3 * (cpu_seconds() - cpu_begin) / num
    sizes = [_size_of(image) for image in images]
    megapixels = sum(width * height for width, height in sizes) / len(sizes) / 1e6
    kilobytes = sum(image.nbytes for image in images) / len(images) / 1e3
    digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]
    row = {"part": job.name, "decoder": f"DALI {'mixed' if on_gpu else 'cpu'}, load {load:g}"}
    row |= {"images/s": f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"}
    row |= {"MP/s": f"{median(rates) * megapixels:,.0f}", "CPU s per 1,000": f"{cost_s:.3f}"}
    row |= {"batch": str(batch), "threads": str(threads)}
    note = (
        f"- {len(images)} images, {kilobytes:.1f} kB and {megapixels:.3f} MP each, SHA-256 {digest}; {_versions(job)}"
    )
    figures = {"images_per_s": rates, "cpu_s_per_1000": cost_s, "sha256": digest, "megapixels": megapixels}
    return Outcome(rows=[row], notes=[note], figures=figures | {"kilobytes": kilobytes, "load": load})


def _encoded(shards: Any, number: int) -> Encoded:
    shard = int(np.searchsorted(np.cumsum(shards.shard_sizes), number, side="right"))
    record = shards.index(shard)[number - int(np.sum(shards.shard_sizes[:shard]))]
    with shards.shard_path(shard).open("rb") as file:
        file.seek(int(record["offset"]))
        return np.frombuffer(file.read(int(record["size"])), np.uint8)


def _size_of(encoded: Encoded) -> tuple[int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return image.size


def _versions(job: Job) -> str:
    """What decides the rate: the GPU, its driver, DALI and its decoders."""
    from importlib import metadata

    wanted = ("nvidia-dali", "nvidia-nvimgcodec", "nvidia-nvjpeg", "nvidia-cuda-runtime")
    dists = {dist.name: dist.version for dist in metadata.distributions() if (dist.name or "").startswith(wanted)}
    gpu = ""
    if job.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0] + ", "
        except (OSError, subprocess.CalledProcessError, IndexError):
            gpu = "nvidia-smi does not answer, "
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(dists.items()))
    return f"{gpu}{libraries}, Python {sys.version.split()[0]}"


def kinds_of_jpeg(photograph: npt.NDArray[np.uint8]) -> dict[str, bytes]:
    """One photograph (H, W, 3) in each kind of JPEG that a set may hold."""
    import cv2
    from PIL import Image

    odd = photograph[: photograph.shape[0] - 1 | 1, : photograph.shape[1] - 1 | 1]

    def baseline(pixels: npt.NDArray[np.uint8], sampling: int) -> bytes:
        options = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
        return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()

    def pillow(image: Image.Image, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90, **options)
        return file.getvalue()

    image = Image.fromarray(photograph)
    return {
        "4:2:0": baseline(photograph, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
        "4:2:2": baseline(photograph, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
        "4:4:0": baseline(photograph, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
        "4:4:4": baseline(photograph, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
        "4:1:1": baseline(photograph, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
        "odd size": baseline(odd, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
        "gray": pillow(image.convert("L")),
        "progressive": pillow(image, progressive=True),
        "CMYK": pillow(image.convert("CMYK")),
    }


DECODERS: dict[str, dict[str, Any]] = {
    "engines": {"on_gpu": True, "load": 1.0},
    "CUDA": {"on_gpu": True, "load": 0.0},
    "CPU": {"on_gpu": False, "load": 0.0},
}


def jpeg_kinds(job: Job, *, batch: int, rounds: int) -> Outcome:
    """Each kind of JPEG by each decoder: images/s, and how far its pixels are from libjpeg-turbo's (Pillow)."""
    kinds = kinds_of_jpeg(_photograph(job))
    rows: list[Row] = []
    figures: dict[str, Any] = {}
    for decoder, options in DECODERS.items():
        if job.device != "cuda" and options["on_gpu"]:
            continue
        for kind, found in _decode_all(kinds, options, batch, rounds).items():
            row = next((row for row in rows if row["part"] == kind), None)
            if row is None:
                rows.append(row := {"part": kind, "kB": f"{len(kinds[kind]) / 1e3:.0f}"})
            figures[f"{kind}, {decoder}"] = found
            if isinstance(found, str):
                row[f"{decoder}, images/s"] = found
                continue
            row[f"{decoder}, images/s"] = f"{found['images_per_s']:,.0f}"
            row[f"{decoder}, difference"] = f"{found['mean']:.2f} (at most {found['largest']:.0f})"
    notes = ["Difference: mean of the absolute differences to Pillow's pixels, and the largest, in levels of 255."]
    return Outcome(rows=rows, notes=notes, figures=figures)


def _photograph(job: Job) -> npt.NDArray[np.uint8]:
    from PIL import Image

    from shards.sets import open_set

    with Image.open(io.BytesIO(_encoded(open_set(job.shards()), 0).tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def _decode_all(kinds: dict[str, bytes], options: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    """Each kind in turn; a decoder that kills its process is told, and the next kind gets a fresh one."""
    found: dict[str, Any] = {}
    left = dict(kinds)
    while left:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
            while left:
                kind, encoded = next(iter(left.items()))
                del left[kind]
                try:
                    found[kind] = processes.submit(decode_kind, encoded, options, batch, rounds).result()
                except BrokenProcessPool:
                    found[kind] = "crashes"
                    break
    return found


def decode_kind(encoded: bytes, options: dict[str, Any], batch: int, rounds: int) -> dict[str, float] | str:
    """Images/s of copies of one image, and the differences of its pixels to Pillow's; or why it is not decoded."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(image.convert("RGB")).astype(np.float64)
    images = [np.frombuffer(encoded, np.uint8) for _ in range(batch)]
    try:
        pipe = decode_pipeline(lambda: images, batch=batch, threads=min(16, processors()), **options)
        pixels = _first_pixels(pipe.run())
        pipe.run()
        begin = time.perf_counter()
        for _ in range(rounds):
            pipe.run()
        rate = batch * rounds / (time.perf_counter() - begin)
    except RuntimeError as error:
        return f"refused: {_reason(str(error).splitlines())}"
    if pixels.shape != expected.shape:
        return f"gives {pixels.shape}"
    difference = np.abs(pixels - expected)
    return {"images_per_s": rate, "mean": float(difference.mean()), "largest": float(difference.max())}


def _first_pixels(outputs: Any) -> npt.NDArray[np.float64]:
    [images] = outputs
    return np.asarray(images.as_cpu().at(0)).astype(np.float64)


def _reason(lines: Sequence[str]) -> str:
    """The line of DALI's report that says most."""
    told = [line.strip() for line in lines if "rror" in line or "nsupported" in line or "ailed" in line]
    return (told or [line.strip() for line in lines if line.strip()] or ["no reason given"])[0][:100].replace("|", " ")
