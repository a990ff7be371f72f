"""What a user chooses about packing. Free of numpy and Pillow, so that `--help` costs nothing."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["EncodeConfig", "PackConfig"]


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What becomes of an image."""

    resize: int | None = None
    """Pixels of the side that `resize_mode` names, after shrinking; unset: no image is resized."""
    resize_mode: Literal["shorter", "longer", "exact"] = "shorter"
    """`shorter`, `longer`: that side is shrunk to `resize`, never enlarged. `exact`: both sides become `resize`."""
    quality: int = 90
    """JPEG quality of images that are written anew."""
    min_size: int = 1
    """Images whose shorter side is below this are rejected."""
    max_pixels: int = 100_000_000
    """Images of more pixels are rejected, by their header."""
    max_aspect: float | None = None
    """Images whose longer side is more than this many times the shorter are rejected."""
    mean_rgb: bool = True
    """Store each image's mean colour. This decodes every image at an eighth of its size, which also finds damage
    behind a sound header."""


@dataclass(frozen=True, kw_only=True)
class PackConfig(EncodeConfig):
    """Which images, and how they are laid out in shards."""

    sources: tuple[str, ...]
    """Folders of images."""
    out: str
    """Folder for the shards. Running the same command again continues an unfinished one."""
    labels: Literal["auto", "none", "folder"] = "auto"
    """`folder`: an image's label is the name of the folder that holds it. `auto`: so, if there are at least two."""
    shuffle: bool = True
    """Shuffle all inputs together before they are cut into shards."""
    seed: int = 0
    """Seed of the shuffle."""
    shard_samples: int | None = None
    """Inputs a shard; unset: what gives `shard_bytes`, at most 10,000."""
    shard_bytes: int = 512 << 20
    """Size to aim at; turned into a number of inputs by packing a few."""
    max_rejected: float = 0.05
    """Exit with an error when more than this share of the inputs was rejected (after finishing)."""
    workers: int | None = None
    """Worker processes; unset: one for each CPU that this process may use."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any work starts."""
        if not self.sources:
            raise ValueError("no SOURCE: name at least one folder of images")
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
            raise ValueError(
                f"--quality {self.quality} is no JPEG quality: use 1 to 100 (90 keeps what training can see)"
            )
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected {self.max_rejected} is no share: use 0 to 1")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"--max-aspect {self.max_aspect} rejects every image: use 1 or more")

    def settings(self) -> dict[str, Any]:
        """The options that decide what the shards hold: a resumed or finished set must have the same."""
        values = asdict(self)
        for name in ("out", "workers", "max_rejected"):
            del values[name]
        values["sources"] = list(self.sources)
        return values
