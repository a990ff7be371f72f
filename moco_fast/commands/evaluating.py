"""What the commands and the Python API share: options of an evaluation, and tasks measured as they say."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moco_fast.commands.common import Device, positive
from moco_fast.commands.place import Precision, data_of, place
from moco_fast.evaluation.base import Split, Task
from pipelines.config import Backend

if TYPE_CHECKING:
    import torch

    from moco_fast.config import Config
    from moco_fast.encoders.encoder import Encoder
    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.evaluation.inputs import Subject
    from moco_fast.evaluation.kept import KeptResults
    from moco_fast.evaluation.result import Result
    from pipelines.world import World
    from shards.sets import ShardSet

__all__ = ["EvalOptions", "measure_all"]

Baseline = Literal["untrained", "pixels"]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of every evaluation."""

    encoder: str
    """Folder of a run (its newest checkpoint counts), one of its checkpoints/step-*, a file of weights, a folder of
    timm's or transformers', timm:NAME or torchvision:NAME."""
    which: Literal["query", "key"] = "query"
    """Of an encoder that was trained with its slow average, the one or the other."""
    beside: tuple[Baseline, ...] = ()
    """What else is measured, for comparison: the run's encoder with the weights that it started from, raw pixels."""
    seeds: int = 1
    """Measurements of every task that draws something; the figure is their mean, with a 95% interval."""
    size: int | None = None
    """Height and width of the images in pixels; unset: the encoder's."""
    crop: float | None = None
    """Central square that is used, as a share of the shorter side; unset: the encoder's."""
    backend: Literal["auto", Backend] | None = None
    """What decodes; unset: the run's --data.backend, or auto."""
    encode_batch_size: int = 256
    """Images that the encoder computes at once, over all ranks."""
    precision: Precision | None = None
    """Precision of the encoder. Unset: the run's --run.precision, or auto: bf16 on a GPU that has it, else fp32."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""
    cache: str | None = None
    """Folder for features and packed class folders, that all nodes share; unset: ~/.cache/moco-fast/features."""
    cache_gib: float | None = None
    """Size of that folder; what was used least recently makes room. Unset: four fifths of what the disk has left."""
    save_every_steps: int = 500
    """Steps after which a task that trains saves its state in that folder; the same command continues from there."""


def measure_all(
    options: EvalOptions,
    tasks: Sequence[Task],
    given: Mapping[Split, str | None],
    *,
    leave_out: bool = False,
    out: Path | None = None,
) -> "list[Result]":
    """Measure tasks; collective, where `accelerate launch` started several processes.

    Args:
        options: as they were given.
        tasks: not settled yet.
        given: the sets; None: those of the encoder's run.
        leave_out: leave out tasks that cannot be measured, with a line that says why; otherwise they are an error.
        out: file that the results are for; what there is of them is kept beside it meanwhile.

    Returns:
        the results of the encoder and of what is measured beside it, on every rank.

    Raises:
        ValueError: no such encoder or set, or one that a task cannot work with.
    """
    _validate(options)
    for task in tasks:
        task.validate()
    from moco_fast.encoders.open import open_encoder

    opened = open_encoder(options.encoder, which=options.which, image_size=options.size)
    named = _named_sets(given, opened.config)
    tasks = [task.with_sets(named) for task in tasks]
    named |= _more_sets(tasks)
    needed = frozenset[Split]().union(*(task.splits for task in tasks))
    sets = {split: _open(path, options) for split, path in named.items() if split in needed}
    if "train" in needed and "train" not in sets:
        raise ValueError(f"{opened.name} has no training shards of its own: name some with --train (suite: --data)")
    with place(opened.config, device=options.device, precision=options.precision) as (device, world, precision):
        from moco_fast.evaluation.kept import KeptResults

        kept = KeptResults(out)
        results: list[Result] = []
        for name, encoder, digest, step in _encoders(options, opened):
            subject = _subject(options, opened, encoder.to(device), digest, sets, device, world, precision)
            results += _measure_one(options, opened.config, subject, name, step, tasks, kept, leave_out=leave_out)
        return results


def _open(path: str, options: EvalOptions) -> "ShardSet":
    from moco_fast.evaluation.packed import open_data

    return open_data(path, cache=_cache(options), limit_gib=options.cache_gib)


def _cache(options: EvalOptions) -> Path:
    from moco_fast.evaluation.cache import default_folder

    return default_folder() if options.cache is None else Path(options.cache)


def _named_sets(given: Mapping[Split, str | None], run: "Config | None") -> dict[Split, str]:
    """Return where training and test set are; where one is not given, that of the run."""
    of_run = {} if run is None else {"train": run.data.shards, "test": run.eval.shards}
    found = {split: path or of_run.get(split) for split, path in given.items()}
    return {split: path for split, path in found.items() if path is not None}


def _more_sets(tasks: Sequence[Task]) -> dict[Split, str]:
    """Return where the sets are that tasks name by options of their own. Raises ValueError: a name means two sets."""
    found: dict[Split, str] = {}
    for task in tasks:
        for split, path in task.more_sets().items():
            if split in ("train", "test") or found.setdefault(split, path) != path:
                raise ValueError(f"{split}={path}: {split} is the name of another set already, so choose another name")
    return found


def _validate(options: EvalOptions) -> None:
    positive("seeds", options.seeds)
    positive("encode-batch-size", options.encode_batch_size)
    positive("save-every-steps", options.save_every_steps)
    if options.cache_gib is not None:
        positive("cache-gib", options.cache_gib)
    cache = _cache(options)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(cache, os.W_OK) else "it may not be written to"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise ValueError(f"{cache} cannot hold features ({problem}): name another folder with --cache")
    if options.crop is not None and not 0 < options.crop <= 1:
        raise ValueError(f"--crop is {options.crop}, but must be a share of the image: above 0, at most 1")


def _measure_one(
    options: EvalOptions,
    run: "Config | None",
    subject: "Subject",
    name: str,
    step: int | None,
    tasks: Sequence[Task],
    kept: "KeptResults",
    *,
    leave_out: bool,
) -> "list[Result]":
    from moco_fast.evaluation.front import Plan, evaluate

    def say(task: Task, reason: str) -> None:
        if subject.world.rank == 0:
            print(f"left out: {task.name} of {name}: {' '.join(reason.split())}", file=sys.stderr)

    # timm's vision transformers, and torchvision's.
    is_transformer = any(hasattr(subject.encoder.backbone, name) for name in ("patch_embed", "conv_proj"))
    plan = Plan(
        subject=subject,
        name=name,
        step=step,
        tasks=[task.settled(run, is_transformer=is_transformer) for task in tasks],
        seeds=options.seeds,
        cache=_cache(options),
        cache_gib=options.cache_gib,
        save_every_steps=options.save_every_steps,
        leave_out=say if leave_out else None,
        kept=kept,
    )
    return evaluate(plan)


def _encoders(options: EvalOptions, opened: "OpenedEncoder") -> "list[tuple[str, Encoder, str, int | None]]":
    """Return name, encoder, digest and number of training steps of what is measured."""
    from moco_fast.encoders.formats.base import digest_of
    from moco_fast.evaluation.baselines import raw_pixels
    from moco_fast.evaluation.untrained import untrained_twin

    found: list[tuple[str, Encoder, str, int | None]] = [(opened.name, opened.encoder, opened.digest, opened.step)]
    for baseline in options.beside:
        if baseline == "untrained":
            if opened.config is None:
                raise ValueError(f"--beside untrained needs a run, which says how {opened.name} was before training")
            other, step = untrained_twin(opened.config), 0
        else:
            other, step = raw_pixels(opened.encoder), None
        found.append((baseline, other, digest_of(other), step))
    return found


def _subject(
    options: EvalOptions,
    opened: "OpenedEncoder",
    encoder: "Encoder",
    digest: str,
    sets: "Mapping[Split, ShardSet]",
    device: "torch.device",
    world: "World",
    precision: str,
) -> "Subject":
    from dataclasses import replace

    from moco_fast.evaluation.inputs import Subject

    data = data_of(opened.config, device)
    return Subject(
        encoder=encoder,
        digest=digest,
        sets=sets,
        size=opened.encoder.image_size,
        crop=opened.encoder.crop if options.crop is None else options.crop,
        data=replace(data, batch_size=options.encode_batch_size, backend=options.backend or data.backend),
        device=device,
        world=world,
        precision=precision,
    )
