"""Manifest of a set of shards, `manifest.json`. It is written last, so its presence means that the set is whole."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

from shards.ground.digests import digest
from shards.images.jpeg import ENGINE_KINDS
from shards.storage.file_kinds import LABEL_SETS_SUFFIX, MANIFEST_NAME

__all__ = ["FORMAT", "FORMAT_VERSION", "MANIFEST_NAME", "Manifest", "ShardEntry", "find_tars"]

FORMAT = "moco-fast-shards"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: a tar and the files beside it."""

    name: str
    """File name of the tar; the files beside it share its stem."""
    num_samples: int
    """Samples packed."""
    num_rejected: int
    """Inputs planned for this shard that could not be packed."""
    num_bytes: int
    """Size of the tar."""
    digests: dict[str, str]
    """xxh3_128, in hex, of the tar and of each file beside it, by suffix."""
    max_width: int
    """Widest image in pixels."""
    max_height: int
    """Highest image in pixels."""
    max_bytes: int
    """Largest image in bytes."""
    outcomes: dict[str, int]
    """Packed samples by what was done to them."""
    rejections: dict[str, int]
    """Rejected inputs by reason."""
    jpegs: dict[str, int] = field(default_factory=dict[str, int])
    """Packed samples by kind (shards.images.jpeg, JpegHeader.kind); empty in shards of earlier versions: unknown."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from parsed JSON. Raises KeyError when a field is missing."""
        return cls(**_known(cls, values))

    @property
    def stem(self) -> str:
        """Name without `.tar`."""
        return self.name.removesuffix(".tar")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole set of shards."""

    shards: tuple[ShardEntry, ...]
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
        # Labels of sets with several for an image are beside the tar, all others in it.
        facts = [
            (shard.num_samples, shard.digests.get(".tar"), shard.digests.get(LABEL_SETS_SUFFIX))
            for shard in self.shards
        ]
        return digest(json.dumps([facts, self.class_names]).encode())

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
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}): restore it, or pack again") from error
        if not isinstance(values, dict) or cast("dict[str, Any]", values).get("format") != FORMAT:
            raise ValueError(f"{where} was not written by make-shards: point to a folder that make-shards packed")
        values = cast("dict[str, Any]", values)
        if values.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{where} has version {values.get('version')}, this code reads version {FORMAT_VERSION}: "
                "pack again, or use the moco-fast that wrote it"
            )
        try:
            rest = _known(cls, values)
            rest["shards"] = tuple(ShardEntry.from_dict(entry) for entry in values["shards"])
            rest["class_names"] = tuple(values["class_names"])
            return cls(**rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} lacks {error}: it is damaged; restore it, or pack again") from error

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read the manifest of a folder.

        Raises:
            ValueError: no such folder, no manifest in it (packing has not finished), or another version.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(_explain_absence(Path(folder))) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        return cls.from_json(text, where=str(path))

    def to_json(self) -> str:
        """Return the text of manifest.json: the same set gives the same bytes."""
        values: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        entries = [asdict(shard) for shard in self.shards]
        del values["shards"]
        if not self.has_label_sets:
            del values["has_label_sets"]  # as earlier versions wrote it
        if not self.left_aside:
            del values["left_aside"]
        head = json.dumps(values, indent=1, ensure_ascii=False, sort_keys=False)
        lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
        return f'{head[:-2]},\n "shards": [\n{lines}\n ]\n}}\n'


def describe_jpegs(manifest: Manifest) -> str:
    """Return a line that says what share of a set a GPU's JPEG engines can decode, and what kinds there are."""
    share = manifest.engine_share
    if share is None:
        unknown = f"{manifest.num_unknown_jpegs:,} samples"
        return f"JPEG engines: not known whether they can decode {unknown}; run `make-shards index SHARDS` to find out"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in manifest.jpegs.items())
    return f"JPEG engines can decode {share:.1%} of the samples ({kinds})"


def _known(cls: type[ShardEntry | Manifest], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a class; what earlier versions did not write is empty."""
    later = ("jpegs", "has_label_sets", "left_aside")
    found = {f.name: values[f.name] for f in fields(cls) if f.name not in later}
    return found | {f.name: values[f.name] for f in fields(cls) if f.name in later and f.name in values}


def _explain_absence(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder: give the folder that make-shards wrote"
    if (folder / ".pack").exists():
        return (
            f"{folder} is not finished: run the same `make-shards pack` command again, or `make-shards finish {folder}`"
        )
    inner = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
    if inner:
        return (
            f"{folder} has no {MANIFEST_NAME}, but its folders do: give {' or '.join(str(folder / n) for n in inner)}"
        )
    tars = any(folder.glob("*.tar"))
    way_out = f"`make-shards index {folder}` describes tars that others wrote" if tars else "pack images into it first"
    return f"{folder} has no {MANIFEST_NAME}: {way_out}"


def find_tars(path: str) -> tuple[str, ...]:
    """Return the tars of a local folder that no manifest describes; none where there is a manifest, or no folder."""
    folder = Path(path)
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists():
        return ()
    return tuple(str(tar.absolute()) for tar in sorted(folder.glob("*.tar")))
