"""How fast this machine loads and trains, in a minute or two; `make gpu-check` runs it.

    python benchmarks/gpu_check.py --device cuda --out build/gpu-check

Photographs that scikit-image ships are cut to sizes like ImageNet's, packed, and read by the real loader; the step is
the real one. For every setting: the loader alone, the step alone (on one batch, again and again), and both together.
Writes results.json and results.md.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata, util
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from moco_fast.build import Parts, build
from moco_fast.config import Config
from moco_fast.presets import PRESETS
from moco_fast.runtime import start
from pipelines.batch import TwoViewBatch

ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A configuration, and how long to measure it."""

    name: str
    config: Config
    warmup: int
    """Steps before the clock starts."""
    steps: int
    """Steps in each round."""


def settings(device: str, shards: str) -> list[Setting]:
    """List what is measured on a device."""
    size, batch, warmup, steps = (224, 256, 10, 20) if device == "cuda" else (32, 16, 1, 2)
    found: list[Setting] = []
    for precision in ("bf16", "fp32") if device == "cuda" else ("fp32",):
        base = PRESETS["moco-v2"][1]
        encoder = "resnet50" if device == "cuda" else "resnet18"
        config = replace(
            base,
            data=replace(base.data, shards=shards, batch_size=batch),
            views=replace(base.views, size=size),
            model=replace(base.model, encoder=encoder),
            moco=replace(base.moco, queue_size=65536 if device == "cuda" else 1024),
            run=replace(base.run, device=device, precision=precision, steps=1),
        )
        name = f"moco-v2, {encoder}, {size} px, batch {batch}, {precision}"
        found.append(Setting(name=name, config=config, warmup=warmup, steps=steps))
    return found


def write_photographs(folder: Path, num: int) -> None:
    """Write JPEGs of 500 x 375 pixels, or turned: about the size and the detail of ImageNet's."""
    spec = util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("the photographs come with scikit-image, which is missing: pip install scikit-image")
    names = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
    photographs = [Image.open(Path(spec.origin).parent / "data" / name).convert("RGB") for name in names]
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(num):
        photograph = photographs[number % len(photographs)]
        width, height = (500, 375) if random.random() < 0.75 else (375, 500)
        # A part of the photograph with the sides' ratio kept, so that no two files are the same.
        scale = random.uniform(0.7, 1.0) * min(photograph.width / width, photograph.height / height)
        left = random.uniform(0, photograph.width - scale * width)
        top = random.uniform(0, photograph.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        image = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
        image.save(folder / f"{number:05d}.jpg", quality=92)


def samples_per_s(do_step: Callable[[], object], setting: Setting, device: torch.device) -> dict[str, float]:
    """Time rounds of steps on a device that has finished what came before."""
    for _ in range(setting.warmup):
        do_step()
    rates: list[float] = []
    for _ in range(ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(setting.steps):
            do_step()
        synchronize(device)
        rates.append(setting.steps * setting.config.data.batch_size / (time.perf_counter() - started))
    return {"median": median(rates), "min": min(rates), "max": max(rates)}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(setting: Setting) -> dict[str, Any]:
    """Measure one setting; in a process of its own, so that memory is this setting's alone."""
    runtime = start(setting.config.run)
    parts = build(setting.config, runtime)
    # The loader starts anew for every epoch; an endless one has no end in the middle of a round.
    batches = (batch for _ in cycle((None,)) for batch in parts.loader)
    batch = next(batches)
    device = runtime.device
    results = {
        "loader": samples_per_s(lambda: next(batches), setting, device),
        "step": samples_per_s(lambda: train_step(parts, batch), setting, device),
        "both": samples_per_s(lambda: train_step(parts, next(batches)), setting, device),
    }
    parts.loader.close()
    memory = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = {"torch_peak_bytes": torch.cuda.max_memory_allocated(device), "device_used_bytes": total - free}
    runtime.close()
    return {
        "name": setting.name,
        "loader": parts.loader.description,
        "precision": runtime.precision,
        "samples_per_s": results,
        "memory": memory,
    }


def train_step(parts: Parts, batch: TwoViewBatch) -> None:
    """Train on one batch."""
    parts.train_step([batch], lr=0.03, momentum=0.999)


def environment(device: str) -> dict[str, Any]:
    """Say what the figures were measured on."""
    versions = {
        d.name: d.version
        for d in metadata.distributions()
        if d.name in ("torch", "torchvision", "accelerate", "timm", "numpy") or d.name.startswith("nvidia-dali")
    }
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "versions": dict(sorted(versions.items())),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """Write the report as a person reads it."""
    where = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"# {where['device']}, {where['num_cpus']} CPUs",
        "",
        f"Python {where['python']}, CUDA {where['cuda']}, {versions}.",
        f"Samples/s: median of {ROUNDS} rounds (lowest to highest). A sample is two views.",
        "",
        "| setting | loader alone | step alone | both | torch's peak, device in use |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        cells = [
            f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})"
            for rate in (result["samples_per_s"][what] for what in ("loader", "step", "both"))
        ]
        memory = "-"
        if result["memory"]:
            memory = ", ".join(f"{value / 2**30:.1f} GiB" for value in result["memory"].values())
        lines.append(f"| {' | '.join([result['name'], *cells, memory])} |")
    lines += ["", *(f"Loader: {line}." for line in sorted({result["loader"] for result in report["results"]}))]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write the report, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here: add DEVICE=cpu for the small version", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        images, shards = Path(folder) / "images", Path(folder) / "shards"
        write_photographs(images, 2048 if arguments.device == "cuda" else 128)
        subprocess.run([sys.executable, "-m", "shards.cli", "pack", str(images), "--out", str(shards)], check=True)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
            results = list(processes.map(measure, settings(arguments.device, str(shards))))
    report = {"environment": environment(arguments.device), "results": results}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    (arguments.out / "results.md").write_text(as_markdown(report))
    print(as_markdown(report), end="")
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
