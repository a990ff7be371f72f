"""Loading of trained encoders, without the rest of a run."""

from pathlib import Path

from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.open import Which, open_encoder

__all__ = ["load_encoder"]


def load_encoder(path: str | Path, *, which: Which = "query", image_size: int | None = None) -> Encoder:
    """Load a trained encoder, ours or another library's, that maps pixels to features.

        encoder = moco_fast.load_encoder("runs/first")
        features = encoder.features(images, "backbone")  # images: (B, 3, H, W) uint8

    Args:
        path: folder of a run (its newest checkpoint is used), one of its checkpoints/step-*, an output of `moco-fast
            export`, a file of the MoCo authors, weights of torchvision or timm, or a name such as `timm:resnet50`:
            docs/encoders.md lists them.
        which: the trained encoder, or its momentum encoder if it has one.
        image_size: side of the images that it will process, in pixels; unset: as it was trained.

    Returns:
        the encoder on the CPU in float32 and in eval mode. `image_size` and `crop` describe the images it was evaluated
        on. An encoder without a head gets an identity in its place.

    Raises:
        ValueError: there is nothing to load, or it is damaged.
    """
    return open_encoder(str(path), which=which, image_size=image_size).encoder
