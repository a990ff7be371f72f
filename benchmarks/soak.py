"""Memory, file descriptors, threads and shared memory of long runs: nothing may grow.

    python benchmarks/soak.py --steps 10000 [--minutes 10] [--backends torch dali] [--plot FILE]

Trains a tiny encoder on small photographs for so many steps, or until the time is over, with evaluations, checkpoints
and many epochs, all backends side by side, and samples all processes of each run once a second. PSS counts pages that
processes share once, and leaves out those of files, which depend on who else runs; shared memory is what descriptors
hold of it, in /dev/shm or without a name. A figure holds if the line through its samples (Theil-Sen), without the first
quarter of the steps, grows over 10,000 steps by less than a hundredth of its level: the first save and the first
evaluation start a thread and allocate buffers that are kept, and modules are imported late. In a run of some hundred
steps these few MiB make a line that would grow by a hundred over 10,000: of a short run nothing is said.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from alternating import header
from photographs import photograph_shards
from scipy.stats import theilslopes

ROOT = Path(__file__).resolve().parent.parent

FIGURES = {
    "PSS, MiB": "memory of all processes, without files",
    "RSS, MiB": "memory of the training process",
    "file descriptors": "of all processes",
    "threads": "of all processes",
    "processes": "of the run",
    "shared memory, MiB": "of all descriptors",
}
RECIPE = (
    "demo --model.encoder resnet18_quarter --views.size 16 --data.batch-size 16 --data.lanes 4 --data.num-threads 1 "
    "--bn.num-groups 2 --method.queue-size 128 --eval.every-steps 500 --checkpoint.every-steps 200 "
    "--checkpoint.keep 2 --log.every-steps 10 --log.trackers tensorboard --run.device cpu --run.precision fp32"
)
ALLOWED_GROWTH = 0.01
"""Of a figure's level, over `PER_STEPS`."""
PER_STEPS = 10_000
LEFT_OUT = 0.25
"""Share of the steps at the beginning in which figures may rise."""
SHORTEST = 4_000
"""Steps of which a quarter holds the first saves and evaluations, twice as many as needed."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What one run was seen to use."""

    backend: str
    steps: list[int]
    values: dict[str, list[float]]
    """Figure -> one value per entry of `steps`."""

    @property
    def num_epochs(self) -> float:
        """Passes over the set of 64 photographs."""
        return self.steps[-1] * 16 / 64

    def growth(self, figure: str) -> float:
        """Return the slope of a line through the samples behind the beginning, per 10,000 steps."""
        steps, values = np.array(self.steps, dtype=float), np.array(self.values[figure])
        later = steps >= LEFT_OUT * steps[-1]
        return float(theilslopes(values[later], steps[later]).slope * PER_STEPS)

    def level(self, figure: str) -> float:
        """Return the median behind the beginning."""
        steps = np.array(self.steps)
        return float(np.median(np.array(self.values[figure])[steps >= LEFT_OUT * steps[-1]]))

    def holds(self, figure: str) -> bool | None:
        """Return whether a figure is flat; None: the run was too short to say."""
        if self.steps[-1] < SHORTEST:
            return None
        return self.growth(figure) <= ALLOWED_GROWTH * max(self.level(figure), 1.0)


def soak(backend: str, shards: Path, folder: Path, num_steps: int, seconds: float) -> Samples:
    """Train in a process, and look at it until it ends.

    Raises:
        RuntimeError: the run failed, or was too short for a line.
    """
    out = folder / backend
    words = ["--data.shards", shards, "--eval.shards", shards, "--data.backend", backend, "--run.out", out]
    words += ["--run.steps", num_steps]
    command = [sys.executable, "-m", "moco_fast.train", *RECIPE.split(), *map(str, words)]
    steps: list[int] = []
    values: dict[str, list[float]] = {name: [] for name in FIGURES}
    deadline = time.monotonic() + seconds
    log = folder / f"{backend}.log"
    with log.open("w") as said, subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said) as run:
        while run.poll() is None:
            time.sleep(1)
            if time.monotonic() > deadline:
                run.send_signal(signal.SIGTERM)
                run.wait()
                break
            with suppress(OSError):  # a process has just ended
                step, found = last_step(out / "metrics.jsonl"), look_at(run.pid)
                if step:
                    steps.append(step)
                    for name, value in found.items():
                        values[name].append(value)
    if run.returncode not in (0, 128 + signal.SIGTERM) or len(steps) < 20:
        raise RuntimeError(f"{backend}: ended with {run.returncode}, {len(steps)} samples:\n{log.read_text()}")
    return Samples(backend=backend, steps=steps, values=values)


def last_step(metrics: Path) -> int:
    """Return the step of the last whole line of a run's metrics; 0: there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    with suppress(ValueError, IndexError):
        return int(json.loads(lines[-1])["step"])
    return 0


def look_at(pid: int) -> dict[str, float]:
    """Return the figures of a process and all that it has started.

    Raises:
        OSError: the process is gone.
    """
    # What it has started may end while it is looked at: look again without that.
    for _ in range(5):
        with suppress(OSError, StopIteration):
            return _look_at(pid, [pid, *descendants(pid)])
    return _look_at(pid, [pid, *descendants(pid)])


def _look_at(pid: int, tree: list[int]) -> dict[str, float]:
    return {
        "PSS, MiB": sum(kilobytes(each, "smaps_rollup", kind) for each in tree for kind in ("Pss_Anon", "Pss_Shmem"))
        / 1024,
        "RSS, MiB": kilobytes(pid, "status", "VmRSS") / 1024,
        "file descriptors": sum(len(list(Path(f"/proc/{each}/fd").iterdir())) for each in tree),
        "threads": sum(len(list(Path(f"/proc/{each}/task").iterdir())) for each in tree),
        "processes": len(tree),
        "shared memory, MiB": shared_bytes(tree) / 2**20,
    }


def shared_bytes(tree: list[int]) -> int:
    """Return the bytes of shared memory that processes hold by descriptors; what several hold counts once."""
    found: dict[tuple[int, int], int] = {}
    for pid in tree:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if str(descriptor.readlink()).startswith(("/dev/shm/", "/memfd:")):
                    status = descriptor.stat()
                    found[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(found.values())


def descendants(pid: int) -> Iterator[int]:
    """Return the processes that a process has started, and theirs."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from descendants(child)


def kilobytes(pid: int, file: str, field: str) -> int:
    """Return a field of a file below /proc."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def verdict(runs: list[Samples]) -> str:
    """Return a table of all figures, with their growth per 10,000 steps."""
    lines = [
        "| backend | steps | epochs | figure | level | growth per 10,000 steps | |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for name, what in FIGURES.items():
            flat = {True: "flat", False: "**GROWS**", None: "too short"}[run.holds(name)]
            figures = f"{run.level(name):,.1f} | {run.growth(name):+.2f}"
            lines.append(
                f"| {run.backend} | {run.steps[-1]:,} | {run.num_epochs:,.0f} | {name}: {what} | {figures} | {flat} |"
            )
    return "\n".join(lines)


def draw(runs: list[Samples], path: Path) -> None:
    """Draw each figure over steps."""
    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(FIGURES), figsize=(8, 1.7 * len(FIGURES)), sharex=True, layout="constrained")
    for axis, name in zip(axes, FIGURES, strict=True):
        for run in runs:
            # An SVG need not hold thousands of points.
            every = max(1, len(run.steps) // 200)
            axis.plot(run.steps[::every], run.values[name][::every], label=run.backend)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("step")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10.0, help="after which the runs are told to stop")
    parser.add_argument("--backends", nargs="+", default=["torch", "dali"], choices=("torch", "dali", "ffcv"))
    parser.add_argument("--photos", type=Path, help="tar of photographs to load instead of scikit-image's")
    parser.add_argument("--plot", type=Path, help="where to draw the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = photograph_shards(Path(folder), num=64, photos=options.photos, size=(40, 32))
        started = partial(
            soak, shards=shards, folder=Path(folder), num_steps=options.steps, seconds=60 * options.minutes
        )
        with ThreadPoolExecutor() as threads:
            runs = list(threads.map(started, options.backends))
    print(header("cpu"))
    print(f"\n{verdict(runs)}")
    if options.plot:
        draw(runs, options.plot)
    return 0 if all(run.holds(name) for run in runs for name in FIGURES) else 1


if __name__ == "__main__":
    sys.exit(main())
