"""The parts of the GPU check; gpu_check.py runs each in a process of its own, with one argument of JSON.

Every part gives rows for the table of its kind, notes in Markdown, figures, and whether all is well.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from cifar_files import unpack_cifar
from gpu_beside import beside
from gpu_decoding import decode_rate, jpeg_kinds
from gpu_job import Job, Outcome, Row, backend_of, cpu_seconds, processors, recipe, repeated
from gpu_profile import profile

ROOT = Path(__file__).resolve().parent.parent

WANTED = (
    "accelerate",
    "google-crc32c",
    "hypothesis",
    "matplotlib",
    "numpy",
    "nvidia-ml-py",
    "obstore",
    "opencv-python-headless",
    "pillow",
    "psutil",
    "pytest",
    "pytest-timeout",
    "safetensors",
    "scikit-image",
    "simplejpeg",
    "tensorboard",
    "timm",
    "torch",
    "torchvision",
    "tqdm",
    "tyro",
    "webdataset",
    "xxhash",
)
"""Packages that one part or another needs."""


def environment(job: Job) -> Outcome:
    """Machine, driver, JPEG engines, versions, and what is missing."""
    import torch
    from alternating import header

    facts: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
    facts |= {"cpus": f"{processors()} of {os.cpu_count()}", "has_apex": importlib.util.find_spec("apex") is not None}
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    with suppress(OSError):
        facts["shared_memory_gib"] = round(shutil.disk_usage("/dev/shm").total / 2**30, 1)
    versions, missing = _packages()
    facts["missing"] = ", ".join(missing) or "nothing"
    if job.device == "cuda":
        facts |= _facts_of_gpu(torch)
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    row = {"part": job.name, "device": facts.get("gpu", "CPU"), "torch": torch.__version__, "python": facts["python"]}
    row |= {"JPEG engines": str(facts.get("jpeg_engines", "")), "missing": facts["missing"]}
    return Outcome(rows=[row], notes=[header(job.device), "", *lines], figures=facts | {"versions": versions})


def _packages() -> tuple[dict[str, str], list[str]]:
    """Versions of what is there, NVIDIA's libraries too, and names of what is not."""
    found = {
        dist.name.lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions() if dist.name
    }
    missing = [name for name in WANTED if name not in found]
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        missing.append("nvidia-dali")
    shown = [name for name in found if name in WANTED or name.startswith(("nvidia-dali", "nvidia-nv", "triton"))]
    return {name: found[name] for name in sorted(shown)}, missing


def _facts_of_gpu(torch: Any) -> dict[str, Any]:
    from pipelines.backends.engines import find_engines

    properties, engines = torch.cuda.get_device_properties(0), find_engines(torch.device("cuda", 0))
    facts = {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    facts |= {"compute_capability": f"{properties.major}.{properties.minor}", "driver": _driver()}
    facts["jpeg_engines"] = engines.count or f"none: {engines.reason}"
    facts["engine_cores"] = engines.cores
    facts["driver_capabilities"] = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "not set")
    facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    # The limit for whatever moves weights: bytes read and written by a copy.
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    facts["copy_gb_per_s"] = round(2 * source.nbytes / _device_seconds(lambda: target.copy_(source), 20) / 1e9)
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "nvidia-smi does not answer"


def data(job: Job) -> Outcome:
    """The photographs that the other parts load."""
    from shards.sets import open_set

    shards = open_set(job.shards())
    num_bytes = int(shards.manifest.shards.num_bytes.sum())
    row = {
        "part": job.name,
        "samples": f"{shards.num_samples:,}",
        "kB a sample": f"{num_bytes / shards.num_samples / 1e3:.0f}",
    }
    return Outcome(rows=[row], figures={"num_samples": shards.num_samples, "num_bytes": num_bytes})


def tests(job: Job, *, paths: list[str], select: str) -> Outcome:
    """The tests of files, those that `select` (pytest's -k) names."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
        command += ["-k", select] if select else []
        subprocess.run([*command, "--junitxml", str(results)], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(results).iter("testcase"))
    failures = {
        f"{case.get('classname')}::{case.get('name')}": _reason(problem.get("message") or "")
        for case in cases
        for problem in [*case.iter("failure"), *case.iter("error")]
    }
    skipped = sum(1 for case in cases for _ in case.iter("skipped"))
    row = {"part": job.name, "passed": str(len(cases) - len(failures) - skipped), "failed": str(len(failures))}
    return Outcome(
        rows=[row | {"skipped": str(skipped), "s": f"{sum(float(case.get('time', 0)) for case in cases):.0f}"}],
        notes=[f"- `{name}`: {message}" for name, message in failures.items()],
        figures={"failures": failures, "num_cases": len(cases)},
        ok=bool(cases) and not failures,
    )


def _reason(message: str) -> str:
    """Return the first line of a failure and its last: a command's error is at its end."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ... ".join(line[:300] for line in dict.fromkeys([*lines[:1], *lines[-3:]]))


def end_to_end(
    job: Job, *, seconds: float, stages: list[str] | None = None, ordered: bool = False, **options: Any
) -> Outcome:
    """`moco-fast bench` on photographs; `ordered`: with DALI's next batch before the step, as `from_dlpack` does it."""
    from hand_over import hand_over

    from moco_fast.bench.measure import STAGES, measure
    from moco_fast.bench.result import table

    config = recipe(job, **options)
    wanted = STAGES if stages is None else [stage for stage in STAGES if stage in stages]
    with hand_over("waits on it" if ordered else "free"):
        result = measure(config, seconds=seconds, stages=wanted)
    row = {"part": job.name, "backend": backend_of(result.environment["loader"], config.data.backend)}
    for name in ("reading", "decoding", "loader", "step", "end_to_end"):
        rate = getattr(result, name)
        row[f"{name.replace('_', ' ')}, samples/s"] = f"{rate.median:,.0f}" if rate else ""
    if result.overlap is not None:
        row["overlap"] = f"{result.overlap:.3f}"
    if result.headroom is not None:
        row["loader to step"] = f"{result.headroom:.2f}"
    if result.data_wait_share is not None and result.end_to_end is not None:
        row["waiting"] = f"{result.data_wait_share:.1%}"
    if result.slowdown is not None:
        row["step beside the loader"] = f"{result.slowdown:.2f}x"
    figures = asdict(result) | {"overlap": result.overlap, "headroom": result.headroom, "slowdown": result.slowdown}
    return Outcome(rows=[row], notes=["```", table(result), "```"], figures=figures)


def loader(job: Job, *, size: int, batch: int, seconds: float, data: dict[str, Any]) -> Outcome:
    """Two views, by the load of the GPU's decoder, threads and backend."""
    from moco_fast.bench.measure import measure

    config = recipe(job, encoder="resnet18_quarter", size=size, batch=batch, queue=64, data=data)
    result = measure(config, seconds=seconds, stages=("decoding", "loader"))
    assert result.decoding is not None
    assert result.loader is not None
    row = {"part": job.name, "backend": backend_of(result.environment["loader"], config.data.backend)}
    row["decoding, samples/s"] = f"{result.decoding.median:,.0f}"
    row["loader, samples/s"] = (
        f"{result.loader.median:,.0f} ({result.loader.lowest:,.0f} to {result.loader.highest:,.0f})"
    )
    if result.device_used_bytes:
        row["GPU memory in use, GiB"] = f"{result.device_used_bytes / 2**30:.1f}"
    return Outcome(rows=[row | {"how": result.environment["loader"]}], figures=asdict(result))


def host(job: Job, *, size: int, batches: list[int], seconds: float) -> Outcome:
    """Processor time of the host for loading alone, all threads and the reader included."""
    import torch

    from pipelines.loader import open_loader

    rows: list[Row] = []
    figures: dict[str, Any] = {}
    for batch in batches:
        config = recipe(job, encoder="resnet18_quarter", size=size, batch=batch, queue=64)
        with open_loader(config.data, config.views, seed=0, device=torch.device(job.device)) as opened:
            backend = backend_of(opened.description, config.data.backend)
            endless = (each for _ in iter(int, 1) for each in opened)
            for _ in range(8):
                next(endless)
            begin, cpu_begin, num = time.perf_counter(), cpu_seconds(), 0
            while time.perf_counter() - begin < seconds:
                next(endless)
                num += batch
            wall_s, cpu_s = time.perf_counter() - begin, cpu_seconds() - cpu_begin
        figures[str(batch)] = {"samples_per_s": num / wall_s, "cpu_s_per_1000": 1e3 * cpu_s / num}
        rows.append({"part": f"batch {batch}", "backend": backend, "loader, samples/s": f"{num / wall_s:,.0f}"})
        rows[-1] |= {"CPU s per 1,000 samples": f"{1e3 * cpu_s / num:.3f}", "CPUs busy": f"{cpu_s / wall_s:.1f}"}
    return Outcome(rows=rows, figures=figures)


def step(job: Job, *, rounds: int, only: list[str] | None = None, **setting: Any) -> Outcome:
    """Our step beside a supervised one and the authors', each on one batch over and over."""
    import torch
    from alternating import alternate, claims_table, compare
    from step import Authors, Ours, Setting, Supervised

    device = torch.device(job.device)
    made = Setting(device=device, **setting)
    contestants = {"ours": Ours, "authors'": Authors, "supervised": Supervised}
    views = made.views()
    calls = 5 if device.type == "cuda" else 1
    alternatives = {
        name: repeated(kind(made, views).step, calls)
        for name, kind in contestants.items()
        if only is None or name in only
    }
    seconds = alternate(alternatives, rounds=rounds, device=device, warmup=3 if device.type == "cuda" else 1)
    rates = {name: [calls * made.batch / each for each in values] for name, values in seconds.items()}
    what = f"{made.encoder}, {made.size} px, batch {made.batch}, {made.precision}{', compiled' if made.compile else ''}"
    row = {"part": job.name, "setting": what}
    row |= {f"{name}, samples/s": f"{median(values):,.0f}" for name, values in rates.items()}
    if device.type == "cuda":
        row["torch's peak, GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    claims = [
        compare(f"step against {other}, {what}", rates["ours"], rates[other], unit="samples/s")
        for other in rates
        if other != "ours"
    ]
    notes = [claims_table(claims)] if claims else []
    return Outcome(
        rows=[row], notes=notes, figures={"samples_per_s": rates, "claims": [asdict(each) for each in claims]}
    )


def momentum(job: Job, *, encoder: str) -> Outcome:
    """The momentum update against one pass over one flat buffer, by the device's clock."""
    import torch
    from alternating import claims_table, compare

    from moco_fast.config import ModelConfig
    from moco_fast.encoders.encoder import build_encoder
    from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
    from moco_fast.methods.momentum_contrast import MomentumContrast

    device = torch.device(job.device)
    query = build_encoder(ModelConfig(encoder=encoder), MomentumContrast())
    query.to(device, memory_format=torch.channels_last)
    key = copy_as_key_encoder(query)
    update = MomentumUpdate(query, key)
    flat_query, flat_key = (torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (query, key))
    calls = 200 if device.type == "cuda" else 5
    alternatives: dict[str, Callable[[], object]] = {
        "ours": lambda: update(0.999),
        "limit": lambda: flat_key.lerp_(flat_query, 0.001),
    }
    micros: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(5):
        for name, call in alternatives.items():
            micros[name].append(1e6 * _device_seconds(call, calls, device.type))
    what = f"momentum update, {encoder}, {flat_key.numel() / 1e6:.1f}M parameters, against one flat buffer"
    goal = 1 / 1.1 if device.type == "cuda" else None
    claim = compare(what, micros["ours"], micros["limit"], unit="us", less_is_better=True, goal=goal)
    row = {"part": job.name, "encoder": encoder, "ours, us": f"{claim.ours:,.0f}", "limit, us": f"{claim.theirs:,.0f}"}
    row["moved by the limit, GB/s"] = f"{3 * flat_key.nbytes / claim.theirs / 1e3:,.0f}"
    return Outcome(rows=[row], notes=[claims_table([claim])], figures={"claims": [asdict(claim)]})


def memory(job: Job, *, batches: list[int], **options: Any) -> Outcome:
    """What a run takes with DALI's buffers, the largest batch first, each in a process of its own."""
    rows: list[Row] = []
    figures: dict[str, Any] = {}
    for batch in batches:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
            found = processes.submit(_memory_of, job, options | {"batch": batch}).result()
        figures[str(batch)] = found
        rows.append({"part": f"batch {batch}"} | {name: f"{value:.2f}" for name, value in found.items()})
    notes = ["GiB. The device's also holds DALI's buffers and the libraries' own; -1: does not fit."]
    return Outcome(rows=rows, notes=notes, figures=figures)


def _memory_of(job: Job, options: dict[str, Any]) -> dict[str, float]:
    import torch

    from moco_fast.bench.measure import measure

    try:
        result = measure(recipe(job, **options), seconds=2, stages=("end_to_end",))
    except torch.OutOfMemoryError:
        return {"torch's peak": -1.0}
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if result.torch_peak_bytes is not None and result.device_used_bytes is not None:
        found |= {"torch's peak": result.torch_peak_bytes / 2**30, "device": result.device_used_bytes / 2**30}
        found["device without torch"] = (result.device_used_bytes - torch.cuda.memory_reserved()) / 2**30
    return found


def cifar10(job: Job, *, archive: str, seconds: float, words: list[str]) -> Outcome:
    """The authors' CIFAR-10 demo, from images to kNN; interrupted, it goes on where it was."""
    from moco_fast.report.record import read_run

    shards = {split: _pack_cifar(Path(archive), split, job.data / "cifar10") for split in ("train", "test")}
    run = job.data / "cifar10" / "run"
    command = [sys.executable, "-m", "moco_fast.train", "cifar10", "--data.shards", str(shards["train"])]
    command += ["--eval.shards", str(shards["test"]), "--run.out", str(run), "--run.device", job.device, *words]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        # The trainer saves and stops.
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    record = read_run(run)
    last = record.evaluations[-1]
    outcome = json.loads((run / "outcome.json").read_text())
    row = {"part": job.name, "steps": f"{last['step']} of {outcome['num_steps']}", "epoch": f"{last['epoch']:.0f}"}
    row |= {"kNN top-1": f"{last['knn/top1']:.1%}", "s": f"{last['time_s']:,.0f}"}
    if record.training:
        row["samples/s"] = f"{record.training[-1]['samples_per_s']:,.0f}"
    notes = ["The authors' code gets 82.6% after 200 epochs."]
    if outcome["outcome"] != "finished":
        print(json.dumps(row))
        raise SystemExit(
            f"ended with {code}, {outcome['outcome']} at step {outcome['step']}: run the same command again"
        )
    return Outcome(rows=[row], notes=notes, figures={"evaluations": record.evaluations})


def _pack_cifar(archive: Path, split: str, folder: Path) -> Path:
    images, shards = folder / "images" / split, folder / "shards" / split
    if (shards / "manifest.json").is_file():
        return shards
    unpack_cifar(archive, split, images)
    command = [sys.executable, "-c", "import sys; from shards.cli import main; sys.exit(main())"]
    subprocess.run([*command, "pack", str(images), "--out", str(shards)], check=True, cwd=ROOT)
    return shards


def _device_seconds(call: Callable[[], object], calls: int, device: str = "cuda") -> float:
    """Seconds of one call by the device's own clock, after a tenth of the calls as warm-up."""
    import torch

    from moco_fast.bench.clock import PartClock

    clock = PartClock(torch.device(device))
    for _ in range(1 + calls // 10):
        call()
    with clock.part("calls"):
        for _ in range(calls):
            call()
    return clock.read()["calls"] / calls


KINDS: dict[str, Callable[..., Outcome]] = {
    "beside": beside,
    "environment": environment,
    "data": data,
    "tests": tests,
    "end_to_end": end_to_end,
    "loader": loader,
    "host": host,
    "decode_rate": decode_rate,
    "jpeg_kinds": jpeg_kinds,
    "step": step,
    "momentum": momentum,
    "memory": memory,
    "profile": profile,
    "cifar10": cifar10,
}


def do(job: str) -> None:
    """Do one part, and write its file whole or not at all; `job`: JSON of kind, options, device, data, photos, out."""
    wanted = json.loads(job)
    out = Path(wanted["out"])
    photos = Path(wanted["photos"]) if wanted["photos"] else None
    part = Job(name=out.stem, device=wanted["device"], data=Path(wanted["data"]), photos=photos)
    outcome = KINDS[wanted["kind"]](part, **wanted["options"])
    # Of this process and of those that it has waited for: a loader's reader, a part's own processes.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(each.ru_utime + each.ru_stime for each in used)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(outcome) | {"cpu_s": cpu_s}, indent=2) + "\n")
    partial.rename(out)


if __name__ == "__main__":
    do(sys.argv[1])
