"""Labels of a packing: numbers for classes, from what sources say or from the folders of images."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.ground.arrays import LabelSets
from shards.ground.errors import AmbiguousLabelsError, PackError
from shards.ground.units import counted
from shards.sources import Input, LabelSet

__all__ = ["ClassTable", "InputLabels", "classes_of_folders"]

_SHOWN = 3
_WORDNET_ID = re.compile(r"n\d{8}")
_DIGITS = re.compile(r"\d+")


class _FolderLabel(NamedTuple):
    """The folders of an image, or its archive, of which its class is made once all are known."""

    source: int
    """Number of the source that was named."""
    folders: str
    """With / between; empty where the archive alone can be the class."""
    archive: str = ""
    """The archive that holds the image, without folders and ending."""


_Known = str | int | LabelSet | _FolderLabel


class ClassTable:
    """Numbers class names as they are met, and gives the final labels once all are known."""

    def __init__(self) -> None:
        self._numbers: dict[_Known, int] = {}
        self._declared: dict[str, None] = {}
        self._classes: Mapping[_FolderLabel, str | None] = {}

    def number(self, label: _Known | None) -> int:
        """Return the provisional number of a label; -1 for none."""
        return -1 if label is None else self._numbers.setdefault(label, len(self._numbers))

    def declare(self, names: Sequence[str]) -> None:
        """Number classes that may have no input."""
        self._declared |= dict.fromkeys(names)

    def folders(self) -> list[_FolderLabel]:
        """Return the folders that were numbered."""
        return [label for label in self._numbers if isinstance(label, _FolderLabel) and label.folders]

    def archives(self) -> list[_FolderLabel]:
        """Return the archives that were numbered."""
        return [label for label in self._numbers if isinstance(label, _FolderLabel) and not label.folders]

    def name_folders(self, classes: Mapping[_FolderLabel, str | None]) -> None:
        """Say which class each folder is; None: none."""
        self._classes = classes

    @property
    def has_sets(self) -> bool:
        """Whether a label is a set of classes."""
        return any(isinstance(label, LabelSet) for label in self._numbers)

    def label_sets(self) -> LabelSets:
        """Return each different set, (S, C)."""
        column = {name: i for i, name in enumerate(self._sorted_names())}
        found = np.zeros((len(self._numbers), len(column)), dtype=np.int8)
        for row, label in zip(found, self._final(), strict=True):
            if isinstance(label, LabelSet):
                row[[column[name] for name in label.unsure]] = -1
                row[[column[name] for name in label.present]] = 1
        return found

    def resolve(self, *, need_two: bool) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """Return the class names, sorted, and the final label, or number of the set, of each provisional number.

        Args:
            need_two: a single class means no labels.

        Raises:
            PackError: labels of different kinds.
        """
        known = self._final()
        labels = {label for label in known if label is not None}
        num_sets = sum(isinstance(label, LabelSet) for label in labels)
        if not labels or (need_two and not num_sets and len({*labels, *self._declared}) < 2):
            return (), np.full(len(known), -1, dtype=np.int32)
        if 0 < num_sets < len(labels):
            raise PackError(
                "some inputs have one label and some a set of labels: pack these sources apart, or use --labels none"
            )
        names = [label for label in labels if isinstance(label, str)]
        if num_sets or len(names) == len(labels):
            final = {name: i for i, name in enumerate(self._sorted_names())}
            printable = tuple(
                name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in final
            )
            numbers = [
                -1 if label is None else number if isinstance(label, LabelSet) else final[str(label)]
                for number, label in enumerate(known)
            ]
            return printable, np.array(numbers, dtype=np.int32)
        if names or self._declared:
            raise PackError(
                f"some labels are names ({[*sorted(names), *self._declared][0]!r}) and some are bare numbers: pack "
                "these sources apart, or use --labels none"
            )
        numbers = [label if isinstance(label, int) else -1 for label in known]
        return tuple(str(i) for i in range(max(numbers) + 1)), np.array(numbers, dtype=np.int32)

    def _final(self) -> list[str | int | LabelSet | None]:
        return [self._classes.get(label) if isinstance(label, _FolderLabel) else label for label in self._numbers]

    def _sorted_names(self) -> list[str]:
        """Return the names of all classes, in the order of their labels."""
        names = dict(self._declared)
        for label in self._final():
            if isinstance(label, LabelSet):
                names |= dict.fromkeys((*label.present, *label.unsure))
            elif isinstance(label, str):
                names[label] = None
        return sorted(names, key=lambda name: name.encode("utf-8", "surrogateescape"))


class InputLabels:
    """The labels of what is listed, as --labels wants them.

    Args:
        wanted: PackConfig.labels.
        sources: as the user named them.
    """

    def __init__(self, wanted: str, sources: Sequence[str]) -> None:
        self.table = ClassTable()
        self._wanted = wanted
        self._sources = sources
        self._own_from: Counter[str] = Counter()
        self._with_own: set[int] = set()
        self._num_unlabeled = 0
        self._num_in_archives = 0
        self._by_archive = wanted == "archive"

    def number(self, source: int, item: Input, archive: str = "") -> int:
        """Return the provisional number of an input's label.

        Args:
            source: number of the source that the user named, which may hold others.
            item: the input.
            archive: name of the archive that holds it, without folders and ending.
        """
        if self._wanted == "none":
            return -1
        if self._wanted == "archive" and archive:
            return self._number_archive(source, archive)
        by_folder = self._wanted in ("auto", "folder") or self._wanted.startswith("path")
        if item.label is not None and self._wanted != "archive" and (self._wanted == "auto" or not by_folder):
            self._with_own.add(source)
            self._own_from[item.label_from] += 1
            return self.table.number(item.label)
        if by_folder and item.folder:
            return self.table.number(_FolderLabel(source, item.folder))
        if self._wanted == "auto" and archive:
            return self._number_archive(source, archive)
        self._num_unlabeled += 1
        return -1

    def _number_archive(self, source: int, archive: str) -> int:
        self._num_in_archives += 1
        return self.table.number(_FolderLabel(source, "", archive))

    def resolve(self) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """Return what `ClassTable.resolve` does, after the folders have become classes.

        Raises:
            AmbiguousLabelsError: folders may be read as classes in several ways.
            PackError: labels of different kinds.
        """
        classes: dict[_FolderLabel, str | None] = {}
        folders = self.table.folders()
        for source in {label.source for label in folders}:
            # A gap in a source's own labels is not the name of a folder.
            if self._wanted == "auto" and source in self._with_own:
                continue
            own = [label.folders for label in folders if label.source == source]
            for folder, name in classes_of_folders(own, self._wanted, self._sources[source]).items():
                classes[_FolderLabel(source, folder)] = name
        archives = self.table.archives()
        names = [label.archive for label in archives]
        # ImageNet's own layout; other archives beside each other may be shards as well.
        self._by_archive |= (
            not self._own_from
            and not folders
            and len(set(names)) == len(names)
            and all(_WORDNET_ID.fullmatch(name) for name in names)
        )
        if self._by_archive:
            classes |= {label: label.archive for label in archives}
        else:
            self._num_unlabeled += self._num_in_archives
        self.table.name_folders(classes)
        return self.table.resolve(need_two=self._wanted == "auto")

    def say(self, class_names: Sequence[str]) -> Iterator[str]:
        """Return lines that say what was found as labels, and where."""
        if self._wanted == "none":
            return
        if not class_names:
            yield f"labels: none found{self._archives_to_choose()}"
            return
        where = [f"{source or 'the source'} ({count:,})" for source, count in self._own_from.most_common(_SHOWN)]
        folders = [
            label for label in self.table.folders() if label.source not in self._with_own or self._wanted != "auto"
        ]
        if folders:
            where.append(f"folders, such as {folders[0].folders}")
        if self._by_archive and self._num_in_archives:
            where.append("names of archives")
        shown = ", ".join(class_names[:_SHOWN]) + (", ..." if len(class_names) > _SHOWN else "")
        without = f"; {counted(self._num_unlabeled, 'input')} without" if self._num_unlabeled else ""
        classes = counted(len(class_names), "class", plural="classes")
        yield f"labels: {classes} ({shown}), by {' and '.join(where)}{without}"
        alike = Counter(unicodedata.normalize("NFC", name) for name in class_names)
        for name in [name for name, count in alike.items() if count > 1][:_SHOWN]:
            yield (
                f"labels: {alike[name]} classes are spelled {name}, in different forms of Unicode (systems write "
                "accents as one character or two), and stay apart: rename one of them if they are the same"
            )

    def _archives_to_choose(self) -> str:
        """Return what to say of archives whose names are more than numbers: they may be classes."""
        names = sorted({label.archive for label in self.table.archives()})
        if len({_DIGITS.sub("", name) for name in names}) < 2:
            return ""
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        return f"; --labels archive takes the names of archives ({shown})"


def classes_of_folders(folders: Collection[str], wanted: str, source: str) -> dict[str, str | None]:
    """Return the class of each folder that holds images.

    Args:
        folders: paths from the source on, with / between.
        wanted: `auto`, `folder` (the last name), `path` (all names but those that all share) or `path:N` (the Nth).
        source: whose folders they are, for messages.

    Raises:
        AmbiguousLabelsError: `auto`, and there are several ways to read them.
    """
    parts = {folder: tuple(part for part in folder.split("/") if part) for folder in folders}
    parts = {folder: own for folder, own in parts.items() if own}
    if wanted == "folder":
        return {folder: own[-1] for folder, own in parts.items()}
    if wanted.startswith("path:"):
        number = int(wanted.removeprefix("path:"))
        return {folder: own[number - 1] if len(own) >= number else None for folder, own in parts.items()}
    shared = _num_shared(parts.values())
    rests = {folder: own[shared:] for folder, own in parts.items()}
    if wanted == "path":
        return {folder: "/".join(rest) for folder, rest in rests.items()}
    # Places365 and SUN397: a/apartment_building/outdoor.
    for first in (shared - 1, shared):
        if first >= 0 and all(_is_by_letter(own[first:]) for own in parts.values()):
            return {folder: "/".join(own[first + 1 :]) for folder, own in parts.items()}
    # Tiny ImageNet: n01443537/images.
    ending = _num_shared([rest[::-1] for rest in rests.values()])
    rests = {folder: rest[: len(rest) - ending] for folder, rest in rests.items()}
    different = set(rests.values())
    holds_others = any(rest[:depth] in different for rest in different for depth in range(1, len(rest)))
    if len({rest[-1] for rest in different}) < len(different) or holds_others:
        raise _ambiguous(parts, source)
    return {folder: rest[-1] for folder, rest in rests.items()}


def _num_shared(paths: Collection[tuple[str, ...]]) -> int:
    """Return how many first parts all paths share, of which each keeps at least one."""
    if not paths:
        return 0
    first, last = min(paths), max(paths)
    most = min(len(path) for path in paths) - 1
    return next((i for i in range(most) if first[i] != last[i]), max(0, most))


def _is_by_letter(path: tuple[str, ...]) -> bool:
    return len(path) >= 2 and len(path[0]) == 1 and path[1][:1].lower() == path[0].lower()


def _ambiguous(parts: Mapping[str, tuple[str, ...]], source: str) -> AmbiguousLabelsError:
    folders = list(parts)
    choices: list[str] = []
    for wanted in (*(f"path:{number + 1}" for number in range(max(map(len, parts.values())))), "folder", "path"):
        names = dict.fromkeys(name for name in classes_of_folders(folders, wanted, source).values() if name is not None)
        if len(names) > 1:
            shown = ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            choices.append(f"--labels {wanted} ({len(names):,} classes: {shown})")
    return AmbiguousLabelsError(
        f"{source}: its folders can be read as classes in several ways. Choose {'; '.join(choices)}; or --labels none"
    )
