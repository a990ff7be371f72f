"""Command line of a training run: a recipe and its options. torch is imported only after they have been checked."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moco_fast import __version__
from moco_fast.config import Config, validate
from moco_fast.meaning import refuse_meaningless, refuse_renamed, refuse_without_section
from moco_fast.presets import PRESETS
from moco_fast.training import process
from pipelines.config import tars_to_stream
from shards.storage.addresses import refuse_addresses
from shards.storage.stores import check_url, is_url, split_sets

__all__ = ["INSTEAD_OF_ADDRESSES", "TAKE_ADDRESSES", "Chosen", "Recipe", "check", "is_first_rank", "main", "parse"]

TAKE_ADDRESSES = frozenset(
    {
        *("DataConfig.shards", "EvalConfig.shards", "CheckpointConfig.mirror"),
        *("EvalTask.train", "EvalTask.test", "Domains.domains", "Embed.images", "Preview.shards"),
    }
)
"""Options of training and of `moco-fast` that take addresses."""

INSTEAD_OF_ADDRESSES = {
    "RunConfig.out": "give a folder on this machine, and the address as --checkpoint.mirror",
    "DataConfig.cache": "give a folder on this machine: it holds copies of what is read from addresses",
}
"""What to do in place of giving an address."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Parsed command line: a preset, and the configuration with its options applied."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress]
    """The preset's name, filled in by the parser: a word of the command line may also be an option's value."""

    @property
    def base(self) -> Config:
        """The preset without options."""
        return PRESETS[self.preset][1]


if TYPE_CHECKING:
    Recipe = Chosen
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(
        {name: Chosen(config=config, preset=name) for name, (_, config) in PRESETS.items()},
        {name: line for name, (line, _) in PRESETS.items()},
        prefix_names=False,
    )


def parse(argv: Sequence[str] | None = None, *, prog: str = "moco_fast.train") -> Config:
    """Read the command line into a validated configuration.

    Args:
        argv: its words; None: those that this process was started with.
        prog: what the command is called in its help.

    Raises:
        SystemExit: 2 when an option is wrong (the message is on stderr), 0 after `--help`.
        ValueError: the options cannot work together, or a folder does not exist.
    """
    words = sys.argv[1:] if argv is None else argv
    refuse_renamed(words)
    refuse_without_section(words, (config for _, config in PRESETS.values()))
    chosen = tyro.cli(
        Recipe,
        prog=prog,
        description="Pretrain an image encoder without labels. For several processes, use `accelerate launch`.",
        args=words,
        console_outputs=is_first_rank(),
    )
    check(chosen.config, chosen.base)
    return chosen.config


def main(argv: Sequence[str] | None = None, *, prog: str = "moco_fast.train") -> int:
    """Train and return the exit code: 0 finished, 2 refused, 128 + signal when a signal stopped it."""
    words = sys.argv[1:] if argv is None else argv
    if list(words) == ["--version"]:
        print(f"{prog} {__version__}")
        return 0
    process.prepare()
    try:
        config = parse(words, prog=prog)
        from moco_fast.training.loop import train

        return train(config)
    except ValueError as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr)
        return 2


def check(config: Config, base: Config) -> None:
    """Check a configuration as far as possible without importing torch.

    Args:
        config: the configuration to check.
        base: the preset that it was made from: options that differ were given by the user, and must have an effect.

    Raises:
        ValueError: the options cannot work together, one has no effect, or a folder does not exist.
    """
    # Imported here because sets load numpy.
    from moco_fast.evaluation.registry import check_tasks
    from moco_fast.training.trackers import check_installed
    from shards.sets.registry import may_be_set

    validate(config)
    refuse_addresses(config, taken_by=TAKE_ADDRESSES, ways_out=INSTEAD_OF_ADDRESSES)
    refuse_meaningless(config, base)
    check_tasks(config)
    check_mirror(config.checkpoint.mirror)
    check_installed(config.log)
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


def check_mirror(address: str | None) -> None:
    """Check --checkpoint.mirror, if there is one. Raises ValueError: it is not the address of a bucket."""
    if address is None:
        return
    if not is_url(address) or address.startswith("http"):
        raise ValueError(
            f"--checkpoint.mirror {address} is not the address of a bucket: give s3://, gs:// or az://; a folder that "
            "outlives the machine can be --run.out itself"
        )
    check_url(address)


def is_first_rank() -> bool:
    """Return whether this process is the one that prints messages."""
    return int(os.environ.get("RANK", "0")) == 0
