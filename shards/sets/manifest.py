"""Manifest of a set of shards, `manifest.json`. It is written last, so its presence means that the set is whole.

Where it is longer than a megabyte, that of some 2,000 shards, `manifest.npz` beside it has the list of shards in
columns (shards.sets.shard_table), and manifest.json names its digest. It only saves time: where it is absent, or not
the one that is named, as after an earlier version wrote manifest.json again, the list in manifest.json is read.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, cast, get_origin, get_type_hints

from shards.ground.digests import digest, digest_file, running_digest
from shards.ground.memory import SharedBytes
from shards.images.jpeg import ENGINE_KINDS
from shards.sets.manifest_text import FORMAT, FORMAT_VERSION, check_head, lines_of, parse, split_head
from shards.sets.shard_table import ShardEntry, ShardTable
from shards.storage.file_kinds import LABEL_SETS_SUFFIX, MANIFEST_NAME, TABLE_OF_SHARDS_NAME
from shards.storage.stores import is_url, open_folder
from shards.storage.target import WORK_NAME

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Manifest",
    "ShardEntry",
    "ShardTable",
    "find_tars",
    "packing_of",
]

_SHORT_BYTES = 1 << 20
"""What is read of a manifest at first; only longer ones have a table beside them."""
_AT_ONCE = 1 << 12
_NAMED = "shard_table"
_PACKED = re.compile(r"shard-\d{6,}\.tar")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole set of shards."""

    shards: ShardTable
    """In order; dense sample numbers run through them."""
    class_names: tuple[str, ...] = ()
    """Name of each label; empty when nothing is labeled."""
    has_label_sets: bool = False
    """A sample has a set of classes, in a file beside the shard, in place of one label."""
    num_inputs: int
    """Everything that was listed: packed + rejected."""
    num_samples: int
    """Samples packed."""
    num_rejected: int
    """Inputs rejected; each is a line of rejected.jsonl."""
    max_width: int
    """Widest image in pixels: a hint for decoders."""
    max_height: int
    """Highest image in pixels."""
    max_bytes: int
    """Largest image in bytes."""
    outcomes: dict[str, int] = field(default_factory=dict[str, int])
    """Packed samples by what was done to them."""
    rejections: dict[str, int] = field(default_factory=dict[str, int])
    """Rejected inputs by reason."""
    left_aside: dict[str, int] = field(default_factory=dict[str, int])
    """What of the sources is not an input, by kind; listed in left-aside.jsonl. Where the inputs were split into
    several sets, the first of these has it."""
    jpegs: dict[str, int] = field(default_factory=dict[str, int])
    """Packed samples by kind, as far as known."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Every option that decides what the shards hold."""

    @cached_property
    def identity(self) -> str:
        """Digest of the samples and their labels; the same wherever the set lies and whatever is noted about it.

        Runs, caches of features, results and embeddings all know a set by it.
        """
        # Labels of sets with several for an image are beside the tar, all others in it. The text is that of JSON, as
        # earlier versions digested it.
        rows = zip(
            self.shards.num_samples.tolist(),
            self.shards.digests_json(".tar"),
            self.shards.digests_json(LABEL_SETS_SUFFIX),
            strict=True,
        )
        facts, separator = running_digest(), "[["
        while chunk := ", ".join(f"[{count}, {tar}, {labels}]" for count, tar, labels in islice(rows, _AT_ONCE)):
            facts.update((separator + chunk).encode())
            separator = ", "
        end = f"], {json.dumps(self.class_names)}]"
        facts.update((end if separator == ", " else separator + end).encode())
        return facts.hexdigest()

    @property
    def num_unknown_jpegs(self) -> int:
        """Samples whose kind is not known, since earlier versions did not note it."""
        return self.num_samples - sum(self.jpegs.values())

    @property
    def engine_share(self) -> float | None:
        """Share of the samples that a GPU's JPEG engine can decode; None: not known of all of them."""
        if self.num_unknown_jpegs or not self.num_samples:
            return None
        return sum(count for kind, count in self.jpegs.items() if kind in ENGINE_KINDS) / self.num_samples

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str) -> Self:
        """Parse the text of a manifest; `where` names it in errors.

        Raises:
            ValueError: not a manifest, or of a version this code does not read.
        """
        try:
            parsed, chunks = parse(text.encode() if isinstance(text, str) else text)
            head = check_head(parsed, where)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is not JSON ({error}): restore it, or pack again") from error
        return cls._of(head, lambda: ShardTable.parsed(chunks), where)

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read the manifest of a folder.

        Raises:
            ValueError: no such folder, no manifest in it (packing has not finished), or another version.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            return cls._read(_LocalFiles(Path(folder)), str(path))[0]
        except FileNotFoundError:
            raise ValueError(_explain_absence(Path(folder))) from None
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error}") from error

    @classmethod
    def fetch(cls, url: str) -> tuple[Self, str]:
        """Fetch the manifest of a folder in a bucket or on a web server, and what copies of its shards are kept under.

        Raises:
            ValueError: no manifest is there, or one of another version.
            PackError: the store does not answer.
        """
        try:
            return cls._read(_RemoteFiles(url), f"{url}/{MANIFEST_NAME}")
        except FileNotFoundError:
            raise ValueError(
                f"{url} has no {MANIFEST_NAME}: packing has not finished there, or the sets are in folders below, such "
                "as train/"
            ) from None

    @classmethod
    def _read(cls, files: "_Files", where: str) -> tuple[Self, str]:
        """Return a manifest, and a digest of the bytes that decide what it is."""
        size = files.size(MANIFEST_NAME)
        split = split_head(files.read_range(MANIFEST_NAME, 0, _SHORT_BYTES)) if size > _SHORT_BYTES else None
        if split is not None:
            head = check_head(split[0], where)
            named = _NamedTable.of(head)
            npz = files.table(named.digest) if named is not None and named.text_bytes == size - split[1] else None
            if npz is not None:
                return cls._of(head, lambda: ShardTable(npz), where), digest(json.dumps(head).encode())
        text = files.read(MANIFEST_NAME)
        return cls.from_json(text, where=where), digest(text)

    @classmethod
    def compared(cls, where: str) -> tuple[Self, str | None]:
        """Read a manifest from manifest.json alone, and say what is wrong with its table; None: it names none.

        Args:
            where: folder, or its address.

        Raises:
            ValueError: as `read` and `fetch`.
        """
        files = _RemoteFiles(where) if is_url(where) else _LocalFiles(Path(where))
        text = files.read(MANIFEST_NAME)
        manifest = cls.from_json(text, where=f"{where}/{MANIFEST_NAME}")
        split = split_head(text)
        named = None if split is None else _NamedTable.of(split[0])
        if split is None or named is None:
            return manifest, None
        npz = files.table(named.digest)
        if npz is None:
            return (
                manifest,
                f"is absent, or not the one that {MANIFEST_NAME} names: `make-shards index {where}` writes it",
            )
        if named.text_bytes != len(text) - split[1] or ShardTable(npz) != manifest.shards:
            return manifest, f"has other shards than {MANIFEST_NAME}: one of them was changed"
        return manifest, ""

    @classmethod
    def _of(cls, head: Mapping[str, Any], shards: Callable[[], ShardTable], where: str) -> Self:
        """Build from what was parsed, which anyone may have edited. Raises ValueError."""
        try:
            table, values = shards(), _known(head)
            _refuse_other_types(values)
            values["class_names"] = tuple(values["class_names"])
            manifest = cls(**values, shards=table)
            manifest._refuse_other_shards()
        except KeyError as error:
            raise ValueError(f"{where} lacks {error}: it is damaged; restore it, or pack again") from error
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where} is damaged ({error}): restore it, or pack again") from error
        return manifest

    def _refuse_other_shards(self) -> None:
        """Refuse a list of shards that is not the one which the totals are of. Raises ValueError."""
        if (listed := int(self.shards.num_samples.sum())) != self.num_samples:
            raise ValueError(f"num_samples is {self.num_samples}, but the shards that it lists have {listed}")

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Give the names and contents of the files to write, manifest.json last: the same set gives the same bytes."""
        lines = lines_of(self.shards)
        head = self._head()
        if len(head) + len(lines) > _SHORT_BYTES:
            npz = bytes(self.shards.npz.view)
            yield TABLE_OF_SHARDS_NAME, npz
            head = self._head(_NamedTable(digest(npz), len(lines)))
        yield MANIFEST_NAME, head + lines

    def to_json(self) -> str:
        """Return the text of a manifest.json that names no table."""
        return (self._head() + lines_of(self.shards)).decode()

    def _head(self, named: "_NamedTable | None" = None) -> bytes:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shards"}
        if not self.has_label_sets:
            del values["has_label_sets"]  # as earlier versions wrote it
        if not self.left_aside:
            del values["left_aside"]
        if named is not None:
            values[_NAMED] = named._asdict()
        values = {"format": FORMAT, "version": FORMAT_VERSION, **values}
        return json.dumps(values, indent=1, ensure_ascii=False).encode()[:-2]


class _NamedTable(NamedTuple):
    """What manifest.json says of the table beside it."""

    digest: str
    """xxh3_128 of manifest.npz, in hex."""
    text_bytes: int
    """Length of the list of shards in manifest.json, which the table is made of."""

    @classmethod
    def of(cls, head: Mapping[str, Any]) -> Self | None:
        """Return what a manifest says, if it does."""
        try:
            return cls(**head[_NAMED])
        except (KeyError, TypeError):
            return None


class _Files(Protocol):
    """The files that a manifest is read from."""

    def size(self, name: str) -> int: ...

    def read(self, name: str) -> bytes: ...

    def read_range(self, name: str, start: int, count: int) -> bytes: ...

    def table(self, digest: str) -> SharedBytes | None:
        """Open the table, if it has this digest."""
        ...


class _LocalFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def read_range(self, name: str, start: int, count: int) -> bytes:
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read(count)

    def table(self, digest: str) -> SharedBytes | None:
        path = self._folder / TABLE_OF_SHARDS_NAME
        try:
            return SharedBytes.of_file(path) if digest_file(path) == digest else None
        except FileNotFoundError:
            return None


class _RemoteFiles:
    def __init__(self, url: str) -> None:
        folder = open_folder(url)
        self.size, self.read, self.read_range, self._chunks = folder.size, folder.read, folder.read_range, folder.chunks

    def table(self, digest: str) -> SharedBytes | None:
        found = running_digest()

        def noted(chunks: Iterator[bytes]) -> Iterator[bytes]:
            for chunk in chunks:
                found.update(chunk)
                yield chunk

        try:
            npz = SharedBytes.filled(noted(self._chunks(TABLE_OF_SHARDS_NAME)), name="moco-fast-shards")
        except FileNotFoundError:
            return None
        return npz if found.hexdigest() == digest else None


def describe_jpegs(manifest: Manifest) -> str:
    """Return a line that says what share of a set a GPU's JPEG engines can decode, and what kinds there are."""
    share = manifest.engine_share
    if share is None:
        unknown = f"{manifest.num_unknown_jpegs:,} samples"
        return f"JPEG engines: not known whether they can decode {unknown}; run `make-shards index SHARDS` to find out"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in manifest.jpegs.items())
    return f"JPEG engines can decode {share:.1%} of the samples ({kinds})"


def _known(head: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest; what earlier versions did not write is empty."""
    later = ("jpegs", "has_label_sets", "left_aside")
    names = [f.name for f in fields(Manifest) if f.name != "shards"]
    return {name: head[name] for name in names if name not in later or name in head}


def _refuse_other_types(values: Mapping[str, Any]) -> None:
    """Refuse what is of another type than make-shards writes. Raises TypeError."""
    kinds: dict[type, Callable[[Any], bool]] = {
        int: lambda value: type(value) is int and value >= 0,
        dict: lambda value: isinstance(value, dict),
        tuple: lambda value: (
            isinstance(value, list) and all(isinstance(name, str) for name in cast("list[Any]", value))
        ),
        bool: lambda value: isinstance(value, bool),
    }
    types = get_type_hints(Manifest)
    for name, value in values.items():
        kind: type = get_origin(types[name]) or types[name]
        if not kinds[kind](value):
            raise TypeError(f"{name} is {value!r:.80}")


def _explain_absence(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder: give the folder that make-shards wrote"
    if (target := packing_of(folder)) is not None:
        return (
            f"{folder} is not finished: run the same `make-shards pack` command again, or `make-shards finish {target}`"
        )
    inner = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
    if inner:
        return (
            f"{folder} has no {MANIFEST_NAME}, but its folders do: give {' or '.join(str(folder / n) for n in inner)}"
        )
    tars = any(folder.glob("*.tar"))
    way_out = f"`make-shards index {folder}` describes tars that others wrote" if tars else "pack images into it first"
    return f"{folder} has no {MANIFEST_NAME}: {way_out}"


def packing_of(folder: Path) -> Path | None:
    """Return the target of the unfinished packing that a folder's shards are of; None: they are of none."""
    if (folder / WORK_NAME).exists():
        return folder
    # The folder of a split, if nothing but shards of ours is in it.
    target = folder.absolute().parent
    is_ours = all(_PACKED.fullmatch(tar.name) for tar in folder.glob("*.tar"))
    return target if is_ours and (target / WORK_NAME).exists() else None


def find_tars(path: str) -> tuple[str, ...]:
    """Return the tars of a local folder that no manifest describes; none where there is one, or packing goes on."""
    folder = Path(path)
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists() or packing_of(folder) is not None:
        return ()
    return tuple(str(tar.absolute()) for tar in sorted(folder.glob("*.tar")))
