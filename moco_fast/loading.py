"""Encoders for who wants nothing but the encoder."""

from pathlib import Path

from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.open import Which, open_encoder

__all__ = ["load_encoder"]


def load_encoder(path: str | Path, *, which: Which = "query", image_size: int | None = None) -> Encoder:
    """Load a trained encoder, whoever trained it: pixels in, features out.

        encoder = moco_fast.load_encoder("runs/first")
        features = encoder.features(images, "backbone")  # images: (B, 3, H, W) uint8

    Args:
        path: folder of a run (its newest checkpoint counts), one of its checkpoints/step-*, what `moco-fast export`
            wrote, a file of the MoCo authors', weights of torchvision or timm, or a name such as `timm:resnet50`:
            docs/encoders.md lists them.
        which: of an encoder that was trained with its slow average, the one or the other.
        image_size: side of the images that it is for, in pixels; unset: as it was trained.

    Returns:
        the encoder on the CPU in float32 and in eval mode. `image_size` and `crop` say what images it was evaluated
        on. One that comes without a head has a stand-in that changes nothing.

    Raises:
        ValueError: there is nothing that can be loaded, or it is damaged.
    """
    return open_encoder(str(path), which=which, image_size=image_size).encoder
