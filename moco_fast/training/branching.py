"""Branches: a new run that begins with another run's checkpoint, with everything in it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_fast import checkpoint
from moco_fast.config import Config
from moco_fast.saving.mirror import look_into
from moco_fast.training.continuing import allowing, compare
from shards.ground.files import write_whole

__all__ = ["Branch", "find_branch"]

# In a run's folder: where its first checkpoint is from.
_NAME = "branch.json"

_REFERENCE = re.compile(r"(?P<run>.+)@(?P<step>\d+|best)")


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Checkpoint of another run that a run begins with."""

    source: Path
    """Folder of the checkpoint."""
    reference: str
    """As it was given: RUN, RUN@STEP or RUN@best."""
    step: int

    @property
    def line(self) -> str:
        """Say where the run began."""
        return f"began with the checkpoint of step {self.step} of {self.reference}"

    def copy_into(self, run: Path) -> None:
        """Make the checkpoint the first one of a run, and write where it is from; the source is only read.

        Raises:
            OSError: the disk is full or not writable.
            ValueError: the checkpoint is damaged.
        """
        facts = {"reference": self.reference, "checkpoint": str(self.source.resolve()), "step": self.step}
        write_whole(run / _NAME, json.dumps(facts, indent=2) + "\n", durable=True)
        # Which evaluation was the best one so far is a question for each run.
        checkpoint.copy(self.source, run / "checkpoints", best={})


def find_branch(config: Config, data: Mapping[str, Mapping[str, Any]]) -> Branch | None:
    """Return what a new run begins with; None: nothing, or it has begun.

    Args:
        config: of the run.
        data: what its sets hold (`continuing.identity_of`).

    Raises:
        ValueError: there is no such checkpoint, the run has begun otherwise, or it has settings or samples that differ
            from the source's and that --run.allow-changes does not name; or its mirror cannot be reached.
    """
    reference, out, mirror = config.run.branch_from, Path(config.run.out), config.checkpoint.mirror
    if reference is None:
        return None
    if checkpoint.find_newest(out / "checkpoints") is not None:
        begun = (out / _NAME).read_bytes() if (out / _NAME).is_file() else b""
        _refuse_other_beginning(f"the run in --run.out {out}", begun, reference)
        return None
    # On another machine the run goes on from its mirror, where its source may be out of reach. The mirror of the source
    # itself, as its config.json names it, must not be taken over.
    if mirror is not None and (begun := look_into(mirror, _NAME)) is not None:
        _refuse_other_beginning(f"the run in --checkpoint.mirror {mirror}", begun, reference)
        return None
    source = _resolve(reference)
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--run.branch-from {reference} is in --run.out {out}: name another folder for the branch")
    before = checkpoint.read_config(source)
    found = compare(before, config, checkpoint.read_numbers(source).get("data", {}), data)
    if found.refused:
        raise ValueError(
            f"--run.branch-from {reference} had other settings ({'; '.join(found.refused)}): use the same ones (such as"
            f" --config {source.parents[1]}/config.json), or change them knowingly with {allowing(found.refused)}"
        )
    return Branch(source=source, reference=reference, step=checkpoint.step_of(source))


def _refuse_other_beginning(run: str, branch: bytes, reference: str) -> None:
    try:
        begun = json.loads(branch)["reference"]
    except (ValueError, KeyError, TypeError):
        begun = None
    if begun != reference:
        how = "without another run's checkpoint" if begun is None else f"with that of {begun}"
        raise ValueError(
            f"--run.branch-from {reference}, but {run} began {how}: name another one, or continue that run without "
            "--run.branch-from"
        )


def _resolve(reference: str) -> Path:
    """Return the checkpoint that RUN, RUN@STEP, RUN@best or the folder of a checkpoint names."""
    path, name = Path(reference), None
    if (found := _REFERENCE.fullmatch(reference)) and not path.exists():
        path = Path(found["run"])
        name = "best" if found["step"] == "best" else f"step-{int(found['step']):08d}"
    if (path / "state.json").is_file():
        return path.resolve()
    folder = path / "checkpoints"
    there = sorted(each.name for each in folder.glob("step-*") if (each / "state.json").is_file())
    if not there:
        raise ValueError(f"--run.branch-from {reference}: {path} holds no checkpoint: give the folder of a run")
    chosen = folder / (name or there[-1])
    if not (chosen / "state.json").is_file():
        steps = ", ".join(str(int(each.removeprefix("step-"))) for each in there)
        raise ValueError(
            f"--run.branch-from {reference}: there is no such checkpoint in {folder}: it has steps {steps}"
        )
    return chosen.resolve()
