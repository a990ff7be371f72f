"""Metrics of a run: averaged on the device, read without blocking it, written as JSON lines and sent to trackers."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast.training.job_status import JobStatus
from moco_fast.training.state import read_lines
from moco_fast.training.trackers import Trackers
from shards.ground.files import write_whole

__all__ = ["Average", "MetricsFile", "Pending", "sheet_of"]


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
    """Writer of `metrics.jsonl`, of trackers and of a TrainJob's status.

    Lines after the step that a run resumes from are dropped.
    """

    def __init__(self, folder: Path, *, step: int, trackers: Trackers, job_status: JobStatus | None = None):
        self._path = folder / "metrics.jsonl"
        _keep_until(self._path, step)
        self._file = self._path.open("a", buffering=1)
        self._trackers, self._job_status = trackers, job_status

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, which must contain `step`."""
        self._file.write(json.dumps(line) + "\n")
        self._trackers.log(line)
        if self._job_status is not None:
            self._job_status.tell(line)

    def show(self, views: tuple[Tensor, ...], *, step: int) -> None:
        """Send a picture of the first samples' views, (B, 3, H, W) uint8, to the trackers; waits for the device."""
        if self._trackers:
            self._trackers.show("views", sheet_of(views), step=step)

    def sync(self) -> None:
        """Wait until the lines written so far are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close all, within a limit."""
        self._file.close()
        self._trackers.close()
        if self._job_status is not None:
            self._job_status.close()


def sheet_of(views: tuple[Tensor, ...], *, num_samples: int = 8) -> npt.NDArray[np.uint8]:
    """Return one picture (H, W, 3): a row for each of the first samples, a column for each view, black where small."""
    side = max(view.shape[-1] for view in views)
    shown = [view[:num_samples].to("cpu", copy=True).permute(0, 2, 3, 1).numpy() for view in views]
    sheet = np.zeros((len(shown[0]), side, len(shown), side, 3), dtype=np.uint8)
    for column, of_view in enumerate(shown):
        height, width = of_view.shape[1:3]
        sheet[:, :height, column, :width] = of_view
    return sheet.reshape(len(shown[0]) * side, len(shown) * side, 3)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and those that a kill or a power cut left incomplete."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
        write_whole(path, "".join(kept), durable=True)
