"""Options of packing. Free of numpy and Pillow, so that `--help` costs nothing."""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

__all__ = ["WORK_FOLDER", "Columns", "EncodeConfig", "PackConfig", "SourceOptions"]

WORK_FOLDER = "/tmp"  # noqa: S108 - a default that the user sees and may change
"""Where unfinished work for a bucket is kept on this machine."""

_DEPTH = re.compile(r"auto|full|(\d+)(?:,(.+):(.+))?|(.+):(.+)")
_LABELS = re.compile(r"auto|none|archive|column|folder|path(?::[1-9]\d*)?|json:.+|txt")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of lists and tables; unset: found by their usual names."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What is wanted of sources."""

    columns: Columns = Columns()
    subset: str | None = None
    """Part of a data set that comes in several."""
    image_root: str | None = None
    """Folder or address that the relative paths of lists begin at; None: where the list is."""
    labels: str = "auto"
    """Which labels are wanted, as in PackConfig."""
    members: tuple[str, ...] = ()
    """Extensions of the files that are inputs; empty: images, of which a sample may have one."""
    follow_links: bool = False
    """Whether links that leave a folder, and links to folders, are followed."""
    annotations: bool = False
    """Whether sources are benchmarks with annotations."""

    @property
    def labeled(self) -> bool:
        """Whether labels will be used."""
        return self.labels != "none"


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How an image is encoded."""

    resize: int | None = field(default=None, metadata={"metavar": "PIXELS"})
    """Pixels of the side that --resize-mode names, after shrinking; unset: no image is resized. At 256, photos of
    ImageNet's size take 27% of the bytes and 55% of the processor time for their views, and small crops lose detail
    (docs/packing.md, stored size)."""
    resize_mode: Literal["shorter", "longer", "exact"] = "shorter"
    """`shorter`, `longer`: that side is shrunk to `resize`, never enlarged. `exact`: both sides become `resize`."""
    quality: int = 90
    """JPEG quality of images that are encoded again."""
    progressive: Literal["encode", "transcode"] = "encode"
    """Progressive JPEGs that need no other change: `encode` encodes them again; `transcode` keeps every pixel
    (needs `pip install 'moco-fast[transcode]'`)."""
    depth_range: str = field(default="auto", metadata={"metavar": "auto|full|BITS|LOW:HIGH"})
    """Which values of PNGs and TIFFs with more than 8 bits per channel become black and white. `auto`: the smallest of
    8, 10, 12, 14 and 16 bits, and of floating-point ranges, that holds the values of up to 128 inputs. `full`: 16 bits,
    and 0 to 1. BITS: of integers. LOW:HIGH: of floating-point numbers. BITS,LOW:HIGH: both."""
    min_size: int = 1
    """Images whose shorter side is below this are rejected."""
    max_pixels: int = 100_000_000
    """Images of more pixels are rejected, by their header."""
    max_aspect: float | None = None
    """Images whose longer side is more than this many times the shorter are rejected."""
    mean_rgb: bool = False
    """Store each image's mean color, which only --views.color linear needs. This decodes every image that is copied at
    an eighth of its size and takes 7 times as long, but damage is found that no marker shows."""
    annotations: bool = False
    """Pack benchmarks for `moco-fast transfer`: folders of VOC, COCO or Cityscapes as they are published. Images are
    copied whatever they are, with their annotations beside them in the shards; lists and .json files become files of
    the set."""


@dataclass(frozen=True, kw_only=True)
class PackConfig(EncodeConfig):
    """Which images, and how they are laid out in shards."""

    sources: tuple[str, ...]
    """Folders, tar and zip archives, WebDataset shards, Parquet, Arrow, TFRecord or MDS files, lists (.txt, .csv, .tsv,
    .jsonl); local, or s3:// gs:// az:// http(s):// addresses. Recognized: ImageNet's tars, CIFAR, PASCAL VOC, COCO's
    and iNaturalist's .json."""
    out: str
    """Folder for the shards. Running the same command again continues an unfinished one."""
    labels: str = "auto"
    """`auto`: labels that the source itself carries (a column, WebDataset's .cls, a usual key of .json), else the names
    of folders; what is ambiguous is refused with the choices. `column`: the source's own alone. `folder`: the name of
    the folder that holds an image. `path`: all folders of its path. `path:N`: the Nth of them. `archive`: the name of
    the tar or zip that holds it. `json:KEY`, `txt`: in WebDataset samples, that key of the .json, or the text of the
    .txt. `none`."""
    members: tuple[str, ...] = ()
    """Extensions of the files that are packed, where samples hold several images, such as `jpg` for 0001.jpg beside
    0001.seg.png; `all`: every image; unset: two images in a sample are refused."""
    follow_links: bool = False
    """Pack what links in folders lead to, under the names of the links: also folders, and what is outside of SOURCE.
    Unset: links to files inside of it alone, and those of Hugging Face's cache."""
    image_column: str | None = None
    """Column of lists and tables that holds the image or its path; unset: found by its usual names."""
    label_column: str | None = None
    """Column of lists and tables that holds the label; unset: found by its usual names."""
    image_root: str | None = None
    """Folder that the relative paths in lists and .json files begin at; unset: the folder of the list."""
    subset: str | None = None
    """Which part of a data set that comes in several, such as `train`, `val`, `trainval` or `test`."""
    shuffle: bool = True
    """Shuffle all inputs together before they are cut into shards."""
    seed: int = 0
    """Seed of the shuffle."""
    shard_samples: int | None = field(default=None, metadata={"metavar": "INPUTS"})
    """Inputs per shard; unset: as many as give --shard-bytes, at most 10,000."""
    shard_bytes: int = 512 << 20
    """Approximate size of a shard in bytes; turned into a number of inputs by packing a few of them."""
    max_rejected: float = 0.05
    """Exit with an error, after finishing, if more than this share of the inputs was rejected."""
    val_fraction: float = 0.0
    """Share of the inputs that becomes a held-out set: OUT/train and OUT/val are written. An image's content decides
    where it goes, so it is always in the same set."""
    split: tuple[str, ...] = field(default=(), metadata={"metavar": "NAME=SHARE..."})
    """Several held-out sets, as NAME=SHARE, such as `val=0.01 test=0.01`; OUT/train takes the rest."""
    dedup: bool = False
    """Leave out inputs that have the same bytes as an earlier one (reads everything once before packing)."""
    dry_run: bool = False
    """Write nothing: list the inputs, try a few, and print counts, sizes, time and how fast the result will decode."""
    part: str | None = field(default=None, metadata={"metavar": "I/N"})
    """I/N: write only part I (from 0) of N, for array jobs that share OUT; then `make-shards finish OUT`."""
    work_folder: str = WORK_FOLDER
    """For a target in a bucket: local folder for the plan and for shards that are being written."""
    workers: int | None = None
    """Worker processes; unset: one per CPU that this process may use, or that the Ray cluster has."""
    executor: Literal["local", "ray"] = "local"
    """Who writes the shards: worker processes of this machine, or an existing Ray cluster (listing stays here)."""
    ray_address: str = field(default="auto", metadata={"metavar": "HOST:PORT"})
    """Address of the Ray cluster, HOST:PORT; `auto`: the one of this machine, or of RAY_ADDRESS."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any work starts."""
        if not self.sources:
            raise ValueError("no SOURCE: name at least one folder, archive, table or list of images")
        for name, least in (
            ("shard_samples", 1),
            ("shard_bytes", 1 << 16),
            ("workers", 1),
            ("resize", 1),
            ("max_pixels", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} is too small: use at least {least}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality} must be between 1 and 100 (90 keeps what training can see)")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected {self.max_rejected} must be a share between 0 and 1")
        if _LABELS.fullmatch(self.labels) is None:
            raise ValueError(
                f"--labels {self.labels} must be auto, none, archive, column, folder, path, path:N (from 1 on), "
                "json:KEY or txt"
            )
        if any(not extension.strip(".") for extension in self.members):
            raise ValueError(f"--members {' '.join(self.members)}: give extensions, such as jpg, or all")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"--max-aspect {self.max_aspect} rejects every image: use 1 or more")

        self._check_depth()
        self._check_splits()
        self._check_annotations()
        if self.part is not None:
            number, slash, count = self.part.partition("/")
            if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
                raise ValueError(f"--part {self.part} must be one of 0/N to N-1/N, such as 0/8")
            if self.executor != "local":
                raise ValueError("--part and --executor ray exclude each other: Ray hands out the shards itself")

    def _check_depth(self) -> None:
        match = _DEPTH.fullmatch(self.depth_range)
        try:
            bits, *ends = match.groups() if match is not None else ("",)
            pairs = [(float(low), float(high)) for low, high in (ends[:2], ends[2:]) if low is not None]
            is_sound = all(-math.inf < low < high < math.inf for low, high in pairs)
            is_sound = is_sound and (bits is None or 8 <= int(bits) <= 16)
        except ValueError:
            is_sound = False
        if not is_sound:
            raise ValueError(
                f"--depth-range {self.depth_range} must be auto, full, a number of bits from 8 to 16, LOW:HIGH such as "
                "0:1 for floating-point numbers, or both, such as 12,0:1"
            )

    def _check_annotations(self) -> None:
        if not self.annotations:
            return
        chosen = ("labels", "members", "subset", "image_root", "image_column", "label_column")
        of_content = ("val_fraction", "split", "dedup")
        of_images = (each.name for each in fields(EncodeConfig) if each.name != "annotations")
        defaults = {each.name: each.default for each in fields(self)}
        for name in (*chosen, *of_content, *of_images):
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')} cannot be given with --annotations, which keeps all images of a "
                    "benchmark, as they are, with what belongs to them: leave one of the two out"
                )

    def _check_splits(self) -> None:
        if self.split and self.val_fraction:
            raise ValueError("--val-fraction and --split exclude each other: give val=SHARE to --split")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction} must be a share between 0 and 1, such as 0.01")
        for text in self.split:
            name, _, share = text.partition("=")
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not re.fullmatch(r"0?\.[0-9]+", share):
                raise ValueError(f"--split {text} is not NAME=SHARE: write it as val=0.01")
        names = self.split_names()
        if len(set(names)) < len(names) or sum(share for _, share in self.splits) >= 1:
            raise ValueError(
                f"--split {' '.join(self.split)}: names must differ (train takes the rest), shares must sum to below 1"
            )

    @property
    def splits(self) -> tuple[tuple[str, float], ...]:
        """(name, share) of each held-out set."""
        if self.val_fraction:
            return (("val", self.val_fraction),)
        return tuple((name, float(share)) for name, _, share in (text.partition("=") for text in self.split))

    def split_names(self) -> list[str]:
        """Return the folders below OUT; empty for OUT itself."""
        return ["train", *(name for name, _ in self.splits)] if self.splits else [""]

    def source_options(self) -> SourceOptions:
        """Return what is wanted of sources."""
        return SourceOptions(
            columns=Columns(image=self.image_column, label=self.label_column),
            subset=self.subset,
            image_root=self.image_root,
            labels=self.labels,
            members=tuple(extension.lower().strip(".") for extension in self.members),
            follow_links=self.follow_links,
            annotations=self.annotations,
        )

    def encoding(self) -> EncodeConfig:
        """Return how an image is encoded: the part that workers need."""
        return EncodeConfig(**{f.name: getattr(self, f.name) for f in fields(EncodeConfig)})

    def settings(self) -> dict[str, Any]:
        """Return the options that decide what the shards hold: a resumed or finished set must have the same."""
        values = asdict(self)
        placing = ("out", "work_folder", "part", "workers", "executor", "ray_address")
        for name in (*placing, "max_rejected", "dry_run"):
            del values[name]
        values["sources"] = list(self.sources)
        values["split"] = list(self.split)
        values["members"] = list(self.members)
        if not self.annotations:
            del values["annotations"]  # as earlier versions wrote it
        return values
