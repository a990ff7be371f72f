"""Labels that lie beside the images of a WebDataset sample: in `.cls`, `.json` or `.txt`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from shards.config import SourceOptions
from shards.ground.errors import PackError
from shards.sources.base import LabelSet, printable
from shards.sources.samples import extension
from shards.sources.values import USUAL_LABELS, as_label, text_label
from shards.storage.tar_reading import TarEntry

__all__ = ["Companions", "Seen"]

_MAX_LABEL_BYTES = 1 << 10
_MAX_JSON_BYTES = 1 << 22
Label = LabelSet | str | int | None


class Seen(NamedTuple):
    """A member of a tar, looked at."""

    entry: TarEntry
    is_image: bool
    """By its first bytes."""
    text: bytes
    """All of it, where it may hold a label."""


class Companions:
    """Finds the labels of samples.

    Args:
        path: of the archive, for messages.
        options: which labels are wanted.
        names: of classes that numbers stand for.
    """

    def __init__(self, path: str, options: SourceOptions, names: Sequence[str]) -> None:
        self._path = path
        self._names = names
        self._wanted = options.labels
        self._key = options.labels.removeprefix("json:") if options.labels.startswith("json:") else None
        self._keys: list[str] = []
        self._found = False
        own = self._wanted in ("auto", "column")
        self._most = {
            "cls": _MAX_LABEL_BYTES if own else 0,
            "json": _MAX_JSON_BYTES if own or self._key is not None else 0,
            "txt": _MAX_LABEL_BYTES if self._wanted == "txt" else 0,
        }

    def num_wanted(self, entry: TarEntry) -> int:
        """Return how many bytes of a member may hold a label; 0 for most members."""
        most = self._most.get(extension(entry.name), 0)
        return entry.size if 0 < entry.size <= most else 0

    def label(self, key: bytes, samples: Mapping[bytes, Sequence[Seen]]) -> tuple[Label, str]:
        """Return the label of a sample, and where it was found.

        Args:
            key: of the sample.
            samples: members of each key near it; those of a key that this one begins with describe it too.

        Raises:
            ValueError: the label has to be chosen.
            PackError: what was chosen cannot be read.
        """
        keys = [key]
        if len(samples) > 1:
            keys = sorted((each for each in samples if key == each or key.startswith(each + b".")), key=len)
        beside = {extension(seen.entry.name): seen for other in keys for seen in samples[other] if seen.text}
        if "cls" in beside:
            return text_label(beside["cls"].text, self._names), ".cls"
        if "json" in beside:
            return self._of_json(beside["json"])
        if "txt" in beside:
            return beside["txt"].text.decode("utf-8", "backslashreplace").strip() or None, ".txt"
        return None, ""

    def _of_json(self, seen: Seen) -> tuple[Label, str]:
        where = f"{self._path}/{printable(seen.entry.name)}"
        try:
            value: Any = json.loads(seen.text)
        except ValueError as error:
            if self._key is None:
                return None, ""
            raise PackError(
                f"{where} is not JSON ({error}): its label cannot be read; repair it, or use other --labels"
            ) from None
        if not isinstance(value, dict):
            return None, ""
        fields = cast("dict[str, Any]", value)
        self._keys = self._keys or list(fields)
        key = self._key or _usual_key(fields, where)
        if key is None or key not in fields:
            return None, ""
        self._found = True
        try:
            return as_label(fields[key], self._names), f"key {key} of .json"
        except ValueError as error:
            raise ValueError(
                f"{where}: {key}: {error}; choose another key with --labels json:KEY (there are {', '.join(fields)}), "
                "or --labels none"
            ) from None

    def refuse_without(self) -> None:
        """Refuse an archive where no sample has the key that was chosen. Raises ValueError."""
        if self._key is not None and self._keys and not self._found:
            raise ValueError(
                f"{self._path}: no sample has the key {self._key} in its .json: there are {', '.join(self._keys)}"
            )


def _usual_key(fields: dict[str, Any], where: str) -> str | None:
    found = [name for name in USUAL_LABELS if name in fields]
    if len(found) > 1:
        choices = " or ".join(f"--labels json:{name}" for name in found)
        raise ValueError(f"{where} has several keys that may be the label: choose {choices}, or --labels none")
    return found[0] if found else None
