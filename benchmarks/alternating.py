"""What the benchmarks share: alternatives timed by turns, claims with their ratios, and how both are written down.

A benchmark compares ours with what a user would take instead, in alternating rounds (A B A B ...) of one run, so that
all meet the same disturbances; ratios are taken round by round. `python benchmarks/NAME.py --json FILE` writes its
claims as a list of {claim, ours, theirs, ratio, goal, holds, ...}, from which the README's table is made.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

import torch


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One comparison; see `compare`."""

    claim: str
    """What is compared with what, in a few words."""
    ours: float
    theirs: float
    unit: str
    """Of `ours` and `theirs`: samples/s, ms, GB."""
    ratio: float
    """How many times better ours is, whether more or less is better: median over rounds."""
    lowest: float
    """The ratio of the worst round."""
    highest: float
    """The ratio of the best round."""
    goal: float | None
    """Least ratio that we promise; None: reported, nothing promised."""
    holds: bool | None
    """Whether the ratio reaches the goal."""


def compare(
    claim: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    unit: str,
    less_is_better: bool = False,
    goal: float | None = None,
) -> Claim:
    """Turn figures of equally many rounds into a claim; times and memory are `less_is_better`, rates are not."""
    ratios = [b / a if less_is_better else a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = median(ratios)
    return Claim(
        claim=claim,
        ours=median(ours),
        theirs=median(theirs),
        unit=unit,
        ratio=ratio,
        lowest=min(ratios),
        highest=max(ratios),
        goal=goal,
        holds=None if goal is None else ratio >= goal,
    )


def claims_table(claims: Sequence[Claim]) -> str:
    """Markdown: a line a claim."""
    lines = ["| | ours | instead | times better | goal |", "|---|---|---|---|---|"]
    for each in claims:
        goal = "" if each.goal is None else f"{each.goal:.3g}: {'holds' if each.holds else 'MISSED'}"
        figures = f"{_figure(each.ours)} {each.unit} | {_figure(each.theirs)} {each.unit}"
        spread = f" ({_times(each.lowest)} to {_times(each.highest)})" if each.lowest != each.highest else ""
        lines.append(f"| {each.claim} | {figures} | **{_times(each.ratio)}**{spread} | {goal} |")
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write_claims(path: Path | None, claims: Sequence[Claim]) -> None:
    """Write what `--json FILE` asks for, if it does."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(each) for each in claims], indent=2) + "\n")


def header(device: str = "cpu") -> str:
    """One line: hardware, its load and the versions, to be read beside any figure."""
    names = ("torch", "nvidia-dali-cuda130", "numpy")
    versions = {dist.name: dist.version for dist in metadata.distributions() if dist.name in names}
    where = torch.cuda.get_device_name() if device.startswith("cuda") else processor()
    load = f"load {os.getloadavg()[0]:.1f}"
    software = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    return f"{where}, {len(os.sched_getaffinity(0))} CPUs ({load}), Python {platform.python_version()}, {software}"


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    alternatives: dict[str, Callable[[], object]], *, rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, alternative by alternative, in `rounds` rounds after `warmup` untimed ones."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(warmup + rounds):
        for name, call in alternatives.items():
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def table(seconds: dict[str, list[float]], *, base: str) -> str:
    """Markdown: median, fastest and slowest in milliseconds, and the median over rounds of the ratio to `base`."""
    lines = [f"| | ms, median | min | max | ratio to {base} |", "|---|---|---|---|---|"]
    for name, values in seconds.items():
        ratio = median(a / b for a, b in zip(values, seconds[base], strict=True))
        ms = [f"{1e3 * value:.2f}" for value in (median(values), min(values), max(values))]
        lines.append(f"| {name} | {' | '.join(ms)} | {ratio:.3f} |")
    return "\n".join(lines)


def bars(path: Path | None, panels: dict[str, dict[str, list[float]]], *, unit: str = "ms") -> None:
    """Draw what `--plot FILE` asks for, if it does.

    A panel for each title: medians, with whiskers from the lowest to the highest; `ms` takes seconds, other units take
    values as they are.
    """
    if path is None:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scale = 1e3 if unit == "ms" else 1.0
    heights = [0.6 + 0.5 * len(values) for values in panels.values()]
    figure, every_axes = plt.subplots(
        len(panels), figsize=(8, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axes, (title, values) in zip(every_axes[:, 0], panels.items(), strict=True):
        middle = [scale * median(of_one) for of_one in values.values()]
        below = [m - scale * min(of_one) for m, of_one in zip(middle, values.values(), strict=True)]
        above = [scale * max(of_one) - m for m, of_one in zip(middle, values.values(), strict=True)]
        axes.barh(list(values), middle, xerr=[below, above], color="#4878a8")
        axes.invert_yaxis()
        axes.set(xlabel=unit, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
