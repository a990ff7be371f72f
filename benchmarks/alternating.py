"""Timing of alternatives by turns, so that all meet the same disturbances; tables and bars of the result."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


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


def bars(seconds: dict[str, list[float]], *, title: str, path: Path) -> None:
    """Draw the medians, with whiskers from the fastest to the slowest."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    middle = [1e3 * median(values) for values in seconds.values()]
    below = [m - 1e3 * min(values) for m, values in zip(middle, seconds.values(), strict=True)]
    above = [1e3 * max(values) - m for m, values in zip(middle, seconds.values(), strict=True)]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.5 * len(seconds)), layout="constrained")
    axes.barh(list(seconds), middle, xerr=[below, above], color="#4878a8")
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
