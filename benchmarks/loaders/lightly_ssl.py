"""lightly's transform for MoCo v2, at its own settings but for the size."""

import io

from lightly.transforms import MoCoV2Transform
from PIL import Image

from loaders.base import Opened, Options, open_data_loader


def open_batches(options: Options) -> Opened:
    """Open a DataLoader of its views."""
    transform = MoCoV2Transform(input_size=options.size)
    return open_data_loader(options, lambda encoded: tuple(transform(Image.open(io.BytesIO(encoded)).convert("RGB"))))
