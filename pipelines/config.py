"""Settings of data: which shards, how they are read, and which views are made of a sample.

Free of torch, numpy and DALI, so that `--help` costs nothing.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = [
    "VIEWS",
    "Backend",
    "Color",
    "DataConfig",
    "FixedCrop",
    "ViewConfig",
    "ViewSpec",
    "ViewsConfig",
    "central_crop",
    "tars_to_stream",
    "ten_crop",
]

Backend = Literal["dali", "ffcv", "torch"]
"""What decodes and augments."""

Color = Literal["torchvision", "linear"]
"""How colors are changed."""


FREELY = {"may_change": "freely"}
"""Metadata of a field that may change between two starts of a run: what is computed does not depend on it."""
WITH_NOTE = {"may_change": "with a note"}
"""Metadata of a field that may change, and it is said. Without it, --run.allow-changes has to name the field."""
KEPT = {"may_change": "if given"}
"""Metadata of a field that keeps its value where it is unset; another one has to be allowed."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples, in which batches, decoded by what."""

    shards: str = field(metadata=FREELY)
    """Folder that `make-shards` wrote (the one that holds manifest.json), its address in a bucket or on a web server
    (s3, gs, az, http), or a .beton. Several with commas between them are one set."""
    batch_size: int = 256
    """Samples in a global step, over all ranks, however many views each gives."""
    lanes: int | None = field(default=None, metadata=KEPT)
    """Maximum number of ranges of the set that are read side by side; more lanes mix better. A small set has fewer.
    Unset: those that the run began with; first 64, or about as many of which each node reads whole ones."""
    window_shards: int = 4
    """Number of shards of a lane, about, among which samples are shuffled."""
    backend: Literal["auto", Backend] = "auto"
    """What decodes and augments. `dali`: on the GPU where there is one. `torch`: worker processes on the CPU. `ffcv`:
    FFCV's compiled code on the CPU, from a .beton (make-shards beton)."""
    num_threads: int | None = field(default=None, metadata=FREELY)
    """Threads (dali, ffcv) or processes (torch) per rank that decode. Unset: the CPUs that this rank really has, but
    at most 16 threads of dali on a GPU, where each takes 16 MiB on the device and as much pinned memory."""
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata=WITH_NOTE)
    """A damaged sample ends the run, or is replaced by the next good one of the set, counted and logged."""
    read_threads: int | None = field(default=None, metadata=FREELY)
    """`dali`: threads per rank that read shards. Unset: 4."""
    prefetch: int = field(default=2, metadata=FREELY)
    """Batches kept ready ahead of the training step."""
    cache: str | None = field(default=None, metadata=FREELY)
    """Folder on local disk for shards of a bucket, shared by all runs; unset: ~/.cache/moco-fast/shards."""
    cache_gib: float | None = field(default=None, metadata=FREELY)
    """Size of that folder; what was used least recently makes room. Unset: four fifths of what the disk has left."""
    cache_decoded: float | None = field(default=None, metadata=FREELY)
    """`torch`: GiB of decoded pixels to keep on each machine, at most, so that later epochs decode only what did not
    fit; an image takes 3 bytes per pixel."""
    cache_decoded_in: str | None = field(default=None, metadata=FREELY)
    """Folder for them, shared by all processes of the machine: on local disk, or in memory (/dev/shm). Unset:
    ~/.cache/moco-fast/decoded."""
    fetchers: int | None = field(default=None, metadata=FREELY)
    """Shards of a bucket that a rank fetches at once. Unset: 4, and up to 32 where that many are faster."""
    hw_decoder_load: float | None = field(default=None, metadata=FREELY)
    """`dali`: share of the JPEGs that the GPU's own engines decode; CUDA decodes the others. Unset: 0.9 where there are
    several engines (H100), 0.65 where there is one (A100)."""
    stream_samples: int | None = None
    """Samples per epoch, for a folder of tars that have no index: they are streamed as they are (torch backend),
    drawn with replacement, without exact resume or checksums. `make-shards index` gives all of that."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "lanes",
            "window_shards",
            "read_threads",
            "prefetch",
            "num_threads",
            "stream_samples",
            "fetchers",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}: it must be 1 or more")
        for name in ("cache_gib", "cache_decoded"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"data.{name} is {value}: it must lie above 0")
        if self.cache_decoded_in is not None and self.cache_decoded is None:
            raise ValueError(
                f"--data.cache-decoded-in {self.cache_decoded_in} means nothing without --data.cache-decoded GIB: give "
                "both, or leave it out"
            )
        if self.hw_decoder_load is not None and not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"data.hw_decoder_load is {self.hw_decoder_load}: a share lies in 0 .. 1")


def tars_to_stream(data: DataConfig) -> tuple[str, ...]:
    """Return the tars that are streamed as they are; none where an index says what is in them.

    Raises:
        ValueError: `stream_samples` was given, but there are no such tars.
    """
    # Here, for sets load numpy.
    from shards.sets.manifest import find_tars

    tars = find_tars(data.shards)
    if data.stream_samples is not None and not tars:
        raise ValueError(
            f"--data.stream-samples {data.stream_samples} is for tars without an index in one folder on this machine, "
            f"which {data.shards} is not: leave it out (an epoch is all samples of a set; --run.samples says how long "
            "a run is)"
        )
    return tars


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How one view of a sample is drawn. Probabilities in 0..1; jitter strengths as in torchvision's ColorJitter."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    jitter_p: float = 0.8
    """Probability of color jitter."""
    brightness: float = 0.4
    """Brightness factor is drawn from [1 - b, 1 + b]."""
    contrast: float = 0.4
    """Contrast factor is drawn from [1 - c, 1 + c]."""
    saturation: float = 0.4
    """Saturation factor is drawn from [1 - s, 1 + s]."""
    hue: float = 0.1
    """Hue shift is drawn from [-h, h], in turns."""
    grayscale_p: float = 0.2
    """Probability of dropping color."""
    grayscale_first: bool = False
    """Drop color before the jitter (MoCo v1) instead of after it."""
    blur_p: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's sigma in output pixels."""
    solarize_p: float = 0.0
    """Probability of inverting all pixels of value 128 and above."""

    def __post_init__(self) -> None:
        for name in ("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a probability lies in 0 .. 1")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: a strength is 0 or more")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}: a shift lies in 0 .. 0.5 turns")
        for name, least, most in (("crop_scale", 0, 1), ("crop_ratio", 0, float("inf")), ("blur_sigma", 0, 20)):
            low, high = getattr(self, name)
            if not least < low <= high <= most:
                raise ValueError(f"{name} is {low} to {high}: it must rise, lie above {least} and be at most {most}")


@dataclass(frozen=True, kw_only=True)
class FixedCrop:
    """Recipe of a view with nothing random in it: a square at a fixed place, for evaluation."""

    side: float = 0.875
    """Side of the square as a share of the image's shorter side."""
    x: float = 0.5
    """Where it lies between the left (0) and the right border (1)."""
    y: float = 0.5
    """Where it lies between the upper (0) and the lower border (1)."""
    flip: bool = False
    """Mirror left and right."""

    def __post_init__(self) -> None:
        if not 0 < self.side <= 1:
            raise ValueError(f"crop is {self.side}: it must lie above 0 and at most at 1")
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise ValueError(f"the crop's place is ({self.x}, {self.y}): both must lie in 0 .. 1")


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One view as a loader makes it."""

    size: int
    """Height and width in pixels."""
    recipe: ViewConfig | FixedCrop
    """What is done to the image."""
    color: Color = "torchvision"
    """How a ViewConfig's jitter and grayscale are computed (ViewsConfig.color)."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}: a view has at least one pixel a side")

    @property
    def may_blur(self) -> bool:
        """Whether some samples are blurred."""
        return isinstance(self.recipe, ViewConfig) and self.recipe.blur_p > 0


def central_crop(size: int, *, side: float = 0.875) -> tuple[ViewSpec, ...]:
    """Return the view that evaluation looks at: the central square, `side` times the image's shorter side."""
    return (ViewSpec(size=size, recipe=FixedCrop(side=side)),)


def ten_crop(size: int, *, side: float = 0.875) -> tuple[ViewSpec, ...]:
    """Return the ten views whose outputs are averaged: the four corners, the center, and the same mirrored.

    Krizhevsky et al. 2012, section 4.1; in the order of torchvision's TenCrop, but that there the corners of the
    mirrored image are named after the mirroring.
    """
    places = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))
    crops = [FixedCrop(side=side, x=x, y=y, flip=flip) for flip in (False, True) for x, y in places]
    return tuple(ViewSpec(size=size, recipe=crop) for crop in crops)


_SMALL_SIZE, _SMALL = 96, ViewConfig(crop_scale=(0.05, 0.14))


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """The views of a sample: two, and small ones beside them where `num_small` asks for some (multi-crop)."""

    size: int = 224
    """Height and width of the query and the key view in pixels."""
    query: ViewConfig = field(default_factory=ViewConfig)
    """The view that the query encoder sees."""
    key: ViewConfig = field(default_factory=ViewConfig)
    """The view that the key encoder sees."""
    num_small: int = 0
    """Small views beside these two (multi-crop, Caron et al. 2020)."""
    small_size: int = _SMALL_SIZE
    """Height and width of a small view in pixels."""
    small: ViewConfig = _SMALL
    """The small views."""
    color: Color = "torchvision"
    """`torchvision`: jitter and grayscale as torchvision's own operations, one by one on 8-bit values. `linear`: as one
    matrix, made of the mean colors in the index (`make-shards pack --mean-rgb`); 3.2 to 4.1 levels away from
    torchvision's."""

    def __post_init__(self) -> None:
        for name in ("size", "small_size"):
            if getattr(self, name) < 8:
                raise ValueError(f"views.{name} is {getattr(self, name)}: a view has at least 8 pixels a side")
        if self.num_small < 0:
            raise ValueError(f"views.num_small is {self.num_small}: it must be 0 or more")
        if not self.num_small and (self.small_size, self.small) != (_SMALL_SIZE, _SMALL):
            raise ValueError(
                "views.small and views.small_size mean nothing without small views: give --views.num-small, or leave "
                "them out"
            )

    @property
    def specs(self) -> tuple[ViewSpec, ...]:
        """The views in the order of their numbers: the query view, the key view, then the small ones."""
        recipes = [(self.size, self.query), (self.size, self.key)] + [(self.small_size, self.small)] * self.num_small
        return tuple(ViewSpec(size=size, recipe=recipe, color=self.color) for size, recipe in recipes)


def _same(view: ViewConfig, size: int) -> ViewsConfig:
    return ViewsConfig(size=size, query=view, key=view)


def _v3(crop_scale: tuple[float, float]) -> ViewsConfig:
    view = ViewConfig(crop_scale=crop_scale, saturation=0.2, blur_p=1.0)
    return ViewsConfig(size=224, query=view, key=replace(view, blur_p=0.1, solarize_p=0.2))


def _multi_crop() -> ViewsConfig:
    large = ViewConfig(crop_scale=(0.14, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    small = replace(large, crop_scale=(0.05, 0.14))
    return ViewsConfig(size=224, query=large, key=large, num_small=6, small_size=96, small=small)


def _moco_v2_multi_crop() -> ViewsConfig:
    large = ViewConfig(crop_scale=(0.14, 1.0))
    return ViewsConfig(size=224, query=large, key=large, num_small=6)


def _dino() -> ViewsConfig:
    views = _v3((0.4, 1.0))
    return replace(views, num_small=8, small=replace(views.query, crop_scale=(0.05, 0.4), blur_p=0.5))


VIEWS: dict[str, ViewsConfig] = {
    "moco-v1": _same(ViewConfig(jitter_p=1.0, hue=0.4, grayscale_first=True, blur_p=0.0), 224),
    "moco-v2": _same(ViewConfig(), 224),
    "moco-v3": _v3((0.2, 1.0)),
    "moco-v3-vit": _v3((0.08, 1.0)),
    # SwAV's (Caron et al. 2020, appendix A; src/multicropdataset.py and its command lines in facebookresearch/swav).
    "multi-crop": _multi_crop(),
    # MoCo v2's at SwAV's scales (Wang et al. 2022; main_moco.py of facebookresearch/asym-siam).
    "moco-v2-multicrop": _moco_v2_multi_crop(),
    # DINO's (Caron et al. 2021, section 3.2 and the defaults of main_dino.py in facebookresearch/dino).
    "dino": _dino(),
    "cifar10": _same(ViewConfig(crop_scale=(0.08, 1.0), blur_p=0.0), 32),
}
"""The published recipes by name."""
