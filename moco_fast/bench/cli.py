"""Command line of the benchmark.

moco-fast bench moco-v2 --data.shards DIR
accelerate launch --config_file deploy/accelerate/gpu-8.yaml -m moco_fast.bench moco-v2 --data.shards DIR
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, make_dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import tyro

from moco_fast.bench.result import BenchResult, table, verdict
from moco_fast.commandline import (
    INSTEAD_OF_ADDRESSES,
    TAKE_ADDRESSES,
    Recipe,
    check,
    is_first_rank,
    recipe_form,
    take_recipes,
)
from moco_fast.needs import how_to_install
from moco_fast.training import process
from shards.ground.options import ending_quietly, parse_words
from shards.storage.addresses import refuse_addresses

__all__ = ["BenchConfig", "main"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure what limits a run on this machine: reading, decoding, making the views, or training.

    With several processes: `accelerate launch ... -m moco_fast.bench` with the same options.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """File of options as that of a training run, such as its config.json, which those of the command line override."""
    seconds: float = 60.0
    """Approximate seconds of measuring, not including start and warm-up."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file to which the figures are also written."""

    def execute(self) -> int:
        """Measure, print the table on the first rank and return the exit code.

        Raises:
            ValueError: the options cannot work as given.
        """
        check(self.recipe.config, self.recipe.base)
        if self.seconds <= 0:
            raise ValueError(f"--seconds is {self.seconds}, but must be above 0")
        if self.json and not Path(self.json).resolve().parent.is_dir():
            raise ValueError(f"--json {self.json}: there is no such folder to write to")
        from moco_fast.bench.measure import measure

        result = measure(self.recipe.config, seconds=self.seconds, tell=_tell)
        if is_first_rank():
            print(table(result))
            if self.json:
                Path(self.json).write_text(json.dumps(_figures(result), indent=2) + "\n")
        return 0


def main(argv: Sequence[str] | None = None, *, prog: str = "moco_fast.bench") -> int:
    """Run the command line, in one of several processes or alone; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return ending_quietly(lambda: _run(words, prog))


def _run(words: Sequence[str], prog: str) -> int:
    process.prepare()
    try:
        config = _parse(words, prog)
        refuse_addresses(config, taken_by=TAKE_ADDRESSES, ways_out=INSTEAD_OF_ADDRESSES)
        return config.execute()
    except ModuleNotFoundError as error:
        said = how_to_install(error)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        said = str(error)
    except KeyboardInterrupt:
        return 130
    if is_first_rank():
        print(f"error: {said}", file=sys.stderr)
    return 2


def _parse(words: Sequence[str], prog: str) -> BenchConfig:
    words, recipes, _ = take_recipes(words)
    # A recipe with the values of a file has other defaults than the one that all commands know.
    recipe = ("recipe", Annotated[recipe_form(recipes), tyro.conf.arg(name="")])
    form = make_dataclass("BenchConfig", [recipe], bases=(BenchConfig,), frozen=True, kw_only=True)
    return parse_words(
        form,
        words,
        prog=prog,
        description=cleandoc(BenchConfig.__doc__ or ""),
        config=(tyro.conf.CascadeSubcommandArgs,),
        console_outputs=is_first_rank(),
    )


def _figures(result: BenchResult) -> dict[str, Any]:
    derived = ("headroom", "overlap", "data_wait_share", "slowdown")
    return asdict(result) | {name: getattr(result, name) for name in derived} | {"verdict": verdict(result)}


def _tell(what: str) -> None:
    if is_first_rank():
        print(f"measuring: {what}", file=sys.stderr, flush=True)
