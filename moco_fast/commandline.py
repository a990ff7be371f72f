"""Command line of a training run: a recipe and its options. torch is imported only after they have been checked."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moco_fast import __version__
from moco_fast.config import Config, validate
from moco_fast.meaning import refuse_meaningless, refuse_renamed, refuse_without_section
from moco_fast.needs import how_to_install
from moco_fast.presets import PRESETS
from moco_fast.training import process
from pipelines.config import tars_to_stream
from shards.ground.option_files import changed, read_option_file, take_option
from shards.ground.options import ending_quietly, parse_words
from shards.storage.addresses import refuse_addresses
from shards.storage.stores import check_url, is_url, split_sets

__all__ = [
    "INSTEAD_OF_ADDRESSES",
    "TAKE_ADDRESSES",
    "Chosen",
    "Recipe",
    "check",
    "config_from_file",
    "is_first_rank",
    "main",
    "parse",
    "recipe_form",
    "take_recipes",
]

TAKE_ADDRESSES = frozenset(
    {
        *("DataConfig.shards", "EvalConfig.shards", "CheckpointConfig.mirror"),
        *("EvalTask.train", "EvalTask.test", "Domains.domains", "Embed.images", "Launch.words", "Preview.shards"),
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

    @property
    def base(self) -> Config:
        """The preset without options."""
        return PRESETS[self.config.recipe][1]


@dataclass(frozen=True, kw_only=True)
class _ChosenForTraining(Chosen):
    file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """File of options, YAML or the config.json of a run, which those of the command line override. It may name the
    recipe (`recipe: moco-v2`), in place of the command line."""


def recipe_form(recipes: Mapping[str, Config]) -> Any:
    """Return the union of recipes' subcommands, for tyro: a `Chosen` for each name."""
    return _form_of({name: Chosen(config=config) for name, config in recipes.items()})


def _form_of(chosen: Mapping[str, Chosen]) -> Any:
    lines = {name: line for name, (line, _) in PRESETS.items()}
    return tyro.extras.subcommand_type_from_defaults(dict(chosen), lines, prefix_names=False)


if TYPE_CHECKING:
    Recipe = Chosen
else:
    Recipe = recipe_form({name: config for name, (_, config) in PRESETS.items()})


def parse(argv: Sequence[str] | None = None, *, prog: str = "moco_fast.train", here: bool = True) -> Config:
    """Read the command line into a validated configuration.

    Args:
        argv: its words; None: those that this process was started with.
        prog: what the command is called in its help.
        here: whether the run is to start on this machine, which then has its data and packages.

    Raises:
        SystemExit: 2 when an option is wrong (the message is on stderr), 0 after `--help`.
        ValueError: the options cannot work together, a folder does not exist, or the file of options is wrong.
    """
    words, recipes, path = take_recipes(sys.argv[1:] if argv is None else argv)
    chosen = parse_words(
        _form_of({name: _ChosenForTraining(config=config, file=path) for name, config in recipes.items()}),
        words,
        prog=prog,
        description="Pretrain an image encoder without labels. For several processes, use `accelerate launch`.",
        console_outputs=is_first_rank(),
    )
    check(chosen.config, chosen.base, here=here)
    return chosen.config


def take_recipes(words: Sequence[str]) -> tuple[list[str], dict[str, Config], str | None]:
    """Take --config out of a command line that begins with a recipe, unless the file names it.

    Returns:
        the words, which begin with the recipe if it is known; the configurations of those that it may be; the file.

    Raises:
        ValueError: the file of options is wrong, or an option has an old name or no section.
    """
    rest, path = take_option(words)
    refuse_renamed(rest)
    named = rest[0] if rest and rest[0] in PRESETS else None
    if path is not None:
        config = config_from_file(path, recipe=named)
        recipes = {config.recipe: config}
        rest = rest if named else [config.recipe, *rest]
    else:
        recipes = {name: config for name, (_, config) in PRESETS.items() if named in (None, name)}
    refuse_without_section(rest, recipes.values())
    return rest, recipes, path


def config_from_file(path: str, *, recipe: str | None = None) -> Config:
    """Return a recipe with the values of a file, not validated yet.

    Args:
        path: of the file: YAML, or JSON such as a run's config.json.
        recipe: name of the recipe, where it is known without the file.

    Raises:
        ValueError: the file names no recipe or another one, or has an option that does not exist or does not fit.
    """
    file = read_option_file(path)
    values = dict(file.values)
    in_file = values.pop("recipe", None) or recipe
    if in_file not in PRESETS:
        raise ValueError(
            f"{file.place('recipe')}: there is no recipe {in_file!r}: choose {', '.join(PRESETS)}"
            if in_file
            else f"{path} names no recipe: write `recipe: moco-v2` into it, or name one before --config"
        )
    if recipe not in (None, in_file):
        raise ValueError(f"{file.place('recipe')}: the recipe is {in_file}, but the command names {recipe}: name one")
    base = PRESETS[in_file][1]
    if isinstance(method := values.get("method"), dict):
        own = {"name": base.method.name} | method
        if own.pop("name") != base.method.name:
            raise ValueError(
                f"{file.place('method.name')}: method.name is {method['name']!r}, but {in_file} trains by "
                f"{base.method.name}: the recipe chooses the method, so name another recipe"
            )
        values["method"] = own
    return changed(base, values, file)


def main(argv: Sequence[str] | None = None, *, prog: str = "moco_fast.train") -> int:
    """Train and return the exit code: 0 finished, 2 refused, 128 + signal when a signal stopped it."""
    words = sys.argv[1:] if argv is None else argv
    return ending_quietly(lambda: _run(words, prog))


def _run(words: Sequence[str], prog: str) -> int:
    if list(words) == ["--version"]:
        print(f"{prog} {__version__}")
        return 0
    process.prepare()
    try:
        config = parse(words, prog=prog)
        from moco_fast.training.loop import train
        from moco_fast.training.startup import StartUp

        return train(config, start_up=StartUp.of_command())
    except ModuleNotFoundError as error:
        if is_first_rank():
            print(f"error: {how_to_install(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        if is_first_rank() or isinstance(error, process.NotMetError):
            print(f"error: {error}", file=sys.stderr)
        return 2


def check(config: Config, base: Config, *, here: bool = True) -> None:
    """Check a configuration as far as possible without importing torch.

    Args:
        config: the configuration to check.
        base: the preset that it was made from: options that differ were given by the user, and must have an effect.
        here: whether this machine has to have the data and the packages.

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
    if not here:
        return
    check_installed(config.log.trackers)
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
