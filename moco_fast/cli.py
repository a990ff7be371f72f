"""Command line `moco-fast`. A subcommand imports its dependencies when it runs: `--help` never loads torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro

from moco_fast import __version__, commandline
from moco_fast.bench import cli as bench
from moco_fast.commandline import Recipe
from moco_fast.commands.config_path import ConfigPath
from moco_fast.commands.embed import Embed
from moco_fast.commands.evaluate import eval_commands
from moco_fast.commands.explore import Explore
from moco_fast.commands.export import Export
from moco_fast.commands.launch import Launch, refuse_unseparated
from moco_fast.commands.plan import PlanRun
from moco_fast.commands.preview import Preview
from moco_fast.commands.replay import Replay
from moco_fast.commands.report import Report
from moco_fast.commands.runs import Runs
from moco_fast.commands.search import Search
from moco_fast.commands.transfer import transfer_commands
from moco_fast.interrupt import StoppedError
from moco_fast.meaning import refuse_renamed
from moco_fast.needs import how_to_install
from moco_fast.speaking import FailedAloneError, note_met, says
from moco_fast.training import process
from shards.ground.options import ending_quietly, parse_words
from shards.storage.addresses import refuse_addresses

__all__ = ["main"]


class Command(Protocol):
    """Options of a subcommand and its action."""

    def execute(self) -> int:
        """Run the subcommand.

        Returns:
            the exit code.

        Raises:
            ValueError, OSError: an error that the user can fix.
        """
        ...


if TYPE_CHECKING:
    _Evaluation = Command
    _Transfer = Command
else:
    _Evaluation, _Transfer = eval_commands(), transfer_commands()


@dataclass(frozen=True, kw_only=True)
class Train:
    """Pretrain an encoder in one process, as `python -m moco_fast.train` does (`moco-fast train --help`).

    Several processes: accelerate launch -m moco_fast.train ...
    """


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure what an encoder is worth: a task, all of them, or results beside published ones."""

    task: Annotated[_Evaluation, tyro.conf.arg(name="")]

    def execute(self) -> int:
        """Evaluate; return the exit code."""
        return self.task.execute()


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Train detection or segmentation from an encoder's weights, as the papers compare pretraining."""

    task: Annotated[_Transfer, tyro.conf.arg(name="")]

    def execute(self) -> int:
        """Do it; return the exit code."""
        return self.task.execute()


@dataclass(frozen=True, kw_only=True)
class _TrainWithOptions:
    """Pretrain an encoder in one process."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]


_Others = (
    Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[Transfer, tyro.conf.subcommand("transfer")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Explore, tyro.conf.subcommand("explore")]
    | Annotated[Preview, tyro.conf.subcommand("preview")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Runs, tyro.conf.subcommand("runs")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[bench.BenchConfig, tyro.conf.subcommand("bench")]
    | Annotated[Launch, tyro.conf.subcommand("launch")]
    | Annotated[PlanRun, tyro.conf.subcommand("plan")]
    | Annotated[ConfigPath, tyro.conf.subcommand("config-path")]
)
_Commands = Annotated[Train, tyro.conf.subcommand("train")] | _Others
_Completed = Annotated[_TrainWithOptions, tyro.conf.subcommand("train")] | _Others

_COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moco-fast`.

    Returns:
        the exit code: 0 done, 2 when the command cannot work as given (one line on stderr says why), 130 interrupted,
        128 + signal when one stopped it and its state was saved.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return ending_quietly(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    if words == ["--version"]:
        print(f"moco-fast {__version__}")
        return 0
    if words[:1] == ["train"]:
        # Recipes and their options are read when they are asked for, and not by every command.
        return commandline.main(words[1:], prog="moco-fast train")
    if words[:1] == ["bench"]:
        return bench.main(words[1:], prog="moco-fast bench")
    process.prepare()
    note_met(False)
    try:
        refuse_renamed(words)
        if words[:1] == ["launch"]:
            refuse_unseparated(words)
        command: Any = parse_words(
            _Completed if any(word in _COMPLETION for word in words) else _Commands,
            words,
            prog="moco-fast",
            description="Train, evaluate, embed, export. `moco-fast --version` prints the version.",
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
        )
        refuse_addresses(command, taken_by=commandline.TAKE_ADDRESSES, ways_out=commandline.INSTEAD_OF_ADDRESSES)
        return command.execute()
    except BrokenPipeError:
        raise
    except (ModuleNotFoundError, ValueError, OSError, StoppedError, FailedAloneError) as error:
        return _ended_by(error)
    except KeyboardInterrupt:
        return 130


def _ended_by(error: Exception) -> int:
    """Print why a command ended, once where all ranks know it; return the exit code."""
    is_said = says(error) or isinstance(error, process.NotMetError)
    if isinstance(error, StoppedError):
        line, code = str(error), 128 + error.number
    else:
        reason = how_to_install(error) if isinstance(error, ModuleNotFoundError) else " ".join(str(error).split())
        line, code = f"error: {reason}", 2
    if is_said:
        print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
