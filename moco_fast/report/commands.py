"""Commands to copy for the next steps with a run."""

from dataclasses import dataclass
from shlex import join, quote, split

from moco_fast.exporters.registry import EXPORTERS, find_exporter
from moco_fast.report.record import RunRecord

__all__ = ["NextCommand", "next_commands"]


@dataclass(frozen=True, kw_only=True)
class NextCommand:
    """Command line and its purpose."""

    purpose: str
    line: str


def next_commands(record: RunRecord) -> list[NextCommand]:
    """Return the commands that work, as far as the run's status and what is left of it tell."""
    config, run = record.config, str(record.path)
    proposals: dict[str, str] = {}
    if record.command and record.status not in ("finished", "running"):
        again = "Begin this run again" if record.checkpoint is None else "Continue this run"
        proposals[again] = record.command
    has_encoder = record.checkpoint is not None
    measured = {name.partition("/")[0] for line in record.evaluations for name in line if "/" in name}
    # A run that measured its health alone may have no labels.
    task = "health" if measured == {"health"} else "knn" if config.eval.shards is not None else None
    if task is not None and has_encoder:
        proposals["Compare with the untrained encoder"] = (
            f"moco-fast eval {task} --encoder {quote(run)} --beside untrained"
        )
    if record.command and record.status == "finished":
        steps = 2 * int(record.last["step"])
        into = quote(f"{run}-{steps}-steps")
        same = _without(record.command, "--run.out", "--run.steps", "--run.epochs", "--run.samples")
        proposals["Train twice as long, into another folder"] = f"{same} --run.steps {steps} --run.out {into}"
    preview = f"moco-fast preview {quote(config.data.shards)} --views moco-v2 --out views.png"
    proposals["See what another recipe makes of these images"] = preview
    formats = [name for name in EXPORTERS if find_exporter(name).why_not(config.model) is None]
    if formats and has_encoder:
        out = find_exporter(formats[0]).place
        line = f"moco-fast export {quote(run)} --format {formats[0]} --out {out}"
        proposals[f"Use the encoder with {formats[0]}"] = line
    if "tensorboard" in config.log.trackers:
        proposals["Watch the numbers in TensorBoard"] = f"tensorboard --logdir {quote(f'{run}/tensorboard')}"
    return [NextCommand(purpose=purpose, line=line) for purpose, line in proposals.items()]


def _without(command: str, *options: str) -> str:
    """Remove options and their values from a command line."""
    kept: list[str] = []
    words = iter(split(command))
    for word in words:
        if word in options:
            next(words, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return join(kept)
