"""State of a training on disk, so that the same command goes on where an earlier one was killed.

    CACHE/trainings/NAME-DIGEST/step-00000500/    the newest state, as a checkpoint of a run (moco_fast.checkpoint)
    CACHE/trainings/NAME-DIGEST.json              what a finished training found, which replaces its states

The digest is that of everything that decides what a training finds.
"""

import json
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast import checkpoint, distributed
from moco_fast.checkpoint import Checkpoint
from moco_fast.evaluation.base import Saving
from moco_fast.saving.reading import load_together
from pipelines.world import World
from shards.ground.digests import short_digest
from shards.ground.files import write_whole
from shards.ground.locks import locked

__all__ = ["SavedTraining"]

_LONGEST = 120  # letters


class SavedTraining:
    """State of one training; the first rank writes, all ranks read. Its methods are collective.

    Args:
        saving: where states are; None: nothing is kept.
        name: of the training, a few words.
        what: everything that decides what it finds, as JSON can hold it.
        world: this process and how many train together.
        device: whose generators are part of the state.
    """

    def __init__(
        self, saving: Saving | None, name: str, what: Mapping[str, Any], *, world: World, device: torch.device
    ) -> None:
        self._saving, self._what = saving, dict(what)
        self._world, self._device = world, device
        self._folder = Path()
        if saving is not None:
            text = json.dumps({"subject": saving.subject, "what": self._what}, sort_keys=True)
            # The end of a long name, which may be a path, so that file systems take it.
            plain = re.sub("[^a-z0-9.]+", "-", name.lower())[-_LONGEST:].strip("-")
            self._folder = saving.folder / f"{plain}-{short_digest(text.encode())}"

    @property
    def name(self) -> str:
        """Of its files: of the training, and a digest of everything that decides what it finds."""
        return self._folder.name

    @contextmanager
    def held(self) -> Generator[None]:
        """Keep other processes from doing the same training; waits for those that do."""
        with ExitStack() as stack:
            with distributed.leaving_together():
                if self._writes:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(self._beside("lock"), holder=str(self._folder), wait=True))
                    checkpoint.sweep(self._folder)
            yield

    def record(self) -> dict[str, Any] | None:
        """Return what the training found if it was finished earlier."""
        found = None
        with distributed.leaving_together():
            if self._writes and self._record.is_file():
                try:
                    found = json.loads(self._record.read_text())
                except ValueError as error:
                    raise ValueError(f"{self._record} is damaged ({error}): remove it") from None
        return self._tell_all(found)

    def newest(self) -> Checkpoint | None:
        """Return the newest state and set this rank's generators as they were; None: there is none.

        Raises:
            ValueError: it is damaged, or this rank does not see it.
        """
        if self._saving is None:
            return None
        found = checkpoint.find_newest(self._folder)
        of_first = self._tell_all(None if found is None else found.name)
        if of_first is None:
            return None
        with distributed.leaving_together():
            if found is None or found.name != of_first:
                raise ValueError(
                    f"rank {self._world.rank} does not see {self._folder}/{of_first}: --cache (of transfer: --out) "
                    "must be on storage that all ranks share"
                )
        state = load_together(found, is_first_of_node=self._world.rank % self._world.local_world_size == 0)
        checkpoint.set_generator_states(state.rng, self._world.rank, self._device)
        return state

    def is_due(self, step: int) -> bool:
        """Whether the state is to be saved after so many steps."""
        return self._saving is not None and step % self._saving.every_steps == 0

    def save(
        self, step: int, *, model: dict[str, Tensor], optimizer: dict[str, Tensor], numbers: dict[str, Any]
    ) -> None:
        """Write a state in place of the one before, whole or not at all.

        Raises:
            OSError: on the first rank, such as that of a full disk; others raise LeftTogetherError with its text.
        """
        if self._saving is None:
            return
        rng = self._gathered(checkpoint.generator_states(self._world.rank, self._device))
        with distributed.leaving_together():
            if self._writes:
                state = Checkpoint(
                    step=step, config=self._what, model=model, optimizer=optimizer, rng=rng, numbers=numbers
                )
                checkpoint.save(self._folder, state, keep=1)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write what the training found, and remove its states. Raises as `save`."""
        with distributed.leaving_together():
            if self._writes:
                write_whole(self._record, json.dumps(record, indent=1) + "\n", durable=True)
                self._remove()

    @property
    def _writes(self) -> bool:
        return self._saving is not None and self._world.rank == 0

    @property
    def _record(self) -> Path:
        return self._beside("json")

    def _beside(self, ending: str) -> Path:
        return self._folder.with_name(f"{self._folder.name}.{ending}")

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tell_all(self, value: Any) -> Any:
        return value if self._world.world_size == 1 else distributed.tell_all(value)

    def _gathered(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._world.world_size == 1:
            return states
        of_ranks: list[Any] = [None] * self._world.world_size
        dist.all_gather_object(of_ranks, states)
        return {name: state for of_rank in of_ranks for name, state in of_rank.items()}
