"""Command line of a training run: a recipe and its options. What needs torch is imported once they make sense."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moco_fast.config import Config, validate
from moco_fast.meaning import refuse_meaningless, refuse_renamed
from moco_fast.presets import PRESETS
from moco_fast.training import process
from pipelines.config import tars_to_stream
from shards.storage.stores import split_sets

__all__ = ["Chosen", "Recipe", "check", "is_first_rank", "main", "parse"]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a command line says: a preset, and the configuration that the options made of it."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress]
    """The preset's name. The parser fills it in: among the words it may also be an option's value."""

    @property
    def base(self) -> Config:
        """The preset as it is without options."""
        return PRESETS[self.preset][1]


if TYPE_CHECKING:
    Recipe = Chosen
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(
        {name: Chosen(config=config, preset=name) for name, (_, config) in PRESETS.items()},
        {name: line for name, (line, _) in PRESETS.items()},
        prefix_names=False,
    )


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read the command line into a validated configuration.

    Raises:
        SystemExit: 2 when an option is wrong (the message is on stderr), 0 after `--help`.
        ValueError: the options cannot work together, or a folder is not there.
    """
    refuse_renamed(sys.argv[1:] if argv is None else argv)
    chosen = tyro.cli(
        Recipe,
        prog="moco_fast.train",
        description="Pretrain an image encoder without labels. Several processes: start it with `accelerate launch`.",
        args=argv,
        console_outputs=is_first_rank(),
    )
    check(chosen.config, chosen.base)
    return chosen.config


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the process's exit code: 0 finished, 2 refused, 128 + signal when told to stop."""
    process.prepare()
    try:
        config = parse(argv)
        from moco_fast.training.loop import train

        return train(config)
    except ValueError as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr)
        return 2


def check(config: Config, base: Config) -> None:
    """Refuse what can be seen to be wrong without importing torch.

    Args:
        config: what is to be done.
        base: what it was made of: options that differ were given, and must mean something.

    Raises:
        ValueError: the options cannot work together, one means nothing, or a folder is not there.
    """
    # Here, for sets load numpy.
    from shards.sets.registry import may_be_set

    validate(config)
    refuse_meaningless(config, base)
    tars_to_stream(config.data)
    for option, shards in (("--data.shards", config.data.shards), ("--eval.shards", config.eval.shards)):
        is_streamed = option == "--data.shards" and config.data.stream_samples is not None
        for path in split_sets(shards) if shards is not None and not is_streamed else ():
            if "://" in path or may_be_set(path):
                continue
            tars = f"; `make-shards index {path}` describes the tars in it" if any(Path(path).glob("*.tar")) else ""
            raise ValueError(
                f"{option} {path} has no manifest.json: give the folder that `make-shards pack` wrote{tars}"
            )


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0
