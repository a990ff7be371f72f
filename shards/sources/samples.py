"""Names of members as samples: which belong together, which are images, and what is left aside."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from shards.ground.units import counted
from shards.images.sniff import is_image
from shards.sources.base import Aside, printable
from shards.storage.file_kinds import IMAGE_SUFFIXES, key_of_plain_image, litter, may_be_archive

__all__ = ["ALL_MEMBERS", "Named", "SeveralImages", "extension", "is_chosen", "sifted", "split_name"]

ALL_MEMBERS = "all"
"""What --members takes for every image."""

_HAS_LETTER = re.compile(rb"[A-Za-z0-9_+-]{0,32}[A-Za-z][A-Za-z0-9_+-]{0,32}")


class Named(NamedTuple):
    """A name in its parts."""

    folder: bytes
    """With the slash."""
    key: bytes
    """What names the sample; empty for hidden files, which have none."""
    extension: bytes
    """The rest, without the dot between."""


@lru_cache(maxsize=4096)  # each name is looked at several times, one after the other
def split_name(name: bytes) -> Named:
    """Split a name as WebDataset does, but for numbers: the key of `a/scan.0001.seg.png` is scan.0001."""
    folder, slash, base = name.rpartition(b"/")
    parts = base.split(b".")
    at = len(parts)
    while at > 1 and _HAS_LETTER.fullmatch(parts[at - 1]):
        at -= 1
    return Named(folder + slash, b".".join(parts[:at]), b".".join(parts[at:]))


@lru_cache(maxsize=4096)
def extension(name: bytes) -> str:
    """Return what follows a name's key, in lower case."""
    return split_name(name).extension.decode("ascii").lower()


def is_chosen(name: bytes, members: Collection[str]) -> bool:
    """Return whether --members names a member's extension."""
    return ALL_MEMBERS in members or extension(name) in members


class SeveralImages:
    """Samples that hold several images, which may be a photo and its masks."""

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        """Samples with several images, by the extensions of each."""
        self._samples: Counter[tuple[str, ...]] = Counter()
        self._first = b""
        self._certain = False

    def note(self, names: Collection[bytes], *, by_repetition: bool = True) -> None:
        """Note the images of one key.

        Args:
            names: of its images.
            by_repetition: extensions that several keys have in common make samples too, not only `a.jpg` beside
                `a.seg.png`.
        """
        if len(names) < 2:
            return
        extensions = sorted({extension(name) for name in names})
        is_certain = any("." not in each for each in extensions)
        if len(extensions) < 2 or not (is_certain or by_repetition):
            return
        self._first = self._first or min(names)
        self._certain |= is_certain
        self._times.update(extensions)
        self._samples[tuple(extensions)] += 1

    def refuse(self, path: str) -> None:
        """Refuse a source with such samples. Raises ValueError."""
        # `mr.smith.jpg` beside `mr.jones.jpg`: a dot in a name is not yet a sample.
        if not self._certain and not any(times > 1 for times in self._times.values()):
            return
        kinds = "; ".join(f"{' and '.join(some)}: {count:,}" for some, count in self._samples.most_common(4))
        [(kind, _)] = self._times.most_common(1)
        plain = next((each for each in self._times if "." not in each), kind)
        count = counted(sum(self._samples.values()), "sample")
        raise ValueError(
            f"{path} has {count} of several images ({kinds}; the first is {printable(self._first)}): if some are "
            f"masks, they would become training images. Choose with --members {plain}, or take every image with "
            f"--members {ALL_MEMBERS}"
        )


def sifted(
    names: Iterable[bytes], members: Collection[str], several: SeveralImages, read: Callable[[bytes], bytes]
) -> Iterator[bytes | Aside]:
    """Return which of the files of a folder are inputs, judged by their names alone.

    Args:
        names: in order, those of one folder next to each other.
        members: extensions that were chosen; empty: all.
        several: notes which of them seem to be images of one sample.
        read: gives a file's first bytes, which decide of what is called as litter is.
    """
    last, images = None, list[bytes]()
    for name in names:
        if not members and (key := key_of_plain_image(name)):
            yield name
            if key != last:
                several.note(images, by_repetition=False)
                last, images = key, []
            images.append(name)
            continue
        kind = litter(name)
        if kind is not None and litter(name, is_image=True) is None and is_image(read(name)):
            kind = None
        if kind is not None:
            yield Aside(kind, name)
        elif may_be_archive(name):
            yield name
        elif members and not is_chosen(name, members):
            yield Aside(extension(name), name)
        else:
            yield name
            split = split_name(name)
            key = split.folder + split.key
            if key != last:
                several.note(images, by_repetition=False)
                last, images = key, []
            if (
                split.key
                and split.extension.rpartition(b".")[2].lower().decode("ascii") in IMAGE_SUFFIXES
                and not members
            ):
                images.append(name)
    several.note(images, by_repetition=False)
