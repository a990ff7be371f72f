"""Files that comparisons write into one folder, each preset its own part of them. Imports no torch.

OUT/results.json     results of every preset
OUT/per-class.csv    figures of each class, by preset, init and seed; shares in percent
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_fast.evaluation.result import Result, read_results, write_results
from shards.ground.files import write_whole
from shards.ground.locks import locked

if TYPE_CHECKING:
    from moco_fast.transfer.training import Trained

__all__ = ["CLASSES", "RESULTS", "class_rows", "is_transfer", "read_class_rows", "refuse_damaged", "write_beside"]

RESULTS, CLASSES = "results.json", "per-class.csv"

Row = dict[str, Any]


def is_transfer(folder: Path) -> bool:
    """Return whether `moco-fast transfer` wrote the folder."""
    return (folder / RESULTS).is_file() and (folder / "trainings").is_dir()


def class_rows(preset: str, init: str, seed: int, trained: "Trained") -> list[Row]:
    """Return the rows of a training."""
    begin = {"preset": preset, "init": init, "seed": seed, "training": trained.name}
    return [begin | row for row in trained.by_class]


def refuse_damaged(out: Path) -> None:
    """Refuse a folder whose results could not be kept beside others, before work starts. Raises ValueError."""
    if (path := out / RESULTS).exists():
        read_results(path)


def write_beside(out: Path, results: Sequence[Result], rows: Sequence[Row]) -> None:
    """Write the results of one preset in place of its earlier ones; those of other presets stay."""
    first = results[0]
    # Another preset may be trained at the same time.
    with locked(out / "results.lock", holder=str(out), wait=True):
        path = out / RESULTS
        earlier = read_results(path) if path.exists() else []
        others = [each for each in earlier if (each.task, each.protocol) != (first.task, first.protocol)]
        write_results(path, [*others, *results])
        kept = [row for row in read_class_rows(out) if row["preset"] != first.protocol]
        write_whole(out / CLASSES, _as_csv([*kept, *rows]), durable=False)


def read_class_rows(out: Path) -> list[Row]:
    """Return the rows of all presets, cells as text; empty ones are left out."""
    path = out / CLASSES
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    # Those of a version that kept one preset have no column of that name.
    return [row for row in rows if "preset" in row]


def _as_csv(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: f"{100 * value:.2f}" if isinstance(value, float) else value for name, value in row.items()}
        writer.writerow(cells)
    return text.getvalue()
