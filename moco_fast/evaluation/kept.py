"""Results that a command has so far, kept in a file beside the one that it will write, until that one is whole.

FILE.json              all results of the command, written at its end
FILE.partial.json      those that it has, in the same form; the same command begins with them after a kill
"""

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moco_fast import distributed
from moco_fast.evaluation.result import Result, read_results, write_results

__all__ = ["KeptResults", "partial_of"]

# What is found, and what it does not depend on.
_NOT_ASKED = frozenset({"figures", "curves", "chosen", "facts", "notes", "time_s", "world_size"})


def partial_of(path: Path) -> Path:
    """Return where the results for a file are kept until it is whole."""
    return path.with_name(f"{path.name.removesuffix('.json')}.partial.json")


class KeptResults:
    """Results of one command; its methods are collective, and the first rank reads and writes.

    Args:
        path: of the file that the command will write; None: nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._partial = None if path is None else partial_of(path)
        self._earlier: list[Result] = []
        self._results: list[Result] = []
        if self._partial is not None and distributed.rank() == 0:
            # Absent, damaged, or of another version: everything is measured.
            with suppress(ValueError):
                self._earlier = read_results(self._partial)
        self._earlier = distributed.tell_all(self._earlier)

    def earlier(self, asked: Result) -> Result | None:
        """Return what an earlier start of the command measured, if it was asked for the very same.

        Args:
            asked: a result without figures.
        """
        found = next((each for each in self._earlier if _question(each) == _question(asked)), None)
        if found is not None and distributed.rank() == 0:
            what = f"{found.task} {found.protocol}".rstrip()
            print(f"measured by an earlier start of this command: {what} of {found.encoder['name']}", file=sys.stderr)
        return found

    def add(self, result: Result) -> None:
        """Keep a result. Raises OSError: the disk is full."""
        self._results.append(result)
        if self._partial is None:
            return
        with distributed.leaving_together():
            if distributed.rank() == 0:
                self._partial.parent.mkdir(exist_ok=True)
                write_results(self._partial, self._results)


def _question(result: Result) -> dict[str, Any]:
    """Return what decides the figures, as JSON gives it back."""
    return json.loads(json.dumps({name: value for name, value in asdict(result).items() if name not in _NOT_ASKED}))
