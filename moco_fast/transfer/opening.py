"""Trained networks opened from their files alone, and used on images.

`described.py` says what their files hold beside the weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional as v2

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import Encoder, build_stemmed, width_of
from moco_fast.transfer.described import HEADER
from moco_fast.transfer.detecting import in_own_pixels
from moco_fast.transfer.loader import held_out
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.pixel_network import PixelNetwork
from moco_fast.transfer.presets import DetectPreset, SegmentPreset
from moco_fast.transfer.sets import as_shown

__all__ = ["FoundObjects", "TrainedNetwork", "load_trained"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundObjects:
    """What a detector found in an image, by falling score."""

    boxes: npt.NDArray[np.float32]
    """(D, 4) left, top, right, bottom in pixels of the image as it is shown."""
    classes: npt.NDArray[np.int64]
    """(D,) numbers of `TrainedNetwork.class_names`."""
    scores: npt.NDArray[np.float32]
    """(D,) 0..1."""
    masks: npt.NDArray[np.bool_] | None = None
    """(D, height, width); None: the detector has none."""
    keypoints: npt.NDArray[np.float32] | None = None
    """(D, K, 3) x, y, and how likely the place is; None: the detector has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedNetwork:
    """A trained detector, or a network that names pixels."""

    network: nn.Module
    """In evaluation mode, on the CPU in float32; a `to` of its own moves it."""
    preset: DetectPreset | SegmentPreset
    class_names: tuple[str, ...]
    keypoint_names: tuple[str, ...] = ()

    @torch.no_grad()
    def detect(self, image: str | Path | Image.Image) -> FoundObjects:
        """Find objects, in the size in which images were tested.

        Args:
            image: or its file; it is turned as its EXIF orientation says.

        Raises:
            ValueError: it is not a detector.
            OSError: the file is not an image.
        """
        if not isinstance(self.preset, DetectPreset):
            raise ValueError("this network names pixels: use `segment`")
        device = next(self.network.parameters()).device
        each = held_out(_shown(image), 0, self.preset)
        assert each.image is not None
        [raw] = self.network([each.image.to(device)])
        found = {name: value.cpu().numpy() for name, value in in_own_pixels(raw, each).items()}
        return FoundObjects(
            boxes=found["boxes"],
            classes=found["labels"] - 1,
            scores=found["scores"],
            masks=found.get("masks"),
            keypoints=found.get("keypoints"),
        )

    @torch.no_grad()
    def segment(self, image: str | Path | Image.Image) -> npt.NDArray[np.int64]:
        """Return the class of each pixel of an image, (height, width). Raises as `detect`."""
        if not isinstance(self.preset, SegmentPreset):
            raise ValueError("this network finds objects: use `detect`")
        device = next(self.network.parameters()).device
        pixels = v2.pil_to_tensor(_shown(image)).to(device)
        return self.network(pixels[None])[0].argmax(0).cpu().numpy()


def _shown(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return as_shown(image)
    with Image.open(image) as opened:
        return as_shown(opened)


def load_trained(path: str | Path, *, encoder: Encoder | None = None) -> TrainedNetwork:
    """Open a network that `moco-fast transfer` trained.

        trained = moco_fast.load_trained("OUT/trained/NAME.safetensors")
        found = trained.detect("photo.jpg")

    Args:
        path: of its file.
        encoder: of the same network, whose weights do not count: needed where only another library builds it.

    Raises:
        ValueError: it is no such file, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
        told = json.loads(header[HEADER])
        preset_type = DetectPreset if told["task"] == "detect" else SegmentPreset
        preset = preset_type(**_as_tuples(told["preset"]))
        names, keypoints, of_encoder = tuple(told["classes"]), tuple(told["keypoints"]), told["encoder"]
        if encoder is None and of_encoder["model"] is None:
            raise ValueError(f"{path} is of a network that another library builds: give an encoder of it as `encoder`")
        encoder = encoder or _frame(of_encoder)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a file of OUT/trained") from None
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a network that `moco-fast transfer` trained ({error!r}): give a file of OUT/trained"
        ) from None
    network = (
        build_detector(encoder, preset, num_classes=len(names), seed=0, num_keypoints=len(keypoints))
        if isinstance(preset, DetectPreset)
        else PixelNetwork(encoder, preset, num_classes=len(names), seed=0)
    )
    try:
        network.load_state_dict(load_file(path))
    except RuntimeError as error:
        first = str(error).partition("\n\t")[2].partition("\n")[0]
        raise ValueError(
            f"{path} has other weights than the network that its header describes ({first}): copy it again, or give "
            "another file of OUT/trained"
        ) from None
    return TrainedNetwork(network=network.eval(), preset=preset, class_names=names, keypoint_names=keypoints)


def _frame(told: dict[str, Any]) -> Encoder:
    """Return an encoder of the network that is told, with weights of no meaning."""
    model = ModelConfig(**_as_tuples(told["model"]))
    with torch.random.fork_rng(devices=[]):
        backbone = build_stemmed(model, image_size=told["image_size"])
    width = width_of(backbone)
    encoder = Encoder(
        backbone,
        nn.Identity(),
        feature_dim=width,
        dim=width,
        image_size=told["image_size"],
        channels=model.channels,
    )
    encoder.pixel_scale.copy_(torch.tensor(told["pixel_scale"]))
    encoder.pixel_shift.copy_(torch.tensor(told["pixel_shift"]))
    return encoder


def _as_tuples(told: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
