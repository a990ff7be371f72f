"""Metrics of a run: averaged on the device, read without blocking it, written as JSON lines and TensorBoard events."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shards.ground.files import write_whole

__all__ = ["Average", "MetricsFile"]


class Average:
    """Means over steps and ranks of named scalars, kept on the device until they are requested.

    Neither `add` nor `take` waits for the device: `take` starts a copy to the host, to be read one interval later.

    Args:
        names: names of the scalars.
        device: device that holds them.
        may_overflow: names whose non-finite values are not counted (float16 skips such a step).
    """

    def __init__(self, names: tuple[str, ...], device: torch.device, *, may_overflow: tuple[str, ...] = ()):
        self.names = names
        self.sums = torch.zeros(2, len(names), device=device)  # (2, N) fp32: sums, and how many values are in each
        self._always_counts = torch.tensor([name not in may_overflow for name in names], device=device)  # (N,)

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one value per name, each a 0-d tensor on the device."""
        row = torch.stack([values[name].detach().float() for name in self.names])
        counts = row.isfinite() | self._always_counts
        self.sums += torch.stack([row.where(counts, 0), counts])

    def take(self) -> "Pending":
        """Start copying the means over all ranks since the last call to the host; NaN where no value was added."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        means = self.sums[0] / self.sums[1]
        self.sums.zero_()
        return Pending(self.names, means)


class Pending:
    """Means that are being copied to the host."""

    def __init__(self, names: tuple[str, ...], means: Tensor):
        self._names = names
        self._means = means.to("cpu", non_blocking=True)
        self._ready = torch.cuda.Event() if means.is_cuda else None
        if self._ready is not None:
            self._ready.record()

    def wait(self) -> dict[str, float]:
        """Return the means; wait for the copy if it has not finished."""
        if self._ready is not None:
            self._ready.synchronize()
        return dict(zip(self._names, self._means.tolist(), strict=True))


class MetricsFile:
    """Writer of `metrics.jsonl` and TensorBoard events; lines after the step that a run resumes from are dropped."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool):
        self._path = folder / "metrics.jsonl"
        _keep_until(self._path, step)
        self._file = self._path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, which must contain `step`."""
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name if "/" in name else f"train/{name}", value, line["step"])

    def sync(self) -> None:
        """Wait until the lines written so far are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line that is incomplete because the run was killed."""
    if not path.exists():
        return
    kept: list[str] = []
    for text in path.read_text().splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    write_whole(path, "".join(kept), durable=True)
