"""`moco-fast eval`: one subcommand for each task, all of them as a suite, and what was published beside results."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, Union

import tyro

from moco_fast.commandline import is_first_rank
from moco_fast.commands.evaluating import EvalOptions, measure_all
from moco_fast.evaluation.base import Split, Task
from moco_fast.evaluation.registry import TASKS, task_class

if TYPE_CHECKING:
    from moco_fast.evaluation.result import Result

__all__ = ["EvalPaper", "EvalSuite", "EvalTask", "eval_commands"]

T = TypeVar("T", bound=Task)


@dataclass(frozen=True, kw_only=True)
class _Written(EvalOptions):
    """Options of every evaluation that a command has beside those of the Python API."""

    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the result as JSON, `-` for the output. Unset: evaluations/TASK.json in the run's folder, if the encoder
    is that of a run."""

    def _write(self, results: "Sequence[Result]", name: str) -> None:
        """Print the table, and write the results where they are wanted; the first rank does."""
        if not is_first_rank():
            return
        from moco_fast.evaluation.kept import partial_of
        from moco_fast.evaluation.result import as_json, as_text, write_results

        if self.out == "-":
            print(as_json(results), end="")
            return
        print(as_text(results))
        for note in dict.fromkeys(note for result in results for note in result.notes):
            print(f"note: {note}", file=sys.stderr)
        path = self._place(name)
        if path is not None:
            path.parent.mkdir(exist_ok=True)
            write_results(path, results)
            partial_of(path).unlink(missing_ok=True)
            print(f"written to {path}", file=sys.stderr)
        run = run_folder(self.encoder)
        if run is not None:
            _add_to_trackers(run, results)

    def _place(self, name: str) -> Path | None:
        if self.out is not None:
            return None if self.out == "-" else Path(self.out)
        run = run_folder(self.encoder)
        return None if run is None else run / "evaluations" / f"{name}.json"

    def _refuse_out(self) -> None:
        """Refuse, before any work, a place that cannot be written to."""
        if self.out not in (None, "-") and not Path(str(self.out)).resolve().parent.is_dir():
            raise ValueError(f"--out {self.out}: there is no such folder to write to")


def _add_to_trackers(run: Path, results: "Sequence[Result]") -> None:
    """Add the figures of a run's encoders to its trackers, at the steps after which the run had them.

    Args:
        run: its folder.
        results: of the run's encoder, and of what was measured beside it: what is not of the run is left out.
    """
    from moco_fast.config import from_dict
    from moco_fast.training.trackers import About, add_rows

    rows: list[tuple[int, dict[str, float]]] = []
    for result in results:
        tag = f"{result.task}-{result.protocol}".rstrip("-")
        if result.step is not None:
            rows.append((result.step, {f"{tag}/{name}": figure.value for name, figure in result.figures.items()}))
    config = from_dict(json.loads((run / "config.json").read_text()))
    add_rows(About.run(config, run), rows, say=lambda line: print(line, file=sys.stderr))


def _quick_tasks() -> list[str]:
    return [name for name in TASKS if not task_class(name).slow]


def run_folder(encoder: str) -> Path | None:
    """Return the run's folder that an encoder is taken from, or None."""
    path = Path(encoder)
    for folder in (path, path.parent.parent):
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


@dataclass(frozen=True, kw_only=True)
class EvalTask(_Written, Generic[T]):
    """A task of `moco-fast eval`: its own options beside those of all."""

    task: Annotated[T, tyro.conf.arg(name="")]
    train: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None
    """Labeled shards to learn from, or a folder with a folder of images for each class, which is packed into the cache;
    unset: the run's training shards."""
    test: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None
    """Held-out samples of the same classes, as shards or class folders; unset: the run's --eval.shards."""

    def execute(self) -> int:
        """Measure, print and write; return the exit code."""
        self._refuse_out()
        if self.seeds > 1 and not self.task.draws:
            raise ValueError(
                f"--seeds {self.seeds} means nothing beside {self.task.name}, which draws nothing: leave it out"
            )
        given: dict[Split, str | None] = {"train": self.train, "test": self.test}
        there = {split for split, path in given.items() if path is not None}
        for split, path in given.items():
            if path is not None and split not in self.task.with_sets(there).splits:
                raise ValueError(
                    f"--{split} {path} means nothing here: {self.task.name}, as it is asked for, does not look at it; "
                    "leave it out"
                )
        name = f"{self.task.name}-{self.task.preset}".rstrip("-")
        self._write(measure_all(self, [self.task], given, out=self._place(name)), name)
        return 0


@dataclass(frozen=True, kw_only=True)
class EvalSuite(_Written):
    """Measure every task that the data allows, with its defaults, from features that are computed once."""

    data: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder with the sets `train` and `test` (or `val`), and sets in a folder `domains` that heads are tested on too;
    each is shards or a folder of class folders. Unset: the run's own shards."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar=f"{{{','.join(TASKS)}}}")] = ()
    """Tasks to measure; unset: all but those that take hours (finetune, label-noise, robustness)."""

    def execute(self) -> int:
        """Measure, print and write; return the exit code."""
        self._refuse_out()
        domains = self._domains()
        tasks = [task_class(name).for_suite(domains) for name in self.tasks or _quick_tasks()]
        results = measure_all(self, tasks, self._sets(), leave_out=not self.tasks, out=self._place("suite"))
        if not results:
            raise ValueError(
                f"nothing can be measured of {self.encoder}: every task was left out, for the reasons above"
            )
        self._write(results, "suite")
        return 0

    def _domains(self) -> dict[str, str]:
        """Return the sets of the folder that are only there to be tested on, by name."""
        folder = None if self.data is None else Path(self.data) / "domains"
        if folder is None or not folder.is_dir():
            return {}
        from moco_fast.evaluation.packed import may_be_data

        return {path.name: str(path) for path in sorted(folder.iterdir()) if may_be_data(str(path))}

    def _sets(self) -> dict[Split, str | None]:
        if self.data is None:
            return {"train": None, "test": None}
        from moco_fast.evaluation.packed import may_be_data

        held_out = [name for name in ("test", "val") if may_be_data(f"{self.data}/{name}")]
        if not may_be_data(f"{self.data}/train"):
            raise ValueError(
                f"--data {self.data} has no set in a folder `train`, neither shards nor class folders: pack one with "
                "make-shards, or name sets one by one with `moco-fast eval TASK --train ... --test ...`"
            )
        return {"train": f"{self.data}/train", "test": f"{self.data}/{held_out[0]}" if held_out else None}


@dataclass(frozen=True, kw_only=True)
class EvalPaper:
    """Print results beside the published figures of the same benchmark, with their sources."""

    results: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RESULT.json...]")]
    """Files that `moco-fast eval ... --out` wrote; none: the published figures alone."""

    def execute(self) -> int:
        """Print; return the exit code."""
        from moco_fast.evaluation.published import beside_published
        from moco_fast.evaluation.result import read_results

        print(beside_published([result for path in self.results for result in read_results(path)]))
        return 0


def eval_commands() -> Any:
    """Return the union of the subcommands of `moco-fast eval`, for tyro."""
    tasks = [
        Annotated[EvalTask[task], tyro.conf.subcommand(name, description=task.__doc__)]
        for name in TASKS
        if (task := task_class(name))
    ]
    others = [Annotated[EvalSuite, tyro.conf.subcommand("suite")], Annotated[EvalPaper, tyro.conf.subcommand("paper")]]
    return Union[(*tasks, *others)]
