"""Command line of the benchmark.

moco-fast bench moco-v2 --data.shards DIR
accelerate launch --config_file deploy/accelerate/gpu-8.yaml -m moco_fast.bench moco-v2 --data.shards DIR
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from moco_fast.bench.result import BenchResult, table, verdict
from moco_fast.commandline import Recipe, check, is_first_rank
from moco_fast.meaning import refuse_renamed
from shards.ground.options import parse_words

__all__ = ["BenchConfig", "main"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure what limits a run on this machine: reading, decoding, making the views, or training.

    With several processes: `accelerate launch ... -m moco_fast.bench` with the same options.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line in one of several processes; return the exit code."""
    try:
        refuse_renamed(sys.argv[1:] if argv is None else argv)
        config = parse_words(
            BenchConfig,
            sys.argv[1:] if argv is None else argv,
            prog="moco_fast.bench",
            config=(tyro.conf.CascadeSubcommandArgs,),
            console_outputs=is_first_rank(),
        )
        return config.execute()
    except ValueError as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr)
        return 2


def _figures(result: BenchResult) -> dict[str, Any]:
    derived = ("headroom", "overlap", "data_wait_share", "slowdown")
    return asdict(result) | {name: getattr(result, name) for name in derived} | {"verdict": verdict(result)}


def _tell(what: str) -> None:
    if is_first_rank():
        print(f"measuring: {what}", file=sys.stderr, flush=True)
