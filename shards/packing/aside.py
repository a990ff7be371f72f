"""What of the sources is not an input: counted by kind, and listed by kind and place."""

import json
from collections import Counter
from pathlib import Path

from shards.sources import Aside, Source
from shards.storage.file_kinds import ASIDE_NAME

__all__ = ["LeftAside", "describe_aside", "read_counts"]


class LeftAside:
    """Counts what is left aside: a line for each kind and source, so that captions of millions of images take few.

    Args:
        root: folder that places are told from; empty: as sources tell them.
    """

    def __init__(self, root: str = "") -> None:
        self._root = root
        self._counts: Counter[tuple[int, str]] = Counter()
        self._first: dict[tuple[int, str], str] = {}

    def add(self, source: Source, item: Aside) -> None:
        """Count a file."""
        kind = item.kind or "without extension"
        key = (id(source), kind)
        if key not in self._counts:
            self._first[key] = source.describe(item.name).removeprefix(self._root)
        self._counts[key] += 1

    @property
    def counts(self) -> dict[str, int]:
        """Files of each kind, sorted by kind."""
        tally: Counter[str] = Counter()
        for (_, kind), count in self._counts.items():
            tally[kind] += count
        return dict(sorted(tally.items()))

    def describe(self) -> str:
        """Return the counts as text."""
        return describe_aside(self.counts)

    def text(self) -> str:
        """Return the content of left-aside.jsonl."""
        lines = (
            {"kind": kind, "count": count, "first": self._first[number, kind]}
            for (number, kind), count in self._counts.items()
        )
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def write(self, folder: Path) -> None:
        """Write left-aside.jsonl, if anything was."""
        if self._counts:
            (folder / ASIDE_NAME).write_text(self.text(), encoding="utf-8")


def describe_aside(counts: dict[str, int]) -> str:
    """Return how many files of each kind were left aside, as text."""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items(), key=lambda each: -each[1]))
    return f"left aside {sum(counts.values()):,} ({kinds})"


def read_counts(text: bytes) -> dict[str, int]:
    """Return the counts of a left-aside.jsonl, sorted by kind."""
    tally: Counter[str] = Counter()
    for line in text.decode().splitlines():
        values = json.loads(line)
        tally[values["kind"]] += values["count"]
    return dict(sorted(tally.items()))
