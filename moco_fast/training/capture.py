"""Capture of a step whose loss or gradient is not finite: what repeats it.

    RUN/capture/
        capture.json            step, losses of all ranks, batches, the loader's place, configuration, samples' digest;
                                loss and gradient norm of the steps before it that were not logged yet
        rng.safetensors         states of torch's generators before the step, by rank, as a checkpoint has them
        checkpoints/step-NNNN/  the run's newest checkpoint before it (links to its files, no copy); none: the run began

The state right before the step is not there: it would have to be copied at every step. `moco-fast replay` takes the
steps from the checkpoint to it again, and compares their losses with those of the run, bit for bit
(moco_fast/training/replay.py).
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moco_fast import checkpoint
from moco_fast.config import Config, to_dict
from moco_fast.training.runtime import Runtime
from pipelines.batch import Batch
from shards.ground.files import appearing, remove

__all__ = ["Capture", "RecentSteps", "observed", "read_capture", "read_generators", "write_capture"]

_VERSION = 2
_MAX_STEPS = 5000  # kept, of some kilobytes each, where lines of metrics are further apart


@dataclass(frozen=True, kw_only=True)
class _Recent:
    step: int
    place: dict[str, int]
    rng: dict[str, Tensor]
    indices: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    """() each, on the device: loss, and gradient norm where it counts."""


@dataclass(frozen=True, kw_only=True)
class Capture:
    """A step that went wrong."""

    version: int
    step: int
    """Its number, from 1."""
    losses: tuple[float, ...]
    """Of all ranks."""
    ranks: tuple[int, ...]
    """Those where a value was not finite."""
    place: dict[str, int]
    """Where the loader was before the step."""
    indices: tuple[tuple[tuple[int, ...], ...], ...]
    """Dense sample numbers of each batch of each rank."""
    observed: tuple[dict[str, list[float]], ...]
    """Of each rank, by the number of a step as text: what `observed` returns. Steps up to the bad one, as far back as
    the run had not logged them yet."""
    from_step: int
    """That the kept checkpoint is of; 0: there was none."""
    world_size: int
    precision: str
    config: dict[str, Any]
    data: dict[str, Any]
    """What the sets held (`identity_of`)."""


def observed(watched: Mapping[str, Tensor], *, may_overflow: bool) -> tuple[Tensor, ...]:
    """Return, of what a step returned, what must be finite: the loss, and the gradient's norm where it counts."""
    return (watched["loss"], *(() if may_overflow else (watched["grad_norm"],)))


class RecentSteps:
    """The steps whose losses have not been looked at yet. Keeping them costs no wait for the device.

    Args:
        runtime: of the run.
        may_overflow: gradients may be infinite (float16, which skips such a step).
    """

    def __init__(self, runtime: Runtime, *, may_overflow: bool):
        self._runtime, self._may_overflow = runtime, may_overflow
        self._steps: deque[_Recent] = deque(maxlen=_MAX_STEPS)
        self._before: tuple[dict[str, int], dict[str, Tensor]] = {}, {}

    def begin(self, place: dict[str, int]) -> None:
        """Note how things are before a step and its batches.

        Args:
            place: of the step's first batch.
        """
        self._before = place, checkpoint.generator_states(self._runtime.rank, self._runtime.device)

    def end(self, step: int, batches: Sequence[Batch], watched: Mapping[str, Tensor]) -> None:
        """Note a step: its number from 1, its batches, and what it returned."""
        place, rng = self._before
        values = observed(watched, may_overflow=self._may_overflow)
        indices = tuple(batch.index for batch in batches)
        self._steps.append(_Recent(step=step, place=place, rng=rng, indices=indices, values=values))

    def settle(self, step: int) -> None:
        """Forget the steps up to this one: their mean was finite."""
        while self._steps and self._steps[0].step <= step:
            self._steps.popleft()

    def first_bad(self) -> _Recent | None:
        """Return this rank's first step with a value that is not finite; waits for the device."""
        for each in self._steps:
            if not torch.stack([value.float() for value in each.values]).isfinite().all():
                return each
        return None

    def up_to(self, step: int) -> dict[str, list[float]]:
        """Return loss and gradient norm of the steps up to this one, by their numbers; waits for the device."""
        return {
            str(each.step): torch.stack([value.float() for value in each.values]).tolist()
            for each in self._steps
            if each.step <= step
        }

    def at(self, step: int) -> _Recent:
        """Return one of the steps."""
        return next(each for each in self._steps if each.step == step)


def write_capture(
    folder: Path, recent: RecentSteps, runtime: Runtime, config: Config, data: Mapping[str, Any]
) -> Path | None:
    """Write RUN/capture in place of an earlier one; collective, the first rank writes.

    Args:
        folder: of the run.
        recent: its steps that were not looked at yet.
        runtime: of the run.
        config: of the run.
        data: what its sets hold (`identity_of`).

    Returns:
        the capture, on every rank; None: no single step of those has a value that is not finite.
    """
    bad = recent.first_bad()
    of_ranks = runtime.gather(None if bad is None else bad.step)
    found = [step for step in of_ranks if step is not None]
    if not found:
        return None
    own = recent.at(min(found))
    indices_of_rank = tuple(tuple(each.tolist()) for each in own.indices)
    facts = (float(own.values[0]), indices_of_rank, recent.up_to(own.step), own.rng)
    losses, indices, of_steps, generators = zip(*runtime.gather(facts), strict=True)
    path = folder / "capture"
    if runtime.rank == 0:
        newest = checkpoint.find_newest(folder / "checkpoints")
        capture = Capture(
            version=_VERSION,
            step=own.step,
            losses=losses,
            ranks=tuple(rank for rank, step in enumerate(of_ranks) if step == own.step),
            place=own.place,
            indices=indices,
            observed=of_steps,
            from_step=0 if newest is None else int(newest.name.removeprefix("step-")),
            world_size=runtime.world_size,
            precision=runtime.precision,
            config=to_dict(config),
            data=dict(data),
        )
        _write(path, capture, {name: each for states in generators for name, each in states.items()}, newest)
    runtime.wait_for_all()
    return path


def _write(path: Path, capture: Capture, generators: dict[str, Tensor], newest: Path | None) -> None:
    remove(path)
    with appearing(path, durable=False) as aside:
        aside.mkdir()
        (aside / "capture.json").write_text(json.dumps(asdict(capture), indent=1) + "\n")
        save_file(generators, aside / "rng.safetensors")
        (aside / "checkpoints").mkdir()
        if newest is not None:
            # Links, so that pruning by a run that goes on leaves the files here.
            shutil.copytree(newest, aside / "checkpoints" / newest.name, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def read_capture(path: Path) -> Capture:
    """Read a capture.

    Raises:
        ValueError: there is none, or another version wrote it.
    """
    try:
        values = json.loads((path / "capture.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} holds no capture ({error}): give the capture/ in a run's folder, which a loss that is not finite "
            "leaves there"
        ) from None
    if values.get("version") != _VERSION:
        raise ValueError(f"{path} was written in format {values.get('version')}, but this version reads {_VERSION}")
    values["indices"] = tuple(tuple(tuple(batch) for batch in of_rank) for of_rank in values["indices"])
    return Capture(**values | {name: tuple(values[name]) for name in ("losses", "ranks", "observed")})


def read_generators(path: Path) -> dict[str, Tensor]:
    """Return the states of all ranks' generators before the step (`checkpoint.generator_states`)."""
    return load_file(path / "rng.safetensors")
