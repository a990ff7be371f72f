"""Trackers of trainings that are not runs: each training is a run of its own there, which goes on where it does."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState

from moco_fast.training.console import say
from moco_fast.training.trackers import About, open_trackers
from moco_fast.transfer.training import Course

__all__ = ["tracked"]


@contextmanager
def tracked(
    course: Course, *, names: Sequence[str], project: str, preset: str, out: Path, device: torch.device
) -> Generator[Callable[[Mapping[str, float]], None]]:
    """Open trackers of a training, on the first rank; what it gives sends them a line of values with `step`.

    Args:
        course: the training.
        names: of the trackers.
        project: that it is part of.
        preset: whose settings it has.
        out: folder of all trainings; files of this one's trackers are in `out`/trackers/NAME.
        device: where it is trained.

    Raises:
        ValueError: a tracker cannot be opened that the training has never had.
    """
    # The trackers ask accelerate which process this is.
    PartialState(cpu=device.type == "cpu")
    folder = out / "trackers" / course.name
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: each for name, each in course.settings.items() if each is not None}
    about = About(
        folder=folder,
        project=project,
        name=f"{preset} {course.title}",
        tags=(preset,),
        options={name: each if isinstance(each, int | float) else str(each) for name, each in options.items()},
        step=course.step,
        option="--trackers",
        kept_in="",
    )
    trackers = open_trackers(names, about, say=say)
    try:
        yield trackers.log
    finally:
        trackers.close()
