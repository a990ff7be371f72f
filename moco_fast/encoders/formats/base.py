"""The contract of a format: whether an encoder is in it, and the encoder."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import nn

from moco_fast.config import IMAGENET_MEAN, IMAGENET_STD, Config, ModelConfig
from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.weights import Weights, listed, read_weights
from moco_fast.methods.base import Method
from shards.ground.digests import running_digest

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "Format",
    "OpenedEncoder",
    "Place",
    "Which",
    "digest_of",
    "opened",
    "refuse_key",
    "structure",
    "without_head",
]

Which = Literal["query", "key"]
"""The trained encoder, or its slow average."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedEncoder:
    """An encoder, and what is known of it."""

    encoder: Encoder
    """On the CPU, in float32 and in eval mode."""
    where: str
    """As it was asked for."""
    name: str
    """What it is, for people."""
    digest: str
    """Of its weights, architecture and normalization: what has the same gives the same features of the same pixels."""
    config: Config | None
    """The run's, if it comes from a run of ours."""
    model: ModelConfig | None
    """What `build_encoder` makes its backbone from; None: a network that only another library builds."""
    method: Method | None
    """Whose head it has; None: it has none."""
    left_out: tuple[str, ...]
    """Names of the tensors that were there and are no part of it, such as a classifier or the other encoder."""
    step: int | None = None
    """Optimizer steps that a run of ours had done."""


@dataclass(frozen=True)
class Place:
    """Where an encoder is to come from; what is there is read when it is looked at."""

    where: str
    """As it was given."""
    library: str | None
    """Of a network that is given by its name there; None: a path."""
    network: str
    """Its name; empty for a path."""
    path: Path | None
    """Folder or file; None: a name alone."""

    @classmethod
    def of(cls, where: str) -> "Place":
        """Tell names (`timm:NAME`, `timm:NAME@FILE`) from paths. Raises ValueError: there is no such path."""
        named = re.fullmatch(r"([a-z]+):([^@/]+)(?:@(.+))?", where)
        library, network, file = named.groups() if named else (None, "", where)
        path = None if file is None else Path(file)
        if path is not None and not path.exists():
            raise ValueError(
                f"{path} does not exist: give a run's folder, a file of weights, a folder of timm's or "
                "transformers', or a name such as timm:resnet50 or torchvision:resnet50"
            )
        # What says which network the weights are of is beside them.
        if path is not None and path.name == "model.safetensors":
            beside = [path.with_name(name) for name in ("state.json", "config.json")]
            path = path.parent if any(each.is_file() for each in beside) else path
        return cls(where, library, network, path)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder by its path."""
        return self.library is None and self.path is not None and self.path.is_dir()

    @property
    def is_file(self) -> bool:
        """Whether it is a file by its path alone."""
        return self.library is None and self.path is not None and self.path.is_file()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return what a folder's config.json says; nothing if there is none."""
        path = self.path / "config.json" if self.is_folder and self.path else None
        if path is None or not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not JSON of an object ({error})") from None

    @cached_property
    def weights(self) -> Weights:
        """Return what the file holds, or the folder's file of weights. Raises ValueError: none, or it is damaged."""
        assert self.path is not None
        if not self.path.is_dir():
            return read_weights(self.path)
        names = ("model.safetensors", "pytorch_model.bin")
        found = next((self.path / name for name in names if (self.path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{self.path} has a config.json but no weights: there is no {' or '.join(names)}")
        return read_weights(found)

    def described(self) -> str:
        """Say what was seen there, for a refusal."""
        if self.is_folder:
            assert self.path is not None
            files = sorted(path.name for path in self.path.iterdir())
            return f"{self.path} holds {listed(files)}" if files else f"{self.path} is empty"
        tensors = self.weights.tensors
        return f"{self.where} holds {len(tensors)} tensors: {listed(tensors)}"


class Format(Protocol):
    """A way in which encoders are kept."""

    def takes(self, place: Place) -> bool:
        """Tell by what is there whether it is of this format. Raises ValueError: it cannot be read."""
        ...

    def open(self, place: Place, which: Which) -> OpenedEncoder:
        """Load the encoder. Raises ValueError: it is not whole, or is not what its names promise."""
        ...


def opened(
    encoder: Encoder,
    where: str,
    name: str,
    *,
    config: Config | None = None,
    model: ModelConfig | None = None,
    method: Method | None = None,
    left_out: tuple[str, ...] = (),
    step: int | None = None,
) -> OpenedEncoder:
    """Return an encoder with its digest."""
    encoder = encoder.float().eval()
    return OpenedEncoder(
        encoder=encoder,
        where=where,
        name=name,
        digest=digest_of(encoder),
        config=config,
        model=model,
        method=method,
        left_out=left_out,
        step=step,
    )


def without_head(
    backbone: nn.Module,
    feature_dim: int,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    size: int = 224,
    crop: float = 0.875,
) -> Encoder:
    """Make an encoder of a backbone that has no projection: what stands in for it changes nothing."""
    (m0, m1, m2), (s0, s1, s2) = mean, std
    return Encoder(
        backbone,
        nn.Identity(),
        feature_dim=feature_dim,
        dim=feature_dim,
        mean=(m0, m1, m2),
        std=(s0, s1, s2),
        image_size=size,
        crop=crop,
    )


def refuse_key(place: Place, which: Which) -> None:
    """Refuse to look for a key encoder where there is one encoder alone. Raises ValueError."""
    if which == "key":
        raise ValueError(f"{place.where} holds one encoder, and no key encoder: leave out which one")


def digest_of(encoder: Encoder) -> str:
    """Digest what decides an encoder's output, in hex."""
    whole = running_digest()
    for name in ("backbone", "head", "predictor"):
        if (part := getattr(encoder, name)) is not None:
            whole.update(json.dumps([name, structure(part)], sort_keys=True).encode())
    tensors = {"pixel_scale": encoder.pixel_scale, "pixel_shift": encoder.pixel_shift} | encoder.state_dict()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        whole.update(cast("ReadableBuffer", values.numpy()))
    return whole.hexdigest()


def structure(network: nn.Module) -> list[object]:
    """Return what a network's tensors do not say, as data: its layers, their numbers of heads, strides and the like."""
    return [
        [name, type(module).__qualname__, {key: _plain(value) for key, value in vars(module).items() if _is_own(key)}]
        for name, module in network.named_modules()
    ]


def _is_own(attribute: str) -> bool:
    return attribute != "training" and not attribute.startswith("_")


def _plain(value: object) -> object:
    """Return numbers, texts and tuples of them; of functions the name, of anything else the type."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return getattr(value, "__qualname__", type(value).__qualname__)
