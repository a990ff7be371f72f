"""The command line of the bench: what it can be told, and what it says.

moco-fast bench moco-v2 --data.shards DIR
accelerate launch --config_file deploy/accelerate/gpu-8.yaml -m moco_fast.bench moco-v2 --data.shards DIR
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moco_fast.bench.result import table, verdict
from moco_fast.train import Recipe, check, is_first_rank

__all__ = ["BenchConfig", "main"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure what limits a run on this machine: reading, decoding, drawing the views, or training.

    Several processes: `accelerate launch ... -m moco_fast.bench` with the same options.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    seconds: float = 60.0
    """About how long to measure; starting and warming up come on top."""
    json: str | None = None
    """File that the figures are also written to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    config = tyro.cli(
        BenchConfig,
        prog="moco-fast bench",
        args=argv,
        config=(tyro.conf.CascadeSubcommandArgs,),
        console_outputs=is_first_rank(),
    )
    try:
        check(config.recipe)
        if config.seconds <= 0:
            raise ValueError(f"--seconds is {config.seconds}, but a round takes some time: give a number above 0")
        if config.json and not Path(config.json).resolve().parent.is_dir():
            raise ValueError(f"--json {config.json}: there is no such folder to write to")
        from moco_fast.bench.measure import measure

        result = measure(config.recipe.config, seconds=config.seconds, tell=_tell)
    except ValueError as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr)
        return 2
    if is_first_rank():
        print(table(result))
        if config.json:
            figures = asdict(result) | {
                "headroom": result.headroom,
                "overlap": result.overlap,
                "data_wait_share": result.data_wait_share,
                "slowdown": result.slowdown,
                "verdict": verdict(result),
            }
            Path(config.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _tell(what: str) -> None:
    if is_first_rank():
        print(f"measuring: {what}", file=sys.stderr, flush=True)
