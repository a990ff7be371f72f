"""The contestants by name, in the order in which they take turns."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from loaders.base import Contestant, Opened, Options

CONTESTANTS: dict[str, Contestant] = {
    "torch": Contestant(opens="ours:open_torch", views="ours, `--data.backend torch`: uint8", ours=True),
    "dali": Contestant(
        opens="ours:open_dali",
        views="ours, `--data.backend dali`: uint8",
        packages=("nvidia-dali-cuda130",),
        ours=True,
    ),
    "ffcv": Contestant(
        opens="ours:open_ffcv",
        views="ours, `--data.backend ffcv`, from a .beton: uint8",
        packages=("ffcv",),
        needs="ffcv",
        install="make setup-ffcv",
        ours=True,
    ),
    "linear": Contestant(
        opens="ours:open_linear",
        views="ours, torch backend with `--views.color linear` (colors not torchvision's): uint8",
        ours=True,
    ),
    "pil": Contestant(
        opens="pillow_authors:open_batches",
        views="the authors' transforms on PIL images, DataLoader: normalized float",
        packages=("pillow", "torchvision"),
    ),
    "lightly": Contestant(
        opens="lightly_ssl:open_batches",
        views="lightly's MoCoV2Transform, DataLoader: normalized float",
        packages=("lightly",),
        needs="lightly",
    ),
    "tv2": Contestant(
        opens="torchvision_v2:open_batches",
        views="torchvision's decoder and v2 transforms on tensors, DataLoader: uint8",
        packages=("torchvision",),
    ),
    "dali-stock": Contestant(
        opens="dali_stock:open_batches",
        views="DALI's own crop, color, blur and flip operators: uint8; hue as a rotation in YIQ",
        packages=("nvidia-dali-cuda130",),
    ),
    "stable-pretraining": Contestant(
        opens="stable_ssl:open_batches",
        views="stable-pretraining's transforms and MultiViewTransform on PIL images, DataLoader: normalized float",
        packages=("stable-pretraining",),
        needs="stable_pretraining",
    ),
    "solo-learn": Contestant(
        opens="solo_ssl:open_batches",
        views="solo-learn's ImagenetTransform, DataLoader: normalized float; bicubic crops",
        packages=("solo-learn",),
        needs="solo",
    ),
    "torchcodec": Contestant(
        opens="torchcodec_v2:open_batches",
        views="torchcodec's decoder, torchvision's v2 transforms, DataLoader: uint8",
        packages=("torchcodec", "torchvision"),
        needs="torchcodec",
    ),
    "kornia": Contestant(
        opens="kornia_cpu:open_batches",
        views="kornia-rs decodes, kornia crops each photo and does the rest on the worker's whole batch: float, 0 to 1",
        packages=("kornia", "kornia-rs"),
        needs="kornia_rs",
    ),
    "spdl": Contestant(
        opens="spdl_threads:open_batches",
        views="SPDL's pipeline of threads in a subprocess and its FFmpeg decoder, then as `pil`: normalized float",
        packages=("spdl", "pillow"),
        needs="spdl.io",
        install="make bench-loaders; it needs FFmpeg's libraries (apt-get install ffmpeg), as its documentation says",
    ),
    "litdata": Contestant(
        opens="litdata_stream:open_batches",
        views="LitData's chunks of the same JPEGs, then as `pil`: normalized float",
        packages=("litdata", "pillow"),
        needs="litdata",
    ),
    "mosaic": Contestant(
        opens="mosaic_stream:open_batches",
        views="mosaic streaming's MDS of the same JPEGs, then as `pil`: normalized float",
        packages=("mosaicml-streaming", "pillow"),
        needs="streaming",
    ),
    "webdataset": Contestant(
        opens="webdataset_stream:open_batches",
        views="webdataset on the shards, then as `pil`: normalized float",
        packages=("webdataset", "pillow"),
        needs="webdataset",
    ),
}


def is_installed(contestant: Contestant) -> bool:
    """Whether what it needs can be imported; nothing is, but the packages above it."""
    try:
        return not contestant.needs or find_spec(contestant.needs) is not None
    except ModuleNotFoundError:
        return False


def open_contestant(name: str, options: Options) -> Opened:
    """Open one in this process."""
    module, function = CONTESTANTS[name].opens.split(":")
    opens: Callable[[Options], Opened] = getattr(import_module(f"loaders.{module}"), function)
    return opens(options)
